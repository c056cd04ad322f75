"""Leaves a failing tier alone for a while, and lets it come back by itself."""

from __future__ import annotations

from typing import Final

from kvbm_core.tier import Reason

__all__ = ["Breaker"]

_FAULTS: Final = frozenset({Reason.DEADLINE, Reason.ERROR})
"""What speaks against the tier, not against one block."""
_SILENT: Final = frozenset({Reason.FULL, Reason.BUSY})
"""What a tier answers without its medium: it shows neither that this works nor that it fails."""


class Breaker:
    """Opens after `threshold` operations in a row that failed by the tier's fault.

    While it is open the tier is neither read nor written. It closes for one trial after a pause
    that doubles with every trial that fails.
    """

    threshold: Final = 3
    first_pause_s: Final = 1.0
    longest_pause_s: Final = 60.0

    def __init__(self) -> None:
        self._faults = 0
        self._pause_s = self.first_pause_s
        self._until_s = 0.0
        self._since_s: float | None = None
        """When the first of the faults came for which it was opened; None: the tier works."""

    def __repr__(self) -> str:
        return f"<Breaker {self._faults} faults, open until {self._until_s:.1f} s>"

    def closed(self, now_s: float) -> bool:
        """Say whether the tier may be used at `now_s`."""
        return now_s >= self._until_s

    @property
    def until_s(self) -> float:
        """When the tier is tried again."""
        return self._until_s

    @property
    def since_s(self) -> float | None:
        """Since when the tier has failed; None: it has not, or has worked since."""
        return self._since_s

    def note(self, reason: Reason, now_s: float) -> bool:
        """Take in how an operation ended (NONE for well). True if this opened the breaker."""
        if reason in _SILENT:
            return False
        if reason not in _FAULTS:
            self._faults, self._pause_s, self._since_s = 0, self.first_pause_s, None
            return False
        self._faults += 1
        self._since_s = now_s if self._since_s is None else self._since_s
        # What ends while it is open was begun before: no trial.
        if self._faults < self.threshold or not self.closed(now_s):
            return False
        self._until_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, self.longest_pause_s)
        return True
