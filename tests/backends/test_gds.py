"""What is the NVMe tier's own: slots, index, engines, the probe, faults. The contract is in `test_cpu`."""

import contextlib
import errno
import fcntl
import gc
import itertools
import logging
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest
import xxhash
from test_cpu import BLOCK, NAMESPACE, content, key, load, lookup, region, run, store
from test_lmdb import du_bytes, small_disk

from kvbm_core import Stack, chain_keys, localdir, root_key
from kvbm_core.config import ByteSize, parse_size
from kvbm_core.errors import ConfigError, QueueFullError, TierError, TierOpenError
from kvbm_core.layers import SEAL_BYTES, SealTier
from kvbm_core.testing import MemoryDevice
from kvbm_core.tier import Op, Outcome, Reason, TierContext, Transfer
from kvbm_gds import GdsConfig, GdsTier, _engines, _io, _layout, _machine, _probe, _slab, _tier, kvbm_backends
from kvbm_gds._check import check
from kvbm_gds._layout import plan_sizing, share_bytes
from kvbm_gds._probe import Finding

KIB, MIB = 1 << 10, 1 << 20
OTHER = b"o" * 16
FAILED_ERROR = (Outcome.FAILED, Reason.ERROR)


def config(path, capacity=8 * MIB, **settings):
    return GdsConfig(path=str(path), capacity=ByteSize(capacity), **settings)


def use_engine(name, monkeypatch):
    """Give what to write after ``engine:`` so that it is this one; the probe has tests of its own."""
    if name == "threads":
        return "threads"
    pytest.importorskip("nixl_cu13", reason="NIXL IS NOT TESTED: it is not installed")
    monkeypatch.setattr(_engines, "run_probe", lambda *_: [Finding(name, "", 1.0, 1.0)])
    return "posix"


@pytest.fixture(params=["threads", "io_uring", "libaio"])
def engine(request, monkeypatch):
    return use_engine(request.param, monkeypatch)


@pytest.fixture
def open_with(tmp_path, monkeypatch):
    monkeypatch.setattr(localdir, "_LOCK_WAIT_S", 0.1)
    with contextlib.ExitStack() as stack:

        def open_(
            capacity=8 * MIB, namespace=NAMESPACE, nbytes=BLOCK, rank=0, world_size=1, wake=lambda: None,
            path=tmp_path / "kv", **settings,
        ):  # fmt: skip
            context = TierContext(namespace, nbytes, rank, world_size, wake)
            tier = GdsTier(config(path, capacity, **settings), context)
            stack.callback(tier.close)
            return tier

        yield open_


@pytest.fixture
def open_tier(open_with, engine):
    return lambda *args, **kwargs: open_with(*args, engine=engine, **kwargs)


@pytest.fixture
def open_plain(open_with):
    """A tier for what does not depend on the engine."""
    return lambda *args, **kwargs: open_with(*args, **{"engine": "threads", **kwargs})


def slots_of(tier):
    return tier.capabilities.capacity_bytes // tier.capabilities.unit_bytes


def keys_in(tier):
    """The keys of the inventory, in its order."""
    return [name for name, _ in tier.inventory()]


def stores(numbers, nbytes=BLOCK):
    return [Transfer(n, Op.STORE, key(n), region(content(n, nbytes), nbytes)) for n in numbers]


def loads(numbers, nbytes=BLOCK):
    return [Transfer(n, Op.LOAD, key(n), region(None, nbytes)) for n in numbers]


def in_turns(tier, transfers):
    """Run transfers, as many at once as the queue takes."""
    depth, ends = tier.capabilities.queue_depth, {}
    for at in range(0, len(transfers), depth):
        ends.update(run(tier, transfers[at : at + depth]))
    return [(ends[t.ticket].outcome, ends[t.ticket].reason) for t in transfers]


def fill(tier, numbers, nbytes=BLOCK):
    return in_turns(tier, stores(numbers, nbytes))


def assert_served(tier, numbers, nbytes=BLOCK):
    transfers = loads(numbers, nbytes)
    assert set(in_turns(tier, transfers)) <= {(Outcome.DONE, Reason.NONE)}
    for transfer in transfers:
        assert transfer.region.view() == content(transfer.ticket, nbytes)


def files_open():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def messages(caplog, level=logging.WARNING):
    return [r.getMessage() for r in caplog.records if r.name == "kvbm_gds" and r.levelno >= level]


# Blocks, and what is found at open.


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 65_632, 100_000, 737_376])
def test_blocks_of_any_length_come_back_as_they_were(open_tier, nbytes):
    tier = open_tier(nbytes=nbytes)
    count = min(10, slots_of(tier))
    assert fill(tier, range(count), nbytes) == [(Outcome.DONE, Reason.NONE)] * count
    assert_served(tier, range(count), nbytes)


def test_blocks_survive_close_and_are_listed_oldest_first(open_tier):
    tier = open_tier()
    assert keys_in(tier) == []
    for n in (5, 3, 9, 1):
        store(tier, n)
    tier.discard([key(3)])
    store(tier, 4)
    tier.close()
    tier = open_tier()
    assert keys_in(tier) == [key(n) for n in (5, 9, 1, 4)]
    assert_served(tier, (5, 9, 1, 4))
    assert lookup(tier, 3) is Outcome.MISSING
    assert repr(tier).endswith("kv/rank0 4/111 objects, 0 in flight>")
    tier.close()
    assert repr(tier).endswith("kv/rank0 4/111 objects, closed>")


def test_wake_is_called_when_there_is_something_to_poll(open_tier):
    woken = threading.Event()
    tier = open_tier(wake=woken.set)
    for transfer in (*stores([1]), *loads([1, 2])):
        woken.clear()
        tier.submit([transfer])
        done = []
        while not done:
            assert woken.wait(20)
            woken.clear()
            done = tier.poll()


def test_other_namespaces_are_kept_until_their_room_is_needed_oldest_first(open_plain):
    tier = open_plain(namespace=OTHER)
    most = slots_of(tier)
    fill(tier, range(10))
    tier.close()
    tier = open_plain()
    assert keys_in(tier) == []
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    assert fill(tier, range(1000, 1000 + most - 8)) == [(Outcome.DONE, Reason.NONE)] * (most - 8)
    tier.close()
    tier = open_plain(namespace=OTHER)
    assert keys_in(tier) == [key(n) for n in range(2, 10)]
    assert_served(tier, range(2, 10))
    tier.close()
    tier = open_plain()
    assert fill(tier, range(2000, 2009)) == [(Outcome.DONE, Reason.NONE)] * 8 + [
        (Outcome.FAILED, Reason.FULL)
    ]
    tier.close()
    assert keys_in(open_plain(namespace=OTHER)) == []


def test_the_inventory_gives_lengths_over_a_restart(open_tier):
    tier = open_tier()
    lengths = {n: 1 + n * 5003 % BLOCK for n in range(40)}
    for n, nbytes in lengths.items():
        assert store(tier, n, nbytes=nbytes).nbytes == nbytes
    tier.discard([key(7)])
    store(tier, 7, nbytes=777)
    tier.close()
    del lengths[7]
    lengths[7] = 777
    tier = open_tier()
    assert list(tier.inventory()) == [(key(n), nbytes) for n, nbytes in lengths.items()]
    for n, nbytes in lengths.items():
        end, data = load(tier, n)
        assert (end.outcome, end.nbytes) == (Outcome.DONE, nbytes)
        assert data[:nbytes] == content(n, nbytes)


def test_objects_longer_than_the_longest_are_kept_while_slots_have_the_same_size(open_plain):
    tier = open_plain()
    fill(tier, range(5))
    tier.close()
    tier = open_plain(nbytes=BLOCK - 1)
    assert list(tier.inventory()) == []
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    fill(tier, range(5, 10), BLOCK - 1)
    tier.close()
    tier = open_plain(nbytes=BLOCK + 1)
    assert list(tier.inventory()) == [(key(n), BLOCK if n < 5 else BLOCK - 1) for n in range(10)]
    assert_served(tier, range(5))
    assert_served(tier, range(5, 10), BLOCK - 1)


def test_what_lies_on_the_disk_is_what_the_page_of_the_format_says(tmp_path, open_plain):
    """An earlier release reads what this one has written, and the other way round."""
    tier = open_plain(nbytes=10_000)
    for n in range(3):
        store(tier, n, nbytes=5000 + n)
    tier.close()
    index = (tmp_path / "kv/rank0/index").read_bytes()
    assert index[:32] == struct.pack("<8sIIQQ", b"KVBMGDS\0", 1, 80, 12_288, (8 << 30) // 12_288)
    slab = (tmp_path / "kv/rank0/slab.000").read_bytes()
    for n in range(3):
        entry = index[4096 + n * 80 : 4176 + n * 80]
        assert entry[:72] == struct.pack("<16s32sQQQ", NAMESPACE, key(n), n + 1, 5000 + n, 0)
        assert entry[72:] == xxhash.xxh3_64_digest(entry[:72])
        assert slab[n * 12_288 :][: 5000 + n] == content(n, 5000 + n)


@pytest.mark.parametrize("nbytes", [0, 12_288, 12_289, 1 << 62])
def test_an_entry_whose_length_no_object_has_is_not_served(tmp_path, open_plain, nbytes):
    open_plain(nbytes=10_000).close()
    with open(tmp_path / "kv/rank0/index", "r+b") as index:
        fields = struct.pack("<16s32sQQQ", NAMESPACE, key(1), 1, nbytes, 0)
        index.seek(4096 + 5 * 80)
        index.write(fields + xxhash.xxh3_64_digest(fields))
    tier = open_plain(nbytes=10_000)
    assert list(tier.inventory()) == []
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    most = slots_of(tier)
    assert fill(tier, range(most), 10_000) == [(Outcome.DONE, Reason.NONE)] * most, "its slot is of use"


def test_slots_of_another_size_start_empty_with_one_line(tmp_path, open_plain, caplog):
    tier = open_plain()
    fill(tier, range(5))
    tier.close()
    tier = open_plain(nbytes=2 * BLOCK)
    assert len(messages(caplog)) == 1
    assert "was made for slots of another size" in caplog.text
    assert keys_in(tier) == []
    assert fill(tier, range(slots_of(tier)), 2 * BLOCK)[-1][0] is Outcome.DONE
    assert du_bytes(tmp_path / "kv") <= 8 * MIB


def test_a_changed_capacity_keeps_what_still_fits(tmp_path, open_tier, caplog):
    tier = open_tier(8 * MIB)
    most = slots_of(tier)
    fill(tier, range(most))
    tier.close()
    tier = open_tier(4 * MIB)
    fewer = slots_of(tier)
    assert messages(caplog) == [
        f"{tmp_path}/kv/rank0: the capacity was lowered; {most - fewer} objects are forgotten"
    ]
    assert keys_in(tier) == [key(n) for n in range(fewer)]
    assert_served(tier, range(fewer))
    assert du_bytes(tmp_path / "kv") <= 4 * MIB
    tier.close()
    tier = open_tier(8 * MIB)
    assert keys_in(tier) == [key(n) for n in range(fewer)]
    assert_served(tier, range(fewer))
    assert set(fill(tier, range(fewer, most))) == {(Outcome.DONE, Reason.NONE)}
    assert len(messages(caplog)) == 1


def test_a_slab_of_several_files(tmp_path, open_tier, monkeypatch, caplog):
    monkeypatch.setattr(_layout, "_FILE_BYTES", MIB)
    tier = open_tier()
    most = slots_of(tier)
    fill(tier, range(most))
    assert_served(tier, range(most))
    tier.close()
    names = sorted(p.name for p in (tmp_path / "kv/rank0").iterdir())
    assert names == ["engine.lock", "index", *(f"slab.{n:03d}" for n in range(8))]
    (tmp_path / "kv/rank0/slab.002").unlink()
    tier = open_tier()
    assert messages(caplog) == [
        f"{tmp_path}/kv/rank0: 15 of {most} objects lay in files that were cut short or deleted; "
        "they are forgotten"
    ]
    left = [n for n in range(most) if n // 15 != 2]
    assert keys_in(tier) == [key(n) for n in left]
    assert_served(tier, left)


# Who may use the directory, and how much room it takes.


def test_a_second_engine_is_refused(tmp_path, open_plain):
    tier = open_plain()
    said = (
        f"path: {tmp_path}/kv/rank0 is in use by another engine (pid {os.getpid()}); "
        "give each engine its own 'path'"
    )
    before = files_open()
    for attempt in (open_plain, lambda: check(config(tmp_path / "kv"))):
        with pytest.raises(TierOpenError) as caught:
            attempt()
        assert str(caught.value) == said
    assert files_open() == before
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_gds import *\n"
        f"try: GdsTier(config({str(tmp_path / 'kv')!r}, engine='threads'), TierContext(NAMESPACE, BLOCK))\n"
        "except TierOpenError as error: print(error)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout == said + "\n"
    tier.close()
    check(config(tmp_path / "kv"))
    open_plain()


def test_only_the_owner_may_read(tmp_path, open_plain):
    store(open_plain(path=tmp_path / "a" / "b"), 1)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [tmp_path / "a", *(tmp_path / "a").rglob("*")]}
    assert modes == {
        "a": 0o700, "b": 0o700, "rank0": 0o700, "index": 0o600, "slab.000": 0o600, "engine.lock": 0o600,
    }  # fmt: skip


def test_check_changes_nothing(tmp_path, open_plain):
    check(config(tmp_path / "x" / "y"))
    assert list(tmp_path.iterdir()) == []
    tier = open_plain()
    store(tier, 1)
    tier.close()
    before = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in (tmp_path / "kv/rank0").iterdir()}
    check(config(tmp_path / "kv"))
    assert {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in (tmp_path / "kv/rank0").iterdir()} == before


def test_check_names_a_path_that_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for attempt in (check, lambda c: GdsTier(c, TierContext(NAMESPACE, BLOCK))):
            with pytest.raises(
                TierOpenError, match=rf"path: .* cannot be used by uid {os.getuid()} .*write a"
            ):
                attempt(config(path, engine="threads"))
    with pytest.raises(TierOpenError, match=r"path: /proc cannot be used by uid"):
        check(config("/proc/kvbm"))


def test_check_names_a_file_system_with_too_little_room(tmp_path):
    with pytest.raises(TierOpenError, match=r"capacity: 1048576TiB.*free; free some room, write at most \d+"):
        check(config(tmp_path, 1 << 60))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_capacity_below_one_block_says_how_much_it_takes(open_plain, world_size):
    with pytest.raises(TierOpenError, match=r"capacity: 4KiB over \d ranks hold no object") as caught:
        open_plain(4096, world_size=world_size)
    least = parse_size(re.search(r"write at least (\S+)", str(caught.value))[1])
    exact = share_bytes(1, BLOCK) * world_size
    assert exact <= least < 1.001 * exact
    assert slots_of(open_plain(exact, world_size=world_size)) == 1
    with pytest.raises(TierOpenError, match="write at least"):
        open_plain(exact - world_size, rank=1, world_size=world_size)


@pytest.mark.parametrize("nbytes", [1, 4096, 65_632, 3 * MIB])
def test_the_sizing_adds_up(nbytes):
    least = share_bytes(1, nbytes)
    assert plan_sizing(least - 1, nbytes) is None
    for share in (least, 3 * least, 40 * MIB + 17, 9 << 30, 40 << 30):
        sizing = plan_sizing(share, nbytes)
        if sizing is None:
            continue
        files = sum(sizing.file_bytes(n) for n in range(sizing.files))
        assert files == sizing.slots * sizing.slot_bytes
        assert files + 4096 + 80 * sizing.slots + sizing.probe_bytes <= share
        number, offset = sizing.place(sizing.slots - 1)
        assert (number, offset + sizing.slot_bytes) == (sizing.files - 1, sizing.file_bytes(sizing.files - 1))


@pytest.mark.parametrize("blocks", [1, 2, 37, 500])
@pytest.mark.parametrize("nbytes", [1, 4096, 28_672 - 32, 65_632])
def test_a_tier_holds_as_many_blocks_as_its_share_was_asked_for(open_plain, blocks, nbytes):
    [backend] = kvbm_backends()
    share = backend.share_bytes(blocks, nbytes)
    tier = open_plain(2 * share, nbytes=nbytes, world_size=2)
    assert slots_of(tier) == blocks


@pytest.mark.parametrize("blocks", [1, 10, 1_000, 100_000, 10_000_000])
@pytest.mark.parametrize("nbytes", [1, 100_000, 2 * MIB, 64 * MIB])
def test_no_share_is_smaller_than_the_one_that_is_said(blocks, nbytes):
    share = share_bytes(blocks, nbytes)
    assert plan_sizing(share, nbytes).slots == blocks
    less = plan_sizing(share - 1, nbytes)
    assert less is None or less.slots < blocks


class Scales:
    """Weighs a directory again and again in a thread, and remembers the most."""

    def __init__(self, path):
        self.path, self.most_bytes, self._stop = path, 0, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._stop.is_set():
            self.most_bytes = max(self.most_bytes, du_bytes(self.path))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.most_bytes = max(self.most_bytes, du_bytes(self.path))


@pytest.mark.parametrize(
    ("capacity", "nbytes", "ranks"),
    [
        (5 * MIB, BLOCK, 2),
        (4 * MIB, 5000, 1),
        (24 * MIB, 737_376, 2),
        pytest.param(5 * MIB, BLOCK, 1, marks=pytest.mark.soak),
        pytest.param(4 * MIB, 5000, 2, marks=pytest.mark.soak),
        pytest.param(24 * MIB, 737_376, 1, marks=pytest.mark.soak),
    ],
)
def test_du_is_never_above_the_capacity(tmp_path, open_with, ranks, capacity, nbytes):
    rng, seen = random.Random(ranks), 0
    with Scales(tmp_path / "kv") as scales:
        # Probing on a restart, too, when the slab is full.
        for life in range(3):
            engines = "threads" if life == 1 else "auto"
            tiers = [
                open_with(capacity, nbytes=nbytes, rank=rank, world_size=ranks, engine=engines)
                for rank in range(ranks)
            ]
            for tier in tiers:
                most, live = slots_of(tier), keys_in(tier)
                assert len(live) == (most if life else 0)
                for _ in range(4):
                    gone = rng.sample(live, len(live) // 2)
                    live = [k for k in live if k not in gone]
                    tier.discard(gone)
                    new = range(seen, seen + most - len(live))
                    assert set(fill(tier, new, nbytes)) <= {(Outcome.DONE, Reason.NONE)}
                    live += [key(n) for n in new]
                    seen += most
            for tier in tiers:
                tier.close()
    assert capacity * 0.8 < scales.most_bytes <= capacity


def test_fewer_ranks_than_before_keep_to_the_capacity_and_keep_what_is_theirs(tmp_path, open_plain, caplog):
    tiers = [open_plain(rank=rank, world_size=3) for rank in range(3)]
    for tier in tiers:
        fill(tier, range(20))
        tier.close()
    tiers = [open_plain(rank=rank, world_size=2) for rank in range(2)]
    dropped = f"{tmp_path}/kv/rank2: more ranks or replicas than there are now left it; dropping it"
    assert messages(caplog) == [dropped]
    assert du_bytes(tmp_path / "kv") <= 8 * MIB
    for tier in tiers:
        assert_served(tier, range(20))


def test_the_directory_of_a_further_rank_that_is_in_use_is_left_alone(tmp_path, open_plain):
    further = open_plain(rank=1, world_size=2)
    with pytest.raises(TierOpenError, match=r"rank1 is in use by another engine"):
        open_plain()
    assert fill(further, range(3)) == [(Outcome.DONE, Reason.NONE)] * 3
    further.close()
    open_plain()
    assert sorted(path.name for path in (tmp_path / "kv").iterdir()) == ["rank0"]


# Kills.

NURSERY = """
import os, random, sys
sys.path.insert(0, {here!r})
from test_gds import *
from kvbm_gds import _engines, _io
if {engine!r} != "threads":
    _engines.run_probe = lambda *_: [Finding({engine!r}, "", 1.0, 1.0)]
    _io.load_nixl()

def live(seed, number):
    tier, rng = open_for_kill({path!r}, {engine!r}, {checked!r}), random.Random(seed)
    log = os.open({log!r}, os.O_RDWR | os.O_APPEND)
    names = {{key(n): n for n in range(number)}}
    stored = [names[k] for k in keys_in(tier)]
    while True:
        if len(stored) > 70:
            gone = rng.sample(stored, 40)
            stored = [n for n in stored if n not in gone]
            os.write(log, b"".join(b"-%d\\n" % n for n in gone))
            tier.discard([key(n) for n in gone])
        new = range(number, number + 16)
        number += 16
        late = [Transfer(-n - 1, Op.LOAD, key(n), region(None, length_of(n))) for n in stored[:4]]
        tier.submit([each for n in new for each in stores([n], length_of(n))] + late)
        left = 16 + len(stored[:4])
        while left:
            for c in tier.poll():
                assert c.outcome is Outcome.DONE, c
                left -= 1
                if c.ticket >= 0:
                    os.write(log, b"+%d\\n" % c.ticket)
                    stored.append(c.ticket)

for line in sys.stdin:
    # Forked from a process without threads, where everything is imported already.
    pid = os.fork()
    if not pid:
        live(*map(int, line.split()))
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def length_of(number):
    """Each object has a length of its own, from one page to all of a slot."""
    return SEAL_BYTES + 1 + number * 40_009 % (BLOCK - SEAL_BYTES)


def open_for_kill(path, engine, checked):
    settings = config(path, engine="threads" if engine == "threads" else "posix", queue_depth=64)
    tier = GdsTier(settings, TierContext(NAMESPACE, BLOCK))
    return SealTier(tier, NAMESPACE) if checked else tier


@pytest.mark.parametrize(
    ("engine", "checked", "kills"),
    [("threads", False, 20), ("threads", True, 14), ("io_uring", False, 8), ("libaio", True, 8)],
)
def test_every_acknowledged_block_survives_kill_9(tmp_path, monkeypatch, engine, checked, kills):
    use_engine(engine, monkeypatch)
    path, log = tmp_path / "kv", tmp_path / "log"
    code = NURSERY.format(
        here=str(Path(__file__).parent), path=str(path), log=str(log), engine=engine, checked=checked
    )
    rng, alive, number = random.Random(engine), set(), 0
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:
        for kill in range(kills):
            log.write_bytes(b"")
            nursery.stdin.write(f"{kill} {number}\n")
            nursery.stdin.flush()
            pid = int(nursery.stdout.readline())
            give_up_s = time.monotonic() + 30
            while b"+" not in log.read_bytes():
                assert time.monotonic() < give_up_s
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.25))
            os.kill(pid, signal.SIGKILL)
            assert nursery.stdout.readline() == "dead\n"
            said = [(line[:1], int(line[1:])) for line in log.read_bytes().split(b"\n")[:-1]]
            gone = {n for sign, n in said if sign == b"-"}
            alive = (alive | {n for sign, n in said if sign == b"+"}) - gone
            number = max(number, *(n for _, n in said)) + 65
            with contextlib.closing(open_for_kill(path, engine, checked)) as tier:
                names = {key(n): n for n in range(number)}
                found = [names[k] for k, _ in tier.inventory()]
                assert [nbytes for _, nbytes in tier.inventory()] == [length_of(n) for n in found]
                assert alive <= set(found)
                # All that is listed is right, also what was not acknowledged.
                transfers = [each for n in found for each in loads([n], length_of(n))]
                assert set(in_turns(tier, transfers)) <= {(Outcome.DONE, Reason.NONE)}
                for transfer in transfers:
                    length = length_of(transfer.ticket) - checked * SEAL_BYTES
                    assert transfer.region.view()[:length] == content(transfer.ticket, length)
            alive = set(found)
        nursery.stdin.close()
    assert number > kills * 16


# A full disk.


def test_a_capacity_beyond_the_disk_leaves_nothing_behind(tmp_path, open_tier):
    with small_disk(tmp_path / "disk", 4 * MIB):
        before = files_open()
        with pytest.raises(TierOpenError) as caught:
            open_tier(16 * MIB, path=tmp_path / "disk/kv")
        said = r"capacity: 16MiB could not be taken in .*rank0 \(No space.*; (\S+) are free\)"
        free = parse_size(re.search(said, str(caught.value))[1])
        assert free > 3.9 * MIB
        assert "write a smaller capacity" in str(caught.value)
        assert [p.name for p in (tmp_path / "disk").rglob("*") if p.is_file()] == ["engine.lock"]
        assert files_open() == before
        # The directory is not locked, and works with less.
        tier = open_tier(3 * MIB, path=tmp_path / "disk/kv")
        assert fill(tier, range(5)) == [(Outcome.DONE, Reason.NONE)] * 5
        tier.close()
        with pytest.raises(TierOpenError, match="capacity: 16MiB could not be taken"):
            open_tier(16 * MIB, path=tmp_path / "disk/kv")
        assert shutil.disk_usage(tmp_path / "disk").free > 1 * MIB
        tier = open_tier(3 * MIB, path=tmp_path / "disk/kv")
        assert_served(tier, range(5))
        tier.close()


def test_a_disk_too_full_for_the_lock_file_is_named(tmp_path, open_plain):
    with small_disk(tmp_path / "disk", 64 * KIB):
        (tmp_path / "disk/kv/rank0").mkdir(parents=True)
        with contextlib.suppress(OSError), open(tmp_path / "disk/rest", "wb") as file:
            file.write(bytes(MIB))
        before = files_open()
        with pytest.raises(TierOpenError, match=r"path: .* cannot be used .*No space left"):
            open_plain(path=tmp_path / "disk/kv")
        assert files_open() == before


def test_a_file_that_cannot_grow_ends_stores_with_full_and_one_line(tmp_path, open_tier, monkeypatch, caplog):
    # As on a file system that copies on write: what was allocated is no promise.
    monkeypatch.setattr(_slab.os, "posix_fallocate", lambda *_: None)
    with small_disk(tmp_path / "disk", 2 * MIB):
        tier = open_tier(8 * MIB, path=tmp_path / "disk/kv")
        ends = [store(tier, n) for n in range(60)]
        stored = [n for n, end in enumerate(ends) if end.outcome is Outcome.DONE]
        assert 20 < len(stored) < 32
        assert {end.reason for end in ends} == {Reason.NONE, Reason.FULL}
        [said] = messages(caplog)
        assert "failed: No space left on device; other files have taken the room that it needs" in said
        assert {end.detail for end in ends} == {"", "No space left on device"}
        assert_served(tier, stored)
        tier.discard([key(n) for n in stored[:10]])
        # Their room on the disk is not given back, but their slots can be written again.
        assert fill(tier, range(100, 110)).count((Outcome.DONE, Reason.NONE)) >= 8
        tier.close()


# Somebody else at the files.


def cut_slab(rank0):
    os.truncate(rank0 / "slab.000", 20 * 69_632 + 100)


def delete_slab(rank0):
    (rank0 / "slab.000").unlink()


def delete_index(rank0):
    (rank0 / "index").unlink()


def cut_index(rank0):
    os.truncate(rank0 / "index", 4096 + 20 * 80 + 7)


def delete_all(rank0):
    shutil.rmtree(rank0)


@pytest.mark.parametrize(
    ("harm", "survive"),
    [(cut_slab, 20), (delete_slab, 0), (delete_index, 0), (cut_index, 20), (delete_all, 0)],
)
def test_files_taken_away_under_a_running_tier(tmp_path, open_tier, monkeypatch, caplog, harm, survive):
    monkeypatch.setattr(_tier, "_REOPEN_EVERY_S", 1e9)
    tier = open_tier()
    fill(tier, range(40))
    harm(tmp_path / "kv/rank0")
    assert lookup(tier, 3) is Outcome.DONE
    assert in_turns(tier, [*loads(range(40)), *stores(range(50, 60))]) == [FAILED_ERROR] * 50
    assert in_turns(tier, loads([1])) == in_turns(tier, stores([60])) == [FAILED_ERROR]
    assert (lookup(tier, 3), lookup(tier, 99)) == (Outcome.DONE, Outcome.MISSING)
    tier.discard([key(39)])
    assert lookup(tier, 39) is Outcome.MISSING
    [said] = messages(caplog)
    assert re.match(r"out for a while: in .*kv/rank0 (slab|the index).* by somebody else; keep", said)
    assert repr(tier).endswith("39/111 objects, out>")
    tier.close()
    tier = open_tier()
    assert keys_in(tier) == [key(n) for n in range(survive)]
    assert_served(tier, range(survive))
    assert fill(tier, range(50, 60)) == [(Outcome.DONE, Reason.NONE)] * 10
    assert_served(tier, range(50, 60))


@pytest.mark.parametrize("harm", [cut_slab, delete_slab, delete_index])
def test_a_stack_counts_what_files_that_are_taken_away_cost_and_gives_no_wrong_byte(tmp_path, harm):
    tier = {"backend": "gds", "capacity": 8 * MIB, "path": str(tmp_path / "kv"), "engine": "threads"}
    keys, device = chain_keys(root_key(), range(40), 1), MemoryDevice(80, BLOCK - SEAL_BYTES)
    for block in range(40):
        device.write(block, content(block)[: BLOCK - SEAL_BYTES])

    def right(count):
        return all(device.read(40 + n) == device.read(n) for n in range(count))

    with Stack.open({"tiers": [tier]}, device, NAMESPACE) as stack:
        stack.store(keys, range(40))
        stack.wait()
        assert stack.load(keys, range(40, 80)) == 40
        assert right(40)
        harm(tmp_path / "kv/rank0")
        for times in (1, 2, 3):
            assert stack.load(keys, range(40, 80)) == 0
            assert stack.counts["gds"].failed == {("load", "error"): 40 * times}
        assert stack.match(keys) == 0, "it is left alone"
    with Stack.open({"tiers": [tier]}, device, NAMESPACE) as stack:
        count = stack.load(keys, range(40, 80))
        assert count == (20 if harm is cut_slab else 0)
        assert right(count)


def test_a_transfer_in_flight_when_files_are_taken_away_fails(tmp_path, open_tier, caplog):
    tier = open_tier()
    fill(tier, range(5))
    tier.submit([*loads(range(5)), *stores(range(10, 15))])
    cut_slab(tmp_path / "kv/rank0")
    os.truncate(tmp_path / "kv/rank0/slab.000", 0)
    ends, give_up_s = [], time.monotonic() + 20
    while len(ends) < 10:
        assert time.monotonic() < give_up_s
        ends += tier.poll()
    assert {(end.outcome, end.reason) for end in ends} == {FAILED_ERROR}
    assert len(messages(caplog)) == 1


def test_a_slab_cut_short_while_closed_loses_what_lay_behind_the_cut(tmp_path, open_tier, caplog):
    tier = open_tier()
    fill(tier, range(40))
    tier.close()
    cut_slab(tmp_path / "kv/rank0")
    tier = open_tier()
    lost = "20 of 40 objects lay in files that were cut short or deleted; they are forgotten"
    assert messages(caplog) == [f"{tmp_path}/kv/rank0: {lost}"]
    assert keys_in(tier) == [key(n) for n in range(20)]
    assert_served(tier, range(20))
    tier.close()
    assert keys_in(open_tier()) == [key(n) for n in range(20)]
    assert len(messages(caplog)) == 1


def test_an_engine_killed_while_it_mends_a_cut_slab_does_not_serve_the_hole(
    tmp_path, open_plain, monkeypatch
):
    tier = open_plain()
    fill(tier, range(40))
    tier.close()
    cut_slab(tmp_path / "kv/rank0")

    def killed(fd, offset, nbytes):
        if nbytes > MIB:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(_slab.os, "posix_fallocate", killed)
        with pytest.raises(SystemExit):
            open_plain()
    # It has its whole length again, and zeros behind the cut.
    assert (tmp_path / "kv/rank0/slab.000").stat().st_size == 111 * 69_632
    tier = open_plain()
    assert keys_in(tier) == [key(n) for n in range(20)]


def test_a_damaged_index_never_gives_a_wrong_block(tmp_path, open_plain, monkeypatch):
    monkeypatch.setattr(_io, "_THREADS", 1)
    nbytes, rank0, rng = 5000, tmp_path / "kv/rank0", random.Random(3)
    tier = open_plain(512 * KIB, nbytes=nbytes)
    fill(tier, range(20), nbytes)
    tier.discard([key(n) for n in range(0, 20, 4)])
    tier.close()
    index, names, lost = (rank0 / "index").read_bytes(), {key(n): n for n in range(20)}, 0
    left = [n for n in range(20) if n % 4]
    slab = (rank0 / "slab.000").read_bytes()
    used = 4096 + 80 * 20
    places = [*range(40), *(rng.randrange(4096, used) for _ in range(300)), *rng.sample(range(used), 60)]
    for place in places:
        damaged = bytearray(index)
        damaged[place] ^= 1 << rng.randrange(8)
        (rank0 / "index").write_bytes(damaged)
        (rank0 / "slab.000").write_bytes(slab)
        tier = open_plain(512 * KIB, nbytes=nbytes)
        found = [names[k] for k in keys_in(tier)]
        assert found == [n for n in left if n in found], "oldest first"
        assert len(found) >= len(left) - 1 or place < 32
        assert_served(tier, found, nbytes)
        lost += len(found) < len(left)
        tier.close()
    assert lost > 200


@pytest.mark.parametrize("length", [0, 10, 4096, 4096 + 79, 4096 + 80 * 7, 4096 + 80 * 7 + 40])
def test_an_index_cut_short_gives_what_is_whole(tmp_path, open_plain, caplog, length):
    tier = open_plain()
    fill(tier, range(12))
    tier.close()
    os.truncate(tmp_path / "kv/rank0/index", length)
    tier = open_plain()
    whole = max(0, length - 4096) // 80
    assert keys_in(tier) == [key(n) for n in range(whole)]
    assert_served(tier, range(whole))
    assert len(messages(caplog)) == (length < 4096), "nothing is said of entries that are not there"
    assert fill(tier, range(20, 30)) == [(Outcome.DONE, Reason.NONE)] * 10


# The probe.

HEAD = "import json, os, sys, time\nengines = sys.argv[4:]\n"
ANSWER = (
    "print(json.dumps(dict(engine=engines[0], problem='', write_bytes_per_s=1, read_bytes_per_s=1)),"
    "flush=True)\n"
)
ALL = f"    for at in range(len(engines)): {ANSWER}".replace("engines[0]", "engines[at]")
TRUE_BUT_WRONG_BYTES = """
from kvbm_gds import _probe
_probe._Host.get = lambda self: bytes(4096)
_probe.child()
"""


@pytest.fixture
def probe_child(monkeypatch):
    pytest.importorskip("nixl_cu13", reason="NIXL IS NOT TESTED: it is not installed")
    monkeypatch.setattr(_engines, "why_gds_is_unavailable", lambda: "not here")

    def put(program):
        monkeypatch.setattr(_probe, "_CHILD", (sys.executable, "-c", program))

    return put


def in_front(program):
    """Hang, crash or lie for the first engine of the first child only; answer well for the others."""
    return f"{HEAD}if len(engines) < 3:\n{ALL}    sys.exit()\n{program}"


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("time.sleep(60)", "it did not move a few blocks within 2 s"),
        (
            "print('a plug-in died', file=sys.stderr, flush=True); os.abort()",
            r"it ended the process that tried it \(exit status -6\), saying: a plug-in died",
        ),
        ("sys.exit(3)", r"it ended the process that tried it \(exit status 3\), saying: nothing"),
        ("print('what?', flush=True); time.sleep(60)", r"the process that tried it answered b'what\?"),
        ("print('{}', flush=True); time.sleep(60)", r"answered b'\{\}"),
        ("print('[1, 2]', flush=True); time.sleep(60)", r"answered b'\[1, 2\]"),
        ("print('x' * 200, end='', flush=True); time.sleep(60)", "did not move a few blocks within 2 s"),
        (ANSWER.replace("engines[0]", "engines[1]"), r"answered b'\{\"engine\": \"libaio\""),
        (ANSWER.replace("read_bytes_per_s=1", "read_bytes_per_s='fast'"), "answered b'"),
    ],
)
def test_auto_takes_the_next_engine_and_says_why(tmp_path, open_with, probe_child, caplog, program, why):
    probe_child(in_front(program))
    before = files_open()
    tier = open_with(engine="auto", probe_deadline_s=2 if "within 2 s" in why else 60)
    [said] = messages(caplog)
    assert re.fullmatch(rf".*kv/rank0: NIXL POSIX \(libaio\); io_uring is out: .*{why}.*", said, re.DOTALL)
    assert tier.capabilities.detail == "NIXL POSIX (libaio)"
    assert store(tier, 1).outcome is Outcome.DONE
    assert_served(tier, [1])
    assert not (tmp_path / "kv/rank0/probe").exists()
    tier.close()
    del tier
    assert files_open() == before


def test_an_engine_that_hangs_after_another_answered_is_killed(tmp_path, open_with, probe_child, caplog):
    note = tmp_path / "pid"
    probe_child(f"{HEAD}open({str(note)!r}, 'w').write(str(os.getpid()))\n{ANSWER}time.sleep(60)")
    tier = open_with(engine="posix", probe_deadline_s=3)
    assert tier.capabilities.detail == "NIXL POSIX (io_uring)"
    assert "libaio is out: it did not move a few blocks within 3 s" in messages(caplog)[0]
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_an_engine_that_reads_other_bytes_is_not_used(open_with, probe_child, caplog):
    probe_child(TRUE_BUT_WRONG_BYTES)
    tier = open_with(engine="auto")
    why = "it read other bytes than were written"
    [said] = messages(caplog)
    outs = "".join(f"; {name} is out: {why}" for name in _probe.HOST)
    assert said.endswith(f"kv/rank0: threads{outs}")
    assert tier.capabilities.detail == "threads"
    tier.close()
    with pytest.raises(TierOpenError) as caught:
        open_with(engine="posix")
    assert str(caught.value) == (
        f"engine: 'posix' does not work here (io_uring: {why}; libaio: {why}); write auto"
    )


def test_a_probe_that_cannot_be_started_leaves_threads(open_with, monkeypatch, probe_child, caplog):
    monkeypatch.setattr(_probe, "_CHILD", ("/no/such/python",))
    assert open_with(engine="auto").capabilities.detail == "threads"
    assert "libaio is out: it could not be tried: " in messages(caplog)[0]


def test_the_true_probe_proves_both_engines_and_leaves_nothing(tmp_path, open_with, monkeypatch):
    pytest.importorskip("nixl_cu13", reason="NIXL IS NOT TESTED: it is not installed")
    seen = []
    monkeypatch.setattr(
        _engines, "run_probe", lambda *args: seen.extend(_probe.run_probe(*args)) or list(seen)
    )
    monkeypatch.setattr(_engines, "why_gds_is_unavailable", lambda: "not here")
    tier = open_with(engine="auto")
    assert [(finding.engine, finding.problem) for finding in seen] == [(name, "") for name in _probe.HOST]
    assert all(finding.score > 0 for finding in seen)
    best = max(seen, key=lambda finding: finding.score).engine
    assert tier.capabilities.detail == ("threads" if best == "threads" else f"NIXL POSIX ({best})")
    assert sorted(p.name for p in (tmp_path / "kv/rank0").iterdir()) == ["engine.lock", "index", "slab.000"]


def test_the_probes_child_dies_with_its_parent(tmp_path):
    program = (
        "import ctypes, os, sys, time\nfrom kvbm_gds import _probe\n"
        "def spin(*_):\n    open('pid', 'w').write(str(os.getpid()))\n    time.sleep(60)\n"
        "_probe._try = spin\n_probe.child()"
    )
    parent = (
        "from pathlib import Path\nfrom kvbm_core.log_limit import TierLog\n"
        "from kvbm_gds import _probe\nimport sys\n"
        f"_probe._CHILD = (sys.executable, '-c', {program!r})\n"
        "_probe.run_probe(Path('probe'), ['io_uring'], 4096, 1, 60, TierLog('kvbm_gds'))"
    )
    note, give_up_s = tmp_path / "pid", time.monotonic() + 30
    with subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path) as process:
        while not (note.exists() and note.read_text()):
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        process.kill()
    pid = int(note.read_text())
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_what_a_killed_engine_left_of_its_probe_is_removed(tmp_path, open_plain):
    open_plain().close()
    (tmp_path / "kv/rank0/probe").write_bytes(bytes(8 * MIB))
    open_plain()
    assert not (tmp_path / "kv/rank0/probe").exists()


def test_gds_without_a_gpu_is_refused_with_the_reason(tmp_path, open_with):
    pytest.importorskip("nixl_cu13", reason="NIXL IS NOT TESTED: it is not installed")
    if not _machine.why_gds_is_unavailable():
        pytest.skip("there is an accelerator here")
    said = r"engine: 'gds' cannot work here: there is no .*; write auto"
    before = files_open()
    with pytest.raises(TierOpenError, match=said):
        open_with(engine="gds")
    assert files_open() == before
    with pytest.raises(TierOpenError, match=said):
        check(config(tmp_path / "kv", engine="gds"))
    open_with(engine="threads")


def test_without_nixl_auto_uses_threads_and_posix_is_refused(tmp_path, open_with, monkeypatch, caplog):
    monkeypatch.setattr(_io, "_NIXL_MODULES", ("no_such_nixl._api",))
    said = "engine: NIXL is not installed; run `pip install nixl-cu13`"
    for name, attempt in itertools.product(("posix", "gds"), (open_with, None)):
        with pytest.raises(TierOpenError, match=said):
            open_with(engine=name) if attempt else check(config(tmp_path / "kv", engine=name))
    check(config(tmp_path / "kv"))
    tier = open_with(engine="auto")
    assert tier.capabilities.detail == "threads"
    [warning] = messages(caplog)
    assert warning.startswith(said)
    assert warning.endswith("; using threads")
    assert store(tier, 1).outcome is Outcome.DONE


@pytest.mark.parametrize(
    ("version", "good"),
    [("1.4.1", False), ("0.9", False), ("1.5.0rc1", True), ("1.5rc2", True), ("2.0.dev1+cu13", True)],
)
def test_a_nixl_that_reports_short_reads_as_done_is_refused(open_with, monkeypatch, version, good):
    pytest.importorskip("nixl_cu13", reason="NIXL IS NOT TESTED: it is not installed")
    monkeypatch.setattr(metadata, "version", lambda name: version)
    if good:
        _io.load_nixl()
        return
    with pytest.raises(TierOpenError, match=rf"engine: nixl-cu13 {version} reports short reads.*install 1.5"):
        open_with(engine="posix")
    assert open_with(engine="auto").capabilities.detail == "threads"


# Engines that fail, and engines that do not end.


def spoil(tier, monkeypatch, number, **fields):
    """Give one block's I/O another file or place, so that the engine truly fails at it."""
    post = tier._engines.host.post

    def posted(ios):
        for io in ios:
            if io.token.key == key(number):
                for name, value in fields.items():
                    setattr(io, name, value)
        post(ios)

    monkeypatch.setattr(tier._engines.host, "post", posted)


def test_one_block_that_cannot_be_written_fails_alone_and_its_slot_is_free_again(
    tmp_path, open_tier, monkeypatch, caplog
):
    tier = open_tier()
    most = slots_of(tier)
    with open(tmp_path / "kv/rank0/slab.000", "rb") as file, monkeypatch.context() as patch:
        spoil(tier, patch, 7, fd=file.fileno())
        ends = in_turns(tier, stores(range(20)))
    assert ends == [FAILED_ERROR if n == 7 else (Outcome.DONE, Reason.NONE) for n in range(20)]
    [said] = messages(caplog)
    assert re.match(r"a store in .*kv/rank0 failed: .", said)
    assert (lookup(tier, 7), lookup(tier, 8)) == (Outcome.MISSING, Outcome.DONE)
    rest = [7, *range(20, most)]
    assert fill(tier, rest) == [(Outcome.DONE, Reason.NONE)] * len(rest)
    assert_served(tier, range(most))
    assert store(tier, most).reason is Reason.FULL
    tier.close()
    assert set(keys_in(open_tier())) == {key(n) for n in range(most)}


def test_a_read_that_ends_short_fails_alone(tmp_path, open_tier, monkeypatch, caplog):
    tier = open_tier()
    fill(tier, range(20))
    (tmp_path / "short").write_bytes(bytes(10_000))
    with open(tmp_path / "short", "rb") as file, monkeypatch.context() as patch:
        spoil(tier, patch, 7, fd=file.fileno(), offset=0)
        ends = in_turns(tier, loads(range(20)))
    assert ends == [FAILED_ERROR if n == 7 else (Outcome.DONE, Reason.NONE) for n in range(20)]
    assert len(messages(caplog)) == 1
    assert_served(tier, range(20))


def test_close_finishes_what_is_in_flight(open_tier):
    tier = open_tier(queue_depth=100)
    fill(tier, range(20))
    transfers = [*stores(range(100, 150)), *loads(range(20))]
    tier.submit(transfers)
    tier.close()
    tier.close()
    ends = tier.poll()
    assert sorted(end.ticket for end in ends) == sorted(t.ticket for t in transfers)
    assert {end.outcome for end in ends} == {Outcome.DONE}
    assert all(t.region.view() == content(t.ticket) for t in transfers)
    assert tier.poll() == []
    tier.discard([key(1)])
    with pytest.raises(TierError, match="closed"):
        tier.submit(loads([1]))
    assert set(keys_in(open_tier())) == {key(n) for n in (*range(20), *range(100, 150))}


@pytest.fixture
def hold(monkeypatch):
    """Keep an engine's reads or writes from ending until it is let go."""
    go_on = threading.Event()
    move = _io.move_bytes

    def held(io, write):
        if io.write is write:
            go_on.wait()
        move(io)

    def hold_(tier, *, write):
        monkeypatch.setattr(_io, "move_bytes", lambda io: held(io, write))
        host = tier._engines.host
        if isinstance(host, _io.NixlIo):
            agent, prepare, handles = host._agent, host._prepare, set()
            post, state = agent.transfer, agent.check_xfer_state

            def prepared(ios):
                handle = prepare(ios)
                if ios[0].write is write:
                    handles.add(id(handle))
                return handle

            def check_state(handle):
                return state(handle) if go_on.is_set() or id(handle) not in handles else "PROC"

            def transfer(handle):
                return "PROC" if post(handle) in ("PROC", "DONE") else "ERR"

            monkeypatch.setattr(host, "_prepare", prepared)
            monkeypatch.setattr(agent, "check_xfer_state", check_state)
            monkeypatch.setattr(agent, "transfer", transfer)
        return go_on

    yield hold_
    go_on.set()


def test_an_engine_that_never_ends_is_left_behind_and_the_directory_stays_locked(
    open_tier, hold, monkeypatch, caplog
):
    monkeypatch.setattr(_tier, "_CLOSE_WAIT_S", 0.3)
    tier = open_tier()
    fill(tier, range(4))
    go_on = hold(tier, write=False)
    transfers = loads(range(4))
    tier.submit(transfers)
    owners = [t.region.owner for t in transfers]
    del transfers
    tier.close()
    assert {(end.outcome, end.reason) for end in tier.poll()} == {FAILED_ERROR}
    assert [
        message for message in messages(caplog) if "transfers go on after 0.3 s; files stay open" in message
    ]
    # Nothing that is still written to is given to anybody else.
    assert all(os.fstat(fd).st_nlink == 1 for fd in tier._slab.fds)
    gc.collect()
    assert all(sum(r is not owners for r in gc.get_referrers(owner)) for owner in owners)
    with pytest.raises(TierOpenError, match="in use by another engine"):
        open_tier()
    go_on.set()
    assert tier._engines.close(20)
    tier._slab.close()
    assert_served(open_tier(), range(4))


def test_a_slot_is_not_written_while_a_late_load_still_reads_it(open_tier, hold):
    tier = open_tier(1 * MIB)
    most = slots_of(tier)
    fill(tier, range(most))
    go_on = hold(tier, write=False)
    [late] = loads([3])
    tier.submit([late])
    tier.discard([key(3), key(4)])
    assert (lookup(tier, 3), lookup(tier, 4)) == (Outcome.MISSING, Outcome.MISSING)
    assert [store(tier, n, ticket=1000).reason for n in (100, 101)] == [Reason.NONE, Reason.FULL]
    go_on.set()
    done, give_up_s = [], time.monotonic() + 20
    while not done:
        assert time.monotonic() < give_up_s
        done = tier.poll()
    assert (done[0].ticket, done[0].outcome) == (3, Outcome.DONE)
    assert late.region.view() == content(3)
    assert [store(tier, n).reason for n in (101, 102)] == [Reason.NONE, Reason.FULL]
    assert_served(tier, [100, 101])


def test_another_models_entry_is_gone_before_its_slot_is_written(tmp_path, open_plain, hold):
    """Else a kill in the middle of the write would leave an entry that vouches for half a block."""
    tier = open_plain(1 * MIB, namespace=OTHER)
    most = slots_of(tier)
    fill(tier, range(most))
    tier.close()

    def entries():
        index = (tmp_path / "kv/rank0/index").read_bytes()
        return sum(index[at : at + 16] == OTHER for at in range(4096, len(index), 80))

    tier = open_plain(1 * MIB)
    assert entries() == most
    hold(tier, write=True)
    tier.submit(stores([0, 1]))
    assert entries() == most - 2


@pytest.mark.parametrize("call", ["transfer", "check_xfer_state"])
def test_what_nixl_does_not_do_is_done_by_threads(open_with, monkeypatch, call):
    tier = open_with(engine=use_engine("libaio", monkeypatch))
    fill(tier, range(4))
    agent = tier._engines.host._agent
    post, state = agent.transfer, agent.check_xfer_state

    def transfer(handle):
        post(handle)
        # Not while the kernel works on it.
        while state(handle) == "PROC":
            pass
        return "ERR"

    said = {"transfer": transfer, "check_xfer_state": lambda h: "PROC" if state(h) == "PROC" else "ERR"}
    with monkeypatch.context() as patch:
        patch.setattr(agent, call, said[call])
        assert_served(tier, range(2))
        assert fill(tier, [10, 11]) == [(Outcome.DONE, Reason.NONE)] * 2
    assert_served(tier, [*range(4), 10, 11])


def test_memory_that_nixl_is_told_of_never_overlaps(tmp_path, monkeypatch):
    """cuFile registers no address twice. Its plug-in needs an accelerator: here NIXL's own agent is told
    of host memory as it would be of the device's.
    """
    use_engine("io_uring", monkeypatch)
    arrived = threading.Event()
    moving = _io.open_engine("io_uring", arrived.set)
    agent, told, said = moving._agent, {}, []
    register, deregister = agent.register_memory, agent.deregister_memory

    def registered(pieces, kind):
        [(address, nbytes, *_)] = pieces
        assert address not in told
        told[address] = nbytes
        said.append(nbytes)
        return register(pieces, kind)

    def deregistered(known):
        del told[known[0][0]]
        return deregister(known)

    with open(tmp_path / "slab", "w+b") as file, monkeypatch.context() as patch:
        os.truncate(file.fileno(), 1 * MIB)
        moving.add_file(file.fileno(), 1 * MIB)
        patch.setattr(agent, "register_memory", registered)
        patch.setattr(agent, "deregister_memory", deregistered)
        patch.setattr(moving, "_direct", True)
        memory = region(content(1, 65_536), 65_536)
        for nbytes in (8192, 4096, 16_384, 8192, 65_536, 4096):
            for write in (True, False):
                io = _io.Io(0, write, file.fileno(), 0, memory.address, nbytes)
                moving.post([io])
                done = []
                while not done:
                    assert arrived.wait(20)
                    arrived.clear()
                    done = moving.take()
                assert not io.error
            assert bytes(memory.view()) == content(1, 65_536)
            file.seek(0)
            assert file.read(nbytes) == content(1, nbytes)
    assert told == {memory.address: 65_536}
    assert said == [8192, 16_384, 65_536], "what it knows already it is not told again"
    assert moving.close(20)


def test_a_second_store_of_a_key_on_its_way_is_busy(open_tier, hold):
    tier = open_tier()
    go_on = hold(tier, write=True)
    tier.submit(stores([1]))
    again = Transfer(2, Op.STORE, key(1), region(content(1)))
    assert run(tier, [again])[2].reason is Reason.BUSY
    assert load(tier, 2)[0].outcome is Outcome.MISSING
    go_on.set()
    assert [end.outcome for end in wait_for(tier, 1)] == [Outcome.DONE]
    assert_served(tier, [1])


def wait_for(tier, count):
    done, give_up_s = [], time.monotonic() + 20
    while len(done) < count:
        assert time.monotonic() < give_up_s
        done += tier.poll()
    return done


def test_places_in_the_queue_are_taken_until_poll(open_tier):
    tier = open_tier(queue_depth=4)
    assert tier.capabilities.queue_depth == 4
    with pytest.raises(QueueFullError, match="5 transfers do not fit beside 0 in flight; the queue takes 4"):
        tier.submit(stores(range(5)))
    assert tier.poll() == []
    # Answered at once, but not polled.
    tier.submit([Transfer(n, Op.LOOKUP, key(n)) for n in range(2)])
    tier.submit(stores([2, 3]))
    with pytest.raises(QueueFullError, match="1 transfers do not fit beside 4"):
        tier.submit([Transfer(9, Op.LOOKUP, key(9))])
    assert len(wait_for(tier, 4)) == 4
    assert fill(tier, range(4, 8)) == [(Outcome.DONE, Reason.NONE)] * 4
    assert lookup(tier, 0) is Outcome.MISSING


@pytest.mark.parametrize("where", ["add_file", "open"])
def test_an_open_that_fails_half_way_leaves_no_thread_no_file_and_no_lock(open_tier, monkeypatch, where):
    before = files_open()

    def refuse(*_):
        raise TierOpenError("refused", operation="open", tier="gds")

    with monkeypatch.context() as patch:
        if where == "add_file":
            patch.setattr(_engines.Engines, "add_files", refuse)
        else:
            patch.setattr(_slab.Slab, "open", refuse)
        with pytest.raises(TierOpenError, match="refused"):
            open_tier()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvbm-gds")]
    assert files_open() == before
    store(open_tier(), 1)


def test_opening_and_closing_leaves_no_file_open(open_tier):
    tier = open_tier()
    tier.close()
    before = files_open()
    for _ in range(5):
        tier = open_tier()
        store(tier, 1)
        tier.close()
        assert files_open() == before


def test_the_lock_of_a_dead_engine_does_not_bind(tmp_path, open_plain):
    open_plain().close()
    assert (tmp_path / "kv/rank0/engine.lock").read_text() == f"{os.getpid()}\n"
    with open(tmp_path / "kv/rank0/engine.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    store(open_plain(), 1)


def test_a_directory_that_may_not_be_used_is_told_from_a_full_one(open_plain, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(_slab, "open_direct", refuse)
    with pytest.raises(TierOpenError, match=r"path: .* cannot be used by uid .*Permission denied"):
        open_plain()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"path": ""}, "path: ''; write a directory"),
        ({"capacity": 0}, "capacity: 0; write a size above 0"),
        ({"queue_depth": 0}, "queue_depth: 0; write a number from 1 to 1024"),
        ({"queue_depth": 1025}, "queue_depth: 1025; write a number from 1 to 1024"),
        ({"probe_deadline_s": 0}, "probe_deadline_s: 0; write seconds above 0"),
        ({"probe_deadline_s": float("nan")}, "probe_deadline_s: nan; write seconds"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_what_to_write(setting, said):
    with pytest.raises(ConfigError, match=said):
        GdsConfig(**{"path": "/x", "capacity": ByteSize(1), **setting})
