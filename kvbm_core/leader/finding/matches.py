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
from kvbm_core.leader.ground.tiers import Tiers

__all__ = ["Finding", "Match", "Matcher", "Prefix", "scan"]


class Prefix(Container[BlockKey], Protocol):
    """The keys of a prompt, in order. Whether a key is among them is answered at once."""

    def __getitem__(self, at: int, /) -> BlockKey: ...

    def slice(self, start: int, stop: int) -> list[BlockKey]:
        """Give the keys of the blocks from `start` to `stop`, exclusive."""


@dataclass(slots=True, eq=False)
class Finding:
    """What was found of a prompt rests on this, beside the objects themselves."""

    start: int
    """First block, or token, asked for."""
    stop: int
    """That after the last asked for."""
    lookups: frozenset[int]
    """Operations that may find more: the finding waits for their answers."""
    departures: int
    """Objects that had ceased to be READY when it was last true."""
    usable: tuple[bool, ...]
    """Tiers that could be used then."""
    retry_s: float
    """When tiers are to be asked again for what is missing."""

    def verdict(
        self, tiers: Tiers, pending: Container[int], start: int, stop: int, now_s: float
    ) -> bool | None:
        """Say whether it holds, as far as the objects do not matter. None: they decide."""
        if (self.start, self.stop) != (start, stop):
            return False
        if self.lookups:
            return any(op in pending for op in self.lookups)
        if now_s >= self.retry_s or tiers.usable(now_s) != self.usable:
            return False
        return None


@dataclass(slots=True, eq=False)
class Match(Finding):
    """What `Planner.match` and `Planner.lookup` said of a prefix, in blocks."""

    tiers: list[int]
    """For each block found, from `start` on, the tier that has it."""


def scan(keys: Sequence[BlockKey], ready: Sequence[tuple[int, Container[BlockKey]]]) -> list[int]:
    """Give for each of the leading keys that tiers have the first tier that has it.

    Args:
        keys: In the order of their prefix.
        ready: Positions of tiers, fastest first, and what each has.
    """
    found: list[int] = []
    for key in keys:
        for position, there in ready:
            if key in there:
                found.append(position)
                break
        else:
            break
    return found


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
        usable = [(at, tier.index.ready) for at, tier in enumerate(self._tiers) if tier.breaker.closed(now_s)]
        return scan(keys, usable)

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
            if tier.search is not None:
                absent_s = tier.search.absent_until_s(rest[0])
                retry_s = min(retry_s, absent_s if absent_s > now_s else now_s + tier.search.absent_s)
        usable = self._tiers.usable(now_s)
        return Match(start, stop, lookups, self._departures.count, usable, retry_s, tiers)

    def holds(self, match: Match, prefix: Prefix, start: int, stop: int, now_s: float) -> bool:
        """Return False if another answer might be found now. Takes the same time for any length."""
        if (known := match.verdict(self._tiers, self._pending, start, stop, now_s)) is not None:
            return known
        missed = match.start + len(match.tiers)
        if missed < match.stop:
            key = prefix[missed]
            for ok, tier in zip(match.usable, self._tiers, strict=True):
                if ok and key in tier.index.ready:
                    return False
        if self._departures.any_since(match.departures, prefix):
            return False
        match.departures = self._departures.count
        return True
