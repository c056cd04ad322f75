"""A stranger's policies, watched: a mistake of theirs costs hits, never a block or the engine."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

from kvbm_core.admission import AdmissionPolicy
from kvbm_core.block import BlockKey
from kvbm_core.policies import Lru
from kvbm_core.policy import EvictionPolicy, Origin

__all__ = ["GuardedAdmission", "GuardedPolicy"]

logger = logging.getLogger("kvbm_core")

P = TypeVar("P", EvictionPolicy, AdmissionPolicy)

_SHORT_EVICTIONS: Final = 8
"""In a row in which it names too few objects though there are more that may go: too many, unless"""
_OBJECTS_EACH: Final = 32
"""so many objects fall to each. A policy that passes over so many protected ones in each gets past
the longest prompt in time."""


class _Adviser(Generic[P]):
    """A stranger's policy of a tier, until its first mistake.

    Args:
        policy: It.
        tier: The tier's name, for the log.
        owner: The policy's name and distribution, for the log.
        instead: How the tier goes on after a mistake, for the log.
    """

    def __init__(self, policy: P, tier: str, owner: str, instead: str) -> None:
        self._policy: P | None = policy
        self._words = tier, instead, owner

    def __repr__(self) -> str:
        return repr(self._policy)

    def __bool__(self) -> bool:
        return self._policy is not None

    def ask(self, method: str, *values: Any, read: Callable[[Any], Any] | None = None) -> Any:
        """Call a method, and `read` its answer. None if that fails, or if it has made a mistake before."""
        if self._policy is None:
            return None
        try:
            answer = getattr(self._policy, method)(*values)
            return answer if read is None else read(answer)
        except Exception as error:  # noqa: BLE001 - a stranger's code: its mistake must not end the engine.
            self.dismiss(f"{method}() raised {type(error).__name__}", error)
            return None

    def dismiss(self, why: str, error: Exception | None = None) -> None:
        """Go on without it."""
        if self._policy is not None:
            self._policy = None
            logger.error(
                "tier %s goes on %s: policy %s is at fault (%s). Tell its authors, or write another policy "
                "for the tier", *self._words, why, exc_info=error,
            )  # fmt: skip


class GuardedAdmission(AdmissionPolicy):
    """Asks another policy. Once it fails, everything is written.

    Args:
        adviser: The policy.
        tier: The tier's name, for the log.
        owner: The policy's name and distribution, for the log.
    """

    def __init__(self, adviser: AdmissionPolicy, tier: str, owner: str) -> None:
        instead = "without an admission policy, so that everything is written"
        self._adviser = _Adviser(adviser, tier, owner, instead)

    def __repr__(self) -> str:
        return f"<GuardedAdmission {self._adviser!r}>"

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:
        """See `AdmissionPolicy.offered`."""
        self._adviser.ask("offered", keys, origin)

    def admitted(self, keys: Sequence[BlockKey], nbytes: int, origin: Origin, now_s: float) -> int:
        """See `AdmissionPolicy.admitted`."""
        count = self._adviser.ask("admitted", keys, nbytes, origin, now_s, read=int)
        return len(keys) if count is None else max(0, min(len(keys), count))


class GuardedPolicy(Lru):
    """Asks another policy, and checks each answer. Once it fails, the tier goes on without it.

    What it frees too little, the least recently used make up for.

    Args:
        adviser: The policy.
        tier: The tier's name, for the log.
        owner: The policy's name and distribution, for the log.
    """

    def __init__(self, adviser: EvictionPolicy, tier: str, owner: str) -> None:
        super().__init__()
        self._adviser = _Adviser(adviser, tier, owner, "with policy lru")
        self._short_evictions = 0
        self.is_told_all = type(adviser).offered is not EvictionPolicy.offered

    def __repr__(self) -> str:
        return f"<GuardedPolicy {self._adviser!r}>"

    def insert(self, key: BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`."""
        super().insert(key, nbytes)
        self._adviser.ask("insert", key, nbytes)

    def insert_each(self, sizes: Mapping[BlockKey, int]) -> None:
        """See `Fifo.insert_each`."""
        for key, nbytes in sizes.items():
            self.insert(key, nbytes)

    def touch(self, key: BlockKey) -> None:
        """See `EvictionPolicy.touch`."""
        super().touch(key)
        self._adviser.ask("touch", key)

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:
        """See `EvictionPolicy.offered`."""
        if not self.is_told_all:
            super().offered(keys, origin)
            return
        for key in reversed(keys):
            if key in self:
                super().touch(key)
        self._await_tail(keys)
        self._adviser.ask("offered", keys, origin)

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy.remove`."""
        super().remove(key)
        self._adviser.ask("remove", key)

    def next_victims(self, count: int) -> list[BlockKey]:
        """See `EvictionPolicy.next_victims`. What it names wrongly is left out: it is a guess."""
        named = self._adviser.ask("next_victims", count, read=list) or ()
        known = [key for key in named[:count] if isinstance(key, bytes) and key in self]
        return known or list(super().next_victims(count))

    def admits(self, key: BlockKey, nbytes: int) -> bool:
        """See `EvictionPolicy.admits`."""
        return self._adviser.ask("admits", key, nbytes) is not False

    def admitted(self, keys: list[BlockKey], fitting: int, nbytes: int) -> list[BlockKey]:
        """Give the leading keys that fit or that the policy lets in, see `Fifo.admitted`."""
        fitting = max(0, fitting)
        rest = itertools.takewhile(lambda key: self.admits(key, nbytes), keys[fitting:])
        return [*keys[:fitting], *rest]

    def evict(
        self, nbytes: int, protected: Container[BlockKey], pinned: Container[BlockKey] = ()
    ) -> list[BlockKey]:
        """See `EvictionPolicy.evict`; `pinned` are more that must stay."""
        protected = _Either(pinned, protected) if pinned else protected
        if not self._adviser:
            return super().evict(nbytes, protected)
        victims: list[BlockKey] = []
        for key in self._adviser.ask("evict", nbytes, protected, read=list) or ():
            if not isinstance(key, bytes) or key not in self or key in protected or nbytes <= 0:
                self._adviser.dismiss(f"evict() named an object that {self._why_not(key, nbytes)}")
                break
            victims.append(key)
            nbytes -= self[key]
            super().remove(key)
        rest = super().evict(nbytes, protected)
        for key in rest:
            self._adviser.ask("remove", key)
        if rest or nbytes <= 0:  # Else it may be that all are protected.
            self._short_evictions = self._short_evictions + 1 if rest else 0
        if self._short_evictions > max(_SHORT_EVICTIONS - 1, len(self) // _OBJECTS_EACH):
            self._adviser.dismiss(f"evict() has freed too little {self._short_evictions} times in a row")
        return victims + rest

    def _why_not(self, key: Any, nbytes: int) -> str:
        """Say what is wrong with an object that the policy has named."""
        if not isinstance(key, bytes) or key not in self:
            return "the tier has not"
        return "need not go" if nbytes <= 0 else "is protected"


class _Either(Container[BlockKey]):
    """The objects of two containers."""

    def __init__(self, one: Container[BlockKey], other: Container[BlockKey]) -> None:
        self._one = one
        self._other = other

    def __contains__(self, key: object) -> bool:
        return key in self._one or key in self._other
