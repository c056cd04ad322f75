"""The others that a rank divides its tiers with: ranks that hold the same bytes, and other engines."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Peers"]


@dataclass(frozen=True, slots=True)
class Peers:
    """Who is beside a rank.

    Two engines of two ranks each, and the ranks of an engine hold the same bytes:

        engine          0          1
        rank          0   1      0   1
        shared tier   0 of 1     0 of 1     all meet in one place; the first rank of an engine writes
        other tiers   0   1      2   3      of 4: each has a place of its own, and its part of the capacity
    """

    replicas: int = 1
    """Neighbouring ranks of an engine that hold the same bytes; divides its `world_size`."""
    engine: int = 0
    """Which of the engines it is."""
    engines: int = 1
    """Engines that one capacity is for. All have as many ranks."""

    def seat(self, rank: int, world_size: int, *, shared: bool) -> tuple[int, int, bool]:
        """Give what a tier is told of a rank.

        Args:
            rank: Within its engine.
            world_size: Ranks of its engine.
            shared: Whether the tier is.

        Returns:
            The rank, how many there are, and True if another one writes the same bytes to the tier.
        """
        if not shared:
            return self.engine * world_size + rank, self.engines * world_size, False
        shard, place = divmod(rank, self.replicas)
        return shard, world_size // self.replicas, place > 0
