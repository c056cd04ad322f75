"""Copies in a lower tier of blocks that tiers above have: the first to make room there, of an exclusive edge.

They are not dropped before that: a block whose lower copy is still there goes down again without a write, and
is not lost if it must go sooner than it could be written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.leader.ground.tiers import Tiers

__all__ = ["SpareCopies"]

_PASSED_OVER: Final = 64
"""Copies that must stay, at most, of those looked at to make room once; they come last the next time."""


class SpareCopies:
    """Knows the spare copies of one tier, those first that have been spare for the longest time.

    Args:
        tiers: The leader's tiers.
        position: Of the tier.
    """

    def __init__(self, tiers: Tiers, position: int) -> None:
        self._tier = tiers[position]
        self._above = [tiers[at] for at in range(position)]
        self._keys: OrderedDict[BlockKey, None] = OrderedDict()
        self._tier.make_room = self._make_room

    def __repr__(self) -> str:
        return f"<SpareCopies {len(self._keys)} in {self._tier.name}>"

    def add(self, keys: Iterable[BlockKey]) -> None:
        """Take in blocks that a tier above has got: what is here of them is spare."""
        there = self._tier.index.ready
        self._keys.update(dict.fromkeys(key for key in keys if key in there))

    def evicted_above(self, keys: Iterable[BlockKey]) -> None:
        """Take in blocks that a tier above has evicted: what is here of them is spare no more."""
        only = [key for key in keys if key in self._keys and not self._is_above(key)]
        for key in only:
            del self._keys[key]
        self._tier.index.touch(only)

    def _make_room(self, nbytes: int) -> None:
        """Drop as many as are in the way of so many bytes, but those in use or kept, or spare no more."""
        index, kept = self._tier.index, list[BlockKey]()
        assert index.capacity_bytes is not None, "only a tier with a bound is exclusive"
        while self._keys and len(kept) < _PASSED_OVER and index.used_bytes + nbytes > index.capacity_bytes:
            key, _ = self._keys.popitem(last=False)
            # What is kept for a request must not go with the room above.
            if index.is_pinned(key) or index.is_kept(key):
                kept.append(key)
            elif key in index and self._is_above(key):
                self._tier.drop(key)
                self._tier.counts.evicted += 1
        self._keys.update(dict.fromkeys(kept))

    def _is_above(self, key: BlockKey) -> bool:
        return any(key in tier.index for tier in self._above)
