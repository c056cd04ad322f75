"""What the leader knows of one tier: the state, the pins and the order of its blocks.

    ABSENT ─reserve─► FILLING ─stored─► READY ─doom─► LEAVING
      ▲                  │ not_stored     │ evict        │ released
      └──────────────────┴────────────────┴──────────────┘

READY blocks without a pin stand in the policy's order and can be evicted; with a pin they cannot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from typing import Final

from kvbm_core.block import BlockEvent, BlockKey, BlockState, next_state
from kvbm_core.policy import EvictionPolicy

__all__ = ["Departures", "TierIndex"]

_SPARED_AT_ONCE: Final = 64
"""Protected blocks passed over for one eviction, beside `_SPARED_EACH`; the next goes on behind them."""
_SPARED_EACH: Final = 8


class Departures:
    """The latest blocks that have ceased to be READY, over all tiers.

    A match that was found before remains true as long as none of its blocks is among them.
    """

    max_remembered: Final = 1024

    def __init__(self) -> None:
        self.count = 0
        """All so far."""
        self._latest: deque[BlockKey] = deque(maxlen=self.max_remembered)

    def __repr__(self) -> str:
        return f"<Departures {self.count}>"

    def note(self, keys: Sequence[BlockKey]) -> None:
        """Add blocks."""
        self.count += len(keys)
        self._latest.extend(keys)

    def any_since(self, count: int, family: Container[BlockKey]) -> bool:
        """Return False if no block of a family has departed since `count`. True if one has, or may have."""
        news = self.count - count
        if news > len(self._latest):
            return True
        return any(self._latest[-at] in family for at in range(1, news + 1))


class TierIndex:
    """The blocks of one tier, by key. No I/O, no bytes, no clock.

    A move along an edge that `kvbm_core.block.TRANSITIONS` has not raises `TransitionError`: for `found`,
    `stored`, `not_stored` and `unpin`. `reserve`, `pin` and `drop` choose among the blocks whose state allows
    the move, and return which they are.

    Args:
        capacity_blocks: Blocks it holds at most. None: no limit.
        policy: The order of eviction.
        departures: Where blocks are noted that cease to be READY.
    """

    def __init__(
        self, capacity_blocks: int | None, policy: EvictionPolicy, departures: Departures | None = None
    ) -> None:
        self.capacity_blocks = capacity_blocks
        self._departures = departures or Departures()
        self._idle = policy
        self._pins: dict[BlockKey, int] = {}
        self._filling: set[BlockKey] = set()
        self._leaving: dict[BlockKey, int] = {}

    def __repr__(self) -> str:
        return (
            f"<TierIndex {len(self)}/{self.capacity_blocks} blocks: {len(self._idle)} idle, "
            f"{len(self._pins)} pinned, {len(self._filling)} filling, {len(self._leaving)} leaving>"
        )

    def __len__(self) -> int:
        return len(self._idle) + len(self._pins) + len(self._filling) + len(self._leaving)

    def __contains__(self, key: object) -> bool:
        """Say whether a block is READY."""
        return key in self._idle or key in self._pins

    def state(self, key: BlockKey) -> BlockState:
        """Say where a block stands."""
        if key in self:
            return BlockState.READY
        if key in self._filling:
            return BlockState.FILLING
        return BlockState.LEAVING if key in self._leaving else BlockState.ABSENT

    def found(self, key: BlockKey) -> None:
        """Take in a block that the tier had when it was opened."""
        self._move(key, BlockEvent.RESERVE)
        self._idle.add(key)

    def touch(self, key: BlockKey) -> None:
        """Make a READY block the most recently used."""
        if key in self._idle:
            self._idle.add(key)

    def pin(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """Keep READY blocks from being evicted until `unpin`; return those that are not READY."""
        idle, pins, gone = self._idle, self._pins, []
        for key in keys:
            if key in pins:
                pins[key] += 1
            elif idle.remove(key):
                pins[key] = 1
            else:
                gone.append(key)
        return gone

    def unpin(self, key: BlockKey) -> bool:
        """Take one pin back. True if the block was LEAVING and is gone with it."""
        if key in self._leaving:
            self._leaving[key] -= 1
            if self._leaving[key]:
                return False
            self._move(key, BlockEvent.RELEASED)
            del self._leaving[key]
            return True
        left = self._pins.get(key, 0) - 1
        if left > 0:
            self._pins[key] = left
            return False
        if left < 0:
            self._move(key, BlockEvent.RELEASED)
        del self._pins[key]
        self._idle.add(key)
        return False

    def reserve(
        self, keys: Sequence[BlockKey], protected: Container[BlockKey] = ()
    ) -> tuple[list[BlockKey], list[BlockKey]]:
        """Set room aside for blocks about to be stored, evicting where needed.

        Args:
            keys: In the order of their prefix.
            protected: The blocks of the same prefix, which are not evicted for `keys`: a prefix without
                its head is worth nothing. Asked for each candidate, so it should answer at once.

        Returns:
            The keys that are FILLING now: a leading part of those that were ABSENT; and the keys
            evicted for them.
        """
        # `state`, written out: a lookup asks thousands of times.
        idle, pins, filling, leaving = self._idle, self._pins, self._filling, self._leaving
        wanted = [
            key
            for key in dict.fromkeys(keys)
            if not (key in idle or key in pins or key in filling or key in leaving)
        ]
        evicted: list[BlockKey] = []
        if self.capacity_blocks is not None:
            missing = len(self) + len(wanted) - self.capacity_blocks
            if missing > 0:
                evicted = self._evict(missing, protected)
                wanted = wanted[: max(0, self.capacity_blocks - len(self))]
        self._filling.update(wanted)
        return wanted, evicted

    def _evict(self, count: int, protected: Container[BlockKey]) -> list[BlockKey]:
        """Evict up to `count` blocks, protected ones excepted.

        Protected blocks that stand first in the order go to its end, so that each is met once in a round.
        Where nearly all are protected fewer are evicted than could be, so that the time is bounded.
        """
        idle = self._idle
        victims: list[BlockKey] = []
        spared = _SPARED_AT_ONCE + _SPARED_EACH * count
        for _ in range(len(idle)):
            if len(victims) == count or not spared:
                break
            key = idle.victim()
            assert key is not None, "there are as many as it says"
            if key in protected:
                idle.add(key)
                spared -= 1
            else:
                victims.append(key)
        self._departures.note(victims)
        return victims

    def stored(self, key: BlockKey) -> None:
        """Note that every rank has the block."""
        if key not in self._filling:  # Asked first, because thousands are stored at once.
            self._move(key, BlockEvent.STORED)
        self._filling.remove(key)
        self._idle.add(key)

    def not_stored(self, key: BlockKey) -> None:
        """Note that some rank has the block not."""
        self._move(key, BlockEvent.NOT_STORED)
        self._filling.remove(key)

    def drop(self, key: BlockKey) -> bool:
        """Forget a READY block: at once, or with its last pin. True if at once. Others stay as they are."""
        self._departures.note([key])
        if key in self._pins:
            self._move(key, BlockEvent.DOOM)
            self._leaving[key] = self._pins.pop(key)
            return False
        return self._idle.remove(key)

    def ready(self) -> list[BlockKey]:
        """List the READY blocks, the next victim first, pinned ones last."""
        return [*self._idle.keys(), *self._pins]

    def _move(self, key: BlockKey, event: BlockEvent) -> None:
        """Check that the table has this edge."""
        next_state(self.state(key), event)
