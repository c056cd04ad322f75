"""A tier that was left alone is tried while the engine is idle, and said to work when it does."""

import dataclasses
import time

import pytest
from test_mover import KEYS, NAMESPACE, Offered, config, device, until

from kvbm_core import (
    Capabilities,
    Completion,
    Op,
    Outcome,
    Planner,
    Reason,
    Report,
    Stack,
    TierStatus,
    Worker,
    load_config,
)
from kvbm_core.block import PROBE_KEY
from kvbm_core.leader.ground.breaker import Breaker
from kvbm_core.memory import MemoryTier

NEVER_S = 3600.0


class Failing(MemoryTier):
    """Fails in the operations of `fails`, keeps those of `holds`, and notes what it is asked for."""

    def __init__(self, tier_config, context):
        super().__init__(tier_config, context)
        self.fails, self.holds = {*Op}, set()
        self.asked, self.discarded, self.held = [], [], []

    def submit(self, transfers):
        self.asked += [(t.op, t.key) for t in transfers]
        self.held += [t for t in transfers if t.op in self.holds]
        super().submit([t for t in transfers if t.op not in self.holds])

    def discard(self, keys):
        self.discarded += keys
        super().discard(keys)

    def tries(self):
        return [op for op, key in self.asked if key == PROBE_KEY]

    def _run(self, transfer):
        if transfer.op in self.fails:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, "[Errno 5] Input/output error")
        return super()._run(transfer)


class Shared(Failing):
    """Others store here too, and it cannot list its blocks."""

    @property
    def capabilities(self):
        return dataclasses.replace(super().capabilities, capacity_bytes=None, shared=True, remote_lookup=True)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Try soon; but leave a tier alone for ever, so that nothing but a try brings it back."""
    monkeypatch.setattr(Breaker, "first_pause_s", 0.05)
    monkeypatch.setattr(Breaker, "longest_pause_s", 0.2)
    note = Breaker.note

    def noted(self, op, reason, now_s):
        opened = note(self, op, reason, now_s)
        self._until_s = now_s + NEVER_S if opened else self._until_s
        return opened

    monkeypatch.setattr(Breaker, "note", noted)


@pytest.fixture
def opened(request):
    """Open a stack over one tier of a class, and fail until it is left alone."""
    stacks = []

    def open_(make, stored=(), **options):
        registry = Offered(make)
        if issubclass(make, Shared):
            offered = registry._loaded["test"]
            registry._loaded["test"] = dataclasses.replace(offered, shared=True)
        stack = Stack.open(config("test", **options), device(), NAMESPACE, registry=registry)
        stacks.append(stack)
        [tier] = registry.tiers
        tier.fails, fails = set(), tier.fails
        for at in stored:
            stack.store([KEYS[at]], [at])
            stack.wait()
        tier.fails = fails
        return stack, tier

    yield open_
    for stack in stacks:
        stack.close()


def fail(stack, operation="store"):
    for at in range(Breaker.threshold):
        if operation == "store":
            stack.store([bytes([at]) * 32], [at])
            stack.wait()
        else:
            stack.load(KEYS[:1], [20])
            stack.wait()


def lines(caplog):
    return [message for message in caplog.messages if "works again" in message]


def test_an_idle_engine_hears_that_the_medium_is_well_and_uses_it_at_once(opened, caplog):
    stack, tier = opened(Failing)
    fail(stack)
    assert not stack._planner.busy(time.monotonic()), "an idle engine takes no steps for it"
    until(lambda: len(tier.tries()) > 2)
    assert lines(caplog) == []
    tier.fails = set()
    until(lambda: lines(caplog))
    # The engine has done nothing meanwhile. What it does now finds the tier, though its pause is not over.
    stack.store(KEYS[:4], range(4))
    stack.wait()
    assert stack.load(KEYS[:4], range(20, 24)) == 4
    [line] = lines(caplog)
    assert line.startswith("tier test0 works again (a block was written and read back); it had failed since")
    assert PROBE_KEY not in tier._objects
    assert stack.occupancy == {"test0": 4}
    asked = len(tier.tries())
    assert stack._worker._engine.pause_s is None
    assert len(tier.tries()) == asked


def test_a_medium_that_can_be_written_and_not_read_does_not_work(opened, caplog):
    stack, tier = opened(Failing, stored=range(1))
    tier.fails = {Op.LOAD}
    fail(stack, "load")
    until(lambda: tier.tries().count(Op.LOAD) > 2)
    assert lines(caplog) == []
    tier.fails = set()
    until(lambda: lines(caplog))
    until(lambda: set(tier._objects) == {KEYS[0]})  # The trial's block goes right behind the line.


def test_a_full_tier_is_tried_with_a_block_that_makes_room(opened, caplog):
    stack, tier = opened(Failing, stored=range(16))
    assert stack.occupancy == {"test0": 16}
    tier.fails = {Op.LOAD}
    fail(stack, "load")
    until(lambda: tier.tries().count(Op.LOAD) > 1)
    tier.fails = set()
    until(lambda: lines(caplog))
    until(lambda: len(tier._objects) == 15)


def test_in_a_shared_tier_nothing_is_stored_or_deleted(opened, caplog):
    stack, tier = opened(Shared)
    fail(stack)
    until(lambda: len(tier.tries()) > 2)
    tier.fails = set()
    until(lambda: lines(caplog))
    assert "it answered when it was asked for a block" in lines(caplog)[0]
    assert set(tier.tries()) == {Op.LOOKUP}
    assert tier.discarded == []
    assert tier._objects == {}


def test_a_shared_tier_that_answers_all_the_while_works_when_what_failed_works(opened, caplog):
    stack, tier = opened(Shared, stored=range(1))
    tier.fails = {Op.LOAD}
    fail(stack, "load")
    until(lambda: len(tier.tries()) > 2)
    assert lines(caplog) == []
    assert not stack._planner.levels(time.monotonic())["test0"].usable
    # Its pause is over: what works beside its loads says nothing of them.
    stack._planner._tiers[0].breaker._until_s = 0.0
    stack.store(KEYS[1:2], [1])
    stack.wait()
    assert tier._objects.keys() == {*KEYS[:2]}
    assert lines(caplog) == []
    tier.fails = set()
    assert stack.load(KEYS[:1], [20]) == 1
    assert len(lines(caplog)) == 1
    assert stack._planner.levels(time.monotonic())["test0"].usable
    until(lambda: not stack._worker._engine._probes._trials)
    assert len(lines(caplog)) == 1


def test_a_tier_that_hangs_is_given_one_block_and_no_thread_spins(opened, caplog):
    stack, tier = opened(Failing, store_deadline_s=0.1)
    fail(stack)
    tier.holds = {Op.STORE}
    until(lambda: tier.held)
    engine = stack._worker._engine
    until(lambda: engine._queues[0].late)
    # Two tries would have been due since.
    moments = []
    for _ in range(3):
        due_s = next(iter(engine._probes._trials.values())).next_s
        until(lambda due_s=due_s: next(iter(engine._probes._trials.values())).next_s != due_s)
        moments.append(engine.pause_s)
    assert [t.key for t in tier.held] == [PROBE_KEY]
    assert min(moments) > 0.01
    assert lines(caplog) == []


def test_what_the_engine_finds_out_itself_is_said_once(opened, caplog, monkeypatch):
    """A trial by a request may come before the next try."""
    monkeypatch.setattr(Breaker, "first_pause_s", 0.3)
    stack, tier = opened(Failing)
    fail(stack)
    tier.fails = set()
    stack._planner._tiers[0].breaker._until_s = 0.0
    stack.store(KEYS[:1], [0])
    stack.wait()
    assert len(lines(caplog)) == 1
    until(lambda: not stack._worker._engine._probes._trials)
    stack.store(KEYS[1:2], [1])
    stack.wait()
    assert len(lines(caplog)) == 1
    assert tier.tries() == []
    assert not stack._planner._endings._left_alone._probed


def test_only_the_rank_whose_part_failed_tries_and_says_so(caplog):
    registry = Offered(Failing)
    settings = load_config(config("test"))
    workers = [
        Worker(settings, device(), NAMESPACE, rank=rank, world_size=2, registry=registry) for rank in range(2)
    ]
    planner = Planner([worker.status() for worker in workers])
    registry.tiers[0].fails = set()

    def step():
        plan = planner.take(time.monotonic())
        for worker in workers:
            worker.submit(plan)
        for worker in workers:
            worker.wait(0.05)
            planner.report(worker.reports(), time.monotonic())

    try:
        for at in range(Breaker.threshold):
            planner.store([KEYS[at]], [at], (), time.monotonic())
            while planner.busy(time.monotonic()):
                step()
        step()
        assert planner.levels(time.monotonic())["test0"].usable is False
        until(lambda: registry.tiers[1].tries())
        registry.tiers[1].fails = set()
        until(lambda: lines(caplog))
        until(lambda: step() or planner.levels(time.monotonic())["test0"].usable)
        assert len(lines(caplog)) == 1
        assert registry.tiers[0].tries() == []
    finally:
        for worker in workers:
            worker.close()


def test_a_block_of_a_try_that_a_kill_left_behind_is_forgotten_and_no_hindrance():
    """A durable tier finds it when it is opened again."""
    planner = Planner([[TierStatus("disk", Capabilities(capacity_bytes=4, durable=True), [(PROBE_KEY, 1)])]])
    assert planner.occupancy == {"disk": 1}
    planner._endings._left_alone._probe(planner.tiers[0])
    plan = planner.take(0.0)
    assert plan.drops == [(0, [PROBE_KEY])]
    assert [probe.tier for probe in plan.probes] == [0]
    assert planner.occupancy == {"disk": 0}


def test_the_reason_that_is_named_is_the_one_that_speaks_against_the_tier(opened, caplog):
    """Of the blocks of one operation some may have waited only: the line names why the others failed."""
    stack, _ = opened(Failing)
    planner = stack._planner
    for at in range(Breaker.threshold):
        keys = [bytes([at, other]) * 16 for other in range(2)]
        planner.store(keys, [0, 1], (), 0.0)
        [store] = planner.take(0.0).stores
        planner.report([Report(store.op, 0, {0: Reason.BUSY, 1: Reason.DEADLINE})], 0.0)
    assert any("tier test0 fails (store: deadline)" in message for message in caplog.messages)


def test_a_block_gone_from_the_host_pool_says_nothing_of_the_tier_below(opened):
    stack, _ = opened(Failing)
    planner = stack._planner
    reasons = [Reason.ERROR, Reason.MISSING, Reason.ERROR, Reason.MISSING, Reason.ERROR]
    for at, reason in enumerate(reasons):
        planner.store([bytes([at]) * 32], [0], (), 0.0)
        [store] = planner.take(0.0).stores
        planner.report([Report(store.op, 0, {0: reason})], 0.0)
    assert planner.levels(0.0)["test0"].usable is False
