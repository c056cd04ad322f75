"""The way of blocks from tiers into the device, and of questions to tiers.

host pool ──────────────────────────scatter──► device      in parts, 512 MiB ahead at most
tier ──► region (host pool, staging) ──scatter──► device
tier ──► region (device memory) ───────scatter──► device   where the tier reads into device memory
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from kvbm_core.device import Device
from kvbm_core.errors import KvbmError
from kvbm_core.plan import Load, Lookup
from kvbm_core.tier import Reason
from kvbm_core.worker.copier import Copier
from kvbm_core.worker.host_buffers import HostBuffers
from kvbm_core.worker.jobs import Copy, Failed, Job, Jobs, Move
from kvbm_core.worker.tier_queue import TierQueue

__all__ = ["Loads"]

_AHEAD_BYTES: Final = 512 << 20
"""On the device's streams at once: ten milliseconds of a link, so that the next look may come late."""


class Loads:
    """Carries loads and lookups out.

    Args:
        jobs: Where ends are noted.
        copier: The device's copies.
        device: The engine's blocks.
        buffers: Where regions come from.
        queues: By position in the stack, of every tier but the host pool.
        host_pool: Position of the host pool; -1 for none.
    """

    def __init__(
        self,
        jobs: Jobs,
        copier: Copier,
        device: Device,
        buffers: HostBuffers,
        queues: Mapping[int, TierQueue],
        host_pool: int,
    ) -> None:
        self._jobs = jobs
        self._copier = copier
        self._device = device
        self._buffers = buffers
        self._queues = queues
        self._host_pool = host_pool
        self._parts: deque[tuple[Job, range]] = deque()
        """Parts of loads from the host pool that were not started."""

    def begin(self, job: Job) -> None:
        """Queue a load or a lookup where its blocks are. Under the lock."""
        assert isinstance(job.op, Load | Lookup)
        if job.op.tier == self._host_pool:
            self._parts.extend((job, part) for part in job.parts())
            return
        waiting = self._queues[job.op.tier].loads
        moves = [Move(job, at, job.op.tier) for at in range(len(job.op.keys))]
        if isinstance(job.op, Load):
            waiting.extend(moves)
        else:  # Small, and a request waits for it before anything else.
            waiting.extendleft(reversed(moves))

    def start_parts(self) -> None:
        """Start loads from the host pool, as far as the device has not enough to copy. Outside the lock."""
        ahead_bytes = self._copier.loading_bytes
        while self._parts and not self._jobs.is_broken and ahead_bytes < _AHEAD_BYTES:
            job, part = self._parts.popleft()
            ahead_bytes += len(part) * job.object_bytes
            self._start_part(job, part)

    def start_in_step(self, job: Job) -> None:
        """Have the engine's work wait for a load. In the engine's thread; also after a bug. Outside the lock.

        Raises:
            KvbmError: If a block is not there. The engine would compute with whatever is in its place.
        """
        for part in job.parts():
            copy = self._start_part(job, part)
            if isinstance(copy.work, Failed) or len(copy.places) < len(part):
                raise KvbmError("blocks that this step computes with cannot be loaded", operation="load")
            self._device.stream_wait(copy.work)

    def scatter(self, landed: Mapping[Job, list[Move]]) -> None:
        """Have the device take what tiers have brought. Outside the lock."""
        for job, moves in landed.items():
            regions = [move.lease.region for move in moves if move.lease]
            self._copier.start(Copy(job, [move.at for move in moves], moves), regions)

    def end(self, copy: Copy, *, done: bool) -> None:
        """Take in a scatter that has ended. Under the lock."""
        if copy.batch:
            reason = Reason.NONE if done else Reason.ERROR
            self._jobs.end(copy.job, copy.places, self._host_pool, reason)
            self._buffers.end_batch(copy.batch)
            return
        for move in copy.moves:
            queue, op = self._queues[move.tier], move.job.op
            if not done:
                queue.fail(move, Reason.ERROR)
                continue
            if move.fills:
                self._buffers.publish(move.key)
            if isinstance(op, Load) and op.fill >= 0:
                if not move.fills:
                    move.job.full.add(op.fill)
                kept = Reason.NONE if move.fills else Reason.FULL
                self._jobs.end(move.job, [move.at], op.fill, kept)
            self._jobs.end(move.job, [move.at], move.tier, Reason.NONE)
            queue.let_go(move)

    def _start_part(self, job: Job, part: range) -> Copy:
        """Start a part of a load from the host pool, as far as it has the blocks."""
        with self._jobs.lock:
            batch = self._buffers.lease_batch(job.op.keys[part.start : part.stop])
            places = [part.start + at for at in batch.regions]
            if len(places) < len(part):
                missing = sorted(set(part).difference(places))
                self._jobs.end(job, missing, self._host_pool, Reason.MISSING)
        return self._copier.start(Copy(job, places, batch=batch), list(batch.regions.values()))
