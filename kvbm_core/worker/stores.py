"""The way of blocks from the device into tiers.

device ──gather──► host pool ──────► every other tier of the store
device ──gather──► staging ────────► the same, of blocks that the host pool has no room for
nothing     host pool ──────► the same, of blocks that it has already
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvbm_core.plan import Store
from kvbm_core.tier import Reason
from kvbm_core.worker.copier import Copier
from kvbm_core.worker.host_buffers import HostBuffers, Lease
from kvbm_core.worker.jobs import Copy, Job, Jobs, Move
from kvbm_core.worker.tier_queue import TierQueue

__all__ = ["Stores"]


class Stores:
    """Carries stores out. Every method is called under the lock of the jobs.

    Args:
        jobs: Where ends are noted.
        copier: The device's copies.
        buffers: Where regions come from.
        queues: By position in the stack, of every tier but the host pool.
        host_pool: Position of the host pool; -1 for none.
    """

    def __init__(
        self,
        jobs: Jobs,
        copier: Copier,
        buffers: HostBuffers,
        queues: Mapping[int, TierQueue],
        host_pool: int,
    ) -> None:
        self._jobs = jobs
        self._copier = copier
        self._buffers = buffers
        self._queues = queues
        self._host_pool = host_pool

    def begin(self, job: Job) -> None:
        """Bring a store's blocks into host regions. Under the lock, so that a claim finds them queued."""
        op, rest = job.op, list(range(len(job.op.keys)))
        assert isinstance(op, Store)
        if not op.blocks:
            self._forward_from_host_pool(job, op, rest)
            return
        if self._host_pool in op.tiers:
            batch = self._buffers.lease_batch(op.keys, fill=True)
            rest = [at for at in rest if at not in batch.regions]
            if rest:  # Its memory is in use for longer than the leader knows.
                job.full.add(self._host_pool)
            self._jobs.end(job, rest, self._host_pool, Reason.FULL)
            self._copier.start(Copy(job, list(batch.regions), batch=batch), list(batch.regions.values()))
        others = self._others(op)
        # What does not go into the host pool's memory.
        leases = {at: lease for at in rest if others and (lease := self._buffers.stage())}
        without = [at for at in rest if at not in leases]
        for tier in others:
            self._jobs.end(job, without, tier, Reason.FULL)
        self._copier.start(
            Copy(job, list(leases), leases=leases), [lease.region for lease in leases.values()]
        )

    def end(self, copy: Copy, op: Store, *, done: bool) -> None:
        """Take in a gather that has ended: publish its blocks, and queue them for the other tiers."""
        lost = copy.work.given_up if done else frozenset(range(len(copy.places)))
        gone = [at for position, at in enumerate(copy.places) if position in lost]
        there = [at for position, at in enumerate(copy.places) if position not in lost]
        # Given up: there was not enough staging on the device when the engine wanted the block back.
        for tier in op.tiers if copy.batch else self._others(op):
            self._jobs.end(copy.job, gone, tier, Reason.FULL if done else Reason.ERROR)
        if copy.batch:
            for at in gone:
                self._buffers.abandon(copy.batch, op.keys[at])
            for at in there:
                self._buffers.publish(op.keys[at])
            self._jobs.end(copy.job, there, self._host_pool, Reason.NONE)
            self._forward_from_host_pool(copy.job, op, there)
            self._buffers.end_batch(copy.batch)
        else:
            for at in gone:
                self._buffers.release(copy.leases[at])
            self._forward(copy.job, op, {at: copy.leases[at] for at in there})

    def _others(self, op: Store) -> list[int]:
        """Give the tiers of a store beside the host pool."""
        return [tier for tier in op.tiers if tier != self._host_pool]

    def _forward_from_host_pool(self, job: Job, op: Store, places: Sequence[int]) -> None:
        """Queue blocks of the host pool for every other tier of their store."""
        others = self._others(op)
        leases = {at: lease for at in places if others and (lease := self._buffers.borrow(op.keys[at]))}
        missing = [at for at in places if at not in leases]
        for tier in others:
            self._jobs.end(job, missing, tier, Reason.MISSING)
        self._forward(job, op, leases)

    def _forward(self, job: Job, op: Store, leases: Mapping[int, Lease]) -> None:
        """Queue blocks that lie in a host region for every other tier of their store."""
        others = self._others(op)
        for at, lease in leases.items():
            for tier in others:
                self._queues[tier].stores.append(Move(job, at, tier, self._buffers.share(lease)))
            self._buffers.release(lease)
