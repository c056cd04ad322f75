"""The way of blocks from one tier to another, past the device.

host pool ────────────────────────────► tier            its memory is read in place
tier ──► region (host pool) ──publish──► host pool      its memory is filled in place
tier ──► region (staging) ────────────► tier
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvbm_core.plan import Fill, FillReason, Store
from kvbm_core.tier import Reason
from kvbm_core.worker.host_buffers import HostBuffers, Lease
from kvbm_core.worker.jobs import Job, Jobs, Move
from kvbm_core.worker.tier_queue import TierQueue

__all__ = ["Fills"]


class Fills:
    """Carries fills out, and forwards what the host pool has got to the other tiers of a store.

    Every method is called under the lock of the jobs.

    Args:
        jobs: Where ends are noted.
        buffers: Where regions come from.
        queues: By position in the stack, of every tier but the host pool.
        host_pool: Position of the host pool; -1 for none.
    """

    def __init__(
        self, jobs: Jobs, buffers: HostBuffers, queues: Mapping[int, TierQueue], host_pool: int
    ) -> None:
        self._jobs = jobs
        self._buffers = buffers
        self._queues = queues
        self._host_pool = host_pool

    def begin(self, job: Job) -> None:
        """Read blocks from the source, or use them where they lie in the host pool."""
        op = job.op
        assert isinstance(op, Fill)
        if op.source == self._host_pool:
            self.forward_from_host_pool(job, range(len(op.keys)), [op.target])
        else:
            queue = self._queues[op.source]
            # Of a prefetch a request will wait for it; nobody does for the others.
            waiting = queue.prefetches if op.reason is FillReason.PREFETCH else queue.copies
            waiting.extend(Move(job, at, op.source) for at in range(len(op.keys)))

    def landed(self, job: Job, moves: Sequence[Move]) -> None:
        """Take in blocks that the source has brought into host memory."""
        op = job.op
        assert isinstance(op, Fill)
        for move in moves:
            self._jobs.end(job, [move.at], op.source, Reason.NONE)
            if op.target != self._host_pool:
                assert move.lease is not None, "a load has a region"
                lease = self._buffers.share(move.lease)
                self._queues[op.target].stores.append(Move(job, move.at, op.target, lease))
            elif move.fills:
                self._buffers.publish(move.key)
                self._jobs.end(job, [move.at], op.target, Reason.NONE)
            else:
                job.full.add(op.target)
                self._jobs.end(job, [move.at], op.target, Reason.FULL)
            self._queues[op.source].let_go(move)

    def forward_from_host_pool(self, job: Job, places: Sequence[int], tiers: Sequence[int]) -> None:
        """Queue blocks of the host pool, by their positions, for other tiers."""
        keys = job.op.keys
        leases = {at: lease for at in places if tiers and (lease := self._buffers.borrow(keys[at]))}
        missing = [at for at in places if at not in leases]
        for tier in tiers:
            self._jobs.end(job, missing, tier, Reason.MISSING)
        self.forward(job, leases, tiers)

    def forward(self, job: Job, leases: Mapping[int, Lease], tiers: Sequence[int]) -> None:
        """Queue blocks that lie in a host region for other tiers."""
        assert isinstance(job.op, Store | Fill)
        for at, lease in leases.items():
            for tier in tiers:
                self._queues[tier].stores.append(Move(job, at, tier, self._buffers.share(lease)))
            self._buffers.release(lease)
