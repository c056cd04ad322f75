"""A tier that never answers: what it may hold of host memory, and that the others go on."""

import time

import pytest
from test_mover import NAMESPACE, Held, Offered, config, device

from kvbm_core import Stack
from kvbm_core.block import chain_keys, root_key

POOL = 64


class Hanging(Held):
    """Takes all it is given and never answers, until `go_on`."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.go_on = False
        self.hold = lambda transfer: not self.go_on


def chain(number):
    return chain_keys(root_key(salt=str(number).encode()), range(4), 1)


def settle(stack, tiers, timeout_s=20):
    """Let the stack go on until nothing is on its way into some tiers."""
    give_up_s = time.monotonic() + timeout_s
    while any(stack._planner._tiers[at].storing for at in tiers):
        assert time.monotonic() < give_up_s
        stack._step()
        stack._go()


def store(stack, tiers, start, stop):
    for number in range(start, stop):
        stack.store(chain(number), [at % 16 for at in range(4 * number, 4 * number + 4)])
        settle(stack, tiers)


def queue_of(stack, name):
    engine = stack._worker._engine
    return next(each for at, each in engine._queues.items() if stack._worker._tiers[at].name.startswith(name))


def held(queue):
    return len(queue.open) + len(queue.late) + len(queue.stores)


@pytest.mark.parametrize("names", [("cpu", "memory", "test"), ("cpu", "test", "memory")], ids="-".join)
def test_other_tiers_store_on_beside_a_tier_that_hangs_and_host_memory_hits(names):
    registry = Offered(Hanging)
    lively = [at for at, name in enumerate(names) if name != "test"]
    options = {"store_deadline_s": 0.3, "load_deadline_s": 2}
    with Stack.open(config(*names, blocks=POOL, **options), device(), NAMESPACE, registry=registry) as stack:
        store(stack, lively, 0, 16)  # Host memory is full.
        queue = queue_of(stack, "test")
        end_s, number = time.monotonic() + 3, 16
        while time.monotonic() < end_s or number < 100:
            store(stack, lively, number, number + 1)
            assert stack.load(chain(number), range(20, 24)) == 4
            assert len(queue.open) + len(queue.late) <= POOL // 4
            assert held(queue) <= POOL // 2, "for a second it is not known that it hangs"
            number += 1
        host, disk = (stack.counts[stack._planner._tiers[at].name] for at in lively)
        assert disk.stored == 4 * number
        # It is noticed that memory is in use, and tried a few times whether it still is.
        assert host.failed[("store", "full")] <= POOL
        assert host.stored >= 4 * number - POOL
        assert host.loaded >= 4 * (number - 16) - POOL
        assert stack.occupancy["cpu0"] >= POOL * 3 // 4
        registry.tiers[0].go_on = True


def test_host_memory_is_whole_again_when_the_tier_goes_on():
    registry = Offered(Hanging)
    options = {"store_deadline_s": 0.2}
    with Stack.open(
        config("cpu", "test", blocks=POOL, **options), device(), NAMESPACE, registry=registry
    ) as stack:
        store(stack, [0], 0, 40)
        until_late = time.monotonic() + 20
        while not queue_of(stack, "test").late:
            store(stack, [0], 40, 60)
            assert time.monotonic() < until_late
        registry.tiers[0].go_on = True
        number, give_up_s = 60, time.monotonic() + 20
        while stack.occupancy["cpu0"] < POOL:
            store(stack, [0], number, number + 1)
            number += 1
            assert time.monotonic() < give_up_s, stack


def test_without_host_memory_a_tier_that_hangs_leaves_staging_to_the_others():
    registry = Offered(Hanging)
    settings = {**config("memory", "test", blocks=4096), "staging": POOL * 4096}
    with Stack.open(settings, device(), NAMESPACE, registry=registry) as stack:
        queue = queue_of(stack, "test")
        store(stack, [0], 0, POOL // 4)  # All of staging waits for the tier that hangs.
        give_up_s = time.monotonic() + 20
        while held(queue) > POOL // 4:
            assert time.monotonic() < give_up_s
            stack._step()
        before = stack.counts["memory0"].stored
        store(stack, [0], 100, 200)
        assert stack.counts["memory0"].stored == before + 400
        registry.tiers[0].go_on = True
