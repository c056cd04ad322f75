"""The moves that wait for one tier below the host pool, and those that are under way there."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.errors import QueueFullError, TierError
from kvbm_core.layers import DeadlineTier
from kvbm_core.plan import Fill, Load
from kvbm_core.tier import Completion, Op, Outcome, Reason, Transfer
from kvbm_core.worker.host_buffers import HostBuffers
from kvbm_core.worker.jobs import Jobs, Move

__all__ = ["TierQueue"]

_STALL_S: Final = 1.0
"""A tier that ends nothing for so long is taken for one that hangs."""


class TierQueue:
    """Submits moves as far as the tier's queue and the regions go, and takes its completions.

    Args:
        tier: A tier behind its layers.
        tickets: Numbers for transfers.
        jobs: Where ends are noted.
        buffers: Where regions come from.
        stage: Gives a move a region of the device's memory, False if none is free. None where the tier reads
            into host memory.
        share: Regions that its moves may hold: the others are for other tiers. None where there is no other.
        charges: For each KV group the bytes of the tier's capacity that are reserved for an object.
    """

    def __init__(
        self,
        tier: DeadlineTier,
        tickets: Iterator[int],
        jobs: Jobs,
        buffers: HostBuffers,
        stage: Callable[[Move], bool] | None,
        share: int | None = None,
        charges: Sequence[int] = (),
    ) -> None:
        self.tier = tier
        self._tickets = tickets
        self._jobs = jobs
        self._buffers = buffers
        self._stage = stage
        depth = tier.capabilities.queue_depth
        self._share = share
        self._charges = charges
        self._depth = depth if share is None else min(depth, share)
        self._moved_s = 0.0
        """When the tier ended something last, or had nothing to do."""
        self.failing: dict[Op, float] = {}
        """Kinds of operation that failed by its own fault, to when they did first since one worked last."""
        self.loads: deque[Move] = deque()
        """Not yet submitted: the tier's queue is full, or no region is free."""
        self.prefetches: deque[Move] = deque()
        """Of fills, blocks that are read here for a request that will want them. They wait for the loads."""
        self.stores: deque[Move] = deque()
        """Likewise. They wait for both. All but the loads leave half of the tier's queue to these."""
        self.copies: deque[Move] = deque()
        """Of fills, blocks read here that no request waits for. They wait for the stores, too."""
        self.open: dict[int, Move] = {}
        self.late: dict[int, Move] = {}
        """Given up, but the region is still the tier's."""
        self.doomed: set[BlockKey] = set()
        """Keys of late moves, to be forgotten when the tier has let go: dropped, or stored too late."""

    def __repr__(self) -> str:
        queued = len(self.loads) + len(self.prefetches) + len(self.stores) + len(self.copies)
        return f"{len(self.open)} open {queued} queued"

    @property
    def failing_since_s(self) -> float | None:
        """Since when it has failed, by this process's clock. None: it has not, or has worked since."""
        return min(self.failing.values(), default=None)

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """Have the tier forget blocks; those still in use, as soon as they are not."""
        late = {move.key for move in self.late.values()}
        self.doomed |= late.intersection(keys)
        self.tier.discard([key for key in keys if key not in late])

    def feed(self) -> None:
        """Submit the moves that wait, as far as the tier's queue and the regions go; loads first."""
        room = self._depth - len(self.open) - len(self.late)
        room -= self._feed_from(self.loads, room)
        in_tier = itertools.chain(self.open.values(), self.late.values())
        others = sum(move.kind is Op.STORE or isinstance(move.job.op, Fill) for move in in_tier)
        room = min(room, max(1, self._depth // 2) - others)
        room -= self._feed_from(self.prefetches, room)
        room -= self._feed_from(self.stores, room)
        self._feed_from(self.copies, room)
        if self._share is not None and len(self.open) + len(self.late) + len(self.stores) > self._share:
            self._shed(self._share)

    def collect(self) -> list[Move]:
        """Take the tier's completions, and return the loads whose regions hold their blocks."""
        landed = []
        completions, released = self.tier.poll(), self.tier.released()
        # A deadline is no answer of the tier's.
        answers = any(completion.reason is not Reason.DEADLINE for completion in completions)
        if answers or released or not (self.open or self.late):
            self._moved_s = time.monotonic()
        for answer in completions:
            move = self.open.pop(answer.ticket)
            completion = _whole(move, answer)
            self._judge(move, completion.reason)
            if completion.outcome is Outcome.DONE and move.kind is Op.LOAD:
                landed.append(move)
            elif completion.outcome is Outcome.DONE:
                self.doomed.discard(move.key)
                self._note_charge(move, completion.nbytes)
                self._jobs.end(move.job, [move.at], move.tier, Reason.NONE)
                self.let_go(move)
            else:
                self._collect_failed(completion, move)
        for ticket in released:
            # May come for a transfer that had failed in time; then nothing is left to do.
            late = self.late.pop(ticket, None)
            if late:
                self.let_go(late, filled=False)
                self._forget_doomed(late.key)
        return landed

    def fail(self, move: Move, reason: Reason) -> None:
        """End a move whose region, if it has one, is ours again."""
        self._judge(move, reason)
        self._jobs.end_move(move, reason)
        self.let_go(move, filled=False)
        self._forget_doomed(move.key)

    def let_go(self, move: Move, *, filled: bool = True) -> None:
        """Stop using a move's region; one that was meant for the host pool and never filled is given back."""
        if move.lease:
            if move.fills and not filled:
                self._buffers.abandon(move.lease, move.key)
            self._buffers.release(move.lease)

    def _note_charge(self, move: Move, nbytes: int) -> None:
        """Note the bytes that a stored object takes; `nbytes` is its length, 0: that of its region."""
        if nbytes and move.kind is Op.STORE and self._charges:
            charge = self.tier.capabilities.charge(nbytes)
            move.job.charge(move.tier, move.at, charge, self._charges[move.job.op.group])

    def _shed(self, share: int) -> None:
        """Give up stores that wait for a tier that ends nothing: they hold regions that other tiers need."""
        if time.monotonic() - self._moved_s < _STALL_S:
            return
        reason = Reason.DEADLINE if self.late else Reason.BUSY
        # The newest: the end of a prefix is worth the least.
        while self.stores and len(self.open) + len(self.late) + len(self.stores) > share:
            self.fail(self.stores.pop(), reason)

    def _feed_from(self, waiting: deque[Move], room: int) -> int:
        """Submit up to `room` moves and return how many."""
        now_s = time.monotonic()
        moves: dict[int, Move] = {}
        while waiting and (len(moves) < room or waiting[0].job.deadline_s <= now_s):
            if waiting[0].job.deadline_s <= now_s:
                self.fail(waiting.popleft(), Reason.DEADLINE)
            elif not self._has_region(waiting[0]):
                break
            else:
                moves[next(self._tickets)] = waiting.popleft()
        if moves:
            self._send([move.transfer(ticket) for ticket, move in moves.items()], moves)
        return len(moves)

    def _send(self, batch: list[Transfer], moves: dict[int, Move]) -> None:
        try:
            self.tier.submit(batch)
        except TierError as error:
            reason = Reason.BUSY if isinstance(error, QueueFullError) else Reason.ERROR
            for ticket, move in moves.items():
                move.job.note(move.tier, Completion(ticket, Outcome.FAILED, reason, str(error)))
                self.fail(move, reason)
        else:
            self.open.update(moves)

    def _has_region(self, move: Move) -> bool:
        """Find the region that a load goes through, if it has none yet."""
        if move.lease or move.kind is not Op.LOAD:
            return True
        # A fill goes on from host memory.
        if self._stage is not None and isinstance(move.job.op, Load):
            return self._stage(move)
        keep = move.is_kept
        move.lease, move.fills = self._buffers.for_load(move.key, move.job.object_bytes, keep=keep)
        return move.lease is not None

    def _collect_failed(self, completion: Completion, move: Move) -> None:
        move.job.note(move.tier, completion)
        held = self.tier.holds(completion.ticket)
        # It may be there after all, and nobody would know. In a shared tier it may be another engine's.
        unknown = move.kind is Op.STORE and not self.tier.capabilities.shared
        if unknown and (held or completion.reason in (Reason.DEADLINE, Reason.ERROR)):
            self.doomed.add(move.key)
        if held:
            self.late[completion.ticket] = move
            self._jobs.end_move(move, completion.reason)
        else:
            self.fail(move, completion.reason)

    def _forget_doomed(self, key: BlockKey) -> None:
        """Have the tier forget a block that may be there and nobody knows, unless it is on its way again."""
        if key in self.doomed and not self.is_busy_with(key):
            self.doomed.remove(key)
            self.tier.discard([key])

    def _judge(self, move: Move, reason: Reason) -> None:
        """Note whether the tier works, by kind as the leader's breaker does; FULL and BUSY say neither."""
        if move.job.ended:  # Of a try, which says itself what it shows.
            return
        if reason.is_fault:
            self.failing.setdefault(move.kind, time.monotonic())
        elif reason not in (Reason.FULL, Reason.BUSY):
            self.failing.pop(move.kind, None)

    def is_busy_with(self, key: BlockKey) -> bool:
        """Return True if a block is on its way, or may be written to still."""
        queued = (self.loads, self.prefetches, self.stores, self.copies)
        moves = itertools.chain(self.open.values(), self.late.values(), *queued)
        return any(move.key == key for move in moves)


def _whole(move: Move, completion: Completion) -> Completion:
    """Fail a load of an object that has another length than the block."""
    if completion.nbytes in (0, move.job.object_bytes) or move.kind is not Op.LOAD:
        return completion
    words = f"it is {completion.nbytes} bytes long, not {move.job.object_bytes}"
    return Completion(completion.ticket, Outcome.FAILED, Reason.CORRUPT, words)
