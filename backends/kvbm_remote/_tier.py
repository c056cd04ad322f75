"""Objects in a store that many engines share: an object store, a file server, a mounted directory.

    caller ── submit ──► jobs ──► event loop, or threads ── get, put, size ──► store
    caller ◄── poll ── completions ◄──┘

    <url>/v1/<namespace>/r<rank>of<ranks>/<first two digits>/<key>    all in hexadecimal
    <url>/v1/facts/r<rank>/<namespace>.json                           see `_facts`

Nothing here waits for the store, also not at open: an engine starts while it is down.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final

from kvbm_core.block import BlockKey
from kvbm_core.errors import QueueFullError, TierError
from kvbm_core.log_limit import LogLimit, TierLog
from kvbm_core.tier import Capabilities, Completion, Op, Outcome, Reason, Tier, TierContext, Transfer
from kvbm_remote._clients import WITHOUT_ROOT, check, is_read_only, make_store
from kvbm_remote._config import RemoteConfig, shown_url
from kvbm_remote._facts import RemoteFacts
from kvbm_remote._faults import Fault, WrongLengthError, classify
from kvbm_remote._kinds import BUCKET, MISSING
from kvbm_remote._runners import Job, LoopRunner, Runner, ThreadRunner
from kvbm_remote._stores import LITTER_S, TEMPORARY, TOP, UNSAID, is_temporary

__all__ = ["RemoteTier"]

_QUEUE_FACTOR: Final = 4
"""Transfers taken, for each that is under way."""
_PRESENT_S: Final = 30.0
"""What was seen counts as there for so long. Others delete rarely."""
_ABSENT_S: Final = 1.0
"""What was not there may be stored by another engine at any time."""
_MAX_SEEN: Final = 1 << 16
"""Answers remembered."""
_MAX_GONE: Final = 1 << 16
"""Corrupt blocks remembered until they are deleted or written again."""
_MAX_DELETING: Final = 1024
"""Deletions queued. Further ones are not made: the block is absent here, and others find it corrupt."""
_GRACE_S: Final = 0.5
"""A transfer whose client library does not end in time is answered so much later without it."""
_CLOSE_WAIT_S: Final = 3.0
"""What is queued at close is finished for so long; the rest fails."""


class RemoteTier(Tier):
    """Blocks as objects, one each."""

    def __init__(self, config: RemoteConfig, context: TierContext) -> None:
        check(config)
        self._config = config
        self._context = context
        self._place = shown_url(config.url)
        self._read_only = is_read_only(config)
        self._log = TierLog("kvbm_remote", context.name)
        self._store = make_store(config, self._log)
        self._depth = _QUEUE_FACTOR * config.max_in_flight
        self._capabilities = Capabilities(
            capacity_bytes=None,
            queue_depth=self._depth,
            durable=config.protocol != "memory",
            shared=True,
            remote_lookup=True,
            detail=f"{self._place} by {self._store.client}" + (", read only" if self._read_only else ""),
            read_only=self._read_only,
        )
        self._folder = f"{TOP}/{context.namespace.hex()}/r{context.rank}of{context.world_size}"
        self._facts = RemoteFacts(self._store, context, self._place, self._log, read_only=self._read_only)
        self._lines = LogLimit(self._log)
        self._lock = threading.Lock()
        self._open: dict[int, Job] = {}
        self._done: deque[Completion] = deque()
        self._unpolled = 0
        self._seen: OrderedDict[BlockKey, tuple[float, int | None]] = OrderedDict()
        """Until when an answer counts, and how long the object is; `UNSAID` if unknown, None if absent."""
        self._gone: OrderedDict[BlockKey, None] = OrderedDict()
        self._deleting: dict[BlockKey, list[Job]] = {}
        self._next_expiry_s = 0.0
        self._closed = False
        self._runner = self._start()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._unpolled} in flight"
        return f"<RemoteTier {self._place} by {self._store.client}, {state}>"

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        """See `Tier.inventory`. Empty: a shared store may hold millions, ask with LOOKUP."""
        return ()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`.

        Raises:
            TierError: If the tier is closed.
        """
        if self._closed:
            raise TierError("the tier is closed", operation="submit", tier=self._context.name)
        if self._unpolled + len(transfers) > self._depth:
            raise QueueFullError(
                f"{len(transfers)} transfers do not fit beside {self._unpolled} in flight; "
                f"the queue takes {self._depth}",
                operation="submit",
                tier=self._context.name,
            )
        self._unpolled += len(transfers)
        now_s = time.monotonic()
        answers, jobs = [], []
        with self._lock:
            for transfer in transfers:
                answer = self._answer(transfer, now_s)
                if answer is not None:
                    answers.append(answer)
                elif (job := self._accept(transfer, now_s)) is not None:
                    jobs.append(job)
        if now_s >= self._facts.due_s and any(transfer.op is Op.STORE for transfer in transfers):
            self._facts.begin()
            jobs.append(self._errand(self._facts.write, "facts"))
        if jobs:
            self._runner.push(jobs)
        if answers:
            self._done.extend(answers)
            self._context.wake()

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`. Also gives up what its client library does not."""
        now_s = time.monotonic()
        if self._open and now_s >= self._next_expiry_s:
            self._next_expiry_s = now_s + _GRACE_S / 4
            self._expire_overdue(now_s)
        # Only this thread takes, so that many are there.
        done = [self._done.popleft() for _ in range(len(self._done))]
        self._unpolled -= len(done)
        return done

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`. Absent here at once, deleted for all in the background."""
        if self._closed:
            return
        jobs = []
        with self._lock:
            for key in keys:
                self._seen.pop(key, None)
                self._gone[key] = None
                if len(self._gone) > _MAX_GONE:
                    self._gone.popitem(last=False)
                if not self._read_only and key not in self._deleting and len(self._deleting) < _MAX_DELETING:
                    self._deleting[key] = []
                    jobs.append(Job(key, None, self._latest_s(time.monotonic())))
        if jobs:
            self._runner.push(jobs)

    def close(self) -> None:
        """See `Tier.close`. Finishes what is queued for up to 3 s, then fails the rest."""
        if self._closed:
            return
        self._closed = True
        self._runner.close(time.monotonic() + _CLOSE_WAIT_S, self._let_go)
        with self._lock:
            left, self._open = list(self._open), {}
        if left:
            closed = "the tier was closed"
            self._done.extend(Completion(ticket, Outcome.FAILED, Reason.DEADLINE, closed) for ticket in left)
            self._context.wake()
        self._lines.close()

    def _start(self) -> Runner:
        limit = self._config.max_in_flight
        runner: Runner = (
            LoopRunner(self._handle, self._time_is_up, limit, self._config.timeout_s, self._log)
            if self._store.asynchronous
            else ThreadRunner(self._handle, limit, self._log)
        )
        # A first look, so that the log soon says what is wrong.
        errands = [self._errand(self._look, "open")]
        # A file system without a root lists nothing.
        if self._context.facts and self._config.protocol not in WITHOUT_ROOT:
            errands.append(self._errand(self._facts.look, "facts"))
        runner.push(errands)
        return runner

    def _errand(self, do: Callable[[], Coroutine[Any, Any, None]], name: str) -> Job:
        return Job(b"", None, self._latest_s(time.monotonic()), errand=do, name=name)

    def _latest_s(self, now_s: float) -> float:
        """Say when a job that is queued now is over at the latest: behind a full queue of slow ones."""
        return now_s + (_QUEUE_FACTOR + 1) * self._config.timeout_s

    # --- under the lock ---

    def _answer(self, transfer: Transfer, now_s: float) -> Completion | None:
        """Answer what needs no request."""
        ticket, key = transfer.ticket, transfer.key
        expires_s, nbytes = self._seen.get(key, (0.0, None))
        fresh = expires_s > now_s
        present = Completion(ticket, Outcome.DONE, nbytes=max(0, nbytes or 0))
        if transfer.op is Op.STORE:
            if self._read_only:
                # Not an error: the tier works as it should.
                return Completion(ticket, Outcome.FAILED, Reason.FULL)
            return present if fresh and nbytes is not None else None
        if key in self._gone or (transfer.op is Op.LOOKUP and fresh and nbytes is None):
            return Completion(ticket, Outcome.MISSING, Reason.MISSING)
        return present if transfer.op is Op.LOOKUP and fresh else None

    def _accept(self, transfer: Transfer, now_s: float) -> Job | None:
        """Open a transfer; its job, unless it waits for a deletion."""
        give_up_s = min(transfer.deadline_s, self._latest_s(now_s))
        job = Job(transfer.key, transfer, give_up_s, overwrite=transfer.key in self._gone)
        self._open[transfer.ticket] = job
        if transfer.op is Op.STORE and transfer.key in self._deleting:
            # Nobody takes those that were given up while the deletion hangs in a client library.
            waiting = [other for other in self._deleting[transfer.key] if not other.ended]
            self._deleting[transfer.key] = [*waiting, job]
            return None
        return job

    def _note(self, key: BlockKey, nbytes: int | None) -> None:
        """Remember how long an object is, `UNSAID` if it is there; or None, that it is not."""
        if nbytes is not None:
            self._gone.pop(key, None)
        self._seen[key] = (time.monotonic() + (_ABSENT_S if nbytes is None else _PRESENT_S), nbytes)
        self._seen.move_to_end(key)
        if len(self._seen) > _MAX_SEEN:
            self._seen.popitem(last=False)

    # --- the loop's thread, or the threads ---

    async def _handle(self, job: Job) -> None:
        """Run a job to its completion."""
        if not self._begin(job):
            return
        fault: Fault | None = None
        for attempt in range(1, self._config.attempts + 1):
            try:
                await self._perform(job)
            except Exception as error:  # noqa: BLE001 - the edge to foreign libraries: it becomes a completion
                fault = self._fault(job, error)
                if fault.kind.again and attempt < self._config.attempts and time.monotonic() < job.give_up_s:
                    continue
            else:
                fault = None
            break
        self._end(job, fault)

    def _fault(self, job: Job, error: Exception) -> Fault:
        fault = classify(error)
        if fault.kind is MISSING and job.transfer is not None and job.transfer.op is Op.STORE:
            # What a write misses is not the object.
            return Fault(BUCKET, fault.detail)
        return fault

    def _begin(self, job: Job) -> bool:
        """Take a job up, unless it was given up in the queue."""
        now_s = time.monotonic()
        with self._lock:
            if job.ended:
                return False
            late = job.give_up_s <= now_s
            job.give_up_s = min(job.give_up_s, now_s + self._config.timeout_s)
            # From here on the region is in use, until the transfer says that it is not.
            job.held = not late
        if late:
            self._time_is_up(job)
        return not late

    async def _perform(self, job: Job) -> None:
        transfer, path = job.transfer, self._path(job.key)
        if job.errand is not None:
            await job.errand()
        elif transfer is None:
            await self._store.delete(path)
        elif transfer.op is Op.LOOKUP:
            job.held = False
            job.nbytes = await self._store.nbytes(path)
            if job.nbytes != UNSAID and not 0 < job.nbytes <= self._context.max_bytes:
                raise WrongLengthError
        elif transfer.op is Op.STORE:
            await self._write(job, path)
        else:
            await self._read(job, path)

    async def _write(self, job: Job, path: str) -> None:
        assert job.transfer is not None
        assert job.transfer.region is not None
        view = job.transfer.region.view()
        if not self._store.abandonable:
            await self._store.put(path, view, overwrite=job.overwrite)
            return
        if not self._hold(job):
            return
        content = bytes(view)
        job.held = False
        await self._store.put(path, content, overwrite=job.overwrite)

    async def _read(self, job: Job, path: str) -> None:
        assert job.transfer is not None
        assert job.transfer.region is not None
        view = job.transfer.region.view()
        job.held = not self._store.abandonable
        content = await self._store.get(path, view)
        # The store says how long an object is, and nobody here has stored an empty one.
        if not 0 < len(content) <= len(view):
            raise WrongLengthError
        job.nbytes = len(content)
        if self._store.abandonable and self._hold(job):
            view[: job.nbytes] = content

    async def _look(self) -> None:
        """Collect what dead writers left, and ask for something that is not there."""
        if not self._read_only:
            async for entry in self._store.entries(TEMPORARY):
                if is_temporary(entry.path) and entry.modified_s < time.time() - LITTER_S:
                    await self._store.delete(entry.path)
        await self._store.get(f"{TOP}/.look", memoryview(b""))

    def _hold(self, job: Job) -> bool:
        """Keep a job from being given up, if it was not already."""
        with self._lock:
            job.held = not job.ended
            return job.held

    def _path(self, key: BlockKey) -> str:
        name = key.hex()
        return f"{self._folder}/{name[:2]}/{name}"

    def _end(self, job: Job, fault: Fault | None) -> None:
        """Complete a job, and remember what it showed."""
        transfer = job.transfer
        reason = Reason.NONE if fault is None else fault.kind.reason
        if fault is not None and fault.kind is not MISSING:
            operation = transfer.op.value if transfer else job.name
            self._lines.warning(fault.kind, "%s: %s failed: %s", self._place, operation, fault)
        if transfer is None:
            self._end_deletion(job, reason)
            return
        missing = reason is Reason.MISSING
        with self._lock:
            if reason is Reason.NONE and not job.ended:
                self._note(job.key, job.nbytes)
            elif missing:
                self._note(job.key, None)
        outcome = Outcome.DONE if fault is None else Outcome.MISSING if missing else Outcome.FAILED
        detail = str(fault) if outcome is Outcome.FAILED else ""
        nbytes = max(0, job.nbytes) if outcome is Outcome.DONE else 0
        self._complete(job, Completion(transfer.ticket, outcome, reason, detail, nbytes))

    def _end_deletion(self, job: Job, reason: Reason) -> None:
        if not job.key:
            return
        with self._lock:
            job.ended = True
            waiting = self._deleting.pop(job.key, [])
            if reason in (Reason.NONE, Reason.MISSING):
                self._gone.pop(job.key, None)
                self._note(job.key, None)
        if waiting:
            self._runner.push(waiting)

    def _complete(self, job: Job, completion: Completion) -> None:
        with self._lock:
            if job.ended:
                return
            job.ended, job.held = True, False
            self._open.pop(completion.ticket, None)
            self._done.append(completion)
        self._context.wake()

    # --- giving up ---

    async def _let_go(self) -> None:
        try:
            await self._store.close()
        except Exception as error:  # noqa: BLE001 - the edge to foreign libraries: nothing depends on it any more
            self._log.warning("%s: closing the connections failed: %s", self._place, classify(error).detail)

    def _time_is_up(self, job: Job) -> None:
        """Complete a job that took too long."""
        self._end(job, classify(TimeoutError()))

    def _expire_overdue(self, now_s: float) -> None:
        with self._lock:
            overdue = [
                job for job in self._open.values() if job.give_up_s + _GRACE_S < now_s and not job.held
            ]
        for job in overdue:
            self._time_is_up(job)
