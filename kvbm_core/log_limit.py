"""Lines of the log: each names its tier, and one that comes again and again is counted, not repeated."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

__all__ = ["Log", "LogLimit", "TierLog", "clock_words", "spell_words"]

_MAX_KEYS: Final = 256
"""The key whose line is oldest is forgotten first."""


class TierLog(logging.LoggerAdapter[logging.Logger]):
    """Writes lines of a backend, each with the name of the tier that it is about in front.

    Args:
        logger: The logger's name, as a rule the package's.
        tier: The tier's name, see `TierContext.name`; empty where no tier is concerned, then lines stay
            as they are.
    """

    def __init__(self, logger: str, tier: str = "") -> None:
        super().__init__(logging.getLogger(logger))
        self.tier = tier

    def log(self, level: int, msg: object, *args: object, **more: Any) -> None:
        """Log as `logging.Logger.log` does, the tier's name in front."""
        named = (f"tier %s: {msg}", self.tier, *args) if self.tier else (msg, *args)
        more["stacklevel"] = more.get("stacklevel", 1) + 1
        self.logger.log(level, *named, **more)


Log: TypeAlias = logging.Logger | TierLog
"""Where lines go."""


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
        - Of what lasts, the end is written if the beginning was, and only then: what was said to fail is said
          to work again, and what flaps has one line a minute of each kind.

    May be used by several threads.

    Args:
        log: Where lines go.
        every_s: Seconds between two lines of one key.
        clock: Seconds that only go forward.
    """

    def __init__(self, log: Log, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: OrderedDict[Hashable, _Written] = OrderedDict()
        self._since: dict[Hashable, float] = {}
        """When what lasts now began."""
        self._told: set[Hashable] = set()
        """Of these, those of which a line says so."""

    def __repr__(self) -> str:
        left_out = sum(written.left_out for written in self._keys.values())
        return f"<LogLimit {len(self._keys)} keys, {left_out} lines left out>"

    def error(self, key: Hashable, message: str, *args: object) -> bool:
        """Log an error, unless one of this key was written a short while ago.

        Args:
            key: What makes lines alike, as a rule (tier, operation, reason).
            message: As of `logging.Logger.error`.
            *args: Likewise.

        Returns:
            True if it was written, False if it was left out.
        """
        return self._write(logging.ERROR, key, message, args)

    def warning(self, key: Hashable, message: str, *args: object) -> bool:
        """Log a warning, see `error`."""
        return self._write(logging.WARNING, key, message, args)

    def lasts(
        self, what: Hashable, since_s: float, message: str, *args: object, cause: Hashable = None
    ) -> None:
        """Say that something has ceased to be as it should be, or is still so.

        Args:
            what: The state, as a rule (tier, state).
            since_s: When it began, on any clock that does not go back. The first time counts.
            message: As of `logging.Logger.error`.
            *args: Likewise.
            cause: A line with another one may follow within `every_s`.
        """
        self._since.setdefault(what, since_s)
        if self._write(logging.WARNING, (what, cause), message, args):
            self._told.add(what)

    def over(
        self, what: Hashable, now_s: float, message: str = "", *args: object, level: int = logging.WARNING
    ) -> None:
        """Say that something is as it should be again. Nothing, if it was so all the while.

        Args:
            what: As of `lasts`.
            now_s: The time, on the same clock.
            message: As of `logging.Logger.warning`; its last ``%s`` is since when, and for how long, it was.
                Empty: somebody else has written the line.
            *args: Those before it.
            level: Of the line.
        """
        if (since_s := self._since.pop(what, None)) is None:
            return
        if what in self._told and message:
            self._log.log(level, message, *args, spell_words(since_s, now_s), stacklevel=2)
        self._told.discard(what)

    def close(self) -> None:
        """Say how many lines were left out that no line has followed. May be called twice."""
        with self._lock:
            unsaid = [written for written in self._keys.values() if written.left_out]
            self._keys.clear()
        for written in unsaid:
            self._say_unsaid(written)

    def _write(self, level: int, key: Hashable, message: str, args: tuple[object, ...]) -> bool:
        now_s = self._clock()
        with self._lock:
            last = self._keys.get(key)
            if last and now_s - last.at_s < self._every_s:
                last.left_out += 1
                return False
            line = message % args if args else message
            if last and last.left_out:
                line += f" (and {last.left_out} more in the last {now_s - last.at_s:.0f} s)"
            self._keys[key] = _Written(now_s, level, line)
            self._keys.move_to_end(key)
            forgotten = self._keys.popitem(last=False)[1] if len(self._keys) > _MAX_KEYS else None
        self._log.log(level, "%s", line, stacklevel=3)
        if forgotten and forgotten.left_out:
            self._say_unsaid(forgotten)
        return True

    def _say_unsaid(self, written: _Written) -> None:
        since_s = self._clock() - written.at_s
        self._log.log(
            written.level, "%d more in the last %.0f s of: %s", written.left_out, since_s, written.line
        )


def spell_words(since_s: float, now_s: float) -> str:
    """Write a span of time that ends now, for people: ``since 2026-03-01 09:30:05, for 90 s``."""
    seconds = now_s - since_s
    length = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"since {clock_words(since_s, now_s)}, for {length}"


def clock_words(at_s: float, now_s: float) -> str:
    """Write a moment as the wall clock shows it, for people.

    Args:
        at_s: The moment, on any clock that does not go back.
        now_s: What that clock shows now.
    """
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + at_s - now_s))
