"""Which boundaries of a prompt can be restored, asked of tiers and remembered as long as it is true.

For an engine with several KV groups; `kvbm_core.leader.finding.matches` serves those with one.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.groups import KvGroup
from kvbm_core.leader.finding.boundaries import Boundaries, BoundaryFinder, GroupPrefix, Part
from kvbm_core.leader.finding.matches import Finding, scan
from kvbm_core.leader.finding.questions import Questions
from kvbm_core.leader.ground.tiers import Tiers

__all__ = ["GroupMatch", "GroupMatcher"]

_MAX_ASKED: Final = 64
"""Boundaries whose last objects a tier is asked for at once, the longest first."""


@dataclass(slots=True, eq=False)
class GroupMatch(Finding):
    """The boundaries that were found of a prompt, in tokens."""

    boundaries: Boundaries
    arrivals: int
    """Objects that had become READY when it was last true."""

    @property
    def tokens(self) -> list[int]:
        """Tokens of each boundary, the longest first."""
        return self.boundaries.tokens


class _Usable:
    """What the tiers that may be used have."""

    def __init__(self, tiers: Tiers, usable: Sequence[bool]) -> None:
        self._ready = [(at, tier.index.ready) for at, tier in enumerate(tiers) if usable[at]]

    def scan(self, keys: Sequence[BlockKey]) -> list[int]:
        """See `Holdings.scan`."""
        return scan(keys, self._ready)

    def last(self, keys: Sequence[BlockKey]) -> int:
        """See `Holdings.last`."""
        for at in range(len(keys) - 1, -1, -1):
            if self.has(keys[at]):
                return at
        return -1

    def has(self, key: BlockKey) -> bool:
        """Return True if a tier has an object."""
        for _, ready in self._ready:  # noqa: SIM110 - `any` would cost more than the question.
            if key in ready:
                return True
        return False


class GroupMatcher:
    """Finds boundaries, asks the tiers that must be asked, and says whether a finding is still true.

    Args:
        tiers: The leader's tiers.
        groups: Of the engine.
        pending: The numbers of operations that have not ended.
        questions: Asks tiers that cannot list their blocks.
    """

    def __init__(
        self,
        tiers: Tiers,
        groups: Sequence[KvGroup],
        pending: Container[int],
        questions: Questions,
    ) -> None:
        self.finder = BoundaryFinder(groups)
        self._tiers = tiers
        self._pending = pending
        self._questions = questions

    def __repr__(self) -> str:
        return f"<GroupMatcher {len(self.finder.groups)} groups>"

    def find(
        self, prefix: GroupPrefix, start: int, stop: int, now_s: float, last: GroupMatch | None = None
    ) -> GroupMatch:
        """See `Planner.find_boundaries`."""
        if last is not None and self._holds(last, prefix, start, stop, now_s):
            return last
        usable = self._tiers.usable(now_s)
        departures, arrivals = self._tiers.departures.count, self._tiers.arrivals.count
        holdings = _Usable(self._tiers, usable)
        found = self.finder.find(prefix, start, stop, holdings)
        asked = [tier.search for tier in self._tiers if tier.search is not None]
        lookups = self._look_up(found, holdings, prefix, stop, now_s) if asked else frozenset[int]()
        retry_s = min((now_s + search.absent_s for search in asked), default=math.inf)
        return GroupMatch(start, stop, lookups, departures, usable, retry_s, found, arrivals)

    def parts(self, match: GroupMatch, tokens: int) -> list[Part]:
        """List the blocks that one of its boundaries needs, by group."""
        return match.boundaries.parts(tokens, self.finder.groups)

    def _look_up(
        self, found: Boundaries, holdings: _Usable, prefix: GroupPrefix, stop: int, now_s: float
    ) -> frozenset[int]:
        """Ask for what may be there: full groups first, then the last objects of the longest boundaries."""
        asking: set[int] = set()
        for number, full in found.full.items():
            reached = full.first + len(full.tiers)
            rest = prefix.slice(reached, stop // self.finder.groups[number].block_tokens, number)
            if rest:
                asking |= self._questions.ask(rest, now_s, number, prefix.slice(0, 1, number)[0])
        if asking or not self.finder.sparse:
            return frozenset(asking)
        for number in self.finder.sparse:
            if wanted := self._wanted(found, holdings, prefix, number, now_s):
                head = prefix.slice(0, 1, number)[0]
                asking |= self._questions.ask_each(wanted, now_s, number, head)
        return frozenset(asking)

    def _wanted(
        self, found: Boundaries, holdings: _Usable, prefix: GroupPrefix, number: int, now_s: float
    ) -> list[BlockKey]:
        """List what a sparse group's boundaries lack and tiers may have, of the longest boundaries first.

        Of the first boundary all that it needs, of each shorter one only its own blocks: side by side they
        make up what each of them needs. A boundary that needs a block that is nowhere needs no question.
        """
        may_be_there = self._questions.may_be_there(now_s)
        own = self.finder.alignment // self.finder.groups[number].block_tokens
        wanted: dict[BlockKey, None] = {}
        gone = -1
        for tokens in self.finder.candidates(found, _MAX_ASKED):
            needed = self.finder.needed(number, found.start, tokens)
            if gone in needed or len(wanted) >= _MAX_ASKED:
                continue
            asked = needed[-own:] if wanted else needed
            for block, key in zip(
                reversed(asked), reversed(prefix.slice(asked.start, asked.stop, number)), strict=True
            ):
                if holdings.has(key):
                    continue
                if not may_be_there(key):
                    gone = block
                    break
                wanted[key] = None
        return list(wanted)[:_MAX_ASKED]

    def _holds(self, match: GroupMatch, prefix: GroupPrefix, start: int, stop: int, now_s: float) -> bool:
        """Return False if another answer might be found now. Takes the same time for any length."""
        if (known := match.verdict(self._tiers, self._pending, start, stop, now_s)) is not None:
            return known
        departures, arrivals = self._tiers.departures, self._tiers.arrivals
        if departures.any_since(match.departures, prefix) or arrivals.any_since(match.arrivals, prefix):
            return False
        match.departures, match.arrivals = departures.count, arrivals.count
        return True
