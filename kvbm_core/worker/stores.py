"""The way of blocks from the device into tiers.

device ──gather──► host pool ──────► every other tier of the store
device ──gather──► staging ────────► the same, of blocks that the host pool has no room for
"""

from __future__ import annotations

from kvbm_core.plan import Store
from kvbm_core.tier import Reason
from kvbm_core.worker.copier import Copier
from kvbm_core.worker.fills import Fills
from kvbm_core.worker.host_buffers import HostBuffers
from kvbm_core.worker.jobs import Copy, Job, Jobs

__all__ = ["Stores"]


class Stores:
    """Carries stores out. Every method is called under the lock of the jobs.

    Args:
        jobs: Where ends are noted.
        copier: The device's copies.
        buffers: Where regions come from.
        fills: Forwards blocks from host memory to tiers.
        host_pool: Position of the host pool; -1 for none.
    """

    def __init__(
        self,
        jobs: Jobs,
        copier: Copier,
        buffers: HostBuffers,
        fills: Fills,
        host_pool: int,
    ) -> None:
        self._jobs = jobs
        self._copier = copier
        self._buffers = buffers
        self._fills = fills
        self._host_pool = host_pool

    def begin(self, job: Job) -> None:
        """Bring a store's blocks into host regions. Under the lock, so that a claim finds them queued."""
        op, rest = job.op, list(range(len(job.op.keys)))
        assert isinstance(op, Store)
        if self._host_pool in op.tiers:
            batch = self._buffers.lease_batch(op.keys, fill_bytes=job.object_bytes)
            rest = [at for at in rest if at not in batch.regions]
            if rest:  # Its memory is in use for longer than the leader knows.
                job.full.add(self._host_pool)
            self._jobs.end(job, rest, self._host_pool, Reason.FULL)
            self._copier.start(Copy(job, list(batch.regions), batch=batch), list(batch.regions.values()))
        others = self._others(op)
        # What does not go into the host pool's memory.
        leases = {at: lease for at in rest if others and (lease := self._buffers.stage(job.object_bytes))}
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
            self._fills.forward_from_host_pool(copy.job, there, self._others(op))
            self._buffers.end_batch(copy.batch)
        else:
            for at in gone:
                self._buffers.release(copy.leases[at])
            self._fills.forward(copy.job, {at: copy.leases[at] for at in there}, self._others(op))

    def _others(self, op: Store) -> list[int]:
        """Give the tiers of a store beside the host pool."""
        return [tier for tier in op.tiers if tier != self._host_pool]
