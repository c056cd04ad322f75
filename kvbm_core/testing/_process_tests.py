"""Tests of what a tier does to its process: a part of the suite."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any, Final

import pytest

from kvbm_core.testing._broken_files import children
from kvbm_core.testing._child import IdleChild
from kvbm_core.testing._process import changes, process_state
from kvbm_core.testing._rig import PATIENCE_S, Rig
from kvbm_core.tier import Op

__all__ = ["ProcessTests"]

_IDLE_S: Final = 0.1
_MOST_BUSY: Final = 0.5
"""Share of the time in which a thread without work may want to run. One that spins always does."""
_MOST_WAKES: Final = 10


class ProcessTests:
    """A part of `TierSuite`."""

    def test_the_process_stays_as_it_was(self, rig: Rig) -> None:
        """Its folder, umask, signals, environment, cores and logging are the engine's."""
        rig.close(rig.stocked(1))  # What a library does when it is first imported is its own.
        before = process_state()
        tier = rig.open(cpus=frozenset(sorted(os.sched_getaffinity(0))[:1]))
        list(tier.inventory())
        if not tier.capabilities.read_only:
            rig.must_store(tier, 2)
        rig.must_miss(tier, 3)
        during = process_state()
        rig.close(tier)
        assert changes(before, during) == [], "while the tier is open"
        assert changes(before, process_state()) == [], "when it is closed"

    def test_nothing_is_printed(self, rig: Rig) -> None:
        """Neither to the standard output nor to the standard error: an engine's are its own. Log it."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            tier = rig.stocked(1)
            rig.must_hold(tier, 1)
            rig.load(tier, 1, 300)
            rig.must_miss(tier, 2)
            rig.close(tier)
        assert not said.getvalue(), f"it printed {said.getvalue()[:200]!r}"

    def test_close_ends_the_tiers_processes(self, rig: Rig) -> None:
        """And waits for them: none is left, not even as a zombie."""
        before = set(children())
        tier = rig.stocked(1)
        rig.must_hold(tier, 1)
        rig.close(tier)
        for _ in rig.patience(f"processes are left behind: {set(children()) - before}"):
            if not set(children()) - before:
                break

    def test_an_idle_tier_uses_no_processor(self, rig: Rig) -> None:
        """No thread of it spins while it waits for work."""
        tier = rig.stocked(1)
        rig.must_hold(tier, 1)
        if not Path("/proc/self/schedstat").exists():
            pytest.skip("left out: this system does not say how long a thread wants to run (schedstat)")
        for _ in rig.patience("without work it uses more than half of a core"):
            began_s, before_s = time.monotonic(), _wants_s()
            time.sleep(_IDLE_S)
            after_s, took_s = _wants_s(), time.monotonic() - began_s
            if all(after_s[task] - before_s.get(task, 0) < _MOST_BUSY * took_s for task in after_s):
                break

    def test_an_idle_tier_does_not_wake(self, rig: Rig) -> None:
        """When all is polled there is nothing to say."""
        wakes: list[float] = []
        tier = rig.open(wake=lambda: wakes.append(time.monotonic()))
        lookups = [rig.transfer(Op.LOOKUP, number) for number in range(4)]
        tier.submit(lookups)
        rig.wait(tier, lookups)
        for _ in rig.patience("it wakes again and again, though there is nothing to poll"):
            wakes.clear()
            time.sleep(_IDLE_S)
            if len(wakes) <= _MOST_WAKES:
                break

    def test_wake_is_not_called_after_close(self, rig: Rig) -> None:
        """Whoever would be woken is gone."""
        wakes: list[str] = []
        closed = threading.Event()
        before = set(threading.enumerate())

        def wake() -> None:
            if closed.is_set():
                wakes.append(threading.current_thread().name)

        tier = rig.open(wake=wake)
        tier.submit([rig.transfer(Op.LOOKUP, number) for number in range(4)])
        workers = set(threading.enumerate()) - before
        rig.close(tier)
        closed.set()
        for worker in workers:
            worker.join(PATIENCE_S)
        assert not wakes, f"woken after `close` by {wakes}"

    def test_what_is_pinned_is_unpinned_when_the_tier_is_closed(self, rig: Rig) -> None:
        """`TierContext.pin`: each range once, and no memory that is pinned already."""
        ranges: list[tuple[int, int]] = []
        undone: list[tuple[int, int]] = []
        lock = threading.Lock()

        def pin(address: int, nbytes: int) -> Any:
            with lock:
                ranges.append((address, nbytes))
            return lambda: undone.append((address, nbytes))

        tier = rig.open(pin=pin)
        if not tier.capabilities.read_only:
            rig.must_store(tier, *range(4))
            rig.must_hold(tier, *range(4))
        rig.close(tier)
        assert sorted(undone) == sorted(ranges), f"pinned {len(ranges)}, unpinned {len(undone)}"
        ordered = sorted(ranges)
        assert all(low[0] + low[1] <= high[0] for low, high in itertools.pairwise(ordered))

    def test_a_process_ends_that_does_not_close_its_tier(self, rig: Rig) -> None:
        """Its threads and processes do not keep it: an engine may end by an error."""
        IdleChild(rig.name, rig.settings(), rig.max_bytes).must_end()


def _wants_s() -> dict[str, float]:
    """Say of each other thread for how long it has run, or has waited for a core that was busy."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != threading.get_native_id():
            with contextlib.suppress(OSError):  # It has ended; or the system does not say.
                running, waiting, _ = (task / "schedstat").read_text().split()
                found[task.name] = (int(running) + int(waiting)) / 1e9
    return found
