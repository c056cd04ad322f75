"""What the leader knows of one tier: the state, the pins and the order of its blocks.

    ABSENT ─reserve─► FILLING ─stored─► READY ─doom─► LEAVING
      ▲                  │ not_stored     │ evict        │ released
      └──────────────────┴────────────────┴──────────────┘

READY blocks without a pin stand in the policy's order and can be evicted; with a pin they cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvbm_core._policy import EvictionPolicy
from kvbm_core.block import BlockEvent, BlockKey, BlockState, next_state

__all__ = ["TierIndex"]


class TierIndex:
    """The blocks of one tier, by key. No I/O, no bytes, no clock."""

    def __init__(self, capacity_blocks: int | None, policy: EvictionPolicy) -> None:
        self.capacity_blocks = capacity_blocks
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

    def pin(self, keys: Iterable[BlockKey]) -> None:
        """Keep READY blocks from being evicted until `unpin`."""
        idle, pins = self._idle, self._pins
        for key in keys:
            if key in pins:
                pins[key] += 1
                continue
            was_idle = idle.remove(key)
            assert was_idle, "only a READY block can be pinned"
            pins[key] = 1

    def unpin(self, key: BlockKey) -> bool:
        """Take one pin back. True if the block was LEAVING and is gone with it."""
        if key in self._leaving:
            self._leaving[key] -= 1
            if self._leaving[key]:
                return False
            self._move(key, BlockEvent.RELEASED)
            del self._leaving[key]
            return True
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
            self._idle.add(key)
        return False

    def reserve(
        self, keys: Sequence[BlockKey], ancestors: Sequence[BlockKey] = ()
    ) -> tuple[list[BlockKey], list[BlockKey]]:
        """Set room aside for blocks about to be stored, evicting where needed.

        Args:
            keys: In the order of their prefix.
            ancestors: The blocks before `keys` in the same prefix. They are not evicted for `keys`:
                a prefix without its head is worth nothing.

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
                evicted = self._evict(missing, ancestors)
                wanted = wanted[: max(0, self.capacity_blocks - len(self))]
        next_state(BlockState.ABSENT, BlockEvent.RESERVE)
        self._filling.update(wanted)
        return wanted, evicted

    def _evict(self, count: int, ancestors: Sequence[BlockKey]) -> list[BlockKey]:
        """Evict up to `count` blocks, ancestors excepted."""
        family = [key for key in dict.fromkeys(reversed(ancestors)) if key in self._idle]
        for key in family:
            self._idle.add(key)
        # They are the last in the order now, the head of the prefix at its very end.
        next_state(BlockState.READY, BlockEvent.EVICT)
        victims = (self._idle.victim() for _ in range(min(count, len(self._idle) - len(family))))
        return [key for key in victims if key is not None]

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
        """Forget a READY block: at once, or with its last pin. True if at once."""
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
