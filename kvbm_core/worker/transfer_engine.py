"""The verbs of the worker's half: plans in, copies and transfers forward, reports out. Decides nothing.

    store:  device ──gather──► region ──► every other tier of the plan
    load:   tier ──► region ──scatter──► device

A region is memory of the *host pool*, the tier whose memory is used directly (then nothing is copied twice),
or of the staging pool. `submit` is called by the engine's thread, `poll` by the transfer engine's. They share
a lock for the bookkeeping. Gathers are started under it, so that a claim finds each store either waiting or
started; scatters are started outside it, and the device's copies run outside it, as tiers do.

Where a device has `async_gather`, stores are started by `poll`, and the engine's thread does nothing for them
unless blocks are claimed that a store has not been started for. It starts loads in-step.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from kvbm_core.device import Device, Fence, Stageable
from kvbm_core.layers import DeadlineTier
from kvbm_core.plan import Fill, Load, Plan, Report, Store
from kvbm_core.staging import Staging
from kvbm_core.tier import Tier, host_pool_of
from kvbm_core.worker.copier import Copier
from kvbm_core.worker.fills import Fills
from kvbm_core.worker.host_buffers import HostBuffers
from kvbm_core.worker.jobs import Job, Jobs, Move
from kvbm_core.worker.loads import Loads
from kvbm_core.worker.opening import OpenTier
from kvbm_core.worker.probes import Probes
from kvbm_core.worker.stores import Stores
from kvbm_core.worker.tier_queue import TierQueue

__all__ = ["TransferEngine"]

_PAUSE_S: Final = 0.001
"""Between two polls while nothing is copied, but tiers are at work."""


class TransferEngine:
    """Carries out plans for one rank.

    Args:
        opened: The tiers, fastest first. The first that is `Addressable` is the host pool; every other one is
            a `DeadlineTier`.
        device: The engine's blocks.
        staging: For blocks that pass through no host pool. None if the host pool is the only tier.
        jobs: Knows the deadlines and the lengths of objects.
    """

    def __init__(
        self, opened: Sequence[OpenTier], device: Device, staging: Staging | None, jobs: Jobs
    ) -> None:
        tiers = self._tiers = [each.tier for each in opened]
        self._device = device
        self._jobs = jobs
        host_pool = host_pool_of([tier.capabilities for tier in tiers])
        pool = None if host_pool < 0 else tiers[host_pool]
        self._buffers = HostBuffers(pool, staging, max(jobs.object_bytes))
        self._copier = Copier(device)
        tickets = itertools.count(1)
        share = self._buffers.tier_share if len(tiers) > 1 else None
        self._queues = {
            at: TierQueue(tier, tickets, jobs, self._buffers, self._stager(tier), share, each.charges)
            for at, (tier, each) in enumerate(zip(tiers, opened, strict=True))
            if isinstance(tier, DeadlineTier)
        }
        self._fills = Fills(jobs, self._buffers, self._queues, host_pool)
        self._stores = Stores(jobs, self._copier, self._buffers, self._fills, host_pool)
        self._loads = Loads(jobs, self._copier, device, self._buffers, self._queues, host_pool)
        self._probes = Probes(jobs, self._queues)
        self._arrived: deque[Job] = deque()
        self._overwritten: Fence = None
        """Where the last plan that wrote over blocks came in the engine's order of work."""

    def __repr__(self) -> str:
        ways = ", ".join(f"{i}: {queue!r}" for i, queue in self._queues.items())
        return f"<TransferEngine {len(self._jobs)} jobs; {ways}; {self._buffers!r}>"

    @property
    def active(self) -> bool:
        """True if `poll` has work to look after."""
        busy = bool(self._jobs) or any(queue.open for queue in self._queues.values())
        return busy and not self._jobs.is_broken

    @property
    def pause_s(self) -> float | None:
        """Seconds until `poll` must be called; None: until a plan comes, or a tier has ended something."""
        if self.active:
            return self._copier.pause_s or _PAUSE_S
        return None if self._jobs.is_broken else self._probes.pause_s

    @property
    def has_reports(self) -> bool:
        """True if `take_reports` has something to give."""
        return self._jobs.has_reports

    def submit(self, plan: Plan) -> None:
        """Start a plan: drops, then stores, then loads and fills. In the engine's thread.

        Whatever the plan overwrites may be overwritten on return; without `async_gather` of a device, so may
        the blocks of its stores. Raises what `Loads.start_in_step` raises.
        """
        # All are noted before anything is done: whatever fails from here on, `fail_all` ends them.
        stores, loads, lookups, fills = (
            [job for op in ops if (job := self._jobs.begin(op))]
            for ops in (plan.stores, plan.loads, plan.lookups, plan.fills)
        )
        in_step = [job for job in loads if isinstance(job.op, Load) and job.op.in_step]
        claimed = {block for op in plan.loads for block in op.blocks}.union(plan.overwrites)
        if not self._jobs.is_broken:
            with self._jobs.lock:
                for tier, keys in plan.drops:
                    self._queues.get(tier, self._buffers).drop(keys)
                for tier, keys in plan.used:
                    if queue := self._queues.get(tier):
                        queue.tier.used(keys)
                for probe in plan.probes:
                    self._probes.begin(probe)
            self._take_stores(stores, claimed, blocks_final=plan.blocks_final)
        elif not in_step:
            return
        if plan.unordered:
            self._device.claim(plan.unordered, wait=True)
        self._overwritten = self._device.claim(claimed) if claimed else self._overwritten
        for job in loads:
            job.fence = self._overwritten
        for job in in_step:
            self._loads.start_in_step(job)
        self._arrived.extend([*lookups, *(job for job in loads if job not in in_step), *fills])

    def poll(self) -> None:
        """Bring everything forward as far as it goes without waiting."""
        if self._jobs.is_broken:
            return
        self._begin_arrived()
        self._end_copies()
        self._loads.start_parts()
        landed: dict[Job, list[Move]] = {}
        with self._jobs.lock:
            for queue in self._queues.values():
                for move in queue.collect():
                    if not self._probes.take(move):
                        landed.setdefault(move.job, []).append(move)
            self._probes.poll()
            for queue in self._queues.values():
                queue.feed()
            for job in [job for job in landed if isinstance(job.op, Fill)]:
                self._fills.landed(job, landed.pop(job))
        if landed:
            self._loads.scatter(landed)
            self._end_copies()

    def take_reports(self) -> list[Report]:
        """Take the reports that have come since the last call."""
        return self._jobs.take_reports()

    def fail_all(self) -> None:
        """Give up for good, after a bug: end every job and refuse all that comes."""
        self._jobs.is_broken = True
        self._copier.settle()  # What is said to have failed must not be written any more.
        self._jobs.fail_all()

    def close(self) -> None:
        """Wait for the copies under way, then close the tiers, then the device's memory."""
        self._copier.settle()  # The tiers undo the page lock of what the device may be reading and writing.
        for tier in self._tiers:
            tier.close()
        self._buffers.close()
        self._device.close()

    def _stager(self, tier: Tier) -> Callable[[Move], bool] | None:
        """Return the source of device regions for a tier that reads into device memory; None for others."""
        if not tier.capabilities.device_direct:
            return None
        device = self._device
        assert isinstance(device, Stageable)

        def stage(move: Move) -> bool:
            move.lease = self._buffers.stage_on(device, move.job.object_bytes)
            return move.lease is not None

        return stage

    def _take_stores(self, stores: Sequence[Job], claimed: set[int], *, blocks_final: bool) -> None:
        """Start stores now if the device or the engine cannot wait, else leave them to `poll`."""
        async_gather = self._device.traits.async_gather
        fence = ((blocks_final and self._overwritten) or self._device.claim(())) if stores else None
        for job in stores:
            job.fence = fence
        with self._jobs.lock:
            self._arrived.extend(stores)
            for job in list(self._arrived):
                if not isinstance(job.op, Store) or (async_gather and claimed.isdisjoint(job.op.blocks)):
                    continue
                self._arrived.remove(job)
                self._stores.begin(job)

    def _begin_arrived(self) -> None:
        while True:
            with self._jobs.lock:
                if not self._arrived:
                    return
                job = self._arrived.popleft()
                if isinstance(job.op, Store):
                    self._stores.begin(job)
                elif isinstance(job.op, Fill):
                    self._fills.begin(job)
                else:
                    self._loads.begin(job)

    def _end_copies(self) -> None:
        with self._jobs.lock:
            copies = self._copier.under_way()
        # Asking starts copies, and the engine's thread must not wait for that.
        ended = self._copier.ended(copies)
        with self._jobs.lock:
            # After a bug the engine's blocks are not claimed any more: these bytes may be of others.
            if self._jobs.is_broken:
                return
            for copy, done in ended:
                self._copier.remove(copy)
                if isinstance(copy.job.op, Store):
                    self._stores.end(copy, copy.job.op, done=done)
                else:
                    self._loads.end(copy, done=done)
