"""What is the LMDB tier's own: persistence, bounds, crashes. The contract is in `test_cpu`."""

import contextlib
import fcntl
import logging
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest
from test_cpu import BLOCK, NAMESPACE, content, key, load, lookup, region, run, store

from kvbm_core.config import ByteSize
from kvbm_core.errors import ConfigError, TierOpenError
from kvbm_core.tier import Op, Outcome, Reason, TierContext, Transfer
from kvbm_lmdb import LmdbConfig, LmdbTier, kvbm_backends
from kvbm_lmdb._directory import OVERHEAD_BYTES, check, plan_sizing

MIB = 1 << 20


def config(path, capacity=16 * MIB, **settings):
    return LmdbConfig(path=str(path), capacity=ByteSize(capacity), **settings)


@pytest.fixture
def open_tier(tmp_path):
    with contextlib.ExitStack() as stack:

        def open_(capacity=16 * MIB, namespace=NAMESPACE, nbytes=BLOCK, path=tmp_path / "kv", **settings):
            tier = LmdbTier(config(path, capacity, **settings), TierContext(namespace, nbytes))
            stack.callback(tier.close)
            return tier

        yield open_


def room(tier, nbytes=BLOCK):
    """How many objects of one length it holds."""
    found = tier.capabilities
    return found.capacity_bytes // found.charge(nbytes)


def listed(tier):
    return [found for found, _ in tier.inventory()]


def du_bytes(path):
    total = 0
    for file in (path, *path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_blocks * 512
    return total


def test_blocks_survive_close_and_are_listed_oldest_first(open_tier):
    tier = open_tier()
    for n in (5, 3, 9, 1):
        store(tier, n)
    tier.discard([key(3)])
    tier.close()
    tier = open_tier()
    assert list(tier.inventory()) == [(key(5), BLOCK), (key(9), BLOCK), (key(1), BLOCK)]
    assert load(tier, 9)[1] == content(9)
    assert lookup(tier, 3) is Outcome.MISSING
    assert repr(tier).endswith("kv/rank0 3 objects, 205.28KiB of 12.29MiB, 0 in flight>")


CHILD = """
import os, random, sys
sys.path.insert(0, {here!r})
from test_lmdb import *
tier = LmdbTier(config({path!r}, 64 * MIB), TierContext(NAMESPACE, BLOCK))
stored, n = [], 0
print("ready", flush=True)
while True:
    for n in range(n, n + 8):
        tier.submit([Transfer(n, Op.STORE, key(n), region(content(n)))])
    left = 8
    while left:
        for c in tier.poll():
            assert c.outcome is Outcome.DONE, c
            os.write(1, b"+%d\\n" % c.ticket)
            stored.append(c.ticket)
            left -= 1
    n += 1
    if len(stored) > 200:
        gone, stored = stored[:50], stored[50:]
        for g in gone: os.write(1, b"-%d\\n" % g)
        tier.discard([key(g) for g in gone])
"""


@pytest.mark.parametrize("seed", range(4))
def test_every_acknowledged_block_survives_kill_9(tmp_path, open_tier, seed):
    path = tmp_path / "kv"
    code = CHILD.format(here=str(Path(__file__).parent), path=str(path))
    with open(tmp_path / "log", "wb") as log:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=log)
    while b"+" not in (tmp_path / "log").read_bytes():
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0.05, 0.6))
    child.send_signal(signal.SIGKILL)
    child.wait()
    lines = (tmp_path / "log").read_bytes().split(b"\n")[:-1]
    gone = {int(line[1:]) for line in lines if line.startswith(b"-")}
    stored = {int(line[1:]) for line in lines if line.startswith(b"+")} - gone
    tier = open_tier(64 * MIB)
    assert {key(n) for n in stored} <= set(listed(tier))
    for n in stored:
        assert load(tier, n)[1] == content(n)


def test_a_second_process_on_the_directory_gets_a_clear_error(tmp_path, open_tier):
    tier = open_tier()
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_lmdb import *\n"
        f"try: LmdbTier(config({str(tmp_path / 'kv')!r}), TierContext(NAMESPACE, BLOCK))\n"
        "except TierOpenError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == (
        f"path: {tmp_path}/kv/rank0 is in use by another engine (pid {os.getpid()}); "
        "give each engine its own 'path'\n"
    )
    with pytest.raises(TierOpenError, match=rf"in use by another engine \(pid {os.getpid()}\)"):
        check(config(tmp_path / "kv"))
    tier.close()
    check(config(tmp_path / "kv"))


def test_only_the_owner_may_read(tmp_path, open_tier):
    tier = open_tier(path=tmp_path / "a" / "b")
    store(tier, 1)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [tmp_path / "a", *(tmp_path / "a").rglob("*")]}
    assert modes == {
        "a": 0o700, "b": 0o700, "rank0": 0o700, "data.mdb": 0o600, "engine.lock": 0o600,
    }  # fmt: skip


def test_check_changes_nothing(tmp_path):
    check(config(tmp_path / "x" / "y"))
    assert list(tmp_path.iterdir()) == []


def test_check_names_a_path_that_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            TierOpenError, match=rf"file cannot be used by uid {os.getuid()} .*write a directory"
        ):
            check(config(path))
        with pytest.raises(TierOpenError, match="cannot be used by uid"):
            LmdbTier(config(path), TierContext(NAMESPACE, BLOCK))


def test_check_names_a_path_that_cannot_be_written():
    with pytest.raises(TierOpenError, match=r"path: /proc cannot be used by uid"):
        check(config("/proc/kvbm"))


def test_check_names_a_file_system_with_too_little_room(tmp_path):
    with pytest.raises(TierOpenError, match=r"capacity: \d+TiB.*GiB free; free some room, write at most \d+"):
        check(config(tmp_path, 1 << 60))


def test_a_foreign_namespace_is_kept_but_not_served(open_tier):
    tier = open_tier()
    for n in range(10):
        store(tier, n)
    tier.close()
    tier = open_tier(namespace=b"m" * 16)
    assert list(tier.inventory()) == []
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    store(tier, 1)
    tier.close()
    assert listed(open_tier()) == [key(n) for n in range(10)]


@pytest.mark.parametrize(("first", "second"), [(BLOCK, 700_000), (700_000, BLOCK), (4096, 700_000)])
def test_two_models_take_turns_and_it_stays_bounded(tmp_path, open_tier, first, second):
    full = 0
    for turn, (nbytes, namespace) in enumerate([(first, b"1" * 16), (second, b"2" * 16)] * 2):
        tier = open_tier(namespace=namespace, nbytes=nbytes)
        tier.discard(listed(tier))
        for n in range(room(tier, nbytes)):
            full += store(tier, (turn, n), nbytes=nbytes).reason is Reason.FULL
            assert du_bytes(tmp_path / "kv") <= 16 * MIB
        tier.close()
    assert full == 0


def test_a_lowered_capacity_drops_a_file_that_is_too_large(tmp_path, open_tier, caplog):
    tier = open_tier(32 * MIB)
    for n in range(300):
        store(tier, n)
    tier.close()
    with caplog.at_level(logging.WARNING):
        tier = open_tier(8 * MIB)
    assert re.search(
        r"rank0/data.mdb is [\d.]+MiB and may now be 7.\d+MiB: the capacity was lowered", caplog.text
    )
    assert list(tier.inventory()) == []
    assert du_bytes(tmp_path / "kv") <= 8 * MIB
    store(tier, 1)
    tier.close()
    assert listed(open_tier(32 * MIB)) == [key(1)]


def test_fewer_ranks_than_before_keep_to_the_capacity(tmp_path, caplog):
    def open_ranks(count):
        contexts = [TierContext(NAMESPACE, BLOCK, rank, count) for rank in range(count)]
        return [LmdbTier(config(tmp_path), context) for context in contexts]

    def fill_and_close(tiers):
        for tier in tiers:
            for n in range(room(tier)):
                assert store(tier, n).outcome is Outcome.DONE
            tier.close()

    fill_and_close(open_ranks(2))
    fill_and_close(open_ranks(1))
    assert f"{tmp_path}/rank1: more ranks or replicas than there are now left it; dropping it" in caplog.text
    assert du_bytes(tmp_path) <= 16 * MIB


def test_a_capacity_lowered_a_little_keeps_the_newest(tmp_path, open_tier):
    tier = open_tier(32 * MIB)
    count = room(tier)
    for n in range(count):
        store(tier, n)
    tier.close()
    size = (tmp_path / "kv/rank0/data.mdb").stat().st_size
    tier = open_tier(size + 512 * 1024)
    kept = listed(tier)
    assert 0 < len(kept) <= room(tier) < count
    assert kept == [key(n) for n in range(count - len(kept), count)]
    assert load(tier, count - 1)[1] == content(count - 1)


@pytest.mark.parametrize("more_kib", [64, 128, 192, 256, 320, 384])
def test_a_capacity_lowered_to_about_the_size_of_the_file_keeps_no_engine_from_starting(
    tmp_path, open_tier, caplog, more_kib
):
    # A file that was never erased from has no free page, and giving objects up takes some.
    tier = open_tier(32 * MIB)
    for n in range(room(tier)):
        store(tier, n)
    tier.close()
    size = (tmp_path / "kv/rank0/data.mdb").stat().st_size
    tier = open_tier(size + more_kib * 1024)
    assert bool(listed(tier)) is ("the capacity was lowered" not in caplog.text)
    assert "damaged" not in caplog.text
    for n in range(1000, 1005):
        tier.discard(listed(tier)[n - 1000 : n - 999])
        assert store(tier, n).outcome is Outcome.DONE
    assert load(tier, 1004)[1] == content(1004)
    assert du_bytes(tmp_path / "kv") <= size + more_kib * 1024


def damage_meta_pages(data):
    with open(data, "r+b") as file:
        file.write(random.Random(1).randbytes(3 * 4096))


def cut_short(data):
    os.truncate(data, data.stat().st_size // 2)


def make_empty(data):
    os.truncate(data, 100)


@pytest.mark.parametrize("damage", [damage_meta_pages, cut_short, make_empty])
def test_a_damaged_file_is_dropped_with_a_warning(tmp_path, open_tier, caplog, damage):
    tier = open_tier()
    for n in range(20):
        store(tier, n)
    tier.close()
    damage(tmp_path / "kv/rank0/data.mdb")
    with caplog.at_level(logging.WARNING):
        tier = open_tier()
    assert "is damaged" in caplog.text
    assert list(tier.inventory()) == []
    assert store(tier, 1).outcome is Outcome.DONE
    assert load(tier, 1)[1] == content(1)


def rewrite_rows(path, change):
    """Change rows of the index, as damage may that LMDB does not see."""
    env = lmdb.open(str(path / "kv/rank0"), max_dbs=2, map_size=8 * MIB, lock=False)
    index = env.open_db(b"index")
    with env.begin(write=True, db=index) as txn:
        for full_key, row in [each for each in txn.cursor() if len(each[0]) == 48]:
            txn.put(full_key, change(full_key[16:], row))
    env.close()


def test_a_place_that_is_not_the_objects_is_never_done(tmp_path, open_tier):
    tier = open_tier()
    for n in range(6):
        store(tier, n)
    tier.close()
    rows = {
        key(1): lambda row: row[:16] + struct.pack("<Q", 1 << 40 | 4096),  # Shorter than the object.
        key(2): lambda row: row[:16] + struct.pack("<Q", 17 << 40 | 1 << 30),  # Behind the end of the file.
        key(3): lambda row: row[:16] + struct.pack("<Q", 17 << 40 | 3),  # Pages of a tree.
        key(4): lambda row: row[:-3],
        key(5): lambda row: row[:8] + struct.pack("<Q", 1 << 50) + row[16:],
    }
    rewrite_rows(tmp_path, lambda name, row: rows.get(name, bytes)(row))
    tier = open_tier()
    assert listed(tier) == [key(0), key(3)]
    completion, _ = load(tier, 3)
    assert (completion.outcome, completion.reason) == (Outcome.FAILED, Reason.CORRUPT)
    for n in (1, 2, 4, 5):
        assert load(tier, n)[0].outcome is Outcome.MISSING
        assert store(tier, n).outcome is Outcome.DONE
    assert all(load(tier, n)[1] == content(n) for n in (0, 1, 2, 4, 5))


@contextlib.contextmanager
def small_disk(path, nbytes):
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", path], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"THE FULL DISK IS NOT TESTED: mount is not allowed here: {made.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_fails_stores_with_full_and_the_tier_works_on(tmp_path):
    with small_disk(tmp_path / "disk", 8 * MIB):
        tier = LmdbTier(config(tmp_path / "disk", 64 * MIB), TierContext(NAMESPACE, BLOCK))
        ends = [store(tier, n) for n in range(200)]
        stored = [n for n, end in enumerate(ends) if end.outcome is Outcome.DONE]
        assert 60 < len(stored) < 130
        assert {end.reason for end in ends} == {Reason.NONE, Reason.FULL}
        assert all(load(tier, n)[1] == content(n) for n in stored)
        tier.discard([key(n) for n in stored[:40]])
        again = [store(tier, n).outcome for n in range(1000, 1020)]
        assert again.count(Outcome.DONE) >= 15
        tier.close()
        tier = LmdbTier(config(tmp_path / "disk", 64 * MIB), TierContext(NAMESPACE, BLOCK))
        assert {key(n) for n in stored[40:]} <= set(listed(tier))
        tier.close()


CHURNED = [
    (BLOCK, 16 * MIB), (BLOCK, 48 * MIB), (737376, 16 * MIB), (737376, 64 * MIB), (2 * MIB + 96, 32 * MIB),
]  # fmt: skip
ORDERS = ("fifo", "random")


@pytest.mark.parametrize(
    ("nbytes", "capacity", "order"),
    [
        *((*sizes, ORDERS[at % 2]) for at, sizes in enumerate(CHURNED)),
        *(
            pytest.param(*sizes, ORDERS[1 - at % 2], marks=pytest.mark.soak)
            for at, sizes in enumerate(CHURNED)
        ),
    ],
)
def test_churn_at_capacity_never_runs_out_of_room(tmp_path, open_tier, nbytes, capacity, order):
    tier = open_tier(capacity, nbytes=nbytes)
    rng, most = random.Random(7), room(tier, nbytes)
    source, target = region(content(1, nbytes), nbytes), region(None, nbytes)
    live, number, failed, step = [], 0, 0, min(32, max(1, most // 4))
    while number * nbytes < 10 * capacity:
        excess = max(0, len(live) + step - most)
        gone = live[:excess] if order == "fifo" else rng.sample(live, excess)
        live = [n for n in live if n not in set(gone)]
        tier.discard([key(n) for n in gone])
        new = range(number, number + step)
        transfers = [Transfer(n, Op.STORE, key(n), source) for n in new]
        # Readers hold freed pages back.
        transfers += [Transfer(-n - 1, Op.LOAD, key(n), target) for n in rng.sample(live, min(3, len(live)))]
        ends = run(tier, transfers)
        assert {end.reason for end in ends.values()} <= {Reason.NONE, Reason.FULL}
        live += [n for n in new if ends[n].outcome is Outcome.DONE]
        failed += sum(end.reason is Reason.FULL for end in ends.values())
        number += step
        assert du_bytes(tmp_path / "kv") <= capacity
    assert failed == 0


def test_a_map_that_is_full_fails_stores_and_not_the_tier(open_tier, monkeypatch):
    # Claims three times the room there is: what happens when the sizing is wrong.
    from kvbm_lmdb import _tier

    plan = _tier.plan_sizing

    def wrong(share_bytes, nbytes):
        sizing = plan(share_bytes, nbytes)
        return replace(sizing, capacity_bytes=3 * sizing.capacity_bytes)

    monkeypatch.setattr(_tier, "plan_sizing", wrong)
    tier = open_tier(4 * MIB)
    ends = [store(tier, n) for n in range(100)]
    stored = [n for n, end in enumerate(ends) if end.outcome is Outcome.DONE]
    assert {end.reason for end in ends} == {Reason.NONE, Reason.FULL}
    assert all(load(tier, n)[1] == content(n) for n in stored)
    tier.discard([key(n) for n in stored[:30]])
    assert [store(tier, n).outcome for n in range(200, 210)].count(Outcome.DONE) >= 8


def test_a_late_transfer_ends_with_deadline(open_tier):
    tier = open_tier()
    late = Transfer(1, Op.STORE, key(1), region(content(1)), deadline_s=time.monotonic() - 1)
    assert run(tier, [late])[1].reason is Reason.DEADLINE
    store(tier, 1)
    late = Transfer(1, Op.LOAD, key(1), region(), deadline_s=time.monotonic() - 1)
    assert run(tier, [late])[1].reason is Reason.DEADLINE


def test_what_was_stored_is_flushed_on_a_timer(open_tier):
    tier = open_tier(sync_interval_s=0.1)
    store(tier, 1)
    store(tier, 2)
    give_up_s = time.monotonic() + 5
    while tier._dirty:
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_the_lock_of_a_dead_engine_does_not_bind(tmp_path, open_tier):
    open_tier().close()
    assert (tmp_path / "kv/rank0/engine.lock").read_text() == f"{os.getpid()}\n"
    with open(tmp_path / "kv/rank0/engine.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    store(open_tier(), 1)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"path": ""}, "path: ''; write a directory"),
        ({"capacity": 0}, "capacity: 0; write a size"),
        ({"sync_interval_s": 0}, "sync_interval_s: 0; write seconds above 0"),
        ({"readers": 17}, "readers: 17; write a number of threads, 1 to 16"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_what_to_write(setting, said):
    with pytest.raises(ConfigError, match=said):
        LmdbConfig(**{"path": "/x", "capacity": ByteSize(1), **setting})


@pytest.mark.parametrize("blocks", [1, 2, 37, 500, 10_000])
@pytest.mark.parametrize("nbytes", [1, 4096, 65_632, 3 * MIB])
def test_a_tier_holds_as_many_blocks_as_its_share_was_asked_for(open_tier, blocks, nbytes):
    [backend] = kvbm_backends()
    share = backend.share_bytes(blocks, nbytes)
    assert plan_sizing(share, nbytes).capacity_bytes // (nbytes + OVERHEAD_BYTES) == blocks
    assert plan_sizing(share - 1, nbytes) is None or blocks > 1
    if blocks < 500:
        assert room(open_tier(share, nbytes=nbytes), nbytes) == blocks
