"""Stores that are started later, under a mover and its tiers: on a simulated accelerator, step by step.

The mover's thread is never started; each test says when it would have run.
"""

import contextlib
import ctypes
import random

import msgspec
import pytest
import torch
from simulated_gpu import SimulatedGpu
from test_staged import METHODS, opened, until

from kvbm_core import Planner, Reason, Worker, chain_keys, load_config, make_namespace, root_key
from kvbm_core.plan import Plan, Store

KEYS = chain_keys(root_key(), range(16), 1)
NOW = 1.0
BYTES = 512


def content(key):
    return random.Random(key).randbytes(BYTES)


class Engine:
    """Its blocks, what it has enqueued to write there, and a worker whose thread is the test's."""

    def __init__(self, count, seed=0, *, tiers=("cpu",), eager=0.0, method=METHODS[0], blocks=64, **options):
        self.gpu = SimulatedGpu(seed, eager=eager)
        self.memory = torch.zeros(count, BYTES, dtype=torch.uint8)
        self.device = opened({"layer": self.memory}, self.gpu, count, 1, method)
        self.device._out.piece_blocks = self.device._in.piece_blocks = 1
        entries = [{"backend": tier, "capacity": blocks * 4096} for tier in tiers]
        self.worker = Worker(
            load_config({"tiers": entries, **options}), self.device, make_namespace({"a": 1})
        )
        self.worker._thread.start = lambda: None
        self.mover = self.worker._mover

    def writes(self, blocks, keys):
        for block, key in zip(blocks, keys, strict=True):
            address, data = self.memory[block].data_ptr(), content(key)
            self.gpu.put(self.gpu.engine, lambda a=address, d=data: ctypes.memmove(a, d, len(d)))

    def poll(self):
        self.mover.poll()
        self.gpu.step()

    def end(self):
        """Poll until no copy and no job is left; give the reports."""
        reports = []
        while self.mover.active or self.mover._gathers or self.mover._scatters:
            self.poll()
            reports += self.worker.reports()
        return reports

    def assert_nothing_is_in_use(self):
        assert self.mover._slots._lent == {}
        assert "0 waiting, 0 pieces" in repr(self.device)
        assert sorted(self.device._free) == list(range(self.device._out.pieces))
        staging = self.mover._slots._staging
        assert staging is None or repr(staging).startswith("<Staging 0/")


@contextlib.contextmanager
def engine(*args, **options):
    made = Engine(*args, **options)
    try:
        yield made
    finally:
        made.gpu.eager = 0.9  # Closing waits for what is under way.
        made.worker.close()


@pytest.mark.parametrize("tiers", [("cpu",), ("memory",), ("cpu", "memory")], ids="-".join)
def test_what_is_overwritten_before_its_store_began_is_stored_as_it_was_or_not_at_all(tiers):
    with engine(8, tiers=tiers) as made:
        made.writes(range(8), KEYS[:8])
        store = Store(1, KEYS[:8], list(range(8)), list(range(len(tiers))))
        made.worker.submit(Plan(stores=[store]))
        assert not made.device._waits, "the engine's thread starts nothing"
        made.worker.submit(Plan(overwrites=[7, 1, 2, 3, 6]))
        made.writes([7, 1, 2, 3, 6], KEYS[8:13])
        reports = made.end()
        # Two of the five found a piece of staging; nobody was waited for.
        lost = {report.tier: set(report.failures) for report in reports}
        assert lost == {tier: {3, 6, 7} for tier in range(len(tiers))}
        assert {why for report in reports for why in report.failures.values()} == {Reason.FULL}
        stored = {key: at for at, key in enumerate(KEYS[:8]) if at not in {3, 6, 7}}
        for tier in made.worker._tiers:
            blocks = {key: tier.lend(key) for key in KEYS[:8]} if hasattr(tier, "lend") else None
            if blocks is not None:
                assert {key for key, region in blocks.items() if region} == set(stored)
                assert all(bytes(blocks[key].view()[:BYTES]) == content(key) for key in stored)
        made.assert_nothing_is_in_use()


def test_a_store_that_nobody_overwrites_costs_the_engines_thread_nothing(monkeypatch):
    with engine(8) as made:
        made.writes(range(8), KEYS[:8])
        gathers = []
        gather = made.device.gather
        monkeypatch.setattr(made.device, "gather", lambda *args: gathers.append(args) or gather(*args))
        made.worker.submit(Plan(stores=[Store(1, KEYS[:4], [0, 1, 2, 3], [0])]))
        made.worker.submit(Plan(stores=[Store(2, KEYS[4:6], [4, 5], [0])], overwrites=[6, 7]))
        assert not gathers
        made.worker.submit(Plan(overwrites=[5]))
        assert [blocks for blocks, *_ in gathers] == [[4, 5]]
        assert [report.failures for report in made.end()] == [{}, {}]
        made.assert_nothing_is_in_use()


def test_a_load_into_blocks_whose_store_has_not_begun_comes_after_it():
    with engine(8, tiers=("cpu",), seed=3) as made:
        planner = Planner([made.worker.status()])
        made.writes([0, 1], KEYS[:2])
        planner.store(KEYS[:2], [0, 1], [], NOW)
        made.worker.submit(planner.take(NOW))
        planner.report(made.end(), NOW)
        made.writes([2, 3], KEYS[2:4])
        planner.store(KEYS[2:4], [2, 3], KEYS[:2], NOW)
        planner.load("a", KEYS[:2], [2, 3], planner.match(KEYS[:2], NOW))
        made.worker.submit(planner.take(NOW))
        planner.report(made.end(), NOW)
        assert [bytes(made.memory[block].numpy()) for block in (2, 3)] == [content(k) for k in KEYS[:2]]
        for key in KEYS[:4]:
            assert bytes(made.worker._tiers[0].lend(key).view()[:BYTES]) == content(key)
        assert not planner.busy(NOW)


def test_stores_that_wait_at_the_end_are_reported():
    with engine(8) as made:
        made.worker.submit(Plan(stores=[Store(1, KEYS[:4], [0, 1, 2, 3], [0])]))
        made.mover.poll()
        made.worker.submit(Plan(stores=[Store(2, KEYS[4:8], [4, 5, 6, 7], [0])]))
    assert [(r.op, set(r.failures.values())) for r in sorted(made.worker.reports(), key=lambda r: r.op)] == [
        (1, {Reason.ERROR}), (2, {Reason.ERROR}),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_an_engine_over_its_tiers_never_loads_what_is_not_its_keys(seed):  # noqa: C901 - an engine does many things
    """Blocks are computed, stored a step later and given to others at once, as a scheduler would."""
    chance = random.Random(seed)
    tiers = chance.choice([("cpu",), ("memory",), ("cpu", "memory")])
    with engine(
        16, seed, tiers=tiers, method=chance.choice(METHODS), eager=chance.choice((0.0, 0.2, 0.6)), blocks=12
    ) as made:
        planner = Planner([made.worker.status()])
        chains = [chain_keys(root_key(), range(at, at + 6), 1) for at in range(0, 30, 6)]
        loading, computed, loaded = {}, [], 0

        def settle():
            nonlocal loaded
            for op, failures in planner.report(made.worker.reports(), NOW):
                for at, (key, block) in enumerate(zip(op.keys, op.blocks, strict=True)):
                    del loading[block]
                    if at not in failures:
                        assert bytes(made.memory[block].numpy()) == content(key)
                        loaded += 1

        for _ in range(200):
            settle()
            for keys, blocks in computed:
                planner.store(keys, blocks, [], NOW)
            computed, given = [], []
            free = [block for block in range(16) if block not in loading]
            chance.shuffle(free)
            chain = chance.choice(chains)
            found = planner.match(chain, NOW)[: len(free)]
            if found and chance.random() < 0.6:
                blocks, free = free[: len(found)], free[len(found) :]
                loading.update(dict.fromkeys(blocks))
                planner.load(str(chance.random()), chain[: len(found)], blocks, found)
            while len(free) >= 3 and chance.random() < 0.6:
                keys = chance.choice(chains)[: chance.randint(1, 3)]
                blocks, free = free[: len(keys)], free[len(keys) :]
                computed.append((keys, blocks))
                given += blocks
            made.worker.submit(msgspec.structs.replace(planner.take(NOW), overwrites=given))
            for keys, blocks in computed:
                made.writes(blocks, keys)
            for _ in range(chance.randint(0, 3)):
                made.poll()
            while chance.random() < 0.2 and any(traffic.open for traffic in made.mover._traffic.values()):
                until(lambda: made.poll() or not any(t.open for t in made.mover._traffic.values()))
            # An engine is not far ahead.
            while sum(map(len, made.gpu.streams)) > 40 or chance.random() < 0.5:
                made.gpu.step()
        while planner.busy(NOW):
            made.worker.submit(planner.take(NOW))
            made.poll()
            settle()
        assert loaded > 5, planner.counts
        assert loading == {}
        made.assert_nothing_is_in_use()
