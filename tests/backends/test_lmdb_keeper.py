"""The process that has LMDB may die, and its file be damaged: the engine lives, the tier returns."""

import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cpu import BLOCK, NAMESPACE, content, key, load, region, store
from test_lmdb import MIB, config, du_bytes, listed

from kvbm_core.errors import TierOpenError
from kvbm_core.tier import Op, Outcome, Reason, TierContext, Transfer
from kvbm_lmdb import LmdbTier
from kvbm_lmdb._link import Fault


@pytest.fixture
def open_tier(tmp_path):
    with contextlib.ExitStack() as stack:

        def open_(capacity=16 * MIB):
            tier = LmdbTier(config(tmp_path / "kv", capacity), TierContext(NAMESPACE, BLOCK))
            stack.callback(tier.close)
            return tier

        yield open_


def keeper_pid(tier):
    return tier._link._keeper.process.pid


def is_there(pid):
    return Path(f"/proc/{pid}").exists()


def wait_until(condition):
    give_up_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def store_until_done(tier, n):
    wait_until(lambda: store(tier, n).outcome is Outcome.DONE)


def test_each_ticket_ends_once_when_the_keeper_is_killed_and_the_tier_returns(open_tier):
    tier = open_tier(64 * MIB)
    for n in range(20):
        store(tier, n)
    ends, tickets = {}, 0
    for round_ in range(4):
        new = range(100 + 60 * round_, 160 + 60 * round_)
        transfers = [Transfer(tickets + at, Op.STORE, key(n), region(content(n))) for at, n in enumerate(new)]
        transfers += [Transfer(tickets + 60 + n, Op.LOAD, key(n), region()) for n in range(20)]
        tier.submit(transfers)
        wait_until(lambda: tier._link._keeper is not None)
        os.kill(keeper_pid(tier), signal.SIGKILL)
        tickets += len(transfers)

        def polled(tickets=tickets):
            for completion in tier.poll():
                assert completion.ticket not in ends
                ends[completion.ticket] = completion
            return len(ends) == tickets

        wait_until(polled)
        # Loads ask nobody.
        assert all(ends[t.ticket].outcome is Outcome.DONE for t in transfers if t.op is Op.LOAD)
        store_until_done(tier, 1000 + round_)
    reasons = {end.reason for end in ends.values()}
    assert reasons <= {Reason.NONE, Reason.ERROR}
    assert Reason.ERROR in reasons
    assert all(load(tier, n)[1] == content(n) for n in [*range(20), *range(1000, 1004)])


def test_two_batches_under_way_end_once_when_the_keeper_is_killed(open_tier):
    """The second is sent while the keeper is at the first."""
    tier = open_tier(64 * MIB)
    store(tier, 0)
    batch = min(tier._sizing.most_stored, tier._sizing.half_bytes // (-(-BLOCK // 4096) * 4096))
    wait_until(lambda: not tier._dirty)
    os.kill(keeper_pid(tier), signal.SIGSTOP)
    transfers = [Transfer(n, Op.STORE, key(n), region(content(n))) for n in range(1, 2 * batch + 1)]
    tier.submit(transfers)
    wait_until(lambda: sum(len(sent.stores) for sent in tier._sent) == 2 * batch)
    os.kill(keeper_pid(tier), signal.SIGKILL)
    ends = []
    wait_until(lambda: ends.extend(tier.poll()) or len(ends) == len(transfers))
    assert sorted(end.ticket for end in ends) == [transfer.ticket for transfer in transfers]
    assert {end.reason for end in ends} == {Reason.ERROR}
    for n in range(3 * batch, 7 * batch):
        store_until_done(tier, n)
    assert all(load(tier, n)[1] == content(n) for n in [0, *range(3 * batch, 7 * batch)])


def test_batches_that_overlap_hold_the_right_blocks(open_tier):
    tier = open_tier(64 * MIB)
    for first in range(1, 601, 200):
        tier.submit([Transfer(n, Op.STORE, key(n), region(content(n))) for n in range(first, first + 200)])
        ends = []
        wait_until(lambda ends=ends: ends.extend(tier.poll()) or len(ends) == 200)
        assert {end.outcome for end in ends} == {Outcome.DONE}
        assert all(load(tier, n)[1] == content(n) for n in range(first, first + 200))


def test_the_window_is_given_back_at_close(open_tier):
    tier = open_tier()
    store(tier, 1)
    assert "memfd:kvbm-lmdb" in Path("/proc/self/maps").read_text()
    tier.close()
    assert "memfd:kvbm-lmdb" not in Path("/proc/self/maps").read_text()


def test_a_store_fails_at_once_and_says_why_while_there_is_no_keeper(open_tier, caplog):
    tier = open_tier()
    store(tier, 1)
    # As after many faults: the next keeper starts late.
    tier._link._faults.extend([(time.monotonic(), Fault.MEDIUM)] * 8)
    os.kill(keeper_pid(tier), signal.SIGKILL)
    store(tier, 2)
    end = store(tier, 3)
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.ERROR)
    assert "SIGKILL" in end.detail
    assert load(tier, 1)[1] == content(1)
    assert caplog.text.count("the process that has LMDB is gone") == 1
    assert "kv/rank0" in caplog.text


def test_a_file_cut_short_under_load_is_put_aside_and_the_engine_lives(tmp_path, open_tier, caplog):
    tier = open_tier()
    for n in range(100):
        store(tier, n)
    data = tmp_path / "kv/rank0/data.mdb"
    os.truncate(data, 5 * 4096)
    ends = [load(tier, n)[0] for n in range(100)]
    assert {end.reason for end in ends} == {Reason.CORRUPT}
    tier.discard([key(n) for n in range(100)])
    store_until_done(tier, 200)
    wait_until(lambda: store(tier, 201).outcome is Outcome.DONE and load(tier, 201)[1] == content(201))
    assert du_bytes(tmp_path / "kv") <= 16 * MIB


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(6, 24))]
)
def test_damaged_pages_neither_end_nor_stop_the_engine(tmp_path, open_tier, seed):
    tier = open_tier(4 * MIB)
    for n in range(20):
        assert store(tier, n).outcome is Outcome.DONE
    tier.close()
    data, rng = tmp_path / "kv/rank0/data.mdb", random.Random(seed)
    with open(data, "r+b") as file:
        for page in rng.sample(range(data.stat().st_size // 4096), 8):
            file.seek(page * 4096)
            file.write(bytes(4096) if seed % 2 else rng.randbytes(4096))
    tier = open_tier(4 * MIB)
    for n in listed(tier):
        tier.submit([Transfer(1, Op.LOAD, n, region())])
        wait_until(lambda: len(tier.poll()) == 1)
    tier.discard(listed(tier))
    for n in range(300, 310):
        store_until_done(tier, n)
    assert load(tier, 309)[1] == content(309)
    assert du_bytes(tmp_path / "kv") <= 4 * MIB


@pytest.mark.parametrize("version", [0, 2, 3, 262145])
def test_a_file_of_another_format_is_put_aside(tmp_path, open_tier, version):
    """One flipped bit makes it one; LMDB, and py-lmdb before it, each say so in their way."""
    tier = open_tier()
    store(tier, 1)
    tier.close()
    data = tmp_path / "kv/rank0/data.mdb"
    content_now = bytearray(data.read_bytes())
    # After the page's header and the number that says what kind of file it is.
    content_now[20:24] = version.to_bytes(4, "little")
    data.write_bytes(content_now)
    tier = open_tier()
    store_until_done(tier, 2)
    assert load(tier, 2)[1] == content(2)
    assert data.with_name("data.mdb.damaged").read_bytes() == bytes(content_now)


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "owner"])
def test_a_file_that_somebody_else_made_is_refused(tmp_path, kind):
    folder = tmp_path / "kv/rank0"
    folder.mkdir(parents=True)
    data, victim = folder / "data.mdb", tmp_path / "victim"
    victim.write_bytes(b"precious")
    if kind == "link":
        data.symlink_to(victim)
    elif kind == "hard link":
        data.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(data)
    else:
        if os.getuid():
            pytest.skip("ANOTHER OWNER IS NOT TESTED: only root can make one")
        data.write_bytes(b"")
        os.chown(data, 12345, 12345)
    said = {"link": "is a link", "hard link": "has another name", "pipe": "is no regular file"}
    why = said.get(kind, "belongs to uid 12345")
    # As of the lock and of every file of gds: one rule, see `kvbm_core.trust`.
    with pytest.raises(TierOpenError, match=rf"data\.mdb {why}.*backend lmdb uses only files of its own"):
        LmdbTier(config(tmp_path / "kv"), TierContext(NAMESPACE, BLOCK))
    assert victim.read_bytes() == b"precious"


def test_a_link_called_lock_mdb_is_not_followed(tmp_path, open_tier):
    folder, victim = tmp_path / "kv/rank0", tmp_path / "victim"
    folder.mkdir(parents=True)
    victim.write_bytes(b"precious")
    (folder / "lock.mdb").symlink_to(victim)
    assert store(open_tier(), 1).outcome is Outcome.DONE
    assert victim.read_bytes() == b"precious"


def test_no_process_is_left_after_close(open_tier):
    tier = open_tier()
    pid = keeper_pid(tier)
    assert Path(f"/proc/{pid}/comm").read_text() == "kvbm-lmdb\n"
    tier.close()
    tier.close()
    assert not is_there(pid)


@pytest.mark.parametrize("fork", [False, True])
def test_no_keeper_outlives_a_killed_engine(tmp_path, fork):
    code = (
        f"import sys, os, time; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_lmdb import *\n"
        f"tier = LmdbTier(config({str(tmp_path / 'kv')!r}), TierContext(NAMESPACE, BLOCK))\n"
        f"child = os.fork() if {fork} else 1\n"
        "if child: print(tier._link._keeper.process.pid, child, flush=True)\n"
        "time.sleep(60)"
    )
    engine = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    pid, child = map(int, engine.stdout.readline().split())
    engine.kill()
    engine.wait()
    engine.stdout.close()
    wait_until(lambda: not is_there(pid))
    if fork:
        os.kill(child, signal.SIGKILL)


def test_signals_of_the_terminal_do_not_end_the_keeper(open_tier, caplog):
    tier = open_tier()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(keeper_pid(tier), number)
    with caplog.at_level(logging.WARNING):
        assert store(tier, 1).outcome is Outcome.DONE
    assert caplog.text == ""


@pytest.mark.parametrize("what", ["kv", "kv/rank0", "kv/rank0/data.mdb"])
@pytest.mark.parametrize("how", [shutil.rmtree, lambda path: path.rename(path.with_name("away"))])
def test_a_tier_whose_files_are_taken_away_starts_empty_and_is_held_by_its_engine(
    tmp_path, open_tier, caplog, what, how
):
    path = tmp_path / what
    tier = open_tier()
    store(tier, 1)
    path.unlink() if path.is_file() else how(path)
    store_until_done(tier, 2)
    assert load(tier, 2)[1] == content(2)
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    [line] = [message for message in caplog.messages if "is gone" in message]
    assert "somebody deleted or replaced it; keep other programs out" in line
    with pytest.raises(TierOpenError, match="in use by another engine"):
        LmdbTier(config(tmp_path / "kv"), TierContext(NAMESPACE, BLOCK))
    tier.close()
    assert len(list(open_tier().inventory())) == 1
