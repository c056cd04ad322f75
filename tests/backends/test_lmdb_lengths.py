"""Objects of many lengths in LMDB: they fit up to the capacity, in pieces if need be, and come back whole."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest
from test_cpu import NAMESPACE, content, key, load, region, run
from test_lmdb import MIB, config, du_bytes, listed, rewrite_rows, small_disk

from kvbm_core.tier import Op, Outcome, Reason, TierContext, Transfer
from kvbm_lmdb import LmdbTier, _tier
from kvbm_lmdb._contents import contents
from kvbm_lmdb._cut import delete
from kvbm_lmdb._environment import open_store
from kvbm_lmdb._place import SEQUENCE, TICK_KEY, is_sound, nbytes_of, pieces_of, place_of
from kvbm_lmdb._stored import stored
from kvbm_lmdb._tree import read_meta

MAX = 700_000


@pytest.fixture
def open_tier(tmp_path):
    opened = []

    def open_(capacity=16 * MIB, max_bytes=MAX, namespace=NAMESPACE):
        opened.append(LmdbTier(config(tmp_path / "kv", capacity), TierContext(namespace, max_bytes)))
        return opened[-1]

    yield open_
    for tier in opened:
        tier.close()


class Churn:
    """Stores objects of random lengths, and discards as many as their charges ask for."""

    def __init__(self, tier, lengths, seed=0, *, oldest=False):
        self.tier = tier
        self.lengths = lengths
        self.capacity_bytes = tier.capabilities.capacity_bytes
        self.rng = random.Random(seed)
        self.oldest = oldest
        self.live = {}
        self.count = self.stored_bytes = 0
        self.reasons = []

    def charged(self, lengths):
        return sum(map(self.tier.capabilities.charge, lengths))

    def step(self, count):
        new = {}
        for _ in range(count):
            self.count += 1
            new[self.count] = self.rng.randint(*self.lengths)
        excess = self.charged([*self.live.values(), *new.values()]) - self.capacity_bytes
        order = sorted(self.live)
        if not self.oldest:
            self.rng.shuffle(order)
        for victim in order:
            if excess <= 0:
                break
            excess -= self.charged([self.live.pop(victim)])
            self.tier.discard([key(victim)])
        stores = [Transfer(n, Op.STORE, key(n), region(content(n, size), size)) for n, size in new.items()]
        for n, end in run(self.tier, stores).items():
            if end.outcome is Outcome.DONE:
                assert end.nbytes == new[n]
                self.live[n] = new[n]
                self.stored_bytes += new[n]
            self.reasons.append(end.reason)

    def check(self, tier=None):
        """Load all that is there, into regions that are longer."""
        behind = b"\xaa" * 5000
        for batch in batched(self.live.items(), 32):
            targets = {n: region(bytes(size) + behind, size + len(behind)) for n, size in batch}
            loads = [Transfer(at, Op.LOAD, key(n), targets[n]) for at, n in enumerate(targets)]
            ends = run(tier or self.tier, loads)
            for at, (n, size) in enumerate(batch):
                assert (ends[at].outcome, ends[at].nbytes) == (Outcome.DONE, size)
                assert bytes(targets[n].view()) == content(n, size) + behind


def batched(items, count):
    items = list(items)
    return [items[at : at + count] for at in range(0, len(items), count)]


def most_pieces(tier):
    return max(len(pieces_of(place)) for place in tier._present.values())


SMALL = 4080
"""An object of one page."""


def fragment(tmp_path, open_tier, monkeypatch, capacity=16 * MIB, max_bytes=MAX):
    """Open a tier over a file with hardly two free pages that are neighbours, and that cannot grow.

    Half of it is objects of a page each, and what lay between them was discarded. For the pages of the trees
    that erasing copies it has 40 more.
    """
    tier = open_tier(capacity, max_bytes)
    count = tier.capabilities.capacity_bytes // tier.capabilities.charge(SMALL)
    for first in range(0, count, 200):
        numbers = range(first, min(count, first + 200))
        ends = run(tier, [Transfer(n, Op.STORE, key(-n), region(content(-n, SMALL), SMALL)) for n in numbers])
        assert {end.outcome for end in ends.values()} == {Outcome.DONE}
    tier.close()
    plan, map_bytes = _tier.plan_sizing, (tmp_path / "kv/rank0/data.mdb").stat().st_size + 40 * 4096
    monkeypatch.setattr(_tier, "plan_sizing", lambda *sizes: replace(plan(*sizes), map_bytes=map_bytes))
    churn = Churn(open_tier(capacity, max_bytes), (max_bytes // 3, max_bytes))
    churn.live = {-n: SMALL for n in range(1, count, 2)}
    churn.tier.discard([key(-n) for n in range(0, count, 2)])
    return churn


@pytest.mark.parametrize("oldest", [True, False])
@pytest.mark.parametrize(
    ("capacity", "lengths"),
    [
        (16 * MIB, (1, 9000)),
        (16 * MIB, (20_000, 70_000)),
        (32 * MIB, (4080, 4080)),
        (48 * MIB, (200_000, 735_000)),
        (64 * MIB, (1, 2 * MIB)),
    ],
)
def test_what_the_charges_permit_is_stored_whatever_the_lengths(
    tmp_path, open_tier, capacity, lengths, oldest
):
    churn = Churn(tier := open_tier(capacity, lengths[1]), lengths, oldest=oldest)
    while churn.stored_bytes < 2 * capacity:
        churn.step(max(1, min(100, 4 * MIB // lengths[1])))
        assert du_bytes(tmp_path / "kv") <= capacity
    assert set(churn.reasons) == {Reason.NONE}
    churn.check()
    tier.close()
    assert dict(open_tier(capacity, lengths[1]).inventory()) == {key(n): b for n, b in churn.live.items()}


@pytest.mark.parametrize(
    ("capacity", "lengths"),
    [
        (256 * MIB, (600_000, 2 * MIB)),
        pytest.param(1024 * MIB, (65_536, 70_000), marks=pytest.mark.soak),
        pytest.param(1024 * MIB, (65_536, MIB), marks=pytest.mark.soak),
        pytest.param(1024 * MIB, (600_000, 2 * MIB), marks=pytest.mark.soak),
    ],
)
def test_it_uses_95_percent_of_its_capacity_on_the_disk_and_never_more(
    tmp_path, open_tier, capacity, lengths
):
    churn = Churn(open_tier(capacity, lengths[1]), lengths)
    while churn.stored_bytes < 3 * capacity:
        churn.step(8 * MIB // lengths[1])
        assert du_bytes(tmp_path / "kv") <= capacity
    assert set(churn.reasons) == {Reason.NONE}
    assert most_pieces(churn.tier) > 1 or lengths[1] < 100_000
    assert du_bytes(tmp_path / "kv") >= 0.95 * capacity
    churn.check()


def test_an_object_goes_into_single_pages_where_no_two_are_neighbours(tmp_path, open_tier, monkeypatch):
    churn = fragment(tmp_path, open_tier, monkeypatch)
    small = dict(churn.live)
    for round_ in range(6):
        churn.step(2)
        assert round_ or most_pieces(churn.tier) > 50
        churn.check()
        # And out of it again, though the list of freed pages finds no neighbours either.
        churn.tier.discard([key(n) for n in churn.live.keys() - small.keys()])
        churn.live = dict(small)
    churn.step(2)
    assert set(churn.reasons) == {Reason.NONE}
    churn.tier.close()
    churn.tier = open_tier()
    assert set(listed(churn.tier)) == {key(n) for n in churn.live}
    churn.check()


def test_an_object_longer_than_the_region_is_corrupt_and_a_shorter_leaves_the_rest(open_tier):
    tier = open_tier()
    run(tier, [Transfer(1, Op.STORE, key(1), region(content(1, 10_001), 10_001))])
    assert load(tier, 1, 10_000)[0].reason is Reason.CORRUPT
    end, got = load(tier, 1, 10_002)
    assert (end.outcome, end.nbytes, got) == (Outcome.DONE, 10_001, content(1, 10_001) + b"\xaa")


def test_an_object_longer_than_was_said_at_open_is_refused(open_tier):
    end = run(open_tier(), [Transfer(1, Op.STORE, key(1), region(None, MAX + 1))])[1]
    assert (end.reason, end.detail) == (Reason.ERROR, "700001 bytes, and the longest object has 700000")


def test_objects_longer_than_the_longest_now_are_not_listed_and_given_up_first(open_tier):
    tier = open_tier()
    for n, size in ((1, MAX), (2, 1000), (3, MAX)):
        run(tier, [Transfer(1, Op.STORE, key(n), region(content(n, size), size))])
    tier.close()
    assert list(open_tier(max_bytes=1000).inventory()) == [(key(2), 1000)]


CHILD = """
import os, sys
sys.path.insert(0, {here!r})
from test_lmdb_lengths import *
tier = LmdbTier(config({path!r}, 24 * MIB), TierContext(NAMESPACE, MAX))
churn = Churn(tier, (MAX // 3, MAX), seed={seed})
while True:
    before = dict(churn.live)
    churn.step(4)
    said = ["-%d" % n for n in before.keys() - churn.live.keys()]
    said += ["+%d %d" % (n, churn.live[n]) for n in churn.live.keys() - before.keys()]
    os.write(1, ("\\n".join([*said, "pieces %d" % most_pieces(tier)]) + "\\n").encode())
"""


@pytest.mark.parametrize("victim", ["engine", "keeper"])
@pytest.mark.parametrize("seed", range(3))
def test_every_acknowledged_object_survives_kill_9_while_objects_are_cut(tmp_path, open_tier, seed, victim):
    path, log = tmp_path / "kv", tmp_path / "log"
    code = CHILD.format(here=str(Path(__file__).parent), path=str(path), seed=seed)
    with open(log, "wb") as out:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=out)
    give_up_s = time.monotonic() + 120
    # Until it is full, and some are in pieces.
    while not any(line > b"pieces 1" for line in log.read_bytes().split(b"\n")[:-1] if line[:1] == b"p"):
        assert child.poll() is None
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0.0, 0.5))
    if victim == "keeper":
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        [keeper] = [pid for pid in children if Path(f"/proc/{pid}/comm").read_text() == "kvbm-lmdb\n"]
        os.kill(int(keeper), signal.SIGKILL)
        time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    live = {}
    for line in log.read_bytes().split(b"\n")[:-1]:
        if line[:1] == b"+":
            n, size = map(int, line[1:].split())
            live[n] = size
        elif line[:1] == b"-":
            live.pop(int(line[1:]), None)
    churn = Churn(open_tier(24 * MIB), (MAX // 3, MAX), seed=100 + seed)
    there = dict(churn.tier.inventory())
    # What was asked to go in the step that was cut off may be gone, and is not known here: at most a step's.
    missing = {n for n, size in live.items() if there.get(key(n)) != size}
    assert len(missing) <= 16
    churn.live = {n: size for n, size in live.items() if n not in missing}
    churn.check()
    churn.tier.discard(list(there.keys() - {key(n) for n in churn.live}))
    churn.count = 10**6
    for _ in range(20):
        churn.step(4)
    assert set(churn.reasons) == {Reason.NONE}
    churn.check()


@pytest.mark.parametrize("seed", range(8))
def test_damage_to_objects_in_pieces_neither_ends_nor_stops_the_engine(
    tmp_path, open_tier, monkeypatch, seed
):
    churn = fragment(tmp_path, open_tier, monkeypatch, 4 * MIB, 90_000)
    while most_pieces(churn.tier) <= 3:
        churn.step(1)
    assert set(churn.reasons) == {Reason.NONE}
    churn.tier.close()
    monkeypatch.undo()
    data, rng = tmp_path / "kv/rank0/data.mdb", random.Random(seed)
    with open(data, "r+b") as file:
        for page in rng.sample(range(data.stat().st_size // 4096), 8):
            file.seek(page * 4096)
            file.write(bytes(4096) if seed % 2 else rng.randbytes(4096))
    tier = open_tier(4 * MIB, 90_000)
    for at, (name, size) in enumerate(list(tier.inventory())[-30:]):
        end = run(tier, [Transfer(at, Op.LOAD, name, region(None, 90_000))])[at]
        assert (end.outcome, end.nbytes) == (Outcome.DONE, size) or end.reason is Reason.CORRUPT
    tier.discard(listed(tier))
    give_up_s = time.monotonic() + 60
    churn = Churn(tier, (30_000, 90_000), seed + 50)
    churn.count = 5000
    while len(churn.live) < 20:
        assert time.monotonic() < give_up_s
        churn.step(1)
        time.sleep(0.01)
    churn.check()
    assert du_bytes(tmp_path / "kv") <= 4 * MIB


def test_a_file_of_format_1_is_put_aside(tmp_path, open_tier):
    folder = tmp_path / "kv/rank0"
    folder.mkdir(parents=True, mode=0o700)
    (tmp_path / "kv").chmod(0o700)
    env = lmdb.open(str(folder / "data.mdb"), subdir=False, lock=False, max_dbs=2, map_size=8 * MIB)
    with env.begin(write=True) as txn:
        for name in (b"blocks", b"index"):
            txn.put(NAMESPACE + key(1), b"x" * 5000, db=env.open_db(name, txn))
    env.close()
    old = (folder / "data.mdb").read_bytes()
    tier = open_tier()
    assert listed(tier) == []
    run(tier, [Transfer(1, Op.STORE, key(1), region(content(1, 5000), 5000))])
    assert load(tier, 1, 5000)[1] == content(1, 5000)
    assert (folder / "data.mdb.damaged").read_bytes() == old
    assert "its databases have format 1, and this is 2" in (folder / "data.mdb.damaged.txt").read_text()


def test_an_object_that_was_half_erased_is_not_served_and_its_room_returns(tmp_path, open_tier):
    churn = Churn(tier := open_tier(8 * MIB), (MAX // 2, MAX))
    for _ in range(40):
        churn.step(1)
    tier.close()
    gone = min(churn.live)
    rewrite_rows(tmp_path, lambda name, row: row[:8] + b"\xff" * 8 + row[16:] if name == key(gone) else row)
    del churn.live[gone]
    churn.tier = open_tier(8 * MIB)
    assert set(listed(churn.tier)) == {key(n) for n in churn.live}
    for _ in range(40):
        churn.step(1)
    assert set(churn.reasons) == {Reason.NONE}
    churn.check()


def test_a_full_disk_is_used_to_its_end_in_pieces(tmp_path):
    context = TierContext(NAMESPACE, MAX)
    with (
        small_disk(tmp_path / "disk", 16 * MIB),
        contextlib.closing(LmdbTier(config(tmp_path / "disk", 64 * MIB), context)) as tier,
    ):
        churn = Churn(tier, (MAX // 3, MAX))
        while Reason.FULL not in churn.reasons:
            churn.step(1)
        charged = churn.charged(churn.live.values())
        assert charged > 12 * MIB
        # LMDB uses freed pages again only some transactions later.
        churn.capacity_bytes, churn.reasons = charged - 3 * MAX, []
        most = 0
        for _ in range(80):
            churn.step(1)
            most = max(most, most_pieces(tier))
        assert set(churn.reasons) == {Reason.NONE}
        assert most > 1
        churn.check()


@pytest.mark.parametrize(
    ("place", "sound"),
    [
        (place_of(5000, [(2, 2)]), True),
        (place_of(5000, [(2, 1), (8, 1)]), True),
        (place_of(0, [(2, 1)]), True),
        (place_of(5000, [(2, 3)]), False),
        (place_of(5000, [(1, 2)]), False),
        (place_of(5000, [(9, 2)]), False),
        (place_of(5000, [(2, 2), (4, 1)]), False),
        (place_of(5000, [(2, 1)]), False),
        (place_of(5000, []), False),
        (place_of(5000, [(2, 2)])[:-1], False),
        (b"", False),
    ],
    ids=range(11),
)
def test_a_place_is_sound_if_its_pieces_hold_the_object_and_lie_in_the_file(place, sound):
    assert is_sound(place, 10 * 4096) is sound
    if sound:
        assert place_of(nbytes_of(place), pieces_of(place)) == place


def test_a_directory_of_cut_objects_can_be_copied(tmp_path, open_tier, monkeypatch):
    churn = fragment(tmp_path, open_tier, monkeypatch)
    churn.step(2)
    churn.tier.close()
    shutil.copytree(tmp_path / "kv", tmp_path / "copy")
    tier = LmdbTier(config(tmp_path / "copy"), TierContext(NAMESPACE, MAX))
    churn.check(tier)
    tier.close()


def test_what_a_killed_keeper_has_half_erased_is_counted_by_nobody(tmp_path, open_tier, monkeypatch):
    churn = fragment(tmp_path, open_tier, monkeypatch, 4 * MIB, 90_000)
    churn.step(4)
    gone = next(name for name, place in churn.tier._present.items() if len(pieces_of(place)) > 2)
    churn.tier.close()
    with (tmp_path / "kv/rank0/data.mdb").open("r+b") as file:
        store = open_store(file.fileno(), read_meta(file.fileno()).map_bytes, lambda: None)
        # The keeper's first step, and the last that it lived to make; before it LMDB was moved on.
        with store.env.begin(write=True) as txn:
            assert delete(store, txn, NAMESPACE + gone, most_pages=1) < 0
            txn.put(TICK_KEY, SEQUENCE.pack(1 << 40), db=store.index)
        store.env.close()
    live = {key(n): size for n, size in churn.live.items() if key(n) != gone}
    [found] = stored(config(tmp_path / "kv"))
    assert (found.objects, found.nbytes) == (len(live), sum(live.values()))
    [part] = contents(config(tmp_path / "kv"))
    assert {each.key: each.nbytes for each in part.objects() if not each.broken} == live
    assert not [each.broken for each in part.objects() if each.broken]
    assert part.problems() == []
    part.close()
