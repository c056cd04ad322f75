"""The transfer engine and its worker where something goes wrong: late tiers, regions, bugs, the end."""

import random
import threading
import time

import pytest

from kvbm_core import (
    Addressable,
    Backend,
    Capabilities,
    Completion,
    Op,
    Outcome,
    Reason,
    Registry,
    Stack,
    Tier,
    TierOpenError,
    Worker,
    chain_keys,
    load_config,
    root_key,
)
from kvbm_core.layers import SEAL_BYTES
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing import FaultyTier, MemoryDevice
from kvbm_core.worker.copier import Copier
from kvbm_core.worker.fills import Fills
from kvbm_core.worker.loads import Loads
from kvbm_core.worker.stores import Stores
from kvbm_core.worker.tier_queue import TierQueue
from kvbm_core.worker.transfer_engine import TransferEngine

BLOCK = 4096 - SEAL_BYTES
NAMESPACE = b"n" * 16
KEYS = chain_keys(root_key(), range(16), 1)
PATIENCE_S = 30


class Held(MemoryTier):
    """Keeps the transfers that `hold` names until they are let go, and notes what is asked of it."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.hold = lambda transfer: False
        self.held, self.discarded, self.regions = [], [], []
        self.closed = 0

    def submit(self, transfers):
        self.regions += [(t.op, t.key, t.region.address) for t in transfers]
        self.held += [t for t in transfers if self.hold(t)]
        super().submit([t for t in transfers if not self.hold(t)])

    def poll(self):
        free, self.held = [t for t in self.held if not self.hold(t)], [t for t in self.held if self.hold(t)]
        return [*super().poll(), *map(self._run, free)]

    def discard(self, keys):
        assert not {t.key for t in self.held}.intersection(keys), "never for a key in flight"
        self.discarded += keys
        super().discard(keys)

    def close(self):
        self.closed += 1
        super().close()


class Offered(Registry):
    """The installed backends, and one of the test's own, whose tiers are in `tiers`."""

    def __init__(self, make):
        super().__init__()
        self.tiers = []

        def opened(config, context):
            self.tiers.append(make(config, context))
            return self.tiers[-1]

        self._loaded["test"] = Backend("test", MemoryConfig, opened)


def config(*tiers, blocks=16, **options):
    entries = [
        {"backend": name, "name": f"{name}{at}", "capacity": blocks * 4096} for at, name in enumerate(tiers)
    ]
    return {"tiers": entries, "staging": 4 * 4096, **options}


def device():
    made = MemoryDevice(64, BLOCK)
    for block in range(16):
        made.write(block, random.Random(block).randbytes(BLOCK))
    return made


def until(condition):
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.002)


def in_time(call):
    """Call in a thread of its own, so that a call that never returns fails the test."""
    result = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert result, "it hangs"
    return result[0]


def loads(key):
    return lambda transfer: transfer.op is Op.LOAD and transfer.key == key


def stores(key):
    return lambda transfer: transfer.op is Op.STORE and transfer.key == key


def test_a_late_loads_region_is_not_used_before_the_tier_lets_go():
    registry = Offered(Held)
    with Stack.open(config("test", load_deadline_s=0.1), device(), NAMESPACE, registry=registry) as stack:
        [tier] = registry.tiers
        stack.store(KEYS[:4], range(4))
        stack.wait()
        tier.hold = loads(KEYS[0])
        assert stack.load(KEYS[:1], [20]) == 0
        [kept] = [region for op, key, region in tier.regions if op is Op.LOAD]
        for _ in range(6):
            assert stack.load(KEYS[1:4], [21, 22, 23]) == 3
        assert [at for _, _, at in tier.regions].count(kept) - len(
            [1 for op, _, at in tier.regions if op is Op.STORE and at == kept]
        ) == 1
        tier.hold = lambda transfer: False
        until(lambda: stack._worker._engine._queues[0].late == {})
        assert stack.load(KEYS[:4], range(20, 24)) == 4


def test_a_late_store_that_succeeds_after_all_takes_no_room_for_ever():
    registry = Offered(Held)
    with Stack.open(
        config("test", store_deadline_s=0.1, blocks=1), device(), NAMESPACE, registry=registry
    ) as stack:
        [tier] = registry.tiers
        tier.hold = stores(KEYS[0])
        stack.store(KEYS[:1], [0])
        stack.wait()
        tier.hold = lambda transfer: False
        until(lambda: KEYS[0] in tier.discarded)
        stack.store(KEYS[1:2], [1])
        stack.wait()
        assert stack.load(KEYS[1:2], [20]) == 1


def test_a_block_dropped_while_a_late_load_reads_it_is_forgotten_afterwards():
    registry = Offered(Held)
    with Stack.open(
        config("test", load_deadline_s=0.1, blocks=1), device(), NAMESPACE, registry=registry
    ) as stack:
        [tier] = registry.tiers
        stack.store(KEYS[:1], [0])
        stack.wait()
        tier.hold = loads(KEYS[0])
        assert stack.load(KEYS[:1], [20]) == 0
        stack.store(KEYS[1:2], [1])  # Evicts the block that is still being read.
        stack.wait()
        tier.hold = lambda transfer: False
        until(lambda: not tier.held and stack._worker._engine._queues[0].late == {})
        stack.store(KEYS[2:3], [2])
        stack.wait()
        assert stack.load(KEYS[2:3], [20]) == 1
        assert len(tier._objects) == 1


def test_a_load_does_not_wait_for_stores_that_hang():
    registry = Offered(Held)
    options = {"load_deadline_s": 0.3, "store_deadline_s": 600.0}
    with Stack.open(config("test", **options), device(), NAMESPACE, registry=registry) as stack:
        [tier] = registry.tiers
        stack.store(KEYS[:1], [0])
        stack.wait()
        tier.hold = lambda transfer: transfer.op is Op.STORE
        stack.store(KEYS[1:5], range(1, 5))
        assert in_time(lambda: stack.load(KEYS[:1], [20])) in (0, 1)
        tier.hold = lambda transfer: False
        stack.wait()


def test_staging_that_is_exhausted_skips_stores_and_counts_them():
    registry = Offered(Held)
    with Stack.open(config("test"), device(), NAMESPACE, registry=registry) as stack:
        stack.store(KEYS, range(16))
        stack.wait()
        assert stack.counts["test0"].stored == 4
        assert stack.counts["test0"].failed == {("store", "full"): 12}
        assert stack.load(KEYS, range(20, 36)) == 4


def test_loads_wait_for_staging():
    registry = Offered(Held)
    with Stack.open(config("test"), made := device(), NAMESPACE, registry=registry) as stack:
        for at in range(0, 16, 4):
            stack.store(KEYS[at : at + 4], range(at, at + 4))
            stack.wait()
        assert stack.load(KEYS, range(20, 36)) == 16
        assert [made.read(20 + at) for at in range(16)] == [made.read(at) for at in range(16)]


@pytest.mark.parametrize("checked", [None, True, False])
@pytest.mark.parametrize(
    "order", [("cpu", "memory"), ("memory", "cpu"), ("cpu", "cpu"), ("cpu", "cpu", "memory")]
)
def test_every_block_reaches_every_tier_whether_the_first_is_checked_or_not(order, checked):
    # What is too much at once is copied later from the tier that lends its memory.
    wanted = config(*order, max_store_blocks=2 if "cpu" in order[:1] and not checked else 4)
    wanted["tiers"][0]["checked"] = checked
    with Stack.open(wanted, made := device(), NAMESPACE) as stack:
        for at in range(0, 16, 4):
            stack.store(KEYS[at : at + 4], range(at, at + 4))
            stack.wait()
        assert {name: counts.stored for name, counts in stack.counts.items()} == dict.fromkeys(
            stack.counts, 16
        )
        assert not any(counts.failed for counts in stack.counts.values())
        assert stack.load(KEYS, range(20, 36)) == 16
        assert made.read(35) == made.read(15)


def test_a_tier_behind_its_layers_lends_nothing():
    """Planner and mover must agree on who the host pool is."""
    wanted = config("cpu", "memory", max_store_blocks=2)
    wanted["tiers"][0]["checked"] = True
    with Stack.open(wanted, device(), NAMESPACE) as stack:
        stack.store(KEYS[:4], range(4))
        stack.wait()
        assert not any(counts.failed for counts in stack.counts.values())
        backlog = {name: counts.dropped["backlog"] for name, counts in stack.counts.items()}
        assert backlog == {"cpu0": 2, "memory1": 2}
        assert stack.load(KEYS[:4], range(20, 24)) == 2


@pytest.mark.parametrize(
    ("part", "method"),
    [
        (Fills, "forward"),
        (TransferEngine, "_take_stores"),
        (Stores, "begin"),
        (TransferEngine, "_end_copies"),
        (TierQueue, "collect"),
        (Copier, "start"),
        (Loads, "_start_part"),
    ],
)
def test_a_bug_anywhere_fails_everything_and_hangs_nothing(part, method, monkeypatch):
    with Stack.open(config("cpu", "memory", blocks=4), device(), NAMESPACE) as stack:
        stack.store(KEYS[:4], range(4))
        stack.wait()

        def bug(*args, **kwargs):
            raise ZeroDivisionError(method)

        monkeypatch.setattr(part, method, bug)
        for _ in range(3):
            in_time(lambda: stack.load(KEYS[:4], range(20, 24)))
            stack.store(KEYS[4:6], [4, 5])  # Evicts, stores to two tiers.
            stack.store(KEYS[6:8], [6, 7])
            in_time(lambda: stack.wait() or True)


@pytest.mark.parametrize("order", [("cpu",), ("memory",), ("cpu", "memory")], ids="-".join)
def test_a_stack_that_is_closed_loads_nothing_and_hangs_nothing(order):
    stack = Stack.open(config(*order), device(), NAMESPACE)
    stack.store(KEYS[:4], range(4))
    stack.wait()
    stack.close()
    stack.close()
    stack.store(KEYS[4:8], range(4, 8))
    assert in_time(lambda: stack.load(KEYS[:4], range(20, 24))) == 0
    in_time(lambda: stack.wait() or True)


def test_what_is_under_way_at_close_is_reported():
    registry = Offered(Held)
    stack = Stack.open(config("test"), device(), NAMESPACE, registry=registry)
    registry.tiers[0].hold = lambda transfer: True
    stack.store(KEYS[:4], range(4))
    stack.close()
    in_time(lambda: stack.wait() or True)
    assert stack.counts["test0"].stored == 0


def test_a_tier_too_small_for_a_block_is_closed_again():
    registry = Offered(Held)
    with pytest.raises(TierOpenError):
        Stack.open(config("test", blocks=0), device(), NAMESPACE, registry=registry)
    assert [tier.closed for tier in registry.tiers] == [1]


def test_tiers_are_closed_again_when_another_raises_what_it_should_not():
    def second_raises(config, context):
        if registry.tiers:
            raise OSError("no such device")
        return Held(config, context)

    registry = Offered(second_raises)
    with pytest.raises(TierOpenError, match=r"tier test1: .* OSError: no such device"):
        Stack.open(config("test", "test"), device(), NAMESPACE, registry=registry)
    assert [tier.closed for tier in registry.tiers] == [1]


def test_a_tier_that_hangs_at_close_does_not_hang_the_engine(monkeypatch, caplog):
    go_on = threading.Event()

    class Hanging(Held):
        def close(self):
            go_on.wait(PATIENCE_S)
            super().close()

    registry = Offered(Hanging)
    worker = Worker(load_config(config("test")), device(), NAMESPACE, registry=registry)
    thread = worker._tiers[0].tier._thread
    join = thread.join
    monkeypatch.setattr(thread, "join", lambda timeout: join(0.05))
    worker.close()
    assert "did not close" in caplog.text
    go_on.set()
    join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_tier_in_trouble_comes_back_by_itself(monkeypatch):
    trouble = ["error"]
    registry = Offered(lambda config, context: FaultyTier(MemoryTier(config, context), lambda _: trouble[0]))
    with Stack.open(config("cpu", "test"), device(), NAMESPACE, registry=registry) as stack:
        for at in range(3):
            stack.store(KEYS[at : at + 1], [at])
            stack.wait()
        assert not stack._planner._tiers[1].breaker.closed(time.monotonic())
        assert stack.load(KEYS[:3], range(20, 23)) == 3  # From the other tier.
        trouble[0] = None
        now_s = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now_s() + 120)
        stack.store(KEYS[3:4], [3])
        stack.wait()
        assert stack.counts["test1"].stored == 1


class Silent(Tier, Addressable):
    """Lends memory, which it says, but not where a block goes."""

    capabilities = Capabilities(capacity_bytes=1 << 20, addressable=True)

    def __init__(self, config, context):
        pass

    def inventory(self):
        return ()

    def submit(self, transfers):
        raise NotImplementedError

    def poll(self):
        return [Completion(1, Outcome.FAILED, Reason.ERROR)]

    def discard(self, keys):
        pass

    def close(self):
        pass

    def reserve(self, key, nbytes=0):
        return None

    publish = abandon = view = reserve


def test_a_lender_without_room_fails_the_store_and_nothing_else():
    registry = Offered(Silent)
    with Stack.open(config("test", "memory"), device(), NAMESPACE, registry=registry) as stack:
        stack.store(KEYS[:2], [0, 1])
        stack.wait()
        assert stack.counts["test0"].failed == {("store", "full"): 2}
        assert stack.load(KEYS[:2], [20, 21]) == 2
        assert stack.counts["memory1"].loaded == 2
