"""Stores started later and loads that a step waits for, under a transfer engine: on a simulated accelerator.

The transfer engine's thread is never started; each test says when it would have run.
"""

import contextlib
import ctypes
import random
import time

import pytest
import torch
from simulated_gpu import SimulatedGpu
from test_staged import METHODS, opened, until

from kvbm_core import Planner, Reason, Worker, chain_keys, load_config, root_key
from kvbm_core.block import make_namespace
from kvbm_core.device import DeviceTraits
from kvbm_core.errors import KvbmError
from kvbm_core.plan import Load, Plan, Store, WriteOrder
from kvbm_core.worker import copier, jobs
from kvbm_core.worker.copier import Copier
from kvbm_device import StagedDevice, layout_of

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
        self.device._out.piece_blocks = self.device._in.piece_blocks = (1,)
        entries = [{"backend": tier, "capacity": blocks * 4096} for tier in tiers]
        self.worker = Worker(
            load_config({"tiers": entries, **options}), self.device, make_namespace({"a": 1})
        )
        self.engine = self.worker.take_over()
        self.tiers = [opened.tier for opened in self.worker._tiers]
        self.rights = []
        """What the engine's reads have found so far."""

    def writes(self, blocks, keys):
        for block, key in zip(blocks, keys, strict=True):
            address, data = self.memory[block].data_ptr(), content(key)
            self.gpu.put(self.gpu.engine, lambda a=address, d=data: ctypes.memmove(a, d, len(d)))

    def reads(self, blocks, keys):
        for block, key in zip(blocks, keys, strict=True):
            data = content(key)
            self.gpu.put(
                self.gpu.engine,
                lambda b=block, d=data: self.rights.append(bytes(self.memory[b].numpy()) == d),
            )

    def poll(self):
        self.engine.poll()
        self.gpu.step()

    def end(self):
        """Poll until no copy and no job is left; give the reports."""
        reports = []
        while self.engine.active or self.engine._copier.under_way():
            self.poll()
            reports += self.worker.reports()
        return reports

    def assert_nothing_is_in_use(self):
        assert self.engine._buffers._lent == {}
        assert self.engine._buffers._batches == set()
        assert "0 waiting, 0 pieces" in repr(self.device)
        staging = self.engine._buffers._staging
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
        for tier in made.tiers:
            blocks = {key: tier.view(key) for key in KEYS[:8]} if hasattr(tier, "view") else None
            if blocks is not None:
                assert {key for key, region in blocks.items() if region} == set(stored)
                assert all(bytes(blocks[key].view()[:BYTES]) == content(key) for key in stored)
        made.assert_nothing_is_in_use()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("polls", [0, 1, 3])
def test_who_does_not_keep_the_engines_order_writes_when_nothing_reads(seed, polls):
    """Another connector writes with a copy of its own as soon as the plan has been submitted."""
    with engine(8, seed) as made:
        made.writes(range(8), KEYS[:8])
        made.worker.submit(Plan(stores=[Store(1, KEYS[:8], list(range(8)), [0])]))
        for _ in range(polls):
            made.poll()
        blocks = [7, 1, 2, 0]
        made.worker.submit(Plan(overwrites=blocks, unordered=blocks))
        made.memory[blocks] = 255
        [report] = made.end()
        [tier] = made.tiers
        for at in set(range(8)).difference(report.failures):
            assert bytes(tier.view(KEYS[at]).view()[:BYTES]) == content(KEYS[at])
        assert set(report.failures) <= set(blocks)
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


@pytest.mark.parametrize("settled", [True, False])
def test_what_is_settled_is_read_beside_what_the_engine_has_begun_since(settled):
    with engine(8, eager=0.0) as made:
        made.writes(range(8), KEYS[:8])
        made.worker.submit(Plan(overwrites=[6, 7]))
        computed = {"passed": False}
        made.gpu.wait(made.gpu.engine, computed)
        made.writes([6, 7], KEYS[8:10])
        made.worker.submit(Plan(stores=[Store(1, KEYS[:4], [0, 1, 2, 3], [0])], blocks_final=settled))
        for _ in range(200):
            made.poll()
        assert [report.failures for report in made.worker.reports()] == [{}] * settled
        computed["passed"] = True
        assert [report.failures for report in made.end()] == [{}] * (not settled)
        made.assert_nothing_is_in_use()


def test_nothing_was_begun_before_the_first_plan_that_writes():
    with engine(8) as made:
        made.writes(range(8), KEYS[:8])
        made.worker.submit(Plan(stores=[Store(1, KEYS[:4], [0, 1, 2, 3], [0])], blocks_final=True))
        assert [report.failures for report in made.end()] == [{}]
        tier = made.tiers[0]
        assert all(bytes(tier.view(key).view()[:BYTES]) == content(key) for key in KEYS[:4])


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
            assert bytes(made.tiers[0].view(key).view()[:BYTES]) == content(key)
        assert not planner.busy(NOW)


def stored(made, keys=KEYS[:4]):
    """Have host memory hold some blocks; give the planner that knows."""
    planner = Planner([made.worker.status()])
    made.writes(range(len(keys)), keys)
    planner.store(keys, range(len(keys)), [], NOW)
    made.worker.submit(planner.take(NOW))
    planner.report(made.end(), NOW)
    assert planner.match(keys, NOW) == [0] * len(keys)
    return planner


def in_step(keys, blocks):
    return Plan(loads=[Load(9, "a", 0, -1, keys, blocks, in_step=True)])


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_a_step_computes_with_what_is_loaded_in_it(seed, method, monkeypatch):
    monkeypatch.setattr(jobs, "_FIRST_BLOCKS", 1)  # The load has two parts.
    with engine(8, seed, method=method) as made:
        planner, blocks = stored(made), [6, 2, 0, 5]
        for _ in range(3):
            made.writes(blocks, KEYS[4:8])  # By the step before.
            planner.load("a", KEYS[:4], blocks, planner.match(KEYS[:4], NOW), in_step=True)
            made.worker.submit(planner.take(NOW))
            made.reads(blocks, KEYS[:4])
            made.writes(blocks, KEYS[8:12])  # By the step after, for another request.
        assert made.rights == [], "nothing waits on the host"
        finished = planner.report(made.end(), NOW)
        assert [(op.in_step, failures) for op, failures in finished] == [(True, {})] * 3
        made.gpu.finish()
        assert made.rights == [True] * 12
        assert [bytes(made.memory[block].numpy()) for block in blocks] == [content(k) for k in KEYS[8:12]]
        assert not planner.busy(NOW)
        made.assert_nothing_is_in_use()


def test_a_load_that_comes_while_others_are_looked_at_is_not_lost(monkeypatch):
    """The engine's thread starts it, the transfer engine's thread looks."""
    with engine(8) as made:
        planner, is_done = stored(made), Copier._is_done

        def look(work):
            monkeypatch.setattr(Copier, "_is_done", staticmethod(is_done))
            planner.load("b", KEYS[2:4], [6, 7], [0, 0], in_step=True)
            made.worker.submit(planner.take(NOW))
            return is_done(work)

        monkeypatch.setattr(Copier, "_is_done", staticmethod(look))
        planner.load("a", KEYS[:2], [4, 5], [0, 0], in_step=True)
        made.worker.submit(planner.take(NOW))
        for _ in range(2):
            made.gpu.finish()
            made.engine.poll()
        assert [op.request for op, _ in planner.report(made.worker.reports(), NOW)] == ["a", "b"]
        made.assert_nothing_is_in_use()


def test_a_block_that_is_not_there_is_not_computed_with(monkeypatch):
    monkeypatch.setattr(copier, "_SETTLE_S", 0.1)  # Nobody runs what was begun of the load.
    with engine(8) as made:
        stored(made, KEYS[:1])
        with pytest.raises(KvbmError, match="cannot be loaded"):
            made.worker.submit(in_step(KEYS[:2], [4, 5]))
        # The engine ends. If it does not, it waits for nothing.
        assert [(report.op, set(report.failures)) for report in made.worker.reports()] == [(9, {0, 1})]
        assert not made.engine.active


def test_a_load_that_failed_with_its_mover_is_written_no_more(monkeypatch):
    """The engine's thread finds the bug while the transfer engine's thread is about to start the load."""
    with engine(8) as made:
        planner, end = stored(made), made.engine._end_copies

        def fail_meanwhile():
            monkeypatch.setattr(made.engine, "_end_copies", end)
            made.engine.fail_all()
            end()

        planner.load("a", KEYS[:4], [4, 5, 6, 7], [0] * 4)
        made.worker.submit(planner.take(NOW))
        monkeypatch.setattr(made.engine, "_end_copies", fail_meanwhile)
        made.engine.poll()
        assert [set(report.failures) for report in made.worker.reports()] == [{0, 1, 2, 3}]
        made.writes([4, 5, 6, 7], KEYS[8:12])  # Nothing claims them any more.
        made.gpu.finish()
        assert [bytes(made.memory[b].numpy()) for b in (4, 5, 6, 7)] == [content(k) for k in KEYS[8:12]]


def test_a_block_is_forgotten_when_nobody_reads_it_any_more():
    """Two loads and a store to another tier read it from host memory."""
    with engine(8, tiers=("cpu", "memory")) as made:
        stored(made)
        cpu, slots = made.tiers[0], made.engine._buffers
        loads = [Load(op, "a", 0, -1, KEYS[1:3], blocks) for op, blocks in ((8, [4, 5]), (9, [6, 7]))]
        made.worker.submit(Plan(loads=loads))
        made.engine.poll()
        slot = slots.borrow(KEYS[2])
        made.worker.submit(Plan(drops=[(0, KEYS[1:4])]))
        lent = [bool(cpu.view(key)) for key in KEYS[:4]]
        assert lent == [True, True, True, False]
        made.writes([4, 5, 6, 7], KEYS[8:12])  # The loads come after it.
        assert [(report.op, report.failures) for report in made.end()] == [(8, {}), (9, {})]
        assert [bytes(made.memory[block].numpy()) for block in (4, 5, 6, 7)] == [
            content(key) for key in KEYS[1:3] * 2
        ]
        assert [bool(cpu.view(key)) for key in KEYS[:4]] == [True, False, True, False]
        slots.release(slot)
        assert cpu.view(KEYS[2]) is None
        made.assert_nothing_is_in_use()


def test_what_host_memory_has_not_of_a_load_is_said_and_the_rest_is_loaded():
    with engine(8) as made:
        stored(made)
        made.worker.submit(Plan(loads=[Load(9, "a", 0, -1, [*KEYS[:2], KEYS[9], KEYS[3]], [4, 5, 6, 7])]))
        assert [(report.op, report.failures) for report in made.end()] == [(9, {2: Reason.MISSING})]
        assert [bytes(made.memory[block].numpy()) for block in (4, 5, 7)] == [
            content(key) for key in (KEYS[0], KEYS[1], KEYS[3])
        ]
        made.worker.submit(Plan(loads=[Load(10, "a", 0, -1, KEYS[8:10], [4, 5])]))
        assert [set(report.failures) for report in made.end()] == [{0, 1}]
        made.assert_nothing_is_in_use()


@pytest.mark.parametrize("first", ["load", "store"])
def test_what_was_refused_does_not_hold_back_a_drop_until_the_block_is_there_again(first):
    """The transfer engine's thread polls only while something is under way."""
    with engine(8, blocks=4) as made:
        cpu = made.tiers[0]
        if first == "load":
            made.worker.submit(Plan(loads=[Load(1, "a", 0, -1, KEYS[:1], [0])]))
        else:
            stored(made, KEYS[4:8])
            made.worker.submit(Plan(stores=[Store(1, KEYS[:1], [0], [0])], overwrites=[0]))
        while made.engine.active:
            made.poll()
        assert [set(report.failures) for report in made.worker.reports()] == [{0}]
        made.writes([0], KEYS[:1])
        drops = [(0, [KEYS[0], *KEYS[4:8]])]
        made.worker.submit(Plan(drops=drops, stores=[Store(2, KEYS[:1], [0], [0])]))
        assert [(report.op, report.failures) for report in made.end()] == [(2, {})]
        assert bytes(cpu.view(KEYS[0]).view()[:BYTES]) == content(KEYS[0])
        made.assert_nothing_is_in_use()


def test_a_block_that_the_lender_loses_at_once_is_said_to_be_missing_below(monkeypatch):
    with engine(8, tiers=("cpu", "memory")) as made:
        cpu = made.tiers[0]
        view = cpu.view
        monkeypatch.setattr(cpu, "view", lambda key: None if key == KEYS[1] else view(key))
        made.worker.submit(Plan(stores=[Store(1, KEYS[:2], [0, 1], [0, 1])]))
        found = []
        until(lambda: made.poll() or found.extend(made.worker.reports()) or len(found) == 2)
        assert [(report.tier, report.failures) for report in found] == [(0, {}), (1, {1: Reason.MISSING})]
        assert not made.engine.active


def test_a_copy_of_no_blocks_is_done():
    with engine(8) as made:
        work = made.device.scatter([], [])
        until(lambda: made.gpu.step() or work.done())


def test_only_page_locked_memory_is_loaded_in_the_step(monkeypatch):
    """The driver waits for copies of other memory, in the thread that asks for them: the engine's."""
    with engine(8) as made:
        assert made.device.traits == DeviceTraits((BYTES,), 8, async_gather=True, stream_wait=True)

    def refuse(gpu, address, nbytes):
        raise KvbmError("no memory may be locked", operation="pin")

    monkeypatch.setattr(SimulatedGpu, "pin", refuse)
    memory = torch.zeros(8, BYTES, dtype=torch.uint8)
    layout = layout_of({"layer": memory}, 8)
    monkeypatch.setattr("kvbm_device._jobs.Jobs.__init__", lambda jobs, gpu, most: None)
    assert not StagedDevice(SimulatedGpu(), layout, 1).traits.stream_wait


def test_blocks_that_the_device_does_not_load_are_not_computed_with(monkeypatch):
    with engine(8) as made:
        stored(made)

        def scatter(*args):
            raise RuntimeError("out of order")

        monkeypatch.setattr(made.device, "scatter", scatter)
        with pytest.raises(KvbmError, match="cannot be loaded"):
            made.worker.submit(in_step(KEYS[:4], [4, 5, 6, 7]))


@pytest.mark.parametrize("seed", range(4))
def test_a_mover_that_has_given_up_still_loads_what_a_step_computes_with(seed):
    """The leader may not know yet, and vLLM computes the rest in any case."""
    with engine(8, seed) as made:
        planner = stored(made)
        made.engine.fail_all()
        planner.load("a", KEYS[:4], [4, 5, 6, 7], [0] * 4, in_step=True)
        made.worker.submit(planner.take(NOW))
        made.reads([4, 5, 6, 7], KEYS[:4])
        made.writes([4, 5, 6, 7], KEYS[8:12])
        made.gpu.finish()
        assert made.rights == [True] * 4
        [(_, failures)] = planner.report(made.worker.reports(), NOW)
        assert set(failures) == {0, 1, 2, 3}, "no request is offered a load again"


def test_a_mover_that_has_given_up_computes_with_nothing_that_is_not_there(monkeypatch):
    monkeypatch.setattr(copier, "_SETTLE_S", 0.1)  # Nobody runs what was begun of the load.
    with engine(8) as made:
        stored(made, KEYS[:1])
        made.engine.fail_all()
        with pytest.raises(KvbmError, match="cannot be loaded"):
            made.worker.submit(in_step(KEYS[:2], [4, 5]))


def test_nobody_waits_for_a_worker_that_has_nothing_to_do():
    with engine(8) as made:
        stored(made)
        began_s = time.monotonic()
        assert not made.worker.wait(60)
        assert time.monotonic() - began_s < 30
        made.worker.submit(in_step(KEYS[:4], [4, 5, 6, 7]))
        began_s = time.monotonic()
        assert not made.worker.wait(0.05)
        assert time.monotonic() - began_s >= 0.05


def test_stores_that_wait_at_the_end_are_reported():
    with engine(8) as made:
        made.worker.submit(Plan(stores=[Store(1, KEYS[:4], [0, 1, 2, 3], [0])]))
        made.engine.poll()
        made.worker.submit(Plan(stores=[Store(2, KEYS[4:8], [4, 5, 6, 7], [0])]))
    assert [(r.op, set(r.failures.values())) for r in sorted(made.worker.reports(), key=lambda r: r.op)] == [
        (1, {Reason.ERROR}), (2, {Reason.ERROR}),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_an_engine_over_its_tiers_never_loads_what_is_not_its_keys(seed):  # noqa: C901 - an engine does many things
    """Blocks are computed, stored a step later or more and given to others at once, as a scheduler would."""
    chance = random.Random(seed)
    tiers = chance.choice([("cpu",), ("memory",), ("cpu", "memory")])
    with engine(
        16, seed, tiers=tiers, method=chance.choice(METHODS), eager=chance.choice((0.0, 0.2, 0.6)), blocks=12
    ) as made:
        planner = Planner([made.worker.status()])
        chains = [chain_keys(root_key(), range(at, at + 6), 1) for at in range(0, 30, 6)]
        loading, computed, loaded, needed, written = {}, [], 0, None, -1

        def settle():
            nonlocal loaded
            for op, failures in planner.report(made.worker.reports(), NOW):
                if op.in_step:  # Its blocks may be others' by now.
                    assert failures == {}
                    continue
                for at, (key, block) in enumerate(zip(op.keys, op.blocks, strict=True)):
                    del loading[block]
                    if at not in failures:
                        assert bytes(made.memory[block].numpy()) == content(key)
                        loaded += 1

        for number in range(200):
            settle()
            ripe = [each for each in computed if each[2] < written] if chance.random() < 0.3 else computed
            settled = all(at < written for *_, at in ripe)
            for keys, blocks, _ in ripe:
                planner.store(keys, blocks, [], NOW)
            computed, given, needed = [each for each in computed if each not in ripe], [], None
            kept = {block for _, blocks, _ in computed for block in blocks}
            free = [block for block in range(16) if block not in loading and block not in kept]
            chance.shuffle(free)
            chain = chance.choice(chains)
            found = planner.match(chain, NOW)[: len(free)]
            if found and chance.random() < 0.6:
                blocks, free = free[: len(found)], free[len(found) :]
                if tiers[0] == "cpu" and not any(found) and chance.random() < 0.5:
                    needed = chain[: len(found)], blocks
                else:
                    loading.update(dict.fromkeys(blocks))
                name = str(chance.random())
                planner.load(name, chain[: len(found)], blocks, found, in_step=needed is not None)
            while len(free) >= 3 and chance.random() < 0.6:
                keys = chance.choice(chains)[: chance.randint(1, 3)]
                blocks, free = free[: len(keys)], free[len(keys) :]
                computed.append((keys, blocks, number))
                given += blocks
            plan = planner.take(NOW, WriteOrder(overwrites=given, blocks_final=settled))
            made.worker.submit(plan)
            written = number if given or plan.loads else written
            for keys, blocks, at in computed:
                if at == number:
                    made.writes(blocks, keys)
            if needed:
                made.reads(needed[1], needed[0])
                computed.append((*needed, number))  # To be stored, and anybody's from then on.
            for _ in range(chance.randint(0, 3)):
                made.poll()
            while chance.random() < 0.2 and any(queue.open for queue in made.engine._queues.values()):
                until(lambda: made.poll() or not any(t.open for t in made.engine._queues.values()))
            # An engine is not far ahead.
            while sum(map(len, made.gpu.queues)) > 40 or chance.random() < 0.5:
                made.gpu.step()
        while planner.busy(NOW):
            made.worker.submit(planner.take(NOW))
            made.poll()
            settle()
        made.gpu.finish()
        assert loaded > 5, planner.counts
        assert loading == {}
        assert all(made.rights)
        assert len(made.rights) > 5 or tiers[0] != "cpu"
        made.assert_nothing_is_in_use()
