"""A stranger's policy, watched: a mistake of it costs hits, never a block or the engine."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any, Final

from kvbm_core.block import BlockKey
from kvbm_core.policies import Lru
from kvbm_core.policy import EvictionPolicy, Origin

__all__ = ["GuardedPolicy"]

logger = logging.getLogger("kvbm_core")

_SHORT_EVICTIONS: Final = 8
"""In a row in which it names too few objects though there are more that may go: too many, unless"""
_OBJECTS_EACH: Final = 32
"""so many objects fall to each. A policy that passes over so many protected ones in each gets past
the longest prompt in time."""


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
        self._adviser: EvictionPolicy | None = adviser
        self._tier = tier
        self._owner = owner
        self._short_evictions = 0
        self.is_told_all = type(adviser).offered is not EvictionPolicy.offered

    def __repr__(self) -> str:
        return f"<GuardedPolicy {self._adviser!r}>"

    def insert(self, key: BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`."""
        super().insert(key, nbytes)
        self._ask("insert", lambda adviser: adviser.insert(key, nbytes))

    def touch(self, key: BlockKey) -> None:
        """See `EvictionPolicy.touch`."""
        super().touch(key)
        self._ask("touch", lambda adviser: adviser.touch(key))

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:
        """See `EvictionPolicy.offered`."""
        if not self.is_told_all:
            super().offered(keys, origin)
            return
        for key in reversed(keys):
            if key in self:
                super().touch(key)
        self._await_tail(keys)
        self._ask("offered", lambda adviser: adviser.offered(keys, origin))

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy.remove`."""
        super().remove(key)
        self._ask("remove", lambda adviser: adviser.remove(key))

    def next_victims(self, count: int) -> list[BlockKey]:
        """See `EvictionPolicy.next_victims`. What it names wrongly is left out: it is a guess."""
        named = self._ask("next_victims", lambda adviser: list(adviser.next_victims(count))) or ()
        known = [key for key in named[:count] if isinstance(key, bytes) and key in self]
        return known or list(super().next_victims(count))

    def admits(self, key: BlockKey, nbytes: int) -> bool:
        """See `EvictionPolicy.admits`."""
        return self._ask("admits", lambda adviser: adviser.admits(key, nbytes)) is not False

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
        if self._adviser is None:
            return super().evict(nbytes, protected)
        victims: list[BlockKey] = []
        for key in self._ask("evict", partial(_evict, nbytes=nbytes, protected=protected)) or ():
            if not isinstance(key, bytes) or key not in self or key in protected or nbytes <= 0:
                self._dismiss(f"evict() named an object that {self._why_not(key, nbytes)}")
                break
            victims.append(key)
            nbytes -= self[key]
            super().remove(key)
        rest = super().evict(nbytes, protected)
        for key in rest:
            self._ask("remove", partial(_remove, key=key))
        if rest or nbytes <= 0:  # Else it may be that all are protected.
            self._short_evictions = self._short_evictions + 1 if rest else 0
        if self._short_evictions > max(_SHORT_EVICTIONS - 1, len(self) // _OBJECTS_EACH):
            self._dismiss(f"evict() has freed too little {self._short_evictions} times in a row")
        return victims + rest

    def _why_not(self, key: Any, nbytes: int) -> str:
        """Say what is wrong with an object that the policy has named."""
        if not isinstance(key, bytes) or key not in self:
            return "the tier has not"
        return "need not go" if nbytes <= 0 else "is protected"

    def _ask(self, method: str, call: Callable[[EvictionPolicy], Any]) -> Any:
        if self._adviser is None:
            return None
        try:
            return call(self._adviser)
        except Exception as error:  # noqa: BLE001 - a stranger's code: its mistake must not end the engine.
            self._dismiss(f"{method}() raised {type(error).__name__}", error)
            return None

    def _dismiss(self, why: str, error: Exception | None = None) -> None:
        if self._adviser is None:
            return
        self._adviser = None
        logger.error(
            "tier %s goes on with policy lru: policy %s is at fault (%s). Tell its authors, or write another "
            "policy for the tier", self._tier, self._owner, why, exc_info=error,
        )  # fmt: skip


class _Either(Container[BlockKey]):
    """The objects of two containers."""

    def __init__(self, one: Container[BlockKey], other: Container[BlockKey]) -> None:
        self._one = one
        self._other = other

    def __contains__(self, key: object) -> bool:
        return key in self._one or key in self._other


def _evict(adviser: EvictionPolicy, nbytes: int, protected: Container[BlockKey]) -> list[BlockKey]:
    return list(adviser.evict(nbytes, protected))


def _remove(adviser: EvictionPolicy, key: BlockKey) -> None:
    adviser.remove(key)
