"""How a prompt is looked for in the tiers: its longest prefix, or the boundaries of several KV groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from kvbm_core import Match, Planner
from kvbm_core.groups import KvGroup
from kvbm_core.leader.finding.boundaries import Part
from kvbm_core.leader.finding.group_matches import GroupMatch
from kvbm_engine._requests import RequestState

__all__ = ["BoundarySearch", "Counted", "PrefixSearch", "Search", "make_search"]


class Counted(NamedTuple):
    """What metrics are told of a finding."""

    asked_tokens: int
    asked_blocks: int
    """That the whole prompt needs, of all KV groups."""
    tiers: list[int]
    """For each of them that was found the tier that has it."""
    declined: list[int]
    """Tiers of blocks that were found, and are computed because that is faster."""


class Search(ABC):
    """Finds what can be loaded of a prompt, and chooses how much of that is worth it."""

    @abstractmethod
    def find(self, state: RequestState, start: int, stop: int, now_s: float) -> Match | GroupMatch:
        """Find what tiers have of tokens `start` to `stop`. A finding of before is given back while true."""

    @abstractmethod
    def weigh(self, state: RequestState, now_s: float) -> tuple[int, list[Part]]:
        """Choose how many tokens of a request's finding are loaded; with them the blocks, by group."""

    @abstractmethod
    def count(self, state: RequestState) -> Counted:
        """Say what was found, for metrics."""


class PrefixSearch(Search):
    """For one KV group of which a prefix needs all blocks.

    Args:
        planner: Knows where blocks are.
        block_tokens: Tokens a block.
    """

    def __init__(self, planner: Planner, block_tokens: int) -> None:
        self._planner = planner
        self._size = block_tokens

    def find(self, state: RequestState, start: int, stop: int, now_s: float) -> Match:
        """See `Planner.find`."""
        last = state.finding.match
        assert not isinstance(last, GroupMatch)
        return self._planner.find(state.keys, start // self._size, stop // self._size, now_s, last)

    def weigh(self, state: RequestState, now_s: float) -> tuple[int, list[Part]]:
        """Choose the leading blocks that load faster than the engine computes them."""
        match, finding = state.finding.match, state.finding
        assert isinstance(match, Match)
        last = finding.judged
        if isinstance(last, Match) and (last.start, last.tiers) == (match.start, match.tiers):
            return finding.worth_tokens, finding.parts
        blocks = len(match.tiers)
        if not state.loads_all:
            blocks = self._planner.cost_model.blocks_to_load(match.tiers, now_s)
        parts = [Part(0, match.start, match.tiers[:blocks])] if blocks else []
        return blocks * self._size, parts

    def count(self, state: RequestState) -> Counted:
        """Count blocks of the prefix."""
        match = state.finding.match
        assert isinstance(match, Match)
        asked = match.stop - match.start
        declined = match.tiers[state.finding.worth_tokens // self._size :]
        return Counted(asked * self._size, asked, match.tiers, declined)


class BoundarySearch(Search):
    """For several KV groups, or one of which a prefix does not need all blocks.

    Args:
        planner: Knows where blocks are.
        groups: Of the engine.
    """

    def __init__(self, planner: Planner, groups: Sequence[KvGroup]) -> None:
        self._planner = planner
        self._groups = groups

    def find(self, state: RequestState, start: int, stop: int, now_s: float) -> GroupMatch:
        """See `Planner.find_boundaries`."""
        last = state.finding.match
        assert not isinstance(last, Match)
        return self._planner.find_boundaries(state.keys, start, stop, now_s, last)

    def weigh(self, state: RequestState, now_s: float) -> tuple[int, list[Part]]:
        """Choose the boundary that saves the most time."""
        match = state.finding.match
        assert isinstance(match, GroupMatch)
        if state.loads_all and match.tokens:
            tokens, parts = match.tokens[0], match.boundaries.parts(match.tokens[0], self._groups)
        else:
            tokens, parts = self._planner.choose_boundary(match, now_s)
        # Where no group needs a block, there is nothing whose arrival the engine could be told of.
        return (tokens - match.start, parts) if parts else (0, [])

    def count(self, state: RequestState) -> Counted:
        """Count the blocks of the longest boundary, and those that the whole prompt would need."""
        match, finding = state.finding.match, state.finding
        assert isinstance(match, GroupMatch)
        longest = match.boundaries.parts(match.tokens[0], self._groups) if match.tokens else []
        found = [tier for part in longest for tier in part.tiers]
        worth = Counter(tier for part in finding.parts for tier in part.tiers)
        needed = sum(len(group.needed(match.start, match.stop)) for group in self._groups)
        declined = list((Counter(found) - worth).elements())
        return Counted(match.stop - match.start, max(needed, len(found)), found, declined)


def make_search(planner: Planner, groups: Sequence[KvGroup], *, is_plain: bool) -> Search:
    """Make the search that an engine's KV groups need."""
    return PrefixSearch(planner, groups[0].block_tokens) if is_plain else BoundarySearch(planner, groups)
