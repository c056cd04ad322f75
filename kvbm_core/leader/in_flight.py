"""The leader's operations that are under way: which ranks have yet to report each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvbm_core.plan import Fill, Load, Lookup, Probe, Report, Store
from kvbm_core.tier import Reason

__all__ = ["InFlight", "LegEnded", "Pending"]

_SEVERITY: Final = (Reason.MISSING, Reason.BUSY, Reason.FULL, Reason.DEADLINE, Reason.ERROR, Reason.CORRUPT)
"""Of what two ranks say of one block, the graver counts: a rank whose tier fails must be noticed beside
one that only has not the block, and a corrupt part must be dropped."""


@dataclass(slots=True)
class Pending:
    """An operation whose reports have not all come."""

    op: Store | Load | Lookup | Fill | Probe
    waiting: dict[int, int]
    """Tier to ranks that have yet to report."""
    failures: dict[int, dict[int, Reason]] = field(default_factory=dict)
    """Tier to position to reason, over all ranks."""
    full: set[int] = field(default_factory=set)
    """Tiers that had no room themselves, on some rank."""
    details: dict[int, str] = field(default_factory=dict)
    """Tier to its own words for a failure."""
    took_s: dict[int, float] = field(default_factory=dict)
    """Tier to the seconds that the slowest rank so far took."""
    charges: dict[int, list[int]] = field(default_factory=dict)
    """Tier to the bytes that each object takes, on the rank where it takes most. Empty: as reserved."""
    doomed: bool = False
    """True if a reset came in between: the blocks that arrive are dropped again."""
    pinned: bool = True
    """True if the blocks of a load are pinned. False for blocks that had left their tier before."""

    def take_charges(self, report: Report) -> None:
        """Take in the bytes that a rank's objects take. A rank that says none has what was reserved."""
        known = self.charges.get(report.tier)
        if known is None or not report.charges:
            self.charges[report.tier] = report.charges
        elif known:
            self.charges[report.tier] = list(map(max, known, report.charges))


class LegEnded(NamedTuple):
    """An operation that every rank has reported for one tier."""

    pending: Pending
    tier: int
    is_last: bool
    """True if the operation has ended in all its tiers."""


class InFlight:
    """Counts ranks: the one place that knows when an operation has ended on all of them.

    Args:
        world_size: Ranks of the engine.
        numbers: Numbers for operations, where planners follow each other: no late report may fit another one.
    """

    def __init__(self, world_size: int, numbers: Iterator[int] | None = None) -> None:
        self._world_size = world_size
        self._numbers = numbers or itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._probes = 0
        """Of them, those that nobody waits for."""
        self.latest = 0
        """The number drawn last."""

    def __repr__(self) -> str:
        return f"<InFlight {len(self)} operations>"

    def __len__(self) -> int:
        """Count the operations that will end soon: a probe ends when its tier works again."""
        return len(self._pending) - self._probes

    def __contains__(self, op: object) -> bool:
        """Return True if an operation, by its number, has not ended."""
        return op in self._pending

    @property
    def over_several_ranks(self) -> bool:
        """True if one rank may have a block that another has not."""
        return self._world_size > 1

    def number(self) -> int:
        """Draw the number of the next operation."""
        self.latest = next(self._numbers)
        return self.latest

    def expect(self, op: Store | Load | Lookup | Fill | Probe, *, pinned: bool = True) -> None:
        """Wait for every rank's report of an operation in each of its tiers."""
        self._probes += isinstance(op, Probe)
        self._pending[op.op] = Pending(op, dict.fromkeys(op.tiers, self._world_size), pinned=pinned)

    def take_in(self, reports: Iterable[Report]) -> Iterator[LegEnded]:
        """Take in reports, and give each tier's end of an operation as soon as all ranks have reported it.

        A report that is not expected is of a planner before, and ignored.
        """
        for report in reports:
            pending = self._pending.get(report.op)
            if pending is None or report.tier not in pending.waiting:
                continue
            known = pending.failures.setdefault(report.tier, {})
            for at, why in report.failures.items():
                known[at] = max(why, known.get(at, why), key=_SEVERITY.index)
            if report.full:
                pending.full.add(report.tier)
            if report.detail:
                pending.details.setdefault(report.tier, report.detail)
            pending.take_charges(report)
            pending.waiting[report.tier] -= 1
            pending.took_s[report.tier] = max(pending.took_s.get(report.tier, 0.0), report.seconds)
            if pending.waiting[report.tier]:
                continue
            del pending.waiting[report.tier]
            if not pending.waiting:
                del self._pending[report.op]
                self._probes -= isinstance(pending.op, Probe)
            yield LegEnded(pending, report.tier, not pending.waiting)

    def doom(self) -> None:
        """Have all that is under way dropped when it arrives."""
        for pending in self._pending.values():
            pending.doomed = True
