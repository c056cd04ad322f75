"""Blocks that go from tier to tier, past the device."""

import time

import pytest
from test_mover import KEYS, NAMESPACE, Held, Offered, config, device, until

from kvbm_core import Completion, Op, Outcome, Reason, Stack


def drop(stack, tier, *keys):
    for key in keys:
        stack._planner.tiers[tier].drop(key)
    stack.wait()


def fill(stack, source, target, keys):
    planned = stack._planner.fill(source, target, keys, time.monotonic(), keys)
    stack._go()
    stack.wait()
    return planned


@pytest.fixture(params=[("cpu", "memory", "test"), ("memory", "memory", "test")], ids="-".join)
def stack(request):
    registry = Offered(Held)
    made = device()
    with Stack.open(config(*request.param), made, NAMESPACE, registry=registry) as opened:
        opened.device, opened.test = made, registry.tiers[0]
        opened.store(KEYS[:4], range(4))
        opened.wait()
        yield opened


def has_all(stack, at):
    """Load from one tier only, and compare every byte."""
    planner = stack._planner
    for other in range(3):
        if other != at:
            drop(stack, other, *KEYS[:4])
    assert planner.match(KEYS[:4], time.monotonic()) == [at] * 4
    assert stack.load(KEYS[:4], range(20, 24)) == 4
    assert [stack.device.read(20 + at) for at in range(4)] == [stack.device.read(at) for at in range(4)]


@pytest.mark.parametrize(("source", "target"), [(0, 2), (2, 0), (1, 2), (2, 1), (1, 0)])
def test_blocks_arrive_whole(stack, source, target):
    drop(stack, target, *KEYS[:4])
    assert fill(stack, source, target, KEYS[:4]) == KEYS[:4]
    has_all(stack, target)
    assert not any(tier.index._pins for tier in stack._planner._tiers)
    buffers = stack._worker._engine._buffers
    assert not buffers._lent
    assert "0/" in repr(buffers._staging)


def test_only_what_the_source_has_and_the_target_has_not_is_filled(stack):
    drop(stack, 2, KEYS[1], KEYS[3])
    drop(stack, 1, KEYS[3])
    assert fill(stack, 1, 2, KEYS[:8]) == [KEYS[1]]
    assert fill(stack, 1, 2, KEYS[:8]) == []
    assert stack.counts["test2"].stored == 5


def test_a_block_that_the_source_has_damaged_is_dropped_there_and_speaks_against_no_tier(stack):
    content = bytearray(stack.test._objects[KEYS[2]])
    content[5] ^= 1
    stack.test._objects[KEYS[2]] = bytes(content)
    drop(stack, 1, *KEYS[:4])
    assert fill(stack, 2, 1, KEYS[:4]) == KEYS[:4]
    assert [key in stack._planner._tiers[1].index for key in KEYS[:4]] == [True, True, False, True]
    assert KEYS[2] not in stack._planner._tiers[2].index
    until(lambda: KEYS[2] not in stack.test._objects)
    assert stack.counts["test2"].failed == {("load", "corrupt"): 1}
    assert stack.counts["memory1"].failed == {("store", "missing"): 1}
    assert all(tier.usable for tier in stack._planner.levels(time.monotonic()).values())


class Failing(Held):
    failing = None

    def _run(self, transfer):
        if transfer.op is self.failing:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, "the disk is gone")
        return super()._run(transfer)


@pytest.mark.parametrize(("failing", "ways"), [(Op.LOAD, (2, 1)), (Op.STORE, (1, 2))])
def test_the_tier_that_fails_is_the_one_that_is_left_alone(failing, ways):
    registry = Offered(Failing)
    with Stack.open(config("cpu", "memory", "test"), device(), NAMESPACE, registry=registry) as stack:
        for at in range(4):
            stack.store(KEYS[at : at + 1], [at])
            stack.wait()
        drop(stack, ways[1], *KEYS[:4])
        registry.tiers[0].failing = failing
        for key in KEYS[:3]:
            assert fill(stack, *ways, [key]) == [key]
        usable = {name: tier.usable for name, tier in stack._planner.levels(time.monotonic()).items()}
        assert usable == {"cpu0": True, "memory1": True, "test2": False}
        assert fill(stack, *ways, KEYS[3:4]) == []
        kind = "load" if failing is Op.LOAD else "store"
        assert stack.counts["test2"].failed == {(kind, "error"): 3}


def test_a_source_that_hangs_costs_its_deadline_and_pins_nothing():
    registry = Offered(Held)
    settings = config("memory", "test", store_deadline_s=0.1)
    with Stack.open(settings, device(), NAMESPACE, registry=registry) as stack:
        stack.store(KEYS[:2], [0, 1])
        stack.wait()
        drop(stack, 0, *KEYS[:2])
        tier = registry.tiers[0]
        tier.hold = lambda transfer: transfer.op is Op.LOAD
        assert fill(stack, 1, 0, KEYS[:2]) == KEYS[:2]
        assert stack.counts["test1"].failed == {("load", "deadline"): 2}
        assert not stack._planner._tiers[1].index._pins
        tier.hold = lambda transfer: False
        until(lambda: not stack._worker._engine._queues[1].late)
        assert fill(stack, 1, 0, KEYS[:2]) == KEYS[:2]
        assert stack.load(KEYS[:2], [20, 21]) == 2


def test_a_fill_evicts_and_never_its_own_prefix():
    with Stack.open(config("cpu", "memory", blocks=4), device(), NAMESPACE) as stack:
        stack.store(KEYS[8:12], range(8, 12))
        stack.wait()
        drop(stack, 0, *KEYS[8:12])
        stack.store(KEYS[:2], [0, 1])
        stack.wait()
        assert sorted(stack._planner._tiers[1].index) == sorted([*KEYS[:2], *KEYS[8:10]])
        drop(stack, 1, KEYS[1])
        assert fill(stack, 0, 1, KEYS[:2]) == [KEYS[1]]
        drop(stack, 0, KEYS[0])
        assert fill(stack, 1, 0, KEYS[:12]) == [KEYS[0], *KEYS[8:10]]
