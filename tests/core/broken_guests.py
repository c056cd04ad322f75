"""Tiers that are wrong on purpose in what they do to their process. See `broken_tiers`."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time

from broken_manners import BROKEN
from broken_tiers import found_by

from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.tier import TierContext

__all__ = ["BROKEN"]

_LEFT: list[object] = []


class _Guest(MemoryTier):
    """Does something to its process, and undoes it when the test is over."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.context = context
        self.ended = threading.Event()
        self.come()

    def come(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.ended.set()
        super().close()


@found_by("test_the_process_stays_as_it_was")
class ChangesTheUmask(_Guest):
    """Sets the process's umask for its own files."""

    def come(self) -> None:
        os.umask(0o077)

    def close(self) -> None:
        os.umask(0o022)
        super().close()


@found_by("test_the_process_stays_as_it_was")
class ChangesTheFolder(_Guest):
    """Goes to its own folder."""

    def come(self) -> None:
        self.before = os.getcwd()
        os.chdir("/")

    def close(self) -> None:
        os.chdir(self.before)
        super().close()


@found_by("test_the_process_stays_as_it_was")
class ConfiguresLogging(_Guest):
    """Gives the root logger a handler of its own."""

    def come(self) -> None:
        self.handler = logging.NullHandler()
        logging.getLogger().addHandler(self.handler)

    def close(self) -> None:
        logging.getLogger().removeHandler(self.handler)
        super().close()


@found_by("test_the_process_stays_as_it_was")
class TakesASignal(_Guest):
    """Wants to be told by SIGUSR2, and keeps it."""

    def come(self) -> None:
        signal.signal(signal.SIGUSR2, lambda *_: None)

    def close(self) -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        super().close()


@found_by("test_the_process_stays_as_it_was")
class MovesItsCaller(_Guest):
    """Binds the thread that opens it to the cores near the accelerator."""

    def come(self) -> None:
        self.before = os.sched_getaffinity(0)
        if self.context.cpus:
            os.sched_setaffinity(0, self.context.cpus)
        os.environ["BROKEN_TIER"] = "here"  # Where there is one core only.

    def close(self) -> None:
        os.environ.pop("BROKEN_TIER", None)
        os.sched_setaffinity(0, self.before)
        super().close()


@found_by("test_nothing_is_printed")
class Prints(_Guest):
    """Says hello."""

    def come(self) -> None:
        print("hello", file=sys.stderr)


@found_by("test_close_ends_the_tiers_processes")
class LeavesAProcess(_Guest):
    """Does not end a process that it has started."""

    def come(self) -> None:
        _LEFT.append(subprocess.Popen(["sleep", "2"]))


@found_by("test_an_idle_tier_uses_no_processor")
class Spins(_Guest):
    """Looks for work without a pause."""

    def come(self) -> None:
        threading.Thread(target=self.spin, daemon=True).start()

    def spin(self) -> None:
        while not self.ended.is_set():
            pass


@found_by("test_an_idle_tier_does_not_wake")
class WakesAllTheTime(_Guest):
    """Wakes the core a thousand times a second, in case that there is something."""

    def come(self) -> None:
        threading.Thread(target=self.ring, daemon=True).start()

    def ring(self) -> None:
        while not self.ended.wait(0.001):
            self.context.wake()


@found_by("test_wake_is_not_called_after_close")
class WakesWhenItIsClosed(_Guest):
    """A thread of it wakes the core when all is over."""

    def come(self) -> None:
        threading.Thread(target=self.ring, daemon=True).start()

    def ring(self) -> None:
        self.ended.wait()
        time.sleep(0.05)
        self.context.wake()


@found_by("test_what_is_pinned_is_unpinned_when_the_tier_is_closed")
class LeavesMemoryPinned(_Guest):
    """Pins memory, and never lets go of it."""

    def come(self) -> None:
        if self.context.pin:
            self.context.pin(1 << 20, 1 << 12)


@found_by("test_what_is_pinned_is_unpinned_when_the_tier_is_closed")
class PinsTwice(_Guest):
    """Pins what is pinned already."""

    def come(self) -> None:
        pin = self.context.pin or (lambda address, nbytes: lambda: None)
        self.undo = [pin(1 << 20, 1 << 13), pin((1 << 20) + 4096, 1 << 13)]

    def close(self) -> None:
        for undo in self.undo:
            undo()
        self.undo = []
        super().close()


@found_by("test_a_process_ends_that_does_not_close_its_tier")
class HoldsTheProcess(_Guest):
    """Its thread is no daemon, and waits to be closed."""

    def come(self) -> None:
        threading.Thread(target=self.ended.wait).start()
