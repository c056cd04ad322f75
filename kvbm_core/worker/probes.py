"""Tries tiers that are left alone until they work, also while the engine is idle and no plan comes.

A tier of this engine's own: a block is written, read back and forgotten. A tier that other engines store
into, where nothing may be left behind: it is asked for a block. That it answers shows something only where
it did not before.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvbm_core.block import PROBE_KEY
from kvbm_core.log_limit import spell_words
from kvbm_core.plan import Load, Lookup, Probe, Report, Store
from kvbm_core.staging import Staging
from kvbm_core.tier import Op, Reason, Region
from kvbm_core.worker.host_buffers import Lease
from kvbm_core.worker.jobs import Jobs, Move
from kvbm_core.worker.tier_queue import TierQueue

__all__ = ["Probes"]

logger = logging.getLogger("kvbm_core")


@dataclass(slots=True)
class _Trial:
    """A tier that is tried."""

    probe: Probe
    next_s: float
    """When it is tried next."""
    pause_s: float
    """From then to the try after it."""
    is_silent: bool = False
    """True if it did not answer a question since it was left alone."""


class Probes:
    """Tries each tier that the leader names, one block at a time. All but `pause_s` under the lock.

    Behaviour:
        - At most one try is under way in a tier, and none begins before its pause is over.
        - It ends with a try that works, which one line says, or when all that failed there has worked since.
        - In a tier that answers questions all the while, only what failed can show that it works.

    Args:
        jobs: Where reports go.
        queues: By position in the stack, of every tier but the host pool.
    """

    def __init__(self, jobs: Jobs, queues: Mapping[int, TierQueue]) -> None:
        self._jobs = jobs
        self._block_bytes = max(jobs.object_bytes)
        """Of a region. Each try has memory of its own: a tier that hangs shall hold nobody's."""
        self._group = jobs.object_bytes.index(self._block_bytes)
        self._queues = queues
        self._trials: dict[int, _Trial] = {}

    def __repr__(self) -> str:
        return f"<Probes {sorted(self._trials)}>"

    @property
    def pause_s(self) -> float | None:
        """Seconds until a tier is tried; None: none is to be tried."""
        next_s = min((trial.next_s for trial in list(self._trials.values())), default=None)
        return None if next_s is None else max(0.0, next_s - time.monotonic())

    def begin(self, probe: Probe) -> None:
        """Try a tier from now on."""
        self._trials[probe.tier] = _Trial(probe, time.monotonic() + probe.first_pause_s, probe.first_pause_s)

    def poll(self) -> None:
        """Start the tries that are due."""
        now_s = time.monotonic()
        for trial in list(self._trials.values()):
            if now_s < trial.next_s:
                continue
            queue = self._queues[trial.probe.tier]
            if not queue.failing:  # On this rank it has worked since, or never failed.
                self._end(trial)
                continue
            trial.is_silent |= Op.LOOKUP in queue.failing
            trial.pause_s = min(2 * trial.pause_s, trial.probe.longest_pause_s)
            trial.next_s = now_s + trial.pause_s
            if not queue.is_busy_with(PROBE_KEY):
                self._start(trial, queue)

    def take(self, move: Move) -> bool:
        """Take a block of ours that its tier has brought. False: it is an engine's."""
        if move.key != PROBE_KEY:
            return False
        self._queues[move.tier].let_go(move)
        self._jobs.end_move(move, Reason.NONE)
        return True

    def _start(self, trial: _Trial, queue: TierQueue) -> None:
        tier = trial.probe.tier
        if queue.tier.capabilities.shared:
            ask = Lookup(0, tier, [PROBE_KEY], self._group)
            self._queue(queue.loads, ask, lambda reason: self._asked(trial, reason))
        else:
            region = self._new_region()
            region.view()[:16] = os.urandom(16)
            queue.drop([PROBE_KEY])
            write = Store(0, [PROBE_KEY], [], [tier], self._group)
            self._queue(queue.stores, write, lambda reason: self._written(trial, reason), region)

    def _new_region(self) -> Region:
        region = Staging(0, self._block_bytes).take()
        assert region is not None, "it has one at least"
        return region

    def _queue(
        self, waiting: deque[Move], op: Store | Load | Lookup, ended: Callable[[Reason], None],
        region: Region | None = None,
    ) -> None:  # fmt: skip
        """Have a tier's queue take a block before all that waits there."""
        [tier] = op.tiers
        lease = Lease(region) if region else None
        waiting.appendleft(Move(self._jobs.begin_own(op, ended), 0, tier, lease))

    def _written(self, trial: _Trial, reason: Reason) -> None:
        if reason is Reason.NONE:
            tier = trial.probe.tier
            read = Load(0, "", tier, -1, [PROBE_KEY], [0], group=self._group)
            self._queue(
                self._queues[tier].loads, read, lambda reason: self._read(trial, reason), self._new_region()
            )

    def _read(self, trial: _Trial, reason: Reason) -> None:
        self._queues[trial.probe.tier].drop([PROBE_KEY])
        if reason in (Reason.NONE, Reason.MISSING):
            self._say_works(trial, "a block was written and read back")

    def _asked(self, trial: _Trial, reason: Reason) -> None:
        if reason.is_fault:
            trial.is_silent = True
        elif reason in (Reason.NONE, Reason.MISSING) and trial.is_silent:
            self._say_works(trial, "it answered when it was asked for a block")

    def _say_works(self, trial: _Trial, how: str) -> None:
        queue = self._queues[trial.probe.tier]
        # Else something of a plan has worked meanwhile: the leader says so.
        since_s = queue.failing_since_s
        if self._trials.get(trial.probe.tier) is trial and since_s is not None:
            since = spell_words(since_s, time.monotonic())
            queue.failing.clear()
            logger.warning("tier %s works again (%s); it had failed %s", queue.tier.name, how, since)
            self._end(trial, how)

    def _end(self, trial: _Trial, how: str = "") -> None:
        """Tell the leader; `how` says that a line was written."""
        probe = trial.probe
        del self._trials[probe.tier]
        self._jobs.report(Report(probe.op, probe.tier, detail=how))
