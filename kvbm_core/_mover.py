"""The worker's half: moves bytes between device blocks, host regions and tiers. Decides nothing.

    store:  device ──gather──► region ──► every other tier of the plan
    load:   tier ──► region ──scatter──► device

A region is memory of the *lender*, the tier that lends its own (then nothing is copied twice), or
of the staging pool. `submit` is the engine's thread, `poll` the mover's. They share a lock for the
bookkeeping; copies happen outside it, and tiers work in threads of their own.

Where the device is `deferred`, stores are started by the mover's thread too, and the engine's thread does
nothing for them unless blocks are claimed that a store has not been started for. It starts loads in-step.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from kvbm_core._moves import Copy, Failed, Job, Move, Traffic, is_done
from kvbm_core._slots import Slot, Slots
from kvbm_core._staging import Staging
from kvbm_core.device import Device, Fence, Stageable
from kvbm_core.errors import KvbmError, QueueFullError, TierError
from kvbm_core.layers import FOOTER_BYTES, DeadlineTier
from kvbm_core.plan import Load, Lookup, Plan, Report, Store
from kvbm_core.tier import Addressable, Completion, Outcome, Reason, Region, Tier, Transfer

__all__ = ["Mover"]

logger = logging.getLogger("kvbm_core")

_AHEAD_BYTES: Final = 512 << 20
"""On the device's streams at once: ten milliseconds of a link, so that the mover's thread may be late."""
_PAUSE_S: Final = 0.001
_SETTLE_S: Final = 10.0
"""How long copies under way are waited for at the end."""


class Mover:
    """Carries out plans for one rank.

    Args:
        tiers: Fastest first. The first that is `Addressable` is the lender; every other one is a
            `DeadlineTier`.
        device: The engine's blocks.
        staging: For blocks that pass through no lender. None if the lender is the only tier.
        load_deadline_s: Seconds a load may take.
        store_deadline_s: Seconds a store may take.
        lookup_deadline_s: Seconds a lookup may take.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        device: Device,
        staging: Staging | None,
        *,
        load_deadline_s: float,
        store_deadline_s: float,
        lookup_deadline_s: float,
    ) -> None:
        self._tiers = list(tiers)
        self._device = device
        self._limits_s = {Load: load_deadline_s, Store: store_deadline_s, Lookup: lookup_deadline_s}
        self._lender_at = next((i for i, tier in enumerate(tiers) if isinstance(tier, Addressable)), -1)
        self._slots = Slots(None if self._lender_at < 0 else tiers[self._lender_at], staging)
        self._traffic = {i: Traffic(t) for i, t in enumerate(tiers) if isinstance(t, DeadlineTier)}
        self._lock = threading.Lock()
        self._tickets = itertools.count(1)
        self._arrived: deque[Job] = deque()
        self._lent: deque[tuple[Job, range]] = deque()
        """Parts of loads from the lender that were not started."""
        self._jobs: set[Job] = set()
        self._copies: list[Copy] = []
        self._landed: dict[Job, list[Move]] = {}
        self._reports: list[Report] = []
        self._broken = False
        self._written: Fence = None
        """Where the last plan that wrote over blocks came in the engine's order of work."""

    def __repr__(self) -> str:
        ways = ", ".join(f"{i}: {traffic!r}" for i, traffic in self._traffic.items())
        return f"<Mover {len(self._jobs)} jobs; {ways}; {self._slots!r}>"

    @property
    def active(self) -> bool:
        """Whether `poll` has work to look after."""
        return not self._broken and bool(self._jobs or any(t.open for t in self._traffic.values()))

    @property
    def pause_s(self) -> float | None:
        """How long `poll` need not be called; None: until a plan comes, or a tier has ended something."""
        copies_s = (copy.job.pause_s for copy in list(self._copies))
        return min(copies_s, default=_PAUSE_S) if self.active else None

    def submit(self, plan: Plan) -> None:
        """Start a plan: drops, then stores, then loads. In the engine's thread.

        Whatever the plan overwrites may be overwritten on return; where the device is not deferred, so may
        the blocks of its stores. Raises what `_load_in_step` raises.
        """
        # All are noted before anything is done: whatever fails from here on, `fail_all` ends them.
        stores = [self._job(op, op.tiers) for op in plan.stores]
        loads = [self._job(op, [op.tier] if op.fill < 0 else [op.tier, op.fill]) for op in plan.loads]
        lookups = [self._job(op, [op.tier]) for op in plan.lookups]
        in_step = [job for job in loads if isinstance(job.op, Load) and job.op.in_step]
        claimed = {block for op in plan.loads for block in op.blocks}.union(plan.overwrites)
        if not self._broken:
            with self._lock:
                for tier, keys in plan.drops:
                    self._traffic.get(tier, self._slots).drop(keys)
            self._take_stores(stores, claimed, settled=plan.blocks_final)
        elif not in_step:
            return
        if plan.unordered:
            self._device.claim(plan.unordered, wait=True)
        self._written = self._device.claim(claimed) if claimed else self._written
        for job in loads:
            job.fence = self._written
        for job in in_step:
            self._load_in_step(job)
        self._arrived.extend([*lookups, *(job for job in loads if job not in in_step)])

    def poll(self) -> None:
        """Bring everything forward as far as it goes without waiting."""
        if self._broken:
            return
        self._begin_arrived()
        self._end_copies()
        self._start_lent()
        with self._lock:
            for position in self._traffic:
                self._collect(position)
                self._feed(position)
            landed, self._landed = self._landed, {}
        for job, moves in landed.items():
            regions = [move.slot.region for move in moves if move.slot]
            self._start_copy(Copy(job, [move.at for move in moves], moves), regions)
        if landed:
            self._end_copies()

    @property
    def has_reports(self) -> bool:
        """Whether `take_reports` has something to give."""
        return bool(self._reports)

    def take_reports(self) -> list[Report]:
        """Take what has ended since the last call."""
        with self._lock:
            reports, self._reports = self._reports, []
        return reports

    def fail_all(self) -> None:
        """Give up for good, after a bug: end every job and refuse all that comes."""
        self._broken = True
        self._settle()  # What is said to have failed must not be written any more.
        with self._lock:
            for job in list(self._jobs):
                for tier in list(job.left):
                    self._reports.append(job.failed(tier))
            self._jobs.clear()

    def close(self) -> None:
        """Wait for the copies under way, then close the tiers, then the device's memory."""
        self._settle()  # The tiers undo the page lock of what the device may be reading and writing.
        for tier in self._tiers:
            tier.close()
        self._slots.close()
        self._device.close()

    def _settle(self) -> None:
        """Wait for the device's copies, but not for ever."""
        give_up_s = time.monotonic() + _SETTLE_S
        for copy in list(self._copies):
            while is_done(copy.work) is None and time.monotonic() < give_up_s:
                time.sleep(0.001)

    # Plans in.

    def _job(self, op: Store | Load | Lookup, tiers: Sequence[int]) -> Job:
        now_s = time.monotonic()
        job = Job(op, now_s, now_s + self._limits_s[type(op)], dict.fromkeys(tiers, len(op.keys)))
        with self._lock:
            if self._broken:
                self._reports += [job.failed(tier) for tier in tiers]
            else:
                self._jobs.add(job)
        return job

    def _take_stores(self, stores: Sequence[Job], claimed: set[int], *, settled: bool) -> None:
        """Start stores now if the device or the engine cannot wait, else leave them to the mover's thread."""
        deferred = self._device.deferred
        fence = ((settled and self._written) or self._device.claim(())) if stores else None
        for job in stores:
            job.fence = fence
        with self._lock:
            self._arrived.extend(stores)
            for job in list(self._arrived):
                if not isinstance(job.op, Store) or (deferred and claimed.isdisjoint(job.op.blocks)):
                    continue
                self._arrived.remove(job)
                self._store(job)

    def _store(self, job: Job) -> None:
        """Bring a store's blocks into host regions. Under the lock, so that a claim finds them queued."""
        op, rest = job.op, list(range(len(job.op.keys)))
        assert isinstance(op, Store)
        if not op.blocks:
            self._lend_on(job, op, rest)
            return
        if self._lender_at in op.tiers:
            hold = self._slots.hold(op.keys, fill=True)
            rest = [at for at in rest if at not in hold.regions]
            self._end(job, rest, self._lender_at, Reason.FULL)
            self._start_copy(Copy(job, list(hold.regions), hold=hold), list(hold.regions.values()))
        others = self._others(op)
        # What does not go into the lender's memory.
        slots = {at: slot for at in rest if others and (slot := self._slots.stage())}
        without = [at for at in rest if at not in slots]
        for tier in others:
            self._end(job, without, tier, Reason.FULL)
        self._start_copy(Copy(job, list(slots), slots=slots), [slot.region for slot in slots.values()])

    def _start_copy(self, copy: Copy, regions: list[Region]) -> Copy:
        """Have the device gather into regions, or scatter from them. May be called under the lock."""
        op = copy.job.op
        assert not isinstance(op, Lookup)
        if not regions:
            return copy
        blocks = [op.blocks[at] for at in copy.places]
        try:
            if isinstance(op, Store):
                copy.work = self._device.gather(blocks, regions, copy.job.fence)
            else:
                copy.work = self._device.scatter(regions, blocks, copy.job.fence)
        except Exception:  # A device's error is as foreign as a tier's: it becomes an outcome.
            logger.exception("a copy could not be started")
        self._copies.append(copy)
        return copy

    def _end_copies(self) -> None:
        with self._lock:
            copies = list(self._copies)
        # Asking starts copies, and the engine's thread must not wait for that.
        ended = [(copy, done) for copy in copies if (done := is_done(copy.work)) is not None]
        with self._lock:
            if self._broken:  # The engine's blocks are not claimed any more: these bytes may be of others.
                return
            for copy, done in ended:
                self._copies.remove(copy)
                if isinstance(copy.job.op, Store):
                    self._end_gather(copy, copy.job.op, done=done)
                elif copy.hold:
                    self._end(copy.job, copy.places, self._lender_at, Reason.NONE if done else Reason.ERROR)
                    self._slots.let_go(copy.hold)
                else:
                    self._end_scatter(copy.moves, done=done)

    def _end_gather(self, copy: Copy, op: Store, *, done: bool) -> None:
        lost = copy.work.given_up if done else frozenset(range(len(copy.places)))
        gone = [at for position, at in enumerate(copy.places) if position in lost]
        there = [at for position, at in enumerate(copy.places) if position not in lost]
        # Given up: there was not enough staging on the device when the engine wanted the block back.
        for tier in op.tiers if copy.hold else self._others(op):
            self._end(copy.job, gone, tier, Reason.FULL if done else Reason.ERROR)
        if copy.hold:
            for at in gone:
                self._slots.abandon(copy.hold, op.keys[at])
            for at in there:
                self._slots.publish(op.keys[at])
            self._end(copy.job, there, self._lender_at, Reason.NONE)
            self._lend_on(copy.job, op, there)
            self._slots.let_go(copy.hold)
        else:
            for at in gone:
                self._slots.release(copy.slots[at])
            self._forward(copy.job, op, {at: copy.slots[at] for at in there})

    def _others(self, op: Store) -> list[int]:
        """Give the tiers of a store beside the lender."""
        return [tier for tier in op.tiers if tier != self._lender_at]

    def _lend_on(self, job: Job, op: Store, places: Sequence[int]) -> None:
        """Queue blocks of the lender for every other tier of their store."""
        others = self._others(op)
        slots = {at: slot for at in places if others and (slot := self._slots.borrow(op.keys[at]))}
        missing = [at for at in places if at not in slots]
        for tier in others:
            self._end(job, missing, tier, Reason.MISSING)
        self._forward(job, op, slots)

    def _forward(self, job: Job, op: Store, slots: Mapping[int, Slot]) -> None:
        """Queue blocks that lie in a host region for every other tier of their store."""
        others = self._others(op)
        for at, slot in slots.items():
            for tier in others:
                self._traffic[tier].stores.append(Move(job, at, tier, self._slots.share(slot)))
            self._slots.release(slot)

    def _begin_arrived(self) -> None:
        while True:
            with self._lock:
                if not self._arrived:
                    return
                job = self._arrived.popleft()
                if isinstance(job.op, Store):
                    self._store(job)
                elif job.op.tier == self._lender_at:
                    self._lent.extend((job, part) for part in job.parts(self._device.block_bytes))
                else:
                    loads = self._traffic[job.op.tier].loads
                    moves = [Move(job, at, job.op.tier) for at in range(len(job.op.keys))]
                    if isinstance(job.op, Load):
                        loads.extend(moves)
                    else:  # Small, and a request waits for it before anything else.
                        loads.extendleft(reversed(moves))

    def _start_lent(self) -> None:
        """Start loads from the lender's memory, as far as the device has not enough to copy."""
        ahead = sum(len(copy.places) for copy in self._copies if isinstance(copy.job.op, Load))
        while self._lent and not self._broken and ahead * self._device.block_bytes < _AHEAD_BYTES:
            job, part = self._lent.popleft()
            ahead += len(part)
            self._load_lent(job, part)

    def _load_lent(self, job: Job, part: range) -> Copy:
        """Start to load a part of a load from the lender's memory, as far as it has the blocks."""
        with self._lock:
            hold = self._slots.hold(job.op.keys[part.start : part.stop])
            places = [part.start + at for at in hold.regions]
            if len(places) < len(part):
                self._end(job, sorted(set(part).difference(places)), self._lender_at, Reason.MISSING)
        return self._start_copy(Copy(job, places, hold=hold), list(hold.regions.values()))

    def _load_in_step(self, job: Job) -> None:
        """Have the engine's work wait for a load. In the engine's thread; also after a bug, see `fail_all`.

        Raises:
            KvbmError: If a block is not there. The engine would compute with whatever is in its place.
        """
        for part in job.parts(self._device.block_bytes):
            copy = self._load_lent(job, part)
            if isinstance(copy.work, Failed) or len(copy.places) < len(part):
                raise KvbmError("blocks that this step computes with cannot be loaded", operation="load")
            self._device.join(copy.work)

    # Tiers.

    def _feed(self, position: int) -> None:
        """Submit what waits for a tier, as far as its queue and the regions go; loads first."""
        traffic = self._traffic[position]
        depth = traffic.tier.capabilities.queue_depth
        room = depth - len(traffic.open) - len(traffic.late)
        room -= self._feed_from(traffic, traffic.loads, room)
        stores = sum(isinstance(move.job.op, Store) for move in traffic.open.values())
        self._feed_from(traffic, traffic.stores, min(room, max(1, depth // 2) - stores))

    def _feed_from(self, traffic: Traffic, queue: deque[Move], room: int) -> int:
        """Submit up to `room` moves and return how many."""
        now_s = time.monotonic()
        moves: dict[int, Move] = {}
        while queue and (len(moves) < room or queue[0].job.deadline_s <= now_s):
            if queue[0].job.deadline_s <= now_s:
                self._fail(queue.popleft(), Reason.DEADLINE)
            elif not self._has_slot(queue[0]):
                break
            else:
                moves[next(self._tickets)] = queue.popleft()
        if moves:
            self._send(traffic, [move.transfer(ticket) for ticket, move in moves.items()], moves)
        return len(moves)

    def _send(self, traffic: Traffic, batch: list[Transfer], moves: dict[int, Move]) -> None:
        try:
            traffic.tier.submit(batch)
        except TierError as error:
            reason = Reason.BUSY if isinstance(error, QueueFullError) else Reason.ERROR
            for move in moves.values():
                self._fail(move, reason)
        else:
            traffic.open.update(moves)

    def _has_slot(self, move: Move) -> bool:
        """Find the region that a load goes through, if it has none yet."""
        op = move.job.op
        if move.slot or isinstance(op, Lookup):
            return True
        assert isinstance(op, Load)
        if self._traffic[move.tier].tier.capabilities.device_direct:
            assert isinstance(self._device, Stageable)
            move.slot = self._slots.stage_on(self._device, self._device.block_bytes + FOOTER_BYTES)
            return move.slot is not None
        move.slot, move.fills = self._slots.for_load(move.key, keep=op.fill >= 0)
        return move.slot is not None

    def _collect(self, position: int) -> None:
        """Take a tier's completions."""
        traffic = self._traffic[position]
        for completion in traffic.tier.poll():
            move = traffic.open.pop(completion.ticket)
            if completion.outcome is Outcome.DONE and isinstance(move.job.op, Load):
                self._landed.setdefault(move.job, []).append(move)
            elif completion.outcome is Outcome.DONE:
                traffic.doomed.discard(move.key)
                self._end(move.job, [move.at], position, Reason.NONE)
                self._let_go(move)
            else:
                self._collect_failed(traffic, completion, move)
        for ticket in traffic.tier.released():
            # May come for a transfer that had failed in time; then nothing is left to do.
            late = traffic.late.pop(ticket, None)
            if late:
                self._let_go(late, filled=False)
                traffic.forget_doomed(late.key)

    def _collect_failed(self, traffic: Traffic, completion: Completion, move: Move) -> None:
        held = traffic.tier.holds(completion.ticket)
        # It may be there after all, and nobody would know. In a shared tier it may be another engine's.
        unknown = isinstance(move.job.op, Store) and not traffic.tier.capabilities.shared
        if unknown and (held or completion.reason in (Reason.DEADLINE, Reason.ERROR)):
            traffic.doomed.add(move.key)
        if held:
            traffic.late[completion.ticket] = move
            self._end_move(move, completion.reason)
        else:
            self._fail(move, completion.reason)

    def _end_scatter(self, moves: Sequence[Move], *, done: bool) -> None:
        for move in moves:
            if not done:
                self._fail(move, Reason.ERROR)
                continue
            op = move.job.op
            if move.fills:
                self._slots.publish(move.key)
            if isinstance(op, Load) and op.fill >= 0:
                self._end(move.job, [move.at], op.fill, Reason.NONE if move.fills else Reason.FULL)
            self._end(move.job, [move.at], move.tier, Reason.NONE)
            self._let_go(move)

    # Ends.

    def _fail(self, move: Move, reason: Reason) -> None:
        """End a move whose region, if it has one, is ours again."""
        self._end_move(move, reason)
        self._let_go(move, filled=False)
        self._traffic[move.tier].forget_doomed(move.key)

    def _end_move(self, move: Move, reason: Reason) -> None:
        op = move.job.op
        if isinstance(op, Load) and op.fill >= 0:
            self._end(move.job, [move.at], op.fill, reason)
        self._end(move.job, [move.at], move.tier, reason)

    def _end(self, job: Job, places: Sequence[int], tier: int, reason: Reason) -> None:
        """Note how blocks of a job, by their positions, ended in one tier, see `Job.end`."""
        if job not in self._jobs or not places:
            return
        if report := job.end(places, tier, reason):
            self._reports.append(report)
        if not job.left:
            self._jobs.discard(job)

    def _let_go(self, move: Move, *, filled: bool = True) -> None:
        """Stop using a move's region; one that was meant for the lender and never filled is given back."""
        if move.slot:
            if move.fills and not filled:
                self._slots.abandon(move.slot, move.key)
            self._slots.release(move.slot)
