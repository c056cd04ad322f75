"""The operations of plans that are under way on one rank, and how they end.

Job      one operation of a plan
Move     one block of a job on its way to or from one tier
Copy     the blocks of a job that the device copies in one call
Jobs   all jobs, and the reports that nobody has taken yet
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.device import Fence, Work
from kvbm_core.plan import Fill, Load, Lookup, Report, Store
from kvbm_core.tier import Completion, Op, Reason, Transfer
from kvbm_core.worker.host_buffers import BatchLease, Lease

__all__ = ["Copy", "Failed", "Job", "Jobs", "Move"]

_FIRST_BYTES: Final = 64 << 20
"""Of a load from the host pool: under way a millisecond on the link while the next are looked up."""
_FIRST_BLOCKS: Final = 128
"""Likewise, where they are small: they are looked up in half a millisecond."""
_TIMES_FIRST: Final = 4
"""Of the other parts."""
_LOAD_PAUSE_S: Final = 0.001
"""Not shorter: each look takes the interpreter from the engine, in the middle of its computation."""
_STORE_PAUSE_S: Final = 0.002
_DETAIL_CHARACTERS: Final = 200
"""Of a tier's own words: they travel with a report, and end in one line of the log."""
_OPS: Final = {Store: Op.STORE, Load: Op.LOAD, Lookup: Op.LOOKUP}


@dataclass(slots=True, eq=False)
class Job:
    """One operation of a plan."""

    op: Store | Load | Lookup | Fill
    began_s: float
    deadline_s: float
    left: dict[int, int]
    """Tier to blocks that have not ended there."""
    object_bytes: int
    """Length of each of its objects on this rank."""
    fence: Fence = None
    """Its place in the engine's order of work."""
    failures: dict[int, dict[int, Reason]] = field(default_factory=dict)
    """Tier to position to reason."""
    full: set[int] = field(default_factory=set)
    """Tiers that had no room themselves."""
    details: dict[int, str] = field(default_factory=dict)
    """Tier to its own words for a failure."""
    charges: dict[int, dict[int, int]] = field(default_factory=dict)
    """Tier to position to the bytes that its object takes there, where that is not what was reserved."""
    reserved: dict[int, int] = field(default_factory=dict)
    """Tier to the bytes reserved for each object, of the tiers in `charges`."""
    ended: Callable[[Reason], None] | None = None
    """Of a job of one block that no plan asked for: takes in how it ended."""

    @property
    def pause_s(self) -> float:
        """Seconds between two looks at the device's copies for it: they wake nobody when they end."""
        return _LOAD_PAUSE_S if isinstance(self.op, Load) else _STORE_PAUSE_S

    def parts(self) -> list[range]:
        """Divide a load from the host pool: the first blocks are copied while the next are looked up."""
        count = len(self.op.keys)
        first = min(count, max(1, min(_FIRST_BLOCKS, _FIRST_BYTES // self.object_bytes)))
        step = _TIMES_FIRST * first
        return [range(first), *(range(at, min(count, at + step)) for at in range(first, count, step))]

    def failed(self, tier: int) -> Report:
        """Report that nothing of it has reached a tier."""
        return Report(self.op.op, tier, dict.fromkeys(range(len(self.op.keys)), Reason.ERROR), 0.0)

    def end(self, places: Sequence[int], tier: int, reason: Reason) -> Report | None:
        """Note how blocks ended in one tier; report the last of a tier."""
        if reason is not Reason.NONE:
            self.failures.setdefault(tier, {}).update(dict.fromkeys(places, reason))
        self.left[tier] -= len(places)
        if self.left[tier]:
            return None
        del self.left[tier]
        took_s = time.monotonic() - self.began_s
        failures, detail = self.failures.get(tier, {}), self.details.get(tier, "")
        return Report(
            self.op.op, tier, failures, took_s, tier in self.full, detail, self._charges_of(tier)
        )  # fmt: skip

    def _charges_of(self, tier: int) -> list[int]:
        if tier not in self.charges:
            return []
        charges, reserved = self.charges[tier], self.reserved[tier]
        return [charges.get(at, reserved) for at in range(len(self.op.keys))]

    def charge(self, tier: int, at: int, charge: int, reserved: int) -> None:
        """Note the bytes that an object takes in a tier, and those that were reserved for it."""
        if charge != reserved:
            self.charges.setdefault(tier, {})[at] = charge
            self.reserved[tier] = reserved

    def note(self, tier: int, completion: Completion) -> None:
        """Note what a tier says of a failure beside its reason."""
        if completion.reason is Reason.FULL:
            self.full.add(tier)
        if completion.detail and tier not in self.details:
            words = " ".join(completion.detail.split())
            self.details[tier] = "".join(filter(str.isprintable, words))[:_DETAIL_CHARACTERS]


@dataclass(slots=True, eq=False)
class Move:
    """One block of a job on its way to or from one tier."""

    job: Job
    at: int
    """Position in the operation's keys."""
    tier: int
    lease: Lease | None = None
    fills: bool = False
    """True if the lease is the host pool's, which shall publish the block."""

    @property
    def key(self) -> BlockKey:
        """The block."""
        return self.job.op.keys[self.at]

    @property
    def kind(self) -> Op:
        """What its tier is asked to do."""
        op = self.job.op
        if isinstance(op, Fill):
            return Op.LOAD if self.tier == op.source else Op.STORE
        return _OPS[type(op)]

    @property
    def is_kept(self) -> bool:
        """True if the host pool shall keep the block that its tier brings."""
        op = self.job.op
        return op.fill >= 0 if isinstance(op, Load) else isinstance(op, Fill) and op.target == op.host_pool

    def transfer(self, ticket: int) -> Transfer:
        """Make the transfer that a tier is asked for."""
        region = self.lease.region if self.lease else None
        head = getattr(self.job.op, "head", b"") or None
        return Transfer(ticket, self.kind, self.key, region, self.job.deadline_s, head)


class Failed(Work):
    """A copy that could not be started."""

    def done(self) -> bool:
        """See `Work.done`."""
        raise RuntimeError("the copy could not be started")

    @property
    def given_up(self) -> frozenset[int]:
        """See `Work.given_up`."""
        return frozenset()


@dataclass(slots=True, eq=False)
class Copy:
    """The blocks of a job that the device copies in one call: `moves`, a `batch` or `leases`."""

    job: Job
    places: Sequence[int]
    """Positions in the operation's keys."""
    moves: Sequence[Move] = ()
    """Of a load, the blocks that a tier has brought."""
    batch: BatchLease | None = None
    """Blocks in the host pool's memory."""
    leases: Mapping[int, Lease] = field(default_factory=dict)
    """Of a store, by position, the blocks that go to other tiers only."""
    work: Work = Failed()  # noqa: RUF009 - it holds nothing
    """`Failed` until the device has started it."""


class Jobs:
    """The jobs under way, and the reports that nobody has taken yet.

    Args:
        object_bytes: For each KV group the length of its objects on this rank; 0 where it has no layer of
            the group.
        store_deadline_s: Seconds a store may take.
        load_deadline_s: Seconds a load may take.
        lookup_deadline_s: Seconds a lookup may take.
    """

    def __init__(
        self,
        object_bytes: Sequence[int],
        *,
        store_deadline_s: float,
        load_deadline_s: float,
        lookup_deadline_s: float,
    ) -> None:
        self.object_bytes = tuple(object_bytes)
        self._limits_s = {
            Store: store_deadline_s, Fill: store_deadline_s,
            Load: load_deadline_s, Lookup: lookup_deadline_s,
        }  # fmt: skip
        self._jobs: set[Job] = set()
        self._reports: list[Report] = []
        self.lock = threading.Lock()
        """Guards this bookkeeping, the leases and the queues of tiers."""
        self.is_broken = False
        """True after a bug: every job has ended, and each new one fails."""

    def __repr__(self) -> str:
        return f"<Jobs {len(self._jobs)} jobs>"

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def has_reports(self) -> bool:
        """True if `take_reports` has something to give."""
        return bool(self._reports)

    def begin(self, op: Store | Load | Lookup | Fill) -> Job | None:
        """Open a job. It fails at once after a bug. None: it has ended, because its objects have no bytes."""
        job = self._make(op)
        with self.lock:
            if self.is_broken:
                self._reports += [job.failed(tier) for tier in op.tiers]
            elif not job.object_bytes:
                nothing = [0] * len(op.keys)
                self._reports += [Report(op.op, tier, charges=nothing) for tier in op.tiers]
                return None
            else:
                self._jobs.add(job)
        return job

    def begin_own(self, op: Store | Load | Lookup, ended: Callable[[Reason], None]) -> Job:
        """Open a job of one block that the leader knows nothing of."""
        job = self._make(op)
        job.ended = ended
        return job

    def report(self, report: Report) -> None:
        """Tell the leader something. Under the lock."""
        self._reports.append(report)

    def end(self, job: Job, places: Sequence[int], tier: int, reason: Reason) -> None:
        """Note how blocks of a job, by their positions, ended in one tier. Under the lock."""
        if job.ended:
            job.ended(reason)
        if job not in self._jobs or not places:
            return
        if report := job.end(places, tier, reason):
            self._reports.append(report)
        if not job.left:
            self._jobs.discard(job)

    def end_move(self, move: Move, reason: Reason) -> None:
        """Note how a move ended: in its tier, and in the host pool that was to keep the block."""
        op = move.job.op
        if isinstance(op, Load) and op.fill >= 0:
            self.end(move.job, [move.at], op.fill, reason)
        elif isinstance(op, Fill) and move.tier == op.source:
            self.end(move.job, [move.at], op.target, Reason.MISSING)  # It has not been in that tier.
        self.end(move.job, [move.at], move.tier, reason)

    def take_reports(self) -> list[Report]:
        """Take the reports that have come since the last call."""
        with self.lock:
            reports, self._reports = self._reports, []
        return reports

    def fail_all(self) -> None:
        """End every job, after a bug."""
        with self.lock:
            for job in list(self._jobs):
                for tier in list(job.left):
                    self._reports.append(job.failed(tier))
            self._jobs.clear()

    def _make(self, op: Store | Load | Lookup | Fill) -> Job:
        now_s = time.monotonic()
        left = dict.fromkeys(op.tiers, len(op.keys))
        return Job(op, now_s, now_s + self._limits_s[type(op)], left, self.object_bytes[op.group])
