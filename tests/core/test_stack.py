import itertools
import random
import threading
import time

import pytest

from kvbm_core import (
    ConfigError,
    Device,
    Registry,
    Stack,
    TierOpenError,
    Work,
    Worker,
    chain_keys,
    load_config,
    root_key,
)
from kvbm_core.layers import SEAL_BYTES
from kvbm_core.leader.ground.tier_policies import TierPolicies
from kvbm_core.plan import Plan, Store
from kvbm_core.testing import MemoryDevice

BLOCK = 5000
NAMESPACE = b"n" * 16
KEYS = chain_keys(root_key(), range(64), 1)


def tier(name, blocks, tmp_path):
    slot = -(-(BLOCK + SEAL_BYTES) // 4096) * 4096
    capacity = {"cpu": slot * blocks, "memory": (BLOCK + SEAL_BYTES) * blocks, "lmdb": 4 << 20}[name]
    path = {"path": str(tmp_path / "lmdb")} if name == "lmdb" else {}
    return {"backend": name, "capacity": capacity, **path}


def device(blocks=128):
    made = MemoryDevice(blocks, BLOCK)
    for block in range(64):
        made.write(block, random.Random(block).randbytes(BLOCK))
    return made


ORDERS = [order for count in (1, 2, 3) for order in itertools.permutations(("cpu", "memory", "lmdb"), count)]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_a_round_trip_through_every_order_of_tiers(order, tmp_path):
    with Stack.open(
        {"tiers": [tier(name, 64, tmp_path) for name in order]}, blocks := device(), NAMESPACE
    ) as stack:
        stack.store(KEYS, range(64))
        stack.wait()
        assert all(counts.stored == 64 for counts in stack.counts.values())
        assert stack.load(KEYS, range(64, 128)) == 64
        assert [blocks.read(64 + i) for i in range(64)] == [blocks.read(i) for i in range(64)]
        stack.reset()
        stack.wait()
        assert stack.match(KEYS) == 0
        assert set(stack.occupancy.values()) == {0}


def test_a_durable_tier_serves_after_a_restart_and_fills_the_one_above(tmp_path):
    tiers = [tier("cpu", 64, tmp_path), tier("lmdb", 64, tmp_path)]
    for life in range(2):
        with Stack.open({"tiers": tiers}, blocks := device(), NAMESPACE) as stack:
            if life == 0:
                stack.store(KEYS, range(64))
                stack.wait()
                continue
            assert stack.load(KEYS, range(64, 128)) == 64
            assert stack.counts["lmdb"].loaded == 64
            assert stack.load(KEYS, range(64, 128)) == 64
            assert stack.counts["cpu"].loaded == 64
            assert blocks.read(127) == blocks.read(63)


def test_a_small_upper_tier_still_lets_everything_through(tmp_path):
    with Stack.open(
        {"tiers": [tier("cpu", 4, tmp_path), tier("memory", 64, tmp_path)], "staging": "64KiB"},
        blocks := device(),
        NAMESPACE,
    ) as stack:
        for at in range(0, 64, 4):
            stack.store(KEYS[at : at + 4], range(at, at + 4), KEYS[:at])
            stack.wait()
        count = stack.load(KEYS, range(64, 128))
        assert count >= 60
        assert all(blocks.read(64 + i) == blocks.read(i) for i in range(count))


def test_a_capacity_below_one_block_is_refused(tmp_path):
    with pytest.raises(TierOpenError, match=r"memory.*holds no block.*4.98KiB"):
        Stack.open({"tiers": [{"backend": "memory", "capacity": "1KiB"}]}, device(), NAMESPACE)


def test_the_tiers_already_open_are_closed_when_one_cannot_be(tmp_path):
    lmdb = tier("lmdb", 8, tmp_path)
    with pytest.raises(ConfigError):
        Stack.open({"tiers": [lmdb, {"backend": "memory", "capacity": "x"}]}, device(), NAMESPACE)
    with pytest.raises(TierOpenError):
        Stack.open({"tiers": [lmdb, {"backend": "memory", "capacity": "1KiB"}]}, device(), NAMESPACE)
    Stack.open({"tiers": [lmdb]}, device(), NAMESPACE).close()


class Slow(MemoryDevice):
    """Copies that are done only later, like those of an accelerator."""

    class Later(Work):
        def __init__(self):
            self.at_s = time.monotonic() + 0.02

        def done(self):
            return time.monotonic() >= self.at_s

        @property
        def given_up(self):
            return frozenset()

    def gather(self, blocks, regions, fence=None, group=0):
        super().gather(blocks, regions, fence, group)
        return self.Later()

    def scatter(self, regions, blocks, fence=None, group=0):
        super().scatter(regions, blocks, fence, group)
        return self.Later()


class Broken(MemoryDevice):
    broken = False

    def scatter(self, regions, blocks, fence=None, group=0):
        if self.broken:
            raise RuntimeError("no")
        return super().scatter(regions, blocks, fence, group)

    def gather(self, blocks, regions, fence=None, group=0):
        if self.broken:
            raise RuntimeError("no")
        return super().gather(blocks, regions, fence, group)


@pytest.mark.parametrize("order", [("cpu",), ("cpu", "memory"), ("memory",)], ids="-".join)
def test_copies_that_take_time(order, tmp_path):
    made = Slow(128, BLOCK)
    for block in range(64):
        made.write(block, random.Random(block).randbytes(BLOCK))
    with Stack.open({"tiers": [tier(name, 64, tmp_path) for name in order]}, made, NAMESPACE) as stack:
        stack.store(KEYS, range(64))
        stack.wait()
        assert stack.load(KEYS, range(64, 128)) == 64
        assert made.read(100) == made.read(36)


@pytest.mark.parametrize("order", [("cpu", "memory"), ("memory",)], ids="-".join)
def test_copies_that_fail_are_outcomes(order, tmp_path):
    made = Broken(128, BLOCK)
    with Stack.open({"tiers": [tier(name, 64, tmp_path) for name in order]}, made, NAMESPACE) as stack:
        made.broken = True
        stack.store(KEYS[:4], range(4))
        stack.wait()
        assert stack.match(KEYS) == 0
        made.broken = False
        stack.store(KEYS[:4], range(4))
        stack.wait()
        made.broken = True
        assert stack.load(KEYS[:4], range(64, 68)) == 0
        made.broken = False
        assert stack.load(KEYS[:4], range(64, 68)) == 4


def test_a_bug_in_the_mover_fails_everything_and_hangs_nothing(tmp_path, monkeypatch):
    with Stack.open({"tiers": [tier("cpu", 64, tmp_path)]}, device(), NAMESPACE) as stack:
        monkeypatch.setattr(stack._worker._engine, "_end_copies", lambda: 1 / 0)
        stack.store(KEYS[:4], range(4))
        stack.wait()
        assert stack.counts["cpu"].failed["store", "error"] == 4
        stack.store(KEYS[4:8], range(4))
        stack.wait()
        assert stack.counts["cpu"].failed["store", "error"] == 8


def test_a_worker_may_be_closed_twice_and_before_anything_was_done(tmp_path):
    worker = Worker(load_config({"tiers": [tier("memory", 4, tmp_path)]}), device(), NAMESPACE)
    worker.close()
    worker.close()


def test_a_worker_that_is_taken_over_goes_on_when_it_is_polled_and_not_before(tmp_path):
    worker = Worker(load_config({"tiers": [tier("memory", 4, tmp_path)]}), device(), NAMESPACE)
    engine = worker.take_over()
    threads = set(threading.enumerate())
    worker.submit(Plan(stores=[Store(1, KEYS[:2], [0, 1], [0])]))
    assert not set(threading.enumerate()) - threads
    assert engine.active
    assert worker.reports() == []
    while engine.active:
        engine.poll()
    [report] = worker.reports()
    assert (report.op, report.failures) == (1, {})
    worker.close()


def test_a_worker_whose_thread_polls_is_not_taken_over(tmp_path):
    worker = Worker(load_config({"tiers": [tier("memory", 4, tmp_path)]}), device(), NAMESPACE)
    worker.submit(Plan())
    with pytest.raises(RuntimeError, match="before the first plan"):
        worker.take_over()
    worker.close()


def test_a_device_is_abstract():
    with pytest.raises(TypeError):
        Device()


class Refuses(Registry):
    """Installed backends, and policies that cannot be made."""

    def policies(self, config):
        def make(context):
            raise ConfigError("too small for this policy")

        return TierPolicies({0: make})


def test_a_stack_that_cannot_be_opened_leaves_nothing_open(tmp_path):
    """Threads are counted by a fixture; the directory is free again."""
    wrong = {**tier("lmdb", 8, tmp_path), "policy": {"name": "lru", "size": 1}}
    with pytest.raises(ConfigError, match=r"policy lru: unknown key 'size'"):
        Stack.open({"tiers": [wrong]}, device(), NAMESPACE)
    config = {"tiers": [tier("lmdb", 8, tmp_path)]}
    with pytest.raises(ConfigError, match="too small"):
        Stack.open(config, device(), NAMESPACE, registry=Refuses())
    Stack.open(config, device(), NAMESPACE).close()
