"""Tests of a tier's life from open to close: a part of the suite."""

from __future__ import annotations

import gc
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from kvbm_core.errors import TierError, TierOpenError
from kvbm_core.testing._needs import durable, owned, writable
from kvbm_core.testing._rig import PATIENCE_S, Rig
from kvbm_core.testing._watch import files_held, handles
from kvbm_core.tier import Op

__all__ = ["LifeTests"]


class LifeTests:
    """A part of `TierSuite`."""

    def test_close_ends_the_tiers_threads(self, rig: Rig) -> None:
        """And those it had for what was in flight."""
        before = set(threading.enumerate())
        tier = rig.stocked(*range(4))
        rig.must_hold(tier, *range(4))
        rig.close(tier)
        left = set(threading.enumerate()) - before
        for thread in left:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in left), f"left behind: {left}"

    def test_close_lets_go_of_files_and_memory(self, rig: Rig) -> None:
        """No file of its folder is open, mapped or locked; nothing grows with each tier that was opened."""
        counts = []
        for _ in range(4):
            tier = rig.stocked(1)
            rig.must_hold(tier, 1)
            rig.close(tier)
            counts.append(handles())
        give_up_s = time.monotonic() + PATIENCE_S
        while files_held(rig.folder) or handles() >= counts[0] + 3:  # What it left to others ends soon.
            assert time.monotonic() < give_up_s, (
                f"left open or mapped: {files_held(rig.folder)}; files and threads, tier by tier: {counts}"
            )
            gc.collect()
            time.sleep(0.01)

    @writable
    @durable
    def test_files_are_for_their_owner_alone(self, rig: Rig) -> None:
        """They hold people's prompts. A file may have any mode below a folder that is closed to others."""
        before = os.umask(0o022)
        try:
            tier = rig.open()
            rig.must_store(tier, 1)
            found = _readable_by_others(rig.folder)
            rig.close(tier)
        finally:
            os.umask(before)
        assert not found, f"others may read or write {found[:3]}: files need mode 0600, folders 0700"
        assert not _readable_by_others(rig.folder)

    @writable
    @owned
    def test_a_second_engine_in_the_same_place_is_refused(self, rig: Rig) -> None:
        """By `open`, unless the tier is `shared`. The first goes on, and after it the place is free."""
        tier = rig.open()
        rig.must_store(tier, 1)
        with pytest.raises(TierOpenError):
            rig.open()
        rig.must_hold(tier, 1)
        rig.must_store(tier, 2)
        rig.close(tier)
        rig.must_hold(rig.open(), 1, 2)

    def test_the_capabilities_are_the_same_from_open_to_close(self, rig: Rig) -> None:
        """And after it."""
        tier = rig.open()
        before = tier.capabilities
        if not before.read_only:
            rig.must_store(tier, 1)
        assert tier.capabilities == before
        rig.close(tier)
        assert tier.capabilities == before

    def test_a_new_tier_lists_nothing(self, rig: Rig) -> None:
        """And serves nothing."""
        tier = rig.open()
        assert list(tier.inventory()) == []
        rig.must_miss(tier, 1)

    def test_close_finishes_or_fails_what_is_in_flight_and_poll_returns_it(self, rig: Rig) -> None:
        """Each ticket still completes once."""
        tier = rig.open()
        count = min(tier.capabilities.queue_depth, 16)
        op = Op.LOAD if tier.capabilities.read_only else Op.STORE
        memories = [rig.memory(number) for number in range(count)]
        transfers = [rig.transfer(op, at, memory) for at, memory in enumerate(memories)]
        tier.submit(transfers)
        rig.close(tier)
        done = [completion.ticket for _ in range(3) for completion in tier.poll()]
        assert sorted(done) == sorted(transfer.ticket for transfer in transfers)

    def test_close_may_be_called_twice(self, rig: Rig) -> None:
        """The second does nothing."""
        tier = rig.stocked(1)
        tier.close()
        tier.close()
        assert list(tier.poll()) == []

    def test_submit_after_close_raises(self, rig: Rig) -> None:
        """`TierError`: nothing was started."""
        tier = rig.open()
        rig.close(tier)
        with pytest.raises(TierError):
            tier.submit([rig.transfer(Op.LOOKUP, 1)])


def _readable_by_others(folder: Path) -> list[str]:
    """List what other users can read or write in a folder, as far as they can get into its own folders."""
    found = []
    for path in folder.iterdir():
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            if mode & 0o022:
                found.append(str(path))
            if mode & 0o011:
                found += _readable_by_others(path)
        elif stat.S_ISREG(mode) and mode & 0o066:
            found.append(str(path))
    return found
