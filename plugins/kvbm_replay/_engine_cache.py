"""The engine's own prefix cache, in front of the tiers: least recently used, the end of a prefix first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

__all__ = ["EngineCache"]


class EngineCache:
    """Blocks in the engine's memory.

    Args:
        capacity: Blocks that it holds; 0 for an engine without one.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: dict[int, None] = {}
        """The least recently used first."""

    def __repr__(self) -> str:
        return f"<EngineCache {len(self._blocks)}/{self.capacity} blocks>"

    def match(self, blocks: Sequence[int]) -> int:
        """Count the leading blocks that are there."""
        known = self._blocks
        return next((at for at, block in enumerate(blocks) if block not in known), len(blocks))

    def use(self, blocks: Sequence[int]) -> None:
        """Note that a request had these blocks: they are there now, the first the most recently used."""
        known = self._blocks
        for block in reversed(blocks[: self.capacity]):
            known.pop(block, None)
            known[block] = None
        for block in list(itertools.islice(known, max(0, len(known) - self.capacity))):
            del known[block]
