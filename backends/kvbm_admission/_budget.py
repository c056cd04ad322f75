"""Writes no more than so many bytes a day, and when these become scarce, what is worth most.

saved up:  full ────────── half ────────── empty
written:   everything      second touch    nothing
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

from kvbm_admission._touches import Touches
from kvbm_core import AdmissionPolicy, BlockKey, ByteSize, ConfigError, Origin, PolicyConfig, PolicyContext

__all__ = ["WriteBudget", "WriteBudgetConfig"]

_DAY_S: Final = 86_400.0
_SAVED_S: Final = 3600.0
"""A budget that is not used is saved up for so long: a burst may write an hour's bytes."""


class WriteBudgetConfig(PolicyConfig, frozen=True):
    """Settings of a `WriteBudget`: bytes a day, or the drive and its writes a day.

    Raises:
        ConfigError: If none or both are given, or a value is out of range.
    """

    bytes_per_day: ByteSize | None = None
    """That may be written, over all ranks."""
    drive: ByteSize | None = None
    """The drive's capacity, as its maker states it."""
    drive_writes_per_day: float = 1.0
    """How often a day the whole drive may be written, as its maker states it (DWPD); above 0."""

    def __post_init__(self) -> None:
        if (self.bytes_per_day is None) == (self.drive is None):
            raise ConfigError(
                "bytes_per_day, drive: write one of them, like bytes_per_day: 500GB, or "
                "drive: 2TB with drive_writes_per_day: 1"
            )
        if not 0 < self.drive_writes_per_day < math.inf:
            raise ConfigError(
                f"drive_writes_per_day: {self.drive_writes_per_day!r}; write a number above 0, like 1"
            )
        if self.day_bytes <= 0:
            raise ConfigError("bytes_per_day, drive: 0; write a size above 0, like 500GB")

    @property
    def day_bytes(self) -> float:
        """The bytes of a day."""
        if self.bytes_per_day is not None:
            return float(self.bytes_per_day)
        return float(self.drive or 0) * self.drive_writes_per_day


class WriteBudget(AdmissionPolicy):
    """A budget that fills as time passes.

    Each rank writes its own bytes: the budget is divided among the ranks.
    """

    def __init__(self, config: WriteBudgetConfig, context: PolicyContext) -> None:
        self._bytes_per_s = config.day_bytes / context.ranks / _DAY_S
        self._most_bytes = max(self._bytes_per_s * _SAVED_S, 2.0 * context.usual_bytes)
        self._saved_bytes = self._most_bytes
        self._since_s: float | None = None
        self._touches = Touches(context)

    def __repr__(self) -> str:
        return f"<WriteBudget {self._saved_bytes:.0f} of {self._most_bytes:.0f} bytes saved up>"

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:
        """See `AdmissionPolicy.offered`."""
        self._touches.note(keys)

    def admitted(self, keys: Sequence[BlockKey], nbytes: int, origin: Origin, now_s: float) -> int:
        """See `AdmissionPolicy.admitted`."""
        elapsed_s = 0.0 if self._since_s is None else max(0.0, now_s - self._since_s)
        self._since_s = now_s
        self._saved_bytes = min(self._most_bytes, self._saved_bytes + elapsed_s * self._bytes_per_s)
        if not nbytes:
            return len(keys)
        plenty = max(0, int((self._saved_bytes - self._most_bytes / 2) // nbytes))
        again = sum(1 for _ in itertools.takewhile(self._touches.again, keys))
        count = min(len(keys), int(self._saved_bytes // nbytes), max(plenty, again))
        self._saved_bytes -= count * nbytes
        return count
