"""How much of a medium reading takes: all it gives, or little beside an engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["Pace"]

_PAUSES: Final = 9
"""A read and its pause take ten times as long as the read: a tenth of the time the medium is asked."""
_LOOK_S: Final = 1.0
"""So long it is believed whether an engine is there."""


class Pace:
    """Lets threads read, one at a time and with pauses where that yields to an engine.

    A medium that is busy answers later, and is left alone the longer.

    Args:
        gentle: Yield always, or never; None: while an engine is there.
        holder: Says which process uses the medium; empty if nobody does.
    """

    def __init__(self, gentle: bool | None, holder: Callable[[], str]) -> None:
        self._gentle = gentle
        self._holder = holder
        self._held = False
        self._looked_s = float("-inf")
        self._one = threading.Lock()

    def __repr__(self) -> str:
        return f"<Pace, {'gentle' if self._yields() else 'full'}>"

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and pause after it."""
        if not self._yields():
            yield
            return
        with self._one:
            started_s = time.monotonic()
            yield
            time.sleep(_PAUSES * (time.monotonic() - started_s))

    def _yields(self) -> bool:
        if self._gentle is not None:
            return self._gentle
        now_s = time.monotonic()
        if now_s > self._looked_s + _LOOK_S:
            self._looked_s, self._held = now_s, bool(self._holder())
        return self._held
