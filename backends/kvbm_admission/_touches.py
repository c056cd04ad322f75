"""Writes what is offered a second time: most blocks never are, and three quarters of all writes are saved."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from kvbm_core import AdmissionPolicy, BlockKey, Origin, PolicyConfig, PolicyContext

__all__ = ["SecondTouch", "SecondTouchConfig", "Touches"]

_ROOMS: Final = 2
"""Blocks that are remembered, in rooms of the tier; of these at least"""
_LEAST: Final = 1 << 12
_MOST: Final = 1 << 20


class Touches:
    """Blocks that were offered once, and those that were offered again, lately.

    Two generations, of which the older is forgotten when the younger is full: what was offered within so many
    others is remembered, and never more than twice as much.

    Args:
        context: Of the tier.
    """

    def __init__(self, context: PolicyContext) -> None:
        room = context.capacity_bytes // context.usual_bytes or _MOST
        self._most = max(_LEAST, min(_MOST, _ROOMS * room))
        self._young: dict[BlockKey, bool] = {}
        self._old: dict[BlockKey, bool] = {}

    def __repr__(self) -> str:
        return f"<Touches of {len(self._young)} and {len(self._old)} blocks>"

    def note(self, keys: Sequence[BlockKey]) -> None:
        """Note that a request has these blocks."""
        young, old = self._young, self._old
        for key in keys:
            young[key] = key in young or key in old
        if len(young) >= self._most:
            self._old, self._young = young, {}

    def again(self, key: BlockKey) -> bool:
        """Return True if two requests had a block, as far as is remembered."""
        found = self._young.get(key)
        return self._old.get(key, False) if found is None else found


class SecondTouchConfig(PolicyConfig, frozen=True):
    """Settings of `SecondTouch`: none."""


class SecondTouch(AdmissionPolicy):
    """The leading blocks that were offered before."""

    def __init__(self, config: SecondTouchConfig, context: PolicyContext) -> None:
        self._touches = Touches(context)

    def __repr__(self) -> str:
        return f"<SecondTouch {self._touches!r}>"

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:
        """See `AdmissionPolicy.offered`."""
        self._touches.note(keys)

    def admitted(self, keys: Sequence[BlockKey], nbytes: int, origin: Origin, now_s: float) -> int:
        """See `AdmissionPolicy.admitted`."""
        return sum(1 for _ in itertools.takewhile(self._touches.again, keys))
