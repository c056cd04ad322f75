"""What any cache is measured against: least recently used, and Belady, who knows the future.

A request's hits are its longest leading run of blocks that are there; then all its blocks are. Room is made
before a block comes in, and never at the cost of the same request's blocks. Of blocks that are equally far,
the end of a prefix goes first. L. A. Belady, A study of replacement algorithms for a virtual-storage
computer, IBM Systems Journal 5(2), 1966.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from kvbm_replay._engine_cache import EngineCache
from kvbm_replay.trace import Request

__all__ = ["belady_hits", "lru_hits", "reuse_hits"]


def lru_hits(requests: Sequence[Request], capacity: int) -> int:
    """Count the blocks that one cache of so many blocks hits."""
    cache, hits = EngineCache(capacity), 0
    for request in requests:
        hits += cache.match(request.blocks[: request.asked])
        cache.use(request.blocks + request.answer)
    return hits


def reuse_hits(requests: Sequence[Request]) -> int:
    """Count the blocks that a cache without an end hits."""
    return lru_hits(requests, sum(len(request.blocks) + len(request.answer) for request in requests))


def belady_hits(requests: Sequence[Request], capacity: int) -> int:
    """Count the blocks that one cache of so many blocks hits that keeps what is used next soonest."""
    cache, hits = _Belady(requests, capacity), 0
    for at, request in enumerate(requests):
        hits += cache.match(request.blocks[: request.asked])
        cache.use(at, request.blocks + request.answer)
    return hits


class _Belady:
    """A cache that knows when each block is used next. It takes in nothing that is not used again."""

    def __init__(self, requests: Sequence[Request], capacity: int) -> None:
        self._capacity = capacity
        self._never = len(requests)
        self._next: list[list[int]] = []
        """For each request, the request that uses each of its blocks next."""
        after: dict[int, int] = {}
        for at in range(len(requests) - 1, -1, -1):
            blocks = requests[at].blocks + requests[at].answer
            self._next.append([after.get(block, self._never) for block in blocks])
            after.update(dict.fromkeys(blocks, at))
        self._next.reverse()
        self._there: dict[int, tuple[int, int]] = {}
        self._order: list[tuple[int, int, int]] = []
        """A heap of what is there, and of what was: next use and place, the furthest first, and the block."""

    def match(self, blocks: Sequence[int]) -> int:
        there = self._there
        return next((at for at, block in enumerate(blocks) if block not in there), len(blocks))

    def use(self, at: int, blocks: Sequence[int]) -> None:
        own = set(blocks)
        for place, (block, follows) in enumerate(zip(blocks, self._next[at], strict=True)):
            if block not in self._there and not self._has_room(follows, own):
                continue
            rank = (-follows, -place)
            self._there[block] = rank
            heapq.heappush(self._order, (*rank, block))

    def _has_room(self, follows: int, own: set[int]) -> bool:
        """Make room for a block that is used next at `follows`, if what would have to go is used later."""
        if follows == self._never:
            return False
        if len(self._there) < self._capacity:
            return True
        order, spared, has_room = self._order, [], False
        while order:
            entry = heapq.heappop(order)
            far, place, block = entry
            if self._there.get(block) != (far, place):
                continue  # It has been used since.
            if block in own:
                spared.append(entry)
                continue
            if -far > follows:
                del self._there[block]
                has_room = True
            else:
                spared.append(entry)
            break
        for entry in spared:
            heapq.heappush(order, entry)
        return has_room
