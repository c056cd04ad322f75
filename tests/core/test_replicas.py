"""Ranks that hold the same bytes, of which one writes to a shared tier; engines that divide a capacity."""

import time
from dataclasses import replace

import pytest

from kvbm_core import Backend, Op, Peers, Planner, Registry, Worker, chain_keys, load_config, root_key
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing import FaultyTier, MemoryDevice

BLOCK = 4000
NAMESPACE = b"n" * 16
KEYS = chain_keys(root_key(), range(8), 1)


class Engine:
    """A leader and its workers, in one process."""

    def __init__(self, tiers, ranks, replicas, registry=None, engine=0, engines=1):
        config = load_config({"tiers": tiers, "lookup_deadline_s": 5})
        self.devices = [MemoryDevice(16, BLOCK) for _ in range(ranks)]
        self.workers = [
            Worker(
                config, device, NAMESPACE, rank=rank, world_size=ranks, registry=registry,
                peers=Peers(replicas, engine, engines),
            )
            for rank, device in enumerate(self.devices)
        ]  # fmt: skip
        self.planner = Planner([worker.status() for worker in self.workers])

    def settle(self):
        while self.planner.busy(time.monotonic()):
            plan = self.planner.take(time.monotonic())
            for worker in self.workers:
                worker.submit(plan)
            for worker in self.workers:
                worker.wait(0.01)
                self.planner.report(worker.reports(), time.monotonic())

    def store(self, count):
        for number in range(count):
            for device in self.devices:
                device.write(number, bytes([number + 1]) * BLOCK)
        self.planner.store(KEYS[:count], list(range(count)), [], time.monotonic())
        self.settle()

    def load(self, count):
        if self.planner.lookup(KEYS[:count], time.monotonic()):
            self.settle()
        tiers = self.planner.match(KEYS[:count], time.monotonic())
        if tiers:
            self.planner.load("r", KEYS[: len(tiers)], list(range(8, 8 + len(tiers))), tiers)
            self.settle()
        return len(tiers)

    def close(self):
        for worker in self.workers:
            worker.close()


@pytest.fixture
def start():
    engines = []

    def start(*args, **options):
        engines.append(Engine(*args, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def objects(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("replicas", "copies"), [(1, 2), (2, 1)])
def test_a_shared_tier_has_one_copy_and_every_rank_reads_it(start, tmp_path, replicas, copies):
    tiers = [{"backend": "remote", "url": f"file://{tmp_path}/kv"}]
    first = start(tiers, 2, replicas)
    first.store(3)
    assert first.planner.counts["remote"].stored == 3
    assert len(objects(tmp_path)) == 3 * copies
    # Another engine of this kind, which has nothing in memory.
    second = start(tiers, 2, replicas)
    assert second.load(4) == 3
    for device in second.devices:
        assert [device.read(8 + number)[:1] for number in range(3)] == [b"\1", b"\2", b"\3"]


def test_two_shards_of_two_replicas_each(start, tmp_path):
    tiers = [{"backend": "remote", "url": f"file://{tmp_path}/kv"}]
    engine = start(tiers, 4, 2)
    engine.store(2)
    folders = {path.parent.parent.name for path in objects(tmp_path)}
    assert folders == {"r0of2", "r1of2"}
    assert len(objects(tmp_path)) == 4


class SharedTier(MemoryTier):
    @property
    def capabilities(self):
        return replace(super().capabilities, shared=True)


def registry_of(shared, fault, contexts):
    def open_tier(config, context):
        contexts.append((context.rank, context.world_size))
        kind = SharedTier if shared else MemoryTier
        return FaultyTier(kind(config, context), fault)

    registry = Registry()
    registry._loaded["odd"] = Backend("odd", MemoryConfig, open_tier, shared=shared)
    return registry


def test_a_block_the_writer_could_not_write_is_not_there(start):
    stores, contexts = [], []

    def fault(transfer):
        stores.append(transfer)
        return "error" if transfer.op is Op.STORE else None

    engine = start([{"backend": "odd", "capacity": "1MiB"}], 2, 2, registry_of(True, fault, contexts))
    engine.store(3)
    assert contexts == [(0, 1), (0, 1)]
    assert len(stores) == 3
    assert engine.planner.counts["odd"].failed == {("store", "error"): 3}
    assert engine.load(3) == 0


def test_a_tier_of_its_own_is_written_by_every_rank(start):
    contexts = []
    engine = start(
        [{"backend": "odd", "capacity": "1MiB"}], 2, 2, registry_of(False, lambda _: None, contexts)
    )
    engine.store(3)
    assert contexts == [(0, 2), (1, 2)]
    assert engine.load(3) == 3
    assert [device.read(9)[:1] for device in engine.devices] == [b"\2", b"\2"]


# Engines of one configuration.


@pytest.mark.parametrize(
    ("shared", "told"), [(False, [(2, 4), (3, 4)]), (True, [(0, 1), (0, 1)])], ids=["own", "shared"]
)
def test_ranks_of_engines_are_numbered_through_in_tiers_that_are_not_shared(start, shared, told):
    contexts = []
    registry = registry_of(shared, lambda _: None, contexts)
    engine = start([{"backend": "odd", "capacity": "1MiB"}], 2, 2, registry, engine=1, engines=2)
    assert contexts == told
    [status] = engine.workers[0].status()
    assert status.capabilities.capacity_bytes == (1 << 20) // told[0][1]


@pytest.mark.parametrize("backend", ["gds", "lmdb"])
def test_the_first_of_several_engines_finds_what_was_one_engines_and_the_other_way_round(
    start, tmp_path, backend, caplog
):
    tiers = [{"backend": backend, "path": str(tmp_path), "capacity": "16MiB"}]
    if backend == "gds":
        tiers[0]["engine"] = "threads"
    alone = start(tiers, 1, 1)
    alone.store(3)
    room = [status.capabilities.capacity_bytes for status in alone.workers[0].status()]
    alone.close()

    first, second = (start(tiers, 1, 1, engine=number, engines=2) for number in range(2))
    assert (first.load(4), second.load(4)) == (3, 0)
    assert first.devices[0].read(10)[:1] == b"\3"
    second.store(4)
    assert [len(list(tmp_path.glob(f"rank{number}"))) for number in range(3)] == [1, 1, 0]
    for engine in (first, second):
        [status] = engine.workers[0].status()
        assert status.capabilities.capacity_bytes <= room[0] / 2
        engine.close()

    alone = start(tiers, 1, 1)
    assert alone.load(4) == 3
    assert not (tmp_path / "rank1").exists()
    dropped = f"{tmp_path}/rank1: more ranks or replicas than there are now left it; dropping it"
    assert sum(dropped in line for line in caplog.messages) == 1
