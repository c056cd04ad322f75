"""One rank's session: carries out the leader's plans, and says what came of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from kvbm_core import Load, Report, Worker
from kvbm_engine._values import Outcome, Step
from kvbm_metrics import device_readings

__all__ = ["Copies", "CopyCounter", "Progress", "Rank"]


class Progress:
    """What has ended on a rank and was not said yet. It outlives the tiers: what they owe has failed then.

    Args:
        whole_requests: True if a failure is that of a request, and not of its blocks: with several KV groups
            a prefix is restored in all of them or in none.
    """

    def __init__(self, *, whole_requests: bool = False) -> None:
        self._whole_requests = whole_requests
        self.begun: Step | None = None
        """The step that was begun last."""
        self.reported_step = 0
        """The last step whose outcome held a report."""
        self._loads: dict[int, Load] = {}
        """Loads under way that a request waits for, by operation."""
        self._open: dict[str, set[int]] = {}
        """Their operations, by request."""
        self._finished: set[str] = set()
        """Requests whose loads have all ended."""
        self._failed_blocks: set[int] = set()
        self._failing: set[str] = set()
        """Requests of which a load has failed, and that were not named yet."""
        self._failed_requests: set[str] = set()
        """Of these, those whose loads have all ended."""
        self._reports: list[Report] = []

    def __repr__(self) -> str:
        return f"<Progress {len(self._open)} requests loading, {len(self._reports)} reports to be sent>"

    @property
    def is_loading(self) -> bool:
        """True if a request waits for a load."""
        return bool(self._open)

    def begin(self, step: Step) -> None:
        """Note that a step begins, and the loads that requests wait for."""
        self.begun = step
        for load in step.plan.loads:
            if load.in_step:  # The engine does not wait to be told that it has ended.
                continue
            self._loads[load.op] = load
            self._open.setdefault(load.request, set()).add(load.op)

    def take_in(self, reports: Sequence[Report]) -> None:
        """Take in what has ended."""
        for report in reports:
            self._reports.append(report)
            load = self._loads.get(report.op)
            if load and report.tier == load.tier:
                self.end(load, report.failures)

    def end(self, load: Load, failures: Iterable[int]) -> None:
        """Note that a load has ended, with the positions that failed."""
        del self._loads[load.op]
        if not self._whole_requests:
            self._failed_blocks.update(load.blocks[at] for at in failures)
        elif any(True for _ in failures):
            self._failing.add(load.request)
        still_open = self._open[load.request]
        still_open.discard(load.op)
        if not still_open:
            del self._open[load.request]
            self._finished.add(load.request)
            if load.request in self._failing:
                self._failing.discard(load.request)
                self._failed_requests.add(load.request)

    def fail_all(self) -> None:
        """Have every load under way fail, of which no report will come."""
        for load in list(self._loads.values()):
            self.end(load, range(len(load.blocks)))

    def take_finished(self) -> set[str]:
        """Take the requests whose loads have all ended, well or not. Each is named once."""
        finished, self._finished = self._finished, set()
        return finished

    def take_failed_requests(self) -> set[str]:
        """Take the requests that were not loaded as a whole. Each was named as finished no later."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_failed_blocks(self) -> set[int]:
        """Take the device blocks that were not loaded, of the requests named and to be named."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_outcome(self) -> Outcome | None:
        """Take what the leader must know of the step that was begun last. None: nothing."""
        if self.begun is None or not (self._reports or self.begun.computes):
            return None
        reports, self._reports = self._reports, []
        if reports:
            self.reported_step = self.begun.number
        return Outcome(reports, self.begun.number)


class CopyCounter(Protocol):
    """What a device counts."""

    gathered_bytes: int
    scattered_bytes: int
    staging_full_blocks: int


class Copies:
    """Readings of what a device has copied.

    Args:
        counts: What the device counts.
    """

    def __init__(self, counts: CopyCounter) -> None:
        self._counts = counts
        self._taken: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Copies {self._counts!r}>"

    def take(self) -> dict[str, int]:
        """Give what was copied since the last call."""
        before, counts = self._taken, self._counts
        self._taken = device_readings(
            counts.gathered_bytes, counts.scattered_bytes, counts.staging_full_blocks
        )
        news = {key: value - before.get(key, 0) for key, value in self._taken.items()}
        return {key: value for key, value in news.items() if value}


class Rank:
    """Moves one rank's blocks.

    Args:
        worker: With its tiers open; closed with the rank.
        copies: What its device has copied.
        progress: Is told what ends. It may be older than the rank, and outlives it.
        load_wait_s: How long an idle step waits for progress: an engine that only waits for a disk shall not
            burn a core, and the worker's thread needs the interpreter meanwhile.
        store_wait_s: Likewise where no request is loading: the next may come at any time, and is not seen
            while it waits.
    """

    def __init__(
        self,
        worker: Worker,
        copies: Copies,
        progress: Progress,
        *,
        load_wait_s: float = 0.005,
        store_wait_s: float = 0.001,
    ) -> None:
        self.worker = worker
        self.copies = copies
        self.progress = progress
        self.load_wait_s = load_wait_s
        self.store_wait_s = store_wait_s

    def __repr__(self) -> str:
        return f"<Rank {self.progress!r}; {self.worker!r}>"

    def begin(self, step: Step) -> None:
        """Start a step's plan, before anything of the step is computed.

        Raises:
            Exception: If the step computes with blocks that cannot be loaded.
        """
        self.progress.begin(step)
        if step.plan:
            self.worker.submit(step.plan)

    def collect(self) -> None:
        """Take in what has ended; an idle step waits a little for something to end."""
        progress = self.progress
        begun = progress.begun
        # Not if the leader has not heard yet what came last: a request may wait for just that.
        if begun and begun.idle and begun.acked_step >= progress.reported_step:
            self.worker.wait(self.load_wait_s if progress.is_loading else self.store_wait_s)
        progress.take_in(self.worker.reports())

    def close(self) -> None:
        """Close the tiers; what is under way has failed."""
        self.worker.close()
        self.progress.take_in(self.worker.reports())
        self.progress.fail_all()
