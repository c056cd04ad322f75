"""What runs the tier's jobs: an event loop in a thread of its own, or a few threads.

A job is a coroutine. On the loop it is awaited, with a limit in time; in a thread it never suspends,
so it is run to its end in one step.
"""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvbm_core.block import BlockKey
from kvbm_core.log_limit import Log
from kvbm_core.tier import Op, Transfer
from kvbm_remote._stores import UNSAID

__all__ = ["Job", "LoopRunner", "Runner", "ThreadRunner"]

_END_WAIT_S: Final = 3.0
"""Cancelled jobs, and threads, have so long to end."""
_TIDY_ABOVE: Final = 4096
"""A queue longer than this is rid of jobs that were given up while they waited. The tier has fewer open."""


@dataclass(eq=False, slots=True)
class Job:
    """One operation under way."""

    key: BlockKey
    """Empty for an errand."""
    transfer: Transfer | None
    """None for a deletion or an errand."""
    give_up_s: float
    """On the clock of ``time.monotonic``."""
    overwrite: bool = False
    errand: Callable[[], Coroutine[Any, Any, None]] | None = None
    """What is done that is about no block."""
    name: str = "delete"
    """What a failure is called, if there is no transfer."""
    held: bool = False
    """The transfer's region is being read or written just now: do not give up."""
    ended: bool = False
    nbytes: int = UNSAID
    """Of the object, as soon as the store has said it."""

    @property
    def passes_stores(self) -> bool:
        """Somebody waits for it: it goes ahead of stores and deletions."""
        return self.transfer is not None and self.transfer.op is not Op.STORE


Handle = Callable[[Job], Coroutine[Any, Any, None]]


class Runner(ABC):
    """Runs jobs, at most so many at once, loads and lookups first."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._to_do = threading.Condition()
        self._ahead: deque[Job] = deque()
        self._behind: deque[Job] = deque()

    @abstractmethod
    def push(self, jobs: Sequence[Job]) -> None:
        """Take jobs. Returns at once."""

    @abstractmethod
    def close(self, finish_by_s: float, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Finish what is queued until a time, give the rest up, then run `last`."""

    def _queue(self, jobs: Sequence[Job]) -> None:
        with self._to_do:
            for queue in (self._ahead, self._behind):
                # Nobody takes them while every thread, or the loop, hangs in a client library.
                if len(queue) > _TIDY_ABOVE:
                    waiting = [job for job in queue if not job.ended]
                    queue.clear()
                    queue.extend(waiting)
            for job in jobs:
                (self._ahead if job.passes_stores else self._behind).append(job)

    def _next(self) -> Job | None:
        with self._to_do:
            queue = self._ahead or self._behind
            return queue.popleft() if queue else None


class LoopRunner(Runner):
    """An event loop in a thread."""

    def __init__(
        self, handle: Handle, expire: Callable[[Job], None], max_in_flight: int, timeout_s: float, log: Log
    ) -> None:
        """Start the thread.

        Args:
            handle: Runs a job, and raises nothing.
            expire: Called on the loop for a job that was cancelled because its time was up.
            max_in_flight: Jobs at once.
            timeout_s: From a job's start to its end.
            log: Where its lines go.
        """
        super().__init__(log)
        self._handle = handle
        self._expire = expire
        self._max_in_flight = max_in_flight
        self._timeout_s = timeout_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._pump_due = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kvbm-remote-loop", daemon=True)
        self._thread.start()

    def push(self, jobs: Sequence[Job]) -> None:
        """See `Runner.push`."""
        self._queue(jobs)
        # Once, however often this is called while a client library holds the loop.
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon_threadsafe(self._pump)

    def close(self, finish_by_s: float, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """See `Runner.close`."""
        ended = asyncio.run_coroutine_threadsafe(self._finish(finish_by_s, last), self._loop)
        try:
            ended.result(max(0.0, finish_by_s - time.monotonic()) + 2 * _END_WAIT_S)
        except TimeoutError:
            self._log.error("a client library does not let go of its connections; leaving them open")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_END_WAIT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _pump(self) -> None:
        # Before it looks for jobs, so that none is pushed unseen.
        self._pump_due = False
        while len(self._tasks) < self._max_in_flight and (job := self._next()) is not None:
            task = self._loop.create_task(self._limited(job))
            self._tasks.add(task)
            task.add_done_callback(self._one_done)

    def _one_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._pump()

    async def _limited(self, job: Job) -> None:
        try:
            async with asyncio.timeout_at(min(job.give_up_s, self._loop.time() + self._timeout_s)):
                await self._handle(job)
        except TimeoutError:
            # Awaited: the operation is over.
            self._expire(job)

    async def _finish(self, finish_by_s: float, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._pump()
        while self._tasks and self._loop.time() < finish_by_s:
            await asyncio.wait(self._tasks, timeout=max(0.0, finish_by_s - self._loop.time()))
        self._ahead.clear()
        self._behind.clear()
        if left := set(self._tasks):
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=_END_WAIT_S)
        await last()
        # What the client library left behind is told to end, too.
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            for other in others:
                other.cancel()
            await asyncio.wait(others, timeout=_END_WAIT_S)


class ThreadRunner(Runner):
    """A few threads, each with one job at a time."""

    def __init__(self, handle: Handle, max_in_flight: int, log: Log) -> None:
        """Start the threads.

        Args:
            handle: Runs a job, and raises nothing.
            max_in_flight: Threads.
            log: Where its lines go.
        """
        super().__init__(log)
        self._handle = handle
        self._closing = False
        names = [f"kvbm-remote-{number}" for number in range(max_in_flight)]
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def push(self, jobs: Sequence[Job]) -> None:
        """See `Runner.push`."""
        with self._to_do:
            self._queue(jobs)
            self._to_do.notify(len(jobs))

    def close(self, finish_by_s: float, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """See `Runner.close`."""
        with self._to_do:
            self._closing = True
            self._to_do.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, finish_by_s - time.monotonic()))
        with self._to_do:
            self._ahead.clear()
            self._behind.clear()
        run_through(last())
        give_up_s = time.monotonic() + _END_WAIT_S
        for thread in self._threads:
            thread.join(max(0.0, give_up_s - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            self._log.error("a file system does not answer; leaving its threads behind")

    def _run(self) -> None:
        while True:
            with self._to_do:
                while (job := self._next()) is None and not self._closing:
                    self._to_do.wait()
            if job is None:
                return
            run_through(self._handle(job))


def run_through(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise RuntimeError("a store that is not asynchronous waited for something")
