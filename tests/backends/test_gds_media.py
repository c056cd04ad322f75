"""The NVMe tier on a medium that fails for a while, is full, or was prepared by somebody else."""

import contextlib
import os
import subprocess
import time

import pytest
from test_cpu import content, key, lookup, store
from test_gds import (  # noqa: F401 - fixtures
    FAILED_ERROR,
    MIB,
    assert_served,
    cut_slab,
    delete_all,
    delete_index,
    delete_slab,
    engine,
    fill,
    in_turns,
    keys_in,
    loads,
    messages,
    open_plain,
    open_tier,
    open_with,
    slots_of,
    stores,
)

from kvbm_core.errors import TierOpenError
from kvbm_core.tier import Outcome, Reason
from kvbm_gds import _slots, _tier

DONE = (Outcome.DONE, Reason.NONE)


def test_an_index_that_cannot_be_written_for_a_while_costs_nothing_afterwards(
    tmp_path, open_plain, monkeypatch, caplog  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(_slots, "_MEND_EVERY_S", 0.0)
    tier = open_plain()
    most = slots_of(tier)
    fill(tier, range(most - 1))
    index = os.dup(tier._slab._index)
    with open(tmp_path / "kv/rank0/index", "rb") as file:
        os.dup2(file.fileno(), tier._slab._index)
    assert in_turns(tier, stores([most])) == in_turns(tier, stores([most])) == [FAILED_ERROR]
    tier.discard([key(3), key(4)])
    assert lookup(tier, 3) is Outcome.MISSING
    assert in_turns(tier, stores([most])) == [FAILED_ERROR], "no slot whose entry stands is written"
    assert_served(tier, [1, 2])
    assert len(messages(caplog)) == 2
    os.dup2(index, tier._slab._index)
    os.close(index)
    assert fill(tier, [most, most + 1, most + 2]) == [DONE] * 3
    assert store(tier, most + 3).reason is Reason.FULL
    assert_served(tier, [0, 1, 2, *range(5, most - 1), most, most + 1, most + 2])
    tier.close()
    assert len(keys_in(open_plain())) == most


@pytest.mark.parametrize(
    ("harm", "survive"), [(cut_slab, 20), (delete_slab, 0), (delete_index, 0), (delete_all, 0)]
)
def test_a_tier_whose_files_were_taken_away_comes_back_by_itself(
    tmp_path, open_tier, monkeypatch, caplog, harm, survive  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(_tier, "_REOPEN_EVERY_S", 0.0)
    tier = open_tier()
    fill(tier, range(40))
    harm(tmp_path / "kv/rank0")
    assert in_turns(tier, loads(range(40))) == [FAILED_ERROR] * 40
    give_up_s = time.monotonic() + 30
    while tier._out:
        assert time.monotonic() < give_up_s
        tier.poll()
        time.sleep(0.01)
    assert f"has {survive} of 40 objects; it was out since" in messages(caplog)[-1]
    assert_served(tier, range(survive))
    assert lookup(tier, 39) is Outcome.MISSING
    assert fill(tier, range(100, 120)) == [DONE] * 20
    assert_served(tier, range(100, 120))
    tier.close()
    assert len(keys_in(open_tier())) == survive + 20


@contextlib.contextmanager
def thin_disk(path):
    """A file system that promises more than lies below it: ext4 on a file in a small tmpfs."""
    back, disk = path / "back", path / "disk"
    back.mkdir()
    disk.mkdir()
    steps = [
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", back],
        ["truncate", "-s", "32M", back / "image"],
        ["mkfs.ext4", "-q", "-O", "^has_journal", back / "image"],
        ["mount", "-o", "loop", back / "image", disk],
    ]
    try:
        for step in steps:
            made = subprocess.run(step, capture_output=True)
            if made.returncode:
                pytest.skip(f"A THIN DISK IS NOT TESTED: {step[0]}: {made.stderr.decode()}")
        yield back, disk
    finally:
        subprocess.run(["umount", disk], capture_output=True)
        subprocess.run(["umount", "-l", back], capture_output=True)


def test_a_thin_disk_that_is_full_says_full_takes_freed_slots_and_comes_back(tmp_path, open_tier):  # noqa: F811
    with thin_disk(tmp_path) as (back, disk):
        tier = open_tier(16 * MIB, path=disk / "kv")
        ends = [store(tier, n) for n in range(120)]
        stored = [n for n, end in enumerate(ends) if end.outcome is Outcome.DONE]
        assert 20 < len(stored) < 110
        assert {end.reason for end in ends} == {Reason.NONE, Reason.FULL}, "free bytes say nothing here"
        tier.discard([key(n) for n in stored[:10]])
        assert fill(tier, range(200, 210)) == [DONE] * 10
        assert_served(tier, [*stored[10:], *range(200, 210)])
        subprocess.run(["mount", "-o", "remount,size=64m", back], check=True)
        assert fill(tier, range(300, 340)) == [DONE] * 40
        assert_served(tier, range(300, 340))
        tier.close()


@pytest.mark.parametrize("name", ["index", "slab.000", "probe"])
@pytest.mark.parametrize("hard", [False, True])
def test_a_link_in_place_of_a_file_is_not_followed(tmp_path, open_plain, name, hard):  # noqa: F811
    target = tmp_path / "target"
    target.write_bytes(content(1))
    open_plain().close()
    path = tmp_path / "kv/rank0" / name
    path.unlink(missing_ok=True)
    path.hardlink_to(target) if hard else path.symlink_to(target)
    if name == "probe":
        store(open_plain(), 1)
    else:
        with pytest.raises(
            TierOpenError, match=rf"path: .*rank0/{name} (is a link|has another name).*remove it"
        ):
            open_plain()
    assert target.read_bytes() == content(1)
