"""One line for each thing that goes wrong, with a count of those left out."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

__all__ = ["LogLimit"]

_MAX_KEYS: Final = 256
"""The key whose line is oldest is forgotten first."""


@dataclass(slots=True)
class _Written:
    """The last line of a key, and what has come since."""

    at_s: float
    level: int
    line: str
    left_out: int = 0


class LogLimit:
    """Writes one line for each key in `every_s` seconds, and counts those it leaves out.

    Behaviour:
        - The first line of a key is written at once.
        - The next line that is written says how many were left out since the last, and over how long.
        - What no line has followed is said when the key is forgotten, or at `close`.

    May be used by several threads.

    Args:
        log: Where lines go.
        every_s: Seconds between two lines of one key.
        clock: Seconds that only go forward.
    """

    def __init__(
        self, log: logging.Logger, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: OrderedDict[Hashable, _Written] = OrderedDict()

    def __repr__(self) -> str:
        left_out = sum(written.left_out for written in self._keys.values())
        return f"<LogLimit {len(self._keys)} keys, {left_out} lines left out>"

    def error(self, key: Hashable, message: str, *args: object) -> None:
        """Log an error, unless one of this key was written a short while ago.

        Args:
            key: What makes lines alike, as a rule (tier, operation, reason).
            message: As of `logging.Logger.error`.
            *args: Likewise.
        """
        self._write(logging.ERROR, key, message, args)

    def warning(self, key: Hashable, message: str, *args: object) -> None:
        """Log a warning, see `error`."""
        self._write(logging.WARNING, key, message, args)

    def close(self) -> None:
        """Say how many lines were left out that no line has followed. May be called twice."""
        with self._lock:
            unsaid = [written for written in self._keys.values() if written.left_out]
            self._keys.clear()
        for written in unsaid:
            self._say_unsaid(written)

    def _write(self, level: int, key: Hashable, message: str, args: tuple[object, ...]) -> None:
        now_s = self._clock()
        with self._lock:
            last = self._keys.get(key)
            if last and now_s - last.at_s < self._every_s:
                last.left_out += 1
                return
            line = message % args if args else message
            if last and last.left_out:
                line += f" (and {last.left_out} more in the last {now_s - last.at_s:.0f} s)"
            self._keys[key] = _Written(now_s, level, line)
            self._keys.move_to_end(key)
            forgotten = self._keys.popitem(last=False)[1] if len(self._keys) > _MAX_KEYS else None
        self._log.log(level, "%s", line, stacklevel=3)
        if forgotten and forgotten.left_out:
            self._say_unsaid(forgotten)

    def _say_unsaid(self, written: _Written) -> None:
        since_s = self._clock() - written.at_s
        self._log.log(
            written.level, "%d more in the last %.0f s of: %s", written.left_out, since_s, written.line
        )
