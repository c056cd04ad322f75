"""Where a prompt's prefix can be restored, for an engine with several KV groups.

    full groups   ├──────────────────────────────┤ scanned from the left: no boundary lies behind
    window        │        ├──────┤      ├───────┤ each sparse group keeps its run from the right
    state         │        •      •              •
    boundaries             │      └ no: the window lacks a block
                           └ yes

A boundary is a number of tokens at which every group has the blocks that its coverage names. Of each
sixteenth of the prefix the last one is kept, so that the list is short and the cost model has a choice.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from kvbm_core.block import BlockKey
from kvbm_core.groups import KvGroup, Rule, alignment

__all__ = ["Boundaries", "BoundaryFinder", "GroupPrefix", "Holdings", "Part"]

_PARTS: Final = 16
"""Boundaries found at most, about."""
_AT_ONCE: Final = 16
"""Keys asked for at first while a run is followed, then twice as many each time: most runs end soon."""


class GroupPrefix(Container[BlockKey], Protocol):
    """The keys of a prompt in each group, in order. Whether a key is among them is answered at once."""

    def slice(self, start: int, stop: int, group: int = 0) -> list[BlockKey]:
        """Give the keys of a group's blocks from `start` to `stop`, exclusive."""


class Holdings(Protocol):
    """Which tier has an object."""

    def scan(self, keys: Sequence[BlockKey]) -> list[int]:
        """Give for each of the leading keys that tiers have the tier that has it."""

    def last(self, keys: Sequence[BlockKey]) -> int:
        """Give the position of the last key that a tier has; -1 for none."""


class Part(NamedTuple):
    """The blocks of one group that a boundary needs and the engine has not."""

    group: int
    first: int
    """The first block. The others follow it."""
    tiers: list[int]
    """For each block the tier that has it."""


@dataclass(slots=True)
class _Full:
    """What tiers have of a group of which all blocks are needed."""

    first: int
    tiers: list[int]


@dataclass(slots=True)
class _Run:
    """The blocks of a sparse group that are there one after the other, up to the boundary that is tried."""

    low: int
    """First block of the run."""
    tiers: list[int] = field(default_factory=list)
    """For each block the tier that has it."""

    def cut(self, end: int) -> None:
        """End it ahead of a block, for a shorter boundary."""
        self.low = min(self.low, end)
        del self.tiers[end - self.low :]


@dataclass(slots=True, eq=False)
class Boundaries:
    """A finding: the boundaries of a prefix, and what each needs."""

    start: int
    """Tokens that the engine has already."""
    reach: int
    """Tokens behind which no boundary lies, because a full group ends there."""
    tokens: list[int] = field(default_factory=list)
    """Of each boundary, the longest first."""
    full: dict[int, _Full] = field(default_factory=dict)
    sparse: dict[int, dict[int, Part]] = field(default_factory=dict)
    """Tokens of a boundary to the parts of the sparse groups."""

    def parts(self, tokens: int, groups: Sequence[KvGroup]) -> list[Part]:
        """List the blocks that a boundary needs, by group."""
        parts = []
        for number, group in enumerate(groups):
            if number in self.full:
                full = self.full[number]
                count = tokens // group.block_tokens - full.first
                parts.append(Part(number, full.first, full.tiers[:count]))
            else:
                parts.append(self.sparse[tokens][number])
        return [part for part in parts if part.tiers]


class BoundaryFinder:
    """Finds boundaries. No I/O, no clock.

    Args:
        groups: Of the engine.
    """

    def __init__(self, groups: Sequence[KvGroup]) -> None:
        self.groups = tuple(groups)
        self.alignment = alignment(groups)
        """Tokens of which each boundary is a multiple."""
        self.full = [at for at, group in enumerate(groups) if group.coverage.rule is Rule.ALL]
        """Numbers of the groups of which all blocks are needed."""
        # The one that needs most is asked first: it rules out most.
        sparse = [at for at in range(len(groups)) if at not in self.full]
        self.sparse = sorted(sparse, key=lambda at: -groups[at].coverage.tokens)
        """Numbers of the others."""

    def find(self, prefix: GroupPrefix, start: int, stop: int, holdings: Holdings) -> Boundaries:
        """Find the boundaries of a prefix.

        Args:
            prefix: The prompt's keys.
            start: Tokens that the engine has already, a multiple of the alignment.
            stop: Tokens behind which no boundary may lie.
            holdings: Say which tier has an object.
        """
        found = self._scan_full(prefix, start, stop, holdings)
        runs = {number: _Run(found.reach // self.groups[number].block_tokens) for number in self.sparse}
        step = max(self.alignment, (found.reach - start) // _PARTS)
        tokens = found.reach
        while tokens > start:
            tokens = self._lower(prefix, start, tokens, runs, holdings)
            if tokens <= start:
                break
            found.tokens.append(tokens)
            found.sparse[tokens] = {
                number: self._part(number, start, tokens, runs[number]) for number in self.sparse
            }
            tokens = self._align(min(tokens - self.alignment, tokens - step))
        return found

    def needed(self, number: int, start: int, tokens: int) -> range:
        """Give the blocks of a group that a boundary needs and the engine has not."""
        return self.groups[number].needed(start, tokens)

    def candidates(self, found: Boundaries, most: int) -> Iterator[int]:
        """List boundaries, the longest first, that would be better than the best that was found."""
        best = found.tokens[0] if found.tokens else found.start
        return iter(range(found.reach, max(best, found.reach - most * self.alignment), -self.alignment))

    def _scan_full(self, prefix: GroupPrefix, start: int, stop: int, holdings: Holdings) -> Boundaries:
        """Scan the full groups from the left."""
        found = Boundaries(start, self._align(stop))
        for number in self.full:
            size = self.groups[number].block_tokens
            full = found.full[number] = _Full(start // size, [])
            full.tiers = holdings.scan(prefix.slice(full.first, found.reach // size, number))
            found.reach = self._align(min(found.reach, (full.first + len(full.tiers)) * size))
        return found

    def _lower(
        self, prefix: GroupPrefix, start: int, tokens: int, runs: dict[int, _Run], holdings: Holdings
    ) -> int:
        """Give the longest boundary of at most so many tokens that every sparse group has."""
        before = -1
        while tokens != before and tokens > start:
            before = tokens
            for number in self.sparse:
                tokens = self._lower_to(prefix, number, start, tokens, runs[number], holdings)
        return tokens

    def _lower_to(
        self, prefix: GroupPrefix, number: int, start: int, tokens: int, run: _Run, holdings: Holdings
    ) -> int:
        """Give the longest boundary of at most so many tokens that one group has."""
        group = self.groups[number]
        while tokens > start:
            if group.coverage.rule is Rule.STATE:
                tokens = self._lower_to_state(prefix, number, start, tokens, holdings)
            run.cut(tokens // group.block_tokens)
            needed = self.needed(number, start, tokens)
            missing = self._extend(prefix, number, needed.start, run, holdings)
            if missing < 0:
                break
            # Every boundary that needs the block is out.
            tokens = self._align(missing * group.block_tokens)
        return max(tokens, start)

    def _lower_to_state(
        self, prefix: GroupPrefix, number: int, start: int, tokens: int, holdings: Holdings
    ) -> int:
        """Give the longest boundary of at most so many tokens with a state; `start` if there is none."""
        size = self.groups[number].block_tokens
        each, count = self.alignment // size, 1
        while tokens > start:
            low = max(start, tokens - count * self.alignment)
            ends = prefix.slice(low // size, tokens // size, number)[each - 1 :: each]
            if (last := holdings.last(ends)) >= 0:
                return low + (last + 1) * self.alignment
            tokens, count = low, count + _AT_ONCE
        return start

    def _extend(self, prefix: GroupPrefix, number: int, first: int, run: _Run, holdings: Holdings) -> int:
        """Let a run begin with an earlier block.

        Returns:
            The first block that is missing between; the run ends there, so that the next boundary to be
            tried is as short as may be, and the blocks behind it are never asked for. -1 for none.
        """
        tiers: list[int] = []
        at, count = first, _AT_ONCE
        while at < run.low:
            keys = prefix.slice(at, min(run.low, at + count), number)
            found = holdings.scan(keys)
            tiers += found
            at += len(found)
            if len(found) < len(keys):
                run.low, run.tiers = first, tiers
                return at
            count *= 2
        if tiers:
            run.low, run.tiers = first, tiers + run.tiers
        return -1

    def _part(self, number: int, start: int, tokens: int, run: _Run) -> Part:
        needed = self.needed(number, start, tokens)
        return Part(number, needed.start, run.tiers[needed.start - run.low :])

    def _align(self, tokens: int) -> int:
        return tokens // self.alignment * self.alignment
