"""What was found of a prompt's prefix, remembered as long as it is true.

An engine asks for each waiting request in every step. To look for each block each time would cost more than
a step of the engine, so a finding is kept together with the facts it rests on.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from kvbm_core.block import BlockKey

__all__ = ["Match", "Prefix"]


class Prefix(Container[BlockKey], Protocol):
    """The keys of a prompt, in order. Whether a key is among them is answered at once."""

    def __getitem__(self, at: int, /) -> BlockKey: ...

    def slice(self, start: int, stop: int) -> list[BlockKey]:
        """Give the keys of the blocks from `start` to `stop`, exclusive."""


@dataclass(slots=True, eq=False)
class Match:
    """A finding: what `Planner.match` and `Planner.lookup` said of a prefix."""

    start: int
    """First block asked for."""
    stop: int
    """Block after the last that was asked for."""
    tiers: list[int]
    """For each block found, from `start` on, the tier that has it."""
    lookups: frozenset[int]
    """Operations that may find more: the finding waits for their answers."""
    departures: int
    """Blocks that had ceased to be READY when it was last true."""
    usable: tuple[bool, ...]
    """Tiers that could be used then."""
    retry_s: float
    """When tiers are to be asked again for what is missing."""
