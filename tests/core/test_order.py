"""The order of use over a restart, over a tier in memory whose objects outlive it. See also
`tests/backends/test_order_of_use.py`."""

import dataclasses
import hashlib
import threading
import time

import pytest
from test_mover import until

from kvbm_core import (
    Capabilities,
    Completion,
    Op,
    Outcome,
    Planner,
    Reason,
    TierContext,
    TierStatus,
    Transfer,
)
from kvbm_core.layers import DeadlineTier, OrderShape, OrderTier, order_tier
from kvbm_core.layers.order_parts import entries_of, read_generation, sorted_by_use
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.policies import Fifo, Lru
from kvbm_core.staging import Staging

OBJECT_BYTES = 8192
NAMESPACE = b"n" * 16


class Kept(MemoryTier):
    """Its objects outlive it; `refuses` says what fails."""

    def __init__(self, objects, blocks=200):
        super().__init__(MemoryConfig(capacity=blocks * OBJECT_BYTES), TierContext(NAMESPACE, OBJECT_BYTES))
        self._objects, self.refuses = objects, set()
        self._used_bytes = sum(map(len, objects.values()))

    @property
    def capabilities(self):
        return dataclasses.replace(super().capabilities, durable=True, unit_bytes=OBJECT_BYTES)

    def inventory(self):
        return [(name, len(content)) for name, content in self._objects.items()]

    def close(self):
        pass

    def _run(self, transfer):
        if transfer.op in self.refuses:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, "[Errno 5] Input/output error")
        return super()._run(transfer)


def key(number):
    return hashlib.sha256(str(number).encode()).digest()


def shape_of(tier):
    return OrderShape.of(tier.capabilities, OBJECT_BYTES, tier.capabilities.charge)


def opened(objects, **more):
    inner = Kept(objects, **more)
    return restored(inner)


def restored(inner):
    tier = OrderTier(inner, shape_of(inner), lambda: None, "kept")
    tier.restore()
    return tier


def store(tier, numbers):
    region = Staging(0, OBJECT_BYTES).take()
    for number in numbers:
        tier.submit([Transfer(number + 1, Op.STORE, key(number), region)])
        assert [each.outcome for each in tier.poll()] == [Outcome.DONE]


def listed(tier):
    return [name for name, _ in tier.inventory()]


def keys(*numbers):
    return [key(number) for number in numbers]


@pytest.fixture
def objects():
    """Ten objects, of which two were used; stored and closed."""
    objects = {}
    tier = opened(objects)
    store(tier, range(10))
    tier.used(keys(4, 0))
    tier.close()
    return objects


AS_USED = keys(1, 2, 3, 5, 6, 7, 8, 9, 4, 0)
AS_WRITTEN = keys(*range(10))


def test_what_was_used_last_is_listed_last_and_the_order_is_no_object(objects):
    tier = opened(objects)
    assert listed(tier) == AS_USED
    assert len(objects) == 11
    inner = Kept(objects).capabilities
    assert tier.capabilities.capacity_bytes == inner.capacity_bytes - 2 * OBJECT_BYTES


def test_what_was_stored_after_the_order_was_written_is_the_latest(objects):
    tier = opened(objects)
    store(tier, [20, 21])
    tier._timer.cancel()  # As if it was killed.
    assert listed(opened(objects)) == [*AS_USED, *keys(20, 21)]


def test_what_was_discarded_is_of_no_order(objects):
    tier = opened(objects)
    tier.discard(keys(4, 5))
    tier.used(keys(1))
    tier.close()
    assert listed(opened(objects)) == keys(2, 3, 6, 7, 8, 9, 0, 1)


def test_a_prompts_head_goes_after_its_tail_whatever_comes_in_first():
    tier = opened(objects := {})
    tier.used(keys(3, 2, 1, 0))
    store(tier, [2, 0, 3, 1])
    tier.close()
    assert listed(opened(objects)) == keys(3, 2, 1, 0)


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "other", "empty"])
def test_a_torn_order_is_the_order_of_writing(objects, harm, caplog):
    name = next(name for name in objects if name not in AS_WRITTEN)
    content = bytearray(objects[name])
    content[40] ^= 1
    objects[name] = {
        "flip": bytes(content), "cut": objects[name][:50], "gone": b"", "other": b"x" * OBJECT_BYTES,
        "empty": bytes(OBJECT_BYTES),
    }[harm]  # fmt: skip
    if harm == "gone":
        del objects[name]
    tier = opened(objects)
    assert listed(tier) == AS_WRITTEN
    tier.used(keys(3))
    tier.close()
    assert listed(opened(objects)) == keys(0, 1, 2, 4, 5, 6, 7, 8, 9, 3)
    assert len(objects) == 11
    assert not caplog.records


def test_a_generation_that_was_not_written_to_its_end_leaves_the_one_before():
    tier = opened(objects := {}, blocks=3000)
    assert tier._shape.parts > 1
    store(tier, range(2000))
    tier.used(keys(7))
    tier.close()
    before = dict(objects)
    tier = opened(objects, blocks=3000)
    tier.used(keys(8))
    tier.close()
    new = [name for name in objects if name not in before]
    assert len(new) == 2
    assert listed(opened(objects, blocks=3000))[-2:] == keys(7, 8)
    torn = {**before, new[0]: objects[new[0]]}
    tier = opened(torn, blocks=3000)
    assert listed(tier)[-1:] == keys(7)
    tier.used(keys(9))
    tier.close()
    assert listed(opened(torn, blocks=3000))[-2:] == keys(7, 9)
    assert len(torn) == len(before)


def test_of_two_whole_generations_the_later_counts(objects):
    both = dict(objects)
    tier = opened(objects)
    tier.used(keys(1))
    tier.close()
    both.update(objects)
    assert len(both) == 12
    assert listed(opened(both))[-1:] == keys(1)


def test_it_is_written_by_itself_after_a_change_and_again_after_the_next(monkeypatch):
    monkeypatch.setattr(order_tier, "_EVERY_S", 0.01)
    tier = opened(objects := {})
    store(tier, range(4))
    for number in (2, 1):
        tier.used(keys(number))
        until(lambda: tier.poll() or tier._timer is None)
        assert listed(opened(dict(objects)))[-1:] == keys(number)


def test_a_tier_that_does_not_take_it_costs_one_line_and_no_transfer(objects, monkeypatch, caplog):
    monkeypatch.setattr(order_tier, "_EVERY_S", 0.01)
    tier = opened(objects)
    tier._inner.refuses = {Op.STORE}
    tier.used(keys(1))
    give_up_s = time.monotonic() + 0.2
    while time.monotonic() < give_up_s:
        assert not tier.poll()
    [line] = [each.getMessage() for each in caplog.records]
    assert "the order of use cannot be written ([Errno 5] Input/output error)" in line
    assert listed(opened(dict(objects))) == AS_USED, "the order before is there still"
    tier._inner.refuses = set()
    until(lambda: tier.poll() or tier._timer is None)
    assert listed(opened(objects))[-1:] == keys(1)


@pytest.mark.parametrize(("op", "order"), [(Op.LOAD, AS_WRITTEN), (Op.STORE, AS_USED)])
def test_a_tier_that_does_not_answer_is_opened_and_closed_all_the_same(objects, monkeypatch, op, order):
    monkeypatch.setattr(order_tier, "_WAIT_S", 0.05)

    class Silent(Kept):
        def submit(self, transfers):
            super().submit([each for each in transfers if each.op is not op])

    tier = restored(Silent(objects))
    assert listed(tier) == order
    tier.used(keys(1))
    tier.close()
    assert tier._region is not None


@pytest.mark.parametrize(
    "change",
    [
        {"durable": False},
        {"shared": True},
        {"read_only": True},
        {"capacity_bytes": None},
        {"queue_depth": 1},
        {"capacity_bytes": 127 * OBJECT_BYTES},
    ],
    ids=lambda change: next(iter(change)),
)
def test_which_tiers_keep_no_order(change):
    sound = Capabilities(capacity_bytes=128 * OBJECT_BYTES, durable=True, unit_bytes=OBJECT_BYTES)
    assert OrderShape.of(sound, OBJECT_BYTES, sound.charge).room_bytes == 2 * OBJECT_BYTES
    other = dataclasses.replace(sound, **change)
    assert OrderShape.of(other, OBJECT_BYTES, other.charge) is None


def test_the_room_is_a_64th_at_most_and_the_latest_are_kept():
    capabilities = Capabilities(capacity_bytes=100 << 20, durable=True)
    for object_bytes in (200, 1 << 12, 1 << 15, 1 << 21, 1 << 26):
        shape = OrderShape.of(capabilities, object_bytes, lambda nbytes: nbytes)
        if shape is None:
            continue
        assert shape.room_bytes <= capabilities.capacity_bytes // 64
        assert shape.part_bytes <= object_bytes
        entries = entries_of([number.to_bytes(32, "little") for number in range(shape.most_entries + 5)])
        parts = shape.make_parts(3, entries)
        assert len(parts) == shape.parts
        assert all(len(part) <= shape.part_bytes for part in parts)
        assert read_generation(shape, parts.__getitem__) == (3, entries[5 * 8 :])
    found = [(name, 1) for name in keys(*range(6))]
    assert sorted_by_use(found, entries_of(keys(4, 1, 2))) == [found[at] for at in (0, 3, 4, 1, 2, 5)]


@pytest.mark.parametrize("policy", [Lru, Fifo])
def test_the_leader_tells_what_requests_have_had_the_head_of_a_prompt_last(policy):
    disk = TierStatus("disk", Capabilities(capacity_bytes=64, durable=True), [])
    memory = TierStatus("memory", Capabilities(capacity_bytes=64), [])
    planner = Planner([[memory, disk]], policy=lambda position, context: policy())
    prompt = keys(*range(4))
    planner.store(prompt, range(4), frozenset(prompt), 0.0)
    expected = [] if policy is Fifo else [(1, prompt[::-1])]
    assert planner.take(0.0).used == expected
    assert planner.take(0.0).used == []


def test_the_leader_does_not_tell_of_what_a_tier_has_not_and_does_not_get():
    found = [(name, 1) for name in keys(0, 1)]
    disk = TierStatus("disk", Capabilities(capacity_bytes=64, durable=True), found)
    planner = Planner([[disk]])
    planner._tiers[0].admission = _None()
    prompt = keys(*range(4))
    planner.store(prompt, range(4), frozenset(prompt), 0.0)
    assert planner.take(0.0).used == [(0, keys(1, 0))]


class _None:
    """Admits nothing."""

    def offered(self, keys, origin):
        pass

    def admitted(self, keys, nbytes, origin, now_s):
        return 0


def test_one_thread_makes_all_calls_from_the_first_submit_on(objects):
    class Bound(Kept):
        thread = None

        def submit(self, transfers):
            Bound.thread = Bound.thread or threading.get_ident()
            assert threading.get_ident() == Bound.thread
            super().submit(transfers)

    inner = Bound(objects)
    woken = threading.Event()
    tier = DeadlineTier(OrderTier(inner, shape_of(inner), woken.set, "kept"), woken, "kept", lambda: None)
    assert listed(tier) == AS_USED
    assert Bound.thread not in (None, threading.get_ident())
    tier.used(keys(2))
    tier.close()
    assert listed(opened(objects))[-1:] == keys(2)
