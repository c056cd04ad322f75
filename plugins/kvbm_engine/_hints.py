"""What a client asks of the tiers for one request: read, obeyed as far as that goes, answered and counted.

A hint that is wrong is refused and changes nothing else: the request is computed as without it.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvbm_core import Load, Planner
from kvbm_core.groups import KvGroup
from kvbm_core.leader.tenancy.wishes import NO_WISH, Wish
from kvbm_core.sharing import OTHERS
from kvbm_engine._requests import RequestState
from kvbm_engine._values import Limits
from kvbm_metrics import HINTS, Tally

__all__ = ["Answers", "HintDesk", "refuse_all"]

Answers = dict[str, dict[str, Any]]
"""By hint: ``answer`` is one of ``accepted``, ``clipped`` and ``refused``; the last two have a ``reason``."""

_MAX_HINTS: Final = 8
"""Looked at, of one request. An answer is no longer than that, whatever was asked."""
_LONGEST_NAME: Final = 40
"""Of a hint that nobody knows, in its answer."""
_TENANT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NOT_CACHED: Final = "no KV of this request is stored or loaded, because its tokens do not name it"


@dataclass(slots=True)
class _Hints:
    """Of one request."""

    answers: Answers = field(default_factory=dict)
    keep_s: float = 0.0
    no_store: bool = False
    prefetch_only: bool = False
    tenant: str = ""

    def accept(self, hint: str, **told: object) -> None:
        self.answers[hint] = {"answer": "accepted", **told}

    def clip(self, hint: str, reason: str, **told: object) -> None:
        self.answers[hint] = {"answer": "clipped", "reason": reason, **told}

    def refuse(self, hint: str, reason: str) -> None:
        self.answers[hint] = {"answer": "refused", "reason": reason}


@dataclass(slots=True)
class _Asked:
    """A request with hints that lives."""

    state: RequestState | None
    hints: _Hints
    wish: Wish
    loaded: dict[str, int] = field(default_factory=dict)
    """Blocks, by tier."""


class HintDesk:
    """Takes in the hints of requests, and answers when they end.

    Args:
        groups: The engine's KV groups that are stored.
        planner: Knows tenants, and keeps blocks.
        tally: Counts the answers.
        limits: How much may be kept, and how long.
    """

    def __init__(self, groups: Sequence[KvGroup], planner: Planner, tally: Tally, limits: Limits) -> None:
        self._groups = groups
        self._planner = planner
        self._tally = tally
        self._max_keep_s = limits.max_keep_s
        self._keep_fraction = limits.keep_fraction
        self._asked: dict[str, _Asked] = {}

    def __repr__(self) -> str:
        return f"<HintDesk {len(self._asked)} requests>"

    def begin(
        self, name: str, state: RequestState | None, given: object, max_tokens: int, now_s: float
    ) -> None:
        """Take in what a request that has come asks for.

        Args:
            name: Of the request.
            state: What is known of it. None: its KV is not named by its tokens.
            given: Its hints, as they came.
            max_tokens: That it may compute after its prompt.
            now_s: The time.
        """
        hints = _Hints()
        for hint, value in _items(given, hints):
            _READERS[hint](hints, value)
        if state is None:
            for hint in hints.answers:
                hints.refuse(hint, _NOT_CACHED)
            self._asked[name] = _Asked(None, hints, NO_WISH)
            return
        self._check(hints, max_tokens, now_s)
        wish = Wish(hints.tenant, hints.keep_s) if hints.tenant or hints.keep_s else NO_WISH
        if wish is not NO_WISH:
            state.keys.wish = wish
            self._planner.tenants.begin(wish)
        state.no_store, state.loads_all = hints.no_store, hints.prefetch_only
        self._asked[name] = _Asked(state, hints, wish)

    def loaded(self, load: Load, failed: int) -> None:
        """Note that a load has ended, and how many blocks of it have failed."""
        if asked := self._asked.get(load.request):
            tier = self._planner.tiers[load.tier].name
            asked.loaded[tier] = asked.loaded.get(tier, 0) + len(load.keys) - failed

    def end(self, name: str, now_s: float) -> Answers | None:
        """Answer a request that has ended. None: it had no hints."""
        asked = self._asked.pop(name, None)
        if asked is None:
            return None
        hints, state = asked.hints, asked.state
        if state is not None and hints.keep_s:
            self._keep(hints, asked.wish, state, now_s)
        if hints.prefetch_only:
            hints.accept("prefetch_only", blocks=asked.loaded)
        if asked.wish is not NO_WISH:
            self._planner.tenants.end(asked.wish, now_s)
        for hint, answer in hints.answers.items():
            self._tally.hinted(hint if hint in HINTS else "unknown", answer["answer"])
        return hints.answers

    def _check(self, hints: _Hints, max_tokens: int, now_s: float) -> None:
        """Refuse what cannot be here or now, and clip what is too much."""
        if hints.tenant and (reason := self._planner.tenants.why_not(hints.tenant, now_s)):
            hints.tenant = ""
            hints.refuse("tenant", reason)
        if hints.prefetch_only and max_tokens > 1:
            hints.prefetch_only = False
            hints.refuse("prefetch_only", f"the request may compute {max_tokens} tokens; write max_tokens: 1")
        if not hints.keep_s:
            return
        if hints.no_store or not self._keep_fraction:
            why = "no_store: nothing is stored" if hints.no_store else "this server keeps nothing"
            hints.keep_s = 0.0
            hints.refuse("keep", why)
        elif hints.keep_s > self._max_keep_s:
            hints.keep_s = self._max_keep_s
            hints.clip("keep", f"{self._max_keep_s:g} seconds at most", seconds=self._max_keep_s)

    def _keep(self, hints: _Hints, wish: Wish, state: RequestState, now_s: float) -> None:
        """Keep all that is there of a request that ends, and say how much that is."""
        keys = [
            key
            for at, group in enumerate(self._groups)
            for key in state.keys.slice(0, state.complete_blocks(at, group.block_tokens), at)
        ]
        found = self._planner.tenants.keep(keys, wish, now_s)
        told = hints.answers["keep"]
        told["blocks"] = {tier: kept for tier, (kept, _) in found.items()}
        if any(refused for _, refused in found.values()):
            share = f"{self._keep_fraction:.0%} of a tier and of a quota is kept at most, of one's own blocks"
            told["answer"] = "clipped"
            told["reason"] = f"{told['reason']}; {share}" if "reason" in told else share


def refuse_all(given: object, reason: str) -> Answers:
    """Answer hints where nobody can obey any."""
    hints = _Hints()
    for hint, _ in _items(given, hints):
        hints.refuse(hint, reason)
    return hints.answers


def _items(given: object, hints: _Hints) -> list[tuple[str, object]]:
    """Give the hints that are known; the others are refused."""
    if not isinstance(given, Mapping):
        hints.refuse("hints", f"a {type(given).__name__}; write a mapping like {{keep: 600}}")
        return []
    known = []
    for hint, value in itertools.islice(given.items(), _MAX_HINTS):
        if hint in HINTS:
            known.append((hint, value))
            continue
        near = difflib.get_close_matches(str(hint), HINTS, n=1)
        said = f"did you mean {near[0]}?" if near else f"there are {', '.join(HINTS)}"
        hints.refuse(str(hint)[:_LONGEST_NAME], f"no such hint; {said}")
    return known


def _read_keep(hints: _Hints, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        hints.refuse("keep", f"{_shown(value)}; write seconds above 0")
        return
    hints.keep_s = float(value)
    hints.accept("keep", seconds=hints.keep_s)


def _read_switch(name: str) -> Callable[[_Hints, object], None]:
    def read(hints: _Hints, value: object) -> None:
        if not isinstance(value, bool):
            hints.refuse(name, f"{_shown(value)}; write true or false")
            return
        setattr(hints, name, value)
        hints.accept(name)

    return read


def _read_tenant(hints: _Hints, value: object) -> None:
    if not isinstance(value, str) or not _TENANT.fullmatch(value) or value == OTHERS:
        hints.refuse("tenant", f"{_shown(value)}; write a name of 1 to 64 letters, digits, '.', '_' and '-'")
        return
    hints.tenant = value
    hints.accept("tenant")


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool | int | float):
        return str(value)[:_LONGEST_NAME]
    return repr(value[:_LONGEST_NAME]) if isinstance(value, str) else f"a {type(value).__name__}"


_READERS: Final[Mapping[str, Callable[[_Hints, object], None]]] = {
    "keep": _read_keep,
    "no_store": _read_switch("no_store"),
    "prefetch_only": _read_switch("prefetch_only"),
    "tenant": _read_tenant,
}
