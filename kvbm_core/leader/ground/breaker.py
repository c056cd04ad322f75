"""Leaves a failing tier alone for a while, and lets it come back by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvbm_core.tier import Op, Reason

__all__ = ["Breaker"]

_SILENT: Final = frozenset({Reason.FULL, Reason.BUSY})
"""What a tier answers without its medium: it shows neither that this works nor that it fails."""


@dataclass(slots=True)
class _Row:
    """Operations of one kind that failed by the tier's fault, since one of that kind worked last."""

    since_s: float
    faults: int = 0


class Breaker:
    """Opens after `threshold` operations that failed by the tier's fault, none of their kinds working since.

    What works speaks for its own kind alone: a store that answers questions may hang in its loads.
    While it is open the tier is neither read nor written. It closes for one trial after a pause
    that doubles with every trial that fails.
    """

    threshold: Final = 3
    first_pause_s: Final = 1.0
    longest_pause_s: Final = 60.0

    def __init__(self) -> None:
        self._rows: dict[Op, _Row] = {}
        self._pause_s = self.first_pause_s
        self._until_s = 0.0
        self.left_alone_for: tuple[Op, Reason] | None = None
        """The operation that failed last and why, from when it opened until what failed has worked.
        Also during the trial after a pause."""

    def __repr__(self) -> str:
        rows = ", ".join(f"{op.value} {row.faults}" for op, row in self._rows.items()) or "no"
        return f"<Breaker {rows} faults, open until {self._until_s:.1f} s>"

    def closed(self, now_s: float) -> bool:
        """Say whether the tier may be used at `now_s`."""
        return now_s >= self._until_s

    @property
    def until_s(self) -> float:
        """When the tier is tried again."""
        return self._until_s

    @property
    def since_s(self) -> float | None:
        """Since when the tier has failed; None: it has not, or what failed has worked since."""
        return min((row.since_s for row in self._rows.values()), default=None)

    def note(self, op: Op, reason: Reason, now_s: float) -> bool:
        """Take in how an operation of a kind ended (NONE for well). True if this opened the breaker."""
        if reason in _SILENT:
            return False
        if not reason.is_fault:
            self._rows.pop(op, None)
            if not self._rows:
                self._pause_s, self.left_alone_for = self.first_pause_s, None
            return False
        self._rows.setdefault(op, _Row(now_s)).faults += 1
        faults = sum(row.faults for row in self._rows.values())
        # What ends while it is open was begun before: no trial.
        if faults < self.threshold or not self.closed(now_s):
            return False
        self._until_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, self.longest_pause_s)
        self.left_alone_for = (op, reason)
        return True

    def close(self, now_s: float) -> None:
        """Take in that the tier works, in all it does: it may be used from now on."""
        self._rows.clear()
        self.left_alone_for = None
        self._pause_s, self._until_s = self.first_pause_s, now_s
