"""What was found of a prompt's prefix, remembered as long as it is true.

An engine asks for each waiting request in every step. To look for each block each time would cost more than
a step of the engine, so a finding is kept together with the facts it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvbm_core.block import BlockKey
from kvbm_core.leader.tier_state import Tiers

__all__ = ["Match", "Matcher", "Prefix"]


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


class Matcher:
    """Finds what tiers have of a prefix, and says whether a finding of before is still true.

    Args:
        tiers: The leader's tiers.
        pending: The numbers of operations that have not ended.
    """

    def __init__(self, tiers: Tiers, pending: Container[int]) -> None:
        self._tiers = tiers
        self._departures = tiers.departures
        self._pending = pending

    def match(self, keys: Sequence[BlockKey], now_s: float) -> list[int]:
        """See `Planner.match`."""
        usable = [(i, t.index) for i, t in enumerate(self._tiers) if t.breaker.closed(now_s)]
        found: list[int] = []
        for key in keys:
            for position, index in usable:
                if key in index:
                    found.append(position)
                    break
            else:
                break
        return found

    def remember(
        self,
        start: int,
        stop: int,
        tiers: list[int],
        lookups: frozenset[int],
        rest: Sequence[BlockKey],
        now_s: float,
    ) -> Match:
        """Keep a finding together with what it rests on; `rest` are the blocks that were not found."""
        retry_s = math.inf
        for tier in self._tiers if rest else ():
            if tier.probe is not None:
                absent_s = tier.probe.absent_until_s(rest[0])
                retry_s = min(retry_s, absent_s if absent_s > now_s else now_s + tier.probe.absent_s)
        return Match(start, stop, tiers, lookups, self._departures.count, self._usable(now_s), retry_s)

    def holds(self, match: Match, prefix: Prefix, start: int, stop: int, now_s: float) -> bool:
        """Return False if another answer might be found now. Takes the same time for any length."""
        if (match.start, match.stop) != (start, stop):
            return False
        if match.lookups:
            return any(op in self._pending for op in match.lookups)
        if now_s >= match.retry_s or self._usable(now_s) != match.usable:
            return False
        missed = match.start + len(match.tiers)
        if missed < match.stop:
            key = prefix[missed]
            if any(ok and key in tier.index for ok, tier in zip(match.usable, self._tiers, strict=True)):
                return False
        if self._departures.any_since(match.departures, prefix):
            return False
        match.departures = self._departures.count
        return True

    def _usable(self, now_s: float) -> tuple[bool, ...]:
        return tuple([tier.breaker.closed(now_s) for tier in self._tiers])
