"""Blocks of requests that wait are brought into the host pool, before the engine has room for the requests.

    arrived ─► found in the tiers ─► read, a chunk at a time ─► admitted, finished or aborted: no more of it

Nobody waits for such a read, so it comes after whatever a request waits for. It takes free room of the host
pool, and what its policy would give up first: blocks of waiting requests that are there already are touched,
so that they are not among them. A request that wants nothing else (`prefetch_only`) waits for all of it in
the engine's queue, where it holds nothing, and not beside others' loads in the engine's memory.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from kvbm_core import BlockKey, BlockState, Match, Planner
from kvbm_core.leader.finding.boundaries import Part
from kvbm_core.leader.finding.group_matches import GroupMatch
from kvbm_engine._ledger import Ledger
from kvbm_engine._requests import RequestState
from kvbm_engine._values import Limits

__all__ = ["Prefetch"]

_MAX_BLOCKS: Final = 512
"""On their way at once, of all requests."""
_MAX_BYTES: Final = 256 << 20
"""Likewise, on each rank."""
_CHUNK_BLOCKS: Final = 32
"""Read together: a request that is aborted costs no more than what is on its way."""
_MAX_LOOKED_AT: Final = 8
"""Requests looked at in one step: a prompt's keys are made the first time."""


@dataclass(slots=True, eq=False)
class _Chunk:
    """Blocks of one KV group that are read from one tier."""

    source: int
    group: int
    keys: list[BlockKey]
    nbytes: int = 0
    """Of the host pool. 0: somebody else brings them."""
    began_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that has no blocks of the engine yet."""

    state: RequestState
    match: Match | GroupMatch | None = None
    todo: deque[_Chunk] | None = None
    """None: it has not been found in the tiers yet."""
    reading: list[_Chunk] = field(default_factory=list)
    nbytes: int = 0
    """Of the host pool, brought for it."""
    patient_until_s: float = 0.0
    """It waits so long for all that is to be read, also for what has not begun."""
    paused_step: int = -1
    """The step in which the engine had turned to it, and was told to wait for what is on its way."""


class Prefetch:
    """Reads ahead for requests that wait.

    Args:
        ledger: Knows the requests and steps.
        planner: Knows where blocks are.
        limits: How much is brought, and how long it is waited for.
    """

    def __init__(self, ledger: Ledger, planner: Planner, limits: Limits) -> None:
        self._ledger = ledger
        self._planner = planner
        self._patience_s = limits.patience_s
        self._pool = planner.host_pool
        room = planner.tiers[self._pool].capacity_bytes if self._pool >= 0 else None
        has_lower = 0 <= self._pool < len(planner.tiers) - 1
        self._max_held_bytes = int(limits.prefetch_fraction * room) if has_lower and room else 0
        self._chunk_blocks = 0
        if self._max_held_bytes:
            largest = max(planner.tiers[self._pool].charges)
            self._chunk_blocks = min(_CHUNK_BLOCKS, self._max_held_bytes // largest)
        self._waiting: dict[str, _Waiting] = {}
        self._queue: dict[str, _Waiting] = {}
        """Those for which something may be left to read, in the order in which they came."""
        self.delayed: dict[str, _Waiting] = {}
        """Those for which something may be on its way, see `delays`."""
        self._reading: list[_Chunk] = []
        self._held_bytes = 0

    def __repr__(self) -> str:
        return f"<Prefetch {len(self._queue)} of {len(self._waiting)} waiting, {len(self._reading)} chunks>"

    def arrived(self, state: RequestState | None, name: str, now_s: float) -> None:
        """Note that a request waits."""
        if state is None or name in self._waiting:
            return
        waiting = self._waiting[name] = self._queue[name] = _Waiting(state)
        if state.loads_all:
            waiting.patient_until_s = now_s + self._patience_s
            self.delayed[name] = waiting

    @property
    def is_used(self) -> bool:
        """True if there is anything to read from, and room to bring it to."""
        return self._chunk_blocks > 0

    def gone(self, name: str) -> None:
        """Note that a request has blocks of the engine now, or is gone: nothing more is read for it."""
        if (waiting := self._waiting.pop(name, None)) is not None:
            self._queue.pop(name, None)
            self.delayed.pop(name, None)
            self._held_bytes -= waiting.nbytes

    def delays(self, name: str, now_s: float) -> bool:
        """Return True if a request that the engine turns to shall wait for what is on its way."""
        waiting = self.delayed.get(name)
        if waiting is None:
            return False
        patience_s = self._patience_s
        waiting.reading = [
            chunk
            for chunk in waiting.reading
            if now_s - chunk.began_s < patience_s and self._is_under_way(chunk)
        ]
        if name in self._queue and now_s < waiting.patient_until_s:
            return True
        if not waiting.reading:
            del self.delayed[name]
            return False
        waiting.paused_step = self._ledger.steps.number
        return True

    def step(self, now_s: float) -> None:
        """Plan what is read next. Called when the engine has chosen whom it gives blocks in a step."""
        if self._reading:
            self._reading = [chunk for chunk in self._reading if self._is_under_way(chunk)]
        if not self._queue:
            return
        for name, waiting in list(itertools.islice(self._queue.items(), _MAX_LOOKED_AT)):
            if waiting.paused_step == self._ledger.steps.number:
                continue
            if waiting.todo is None and not self._find(waiting, now_s):
                continue
            goes_on = self._read(waiting, now_s)
            if waiting.reading:
                self.delayed[name] = waiting
            if not goes_on:
                return
            if not waiting.todo:
                del self._queue[name]

    def reset(self) -> None:
        """Forget what was found: it is true no more."""
        for name, waiting in self._waiting.items():
            self._waiting[name] = self._queue[name] = _Waiting(waiting.state)
        self.delayed.clear()
        self._held_bytes = 0

    def _find(self, waiting: _Waiting, now_s: float) -> bool:
        """Find what tiers have of a request, and list what is to be read. False: an answer is to come."""
        state, ledger = waiting.state, self._ledger
        finding = state.finding
        stop = (state.request.num_tokens - 1) // ledger.alignment * ledger.alignment
        if finding.matched_step == ledger.steps.number and finding.match is not None:
            waiting.match = finding.match  # The engine has just asked, and knows what it has itself.
        elif stop <= 0 or not state.may_load:
            waiting.todo = deque()
            return True
        elif ledger.is_plain:
            assert not isinstance(waiting.match, GroupMatch)
            blocks = stop // ledger.alignment
            waiting.match = self._planner.find(state.keys, 0, blocks, now_s, waiting.match)
        else:
            assert not isinstance(waiting.match, Match)
            waiting.match = self._planner.find_boundaries(state.keys, 0, stop, now_s, waiting.match)
        if waiting.match.lookups:
            return False
        waiting.todo = deque(
            chunk for part in self._parts(waiting.match) for chunk in self._chunks(state, part)
        )
        return True

    def _parts(self, match: Match | GroupMatch) -> list[Part]:
        if isinstance(match, Match):
            return [Part(0, match.start, match.tiers)]
        return match.boundaries.parts(match.tokens[0], self._ledger.groups) if match.tokens else []

    def _chunks(self, state: RequestState, part: Part) -> list[_Chunk]:
        """List what is to be read of one KV group; what the host pool has of it is touched."""
        keys = state.keys.slice(part.first, part.first + len(part.tiers), part.group)
        self._planner.touch(keys, self._pool)
        chunks = []
        for tier, run in itertools.groupby(zip(part.tiers, keys, strict=True), key=lambda pair: pair[0]):
            there = [key for _, key in run]
            if tier > self._pool:
                size = self._chunk_blocks
                cuts = range(0, len(there), size)
                chunks += [_Chunk(tier, part.group, there[at : at + size]) for at in cuts]
        return chunks

    def _read(self, waiting: _Waiting, now_s: float) -> bool:
        """Plan to read for a request. False: nobody can be read for now."""
        assert waiting.todo is not None
        blocks = sum(len(chunk.keys) for chunk in self._reading)
        nbytes = sum(chunk.nbytes for chunk in self._reading)
        index = self._planner.tiers[self._pool].index
        while waiting.todo:
            chunk = waiting.todo[0]
            charge = self._planner.tiers[self._pool].charges[chunk.group]
            more_bytes = len(chunk.keys) * charge
            if blocks + len(chunk.keys) > _MAX_BLOCKS or (blocks and nbytes + more_bytes > _MAX_BYTES):
                return False
            if self._held_bytes + more_bytes > self._max_held_bytes:
                return False
            waiting.todo.popleft()
            wanted = [key for key in chunk.keys if index.state(key) is BlockState.ABSENT]
            theirs = [key for key in chunk.keys if index.state(key) is BlockState.FILLING]
            planned = self._planner.fill(
                chunk.source, self._pool, wanted, now_s, waiting.state.keys, chunk.group
            )
            if theirs:
                waiting.reading.append(_Chunk(chunk.source, chunk.group, theirs, 0, now_s))
            if planned:
                taken = len(planned) * charge
                mine = _Chunk(chunk.source, chunk.group, planned, taken, now_s)
                waiting.reading.append(mine)
                self._reading.append(mine)
                waiting.nbytes += taken
                self._held_bytes += taken
                blocks, nbytes = blocks + len(planned), nbytes + taken
            if len(planned) < len(wanted):  # No room, or no source: what follows is worth less.
                waiting.todo.clear()
        return True

    def _is_under_way(self, chunk: _Chunk) -> bool:
        # Blocks of one fill end together.
        return self._planner.tiers[self._pool].index.state(chunk.keys[-1]) is BlockState.FILLING
