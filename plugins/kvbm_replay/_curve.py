"""Hits by size of a cache that evicts the least recently used: one pass over a trace gives all sizes.

A block is hit by every cache that holds more blocks than were used since it was used last: its distance. A
request uses the first block of its prompt last, so distances grow along a prompt, and a leading run is hit as
far as its distances are small enough. R. Mattson et al., Evaluation techniques for storage hierarchies, IBM
Systems Journal 9(2), 1970.

Of a long trace a part of the blocks, chosen by a hash, gives nearly the same curve at a smaller scale. Blocks
that most requests use, and that happen to be chosen or left out, shift it; by how much is known, and mended.
C. Waldspurger et al., Efficient MRC construction with SHARDS, FAST 2015; Cache modeling and optimization
using miniature simulations, ATC 2017.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Final, Protocol

from kvbm_replay.trace import Request, Trace

__all__ = ["Curve", "Distances", "Points", "curve_of", "sampled"]

_HASH_BITS: Final = 24
_MULTIPLIER: Final = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio: neighbouring numbers come out far apart."""


class Curve(Protocol):
    """Blocks hit, by size."""

    accesses: int
    """Blocks that were asked for, all together."""

    @property
    def most(self) -> float:
        """Blocks hit by a cache without an end."""

    def hits(self, blocks: float) -> float:
        """Give the blocks hit by a cache of so many."""

    def blocks_for(self, hits: float) -> int:
        """Give the smallest cache that hits so many blocks, at most `most`."""


class Points:
    """A curve through points that were measured.

    Args:
        points: Sizes and the blocks hit, in ascending order of both; at least one.
        accesses: As of a `Curve`.
    """

    def __init__(self, points: Sequence[tuple[int, float]], accesses: int) -> None:
        self._points = [(0, 0.0), *points]
        self.accesses = accesses

    def __repr__(self) -> str:
        return f"<Points {self._points}>"

    @property
    def most(self) -> float:
        """See `Curve.most`."""
        return self._points[-1][1]

    def hits(self, blocks: float) -> float:
        """See `Curve.hits`."""
        for (less, few), (more, many) in itertools.pairwise(self._points):
            if blocks <= more:
                return few + (many - few) * (blocks - less) / (more - less)
        return self.most

    def blocks_for(self, hits: float) -> int:
        """See `Curve.blocks_for`."""
        for (less, few), (more, many) in itertools.pairwise(self._points):
            if hits <= many:
                return more if many == few else math.ceil(less + (more - less) * (hits - few) / (many - few))
        return self._points[-1][0]


class Distances:
    """The curve of least recently used.

    Args:
        distances: Of the blocks that were used before, in ascending order.
        weight: Blocks that each stands for.
        accesses: Blocks that were asked for, all together.
        shift: Blocks used within the smallest distance that were not drawn; below 0, too many were.
    """

    def __init__(self, distances: Sequence[int], weight: float, accesses: int, shift: float = 0.0) -> None:
        self._distances = distances
        self._weight = weight
        self._shift = shift
        self.accesses = accesses

    def __repr__(self) -> str:
        return f"<Distances: {len(self._distances)} distances, each of {self._weight:g} blocks>"

    @property
    def most(self) -> float:
        """See `Curve.most`."""
        return max(0.0, len(self._distances) * self._weight + self._shift)

    def hits(self, blocks: float) -> float:
        """See `Curve.hits`."""
        within = bisect.bisect_right(self._distances, blocks / self._weight)
        return max(0.0, within * self._weight + self._shift) if within else 0.0

    def blocks_for(self, hits: float) -> int:
        """See `Curve.blocks_for`."""
        at = min(len(self._distances), max(1, math.ceil((hits - self._shift) / self._weight)))
        return round(self._distances[at - 1] * self._weight) if self._distances else 0


def sampled(trace: Trace, part: float) -> Trace:
    """Give a trace with a part of its blocks, from 0 to 1; what of a prompt fills no block shrinks alike."""
    if part >= 1:
        return trace
    limit = round(part * (1 << _HASH_BITS))
    chosen = {
        block
        for block in {block for each in trace.requests for block in (*each.blocks, *each.answer)}
        if ((block + 1) * _MULTIPLIER & (1 << 64) - 1) >> (64 - _HASH_BITS) < limit
    }

    def of(blocks: Sequence[int]) -> list[int]:
        return [block for block in blocks if block in chosen]

    size = trace.block_tokens

    def tokens(request: Request, blocks: int) -> int:
        return blocks * size + round((request.input_tokens - len(request.blocks) * size) * part)

    requests = [
        Request(
            each.at_s, own := of(each.blocks), tokens(each, len(own)), each.output_tokens, of(each.answer),
            None if each.engine_blocks is None else len(of(each.blocks[: each.engine_blocks])),
            len(of(each.blocks[: each.asked])),
        )
        for each in trace.requests
    ]  # fmt: skip
    return Trace(trace.name, trace.block_tokens, requests, trace.token_bytes, trace.lost)


def curve_of(trace: Trace, part: float = 1.0, engine_blocks: int = 0) -> Distances:
    """Compute the curve of what the engine's own cache has not.

    Args:
        trace: The requests.
        part: Of the blocks that are looked at, above 0, at most 1.
        engine_blocks: That the engine's own cache holds. What it had as recorded is left out, too.
    """
    few = sampled(trace, part)
    lasts = _Order(sum(len(each.blocks) + len(each.answer) for each in few.requests))
    distances: list[int] = []
    for request in few.requests:
        known = request.engine_blocks or 0
        for place, block in enumerate(request.blocks[: request.asked]):
            if (distance := lasts.distance(block)) is None:
                break
            if place >= known and distance > engine_blocks * part:
                distances.append(distance)
        lasts.use(request.blocks + request.answer)
    distances.sort()
    shift = trace.accesses - few.accesses / part if part < 1 else 0.0
    if engine_blocks or any(request.engine_blocks for request in few.requests):
        shift = 0.0  # The engine has what is used so often.
    return Distances(distances, 1 / min(part, 1.0), trace.accesses, shift)


class _Order:
    """Blocks in the order of their last use, and how many stand behind one: a Fenwick tree over time.

    Args:
        uses: That will come, at most.
    """

    def __init__(self, uses: int) -> None:
        self._tree = [0] * (uses + 1)
        self._time = 0
        self._at: dict[int, int] = {}

    def distance(self, block: int) -> int | None:
        """Count the blocks from the latest to this one. None: it was not used before."""
        at = self._at.get(block)
        if at is None:
            return None
        tree, before, at = self._tree, 0, at - 1
        while at:
            before += tree[at]
            at &= at - 1
        return len(self._at) - before

    def use(self, blocks: Sequence[int]) -> None:
        """Note that a request has used these blocks, the first the latest."""
        for block in reversed(blocks):
            if block in self._at:
                self._add(self._at[block], -1)
            self._time += 1
            self._at[block] = self._time
            self._add(self._time, 1)

    def _add(self, at: int, value: int) -> None:
        tree, size = self._tree, len(self._tree)
        while at < size:
            tree[at] += value
            at += at & -at
