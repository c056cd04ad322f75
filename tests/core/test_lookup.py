"""Tiers that cannot list their blocks: what they are asked, and what is done with the answers."""

import random
import time
from dataclasses import replace

import pytest

from kvbm_core import (
    Backend,
    Capabilities,
    Planner,
    Reason,
    Registry,
    Report,
    Stack,
    TierStatus,
    chain_keys,
    root_key,
)
from kvbm_core.leader.ground.breaker import Breaker
from kvbm_core.leader.ground.prefix_search import PrefixSearch
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing import FaultyTier, MemoryDevice
from kvbm_core.tier import Op

NOW = 100.0
BLOCK = 4000
NAMESPACE = b"n" * 16
KEYS = chain_keys(root_key(), range(1000), 1)
REMOTE = Capabilities(capacity_bytes=None, durable=True, shared=True, remote_lookup=True)


def planner(ranks=1, above=()):
    return Planner([[*above, TierStatus("remote", REMOTE, [])]] * ranks)


def until(true):
    give_up_s = time.monotonic() + 20
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.005)


def answer(made, present, ranks=1, reason=Reason.MISSING):
    """Answer every question of the next plan; return how many blocks were asked for."""
    asked = 0
    for op in made.take(NOW).lookups:
        asked += len(op.keys)
        failures = {at: reason for at, key in enumerate(op.keys) if key not in present}
        for _ in range(ranks):
            made.report([Report(op.op, op.tier, failures)], NOW)
    return asked


def search(made, keys, present, now_s=NOW):
    """Match until no answer is awaited; return the prefix's length and the blocks asked for."""
    asked = 0
    while True:
        found = len(made.match(keys, now_s))
        if found == len(keys) or not made.lookup(keys[found:], now_s):
            return found, asked
        news = answer(made, present)
        assert news <= PrefixSearch.max_probes
        asked += news


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129, 1000])
@pytest.mark.parametrize("present", [0, 1, 2, 62, 63, 64, 65, 500, 999, 1000])
def test_a_prefix_is_found_exactly_with_few_questions(length, present):
    found, asked = search(planner(), KEYS[:length], set(KEYS[:present]))
    assert found == min(length, present)
    assert asked <= 3 * PrefixSearch.max_probes


@pytest.mark.parametrize("reason", [Reason.DEADLINE, Reason.ERROR])
def test_a_tier_that_answers_questions_and_cannot_load_is_left_alone(reason):
    made = planner()
    for at in range(Breaker.threshold):
        assert made.levels(NOW)["remote"].usable
        assert search(made, KEYS[at : at + 1], {KEYS[at]}) == (1, 1), "each load comes after a good answer"
        made.load("r", KEYS[at : at + 1], [at], [0])
        [op] = made.take(NOW).loads
        made.report([Report(op.op, 0, {0: reason})], NOW)
    assert not made.levels(NOW)["remote"].usable
    assert search(made, KEYS[9:10], {KEYS[9]}) == (0, 0)
    # It answers again when its pause is over; that does not say that it loads.
    assert search(made, KEYS[9:10], {KEYS[9]}, NOW + 1) == (1, 1)
    assert not made.levels(NOW + 1)["remote"].usable
    made.load("r", KEYS[9:10], [9], [0])
    [op] = made.take(NOW + 1).loads
    made.report([Report(op.op, 0)], NOW + 1)
    assert made.levels(NOW + 1)["remote"].usable


def test_what_was_found_or_missing_is_not_asked_again():
    made = planner()
    search(made, KEYS[:10], set(KEYS[:4]))
    assert search(made, KEYS[:10], set()) == (4, 0)


def test_another_engine_may_store_what_was_missing():
    made = planner()
    search(made, KEYS[:10], set(KEYS[:4]))
    assert search(made, KEYS[:10], set(KEYS[:10]), NOW + PrefixSearch.absent_s + 1) == (10, 6)


def test_two_requests_with_one_prefix_ask_once():
    made = planner()
    assert made.lookup(KEYS[:10], NOW)
    assert made.lookup(KEYS[:20], NOW)
    assert len(made.take(NOW).lookups) == 1


def test_a_block_on_its_way_there_is_neither_asked_for_nor_awaited():
    made = planner()
    made.store(KEYS[:1], [0], [], NOW)
    assert not made.lookup(KEYS[:1], NOW)


def test_a_hole_ends_the_prefix():
    assert search(planner(), KEYS[:30], set(KEYS[:30]) - {KEYS[7]})[0] == 7


def test_a_block_is_there_when_every_rank_has_it():
    made = planner(ranks=2)
    assert made.lookup(KEYS[:4], NOW)
    [op] = made.take(NOW).lookups
    made.report([Report(op.op, 0, {3: Reason.MISSING})], NOW)
    assert made.match(KEYS[:4], NOW) == []
    made.report([Report(op.op, 0, {1: Reason.MISSING})], NOW)
    assert made.match(KEYS[:4], NOW) == [0]


def test_a_tier_that_does_not_answer_is_left_alone_after_three_questions():
    made = planner()
    for at in range(3):
        assert made.lookup(KEYS[at : at + 1], NOW)
        answer(made, set(), reason=Reason.DEADLINE)
    assert not made.lookup(KEYS[10:], NOW)
    assert made.lookup(KEYS[10:], NOW + 2)
    assert made.counts["remote"].failed == {("lookup", "deadline"): 3}


def test_what_is_missing_is_no_failure():
    made = planner()
    search(made, KEYS[:10], set())
    assert made.counts["remote"].failed == {}


def test_a_shared_tier_is_told_to_forget_only_what_is_corrupt():
    made = planner()
    search(made, KEYS[:4], set(KEYS[:4]))
    made.load("r", KEYS[:4], range(4), made.match(KEYS[:4], NOW))
    [op] = made.take(NOW).loads
    made.report([Report(op.op, 0, {1: Reason.MISSING, 2: Reason.CORRUPT})], NOW)
    assert made.take(NOW).drops == [(0, [KEYS[2]])]
    assert made.match(KEYS[:4], NOW) == [0]
    made.reset()
    assert made.match(KEYS[:1], NOW) == []
    assert made.take(NOW).drops == []


def test_what_is_known_of_a_shared_tier_is_bounded(monkeypatch):
    monkeypatch.setattr("kvbm_core.leader.ground.tiers._MAX_KNOWN_OBJECTS", 8)
    made = planner()
    assert search(made, KEYS[:30], set(KEYS[:30]))[0] == 8
    assert made.occupancy["remote"] == 8
    assert made.take(NOW).drops == []
    assert made.counts["remote"].evicted == 0


def test_absent_blocks_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(PrefixSearch, "max_absent", 5)
    probe = PrefixSearch()
    for key in KEYS[:20]:
        probe.miss(key, NOW)
    assert repr(probe) == "<PrefixSearch 0 asked, 5 absent>"


class Store(MemoryTier):
    """A store that several stacks use at once."""

    def __init__(self, config, context, blocks):
        super().__init__(config, context)
        self._objects = blocks

    @property
    def capabilities(self):
        return replace(REMOTE, queue_depth=8)


def open_stack(blocks, *, fault=None, **options):
    def open_tier(config, context):
        tier = Store(config, context, blocks)
        return FaultyTier(tier, fault) if fault else tier

    registry = Registry()
    registry._loaded["store"] = Backend("store", MemoryConfig, open_tier, shared=True)
    tiers = [{"backend": "memory", "capacity": "1MiB"}, {"backend": "store", "capacity": "1GiB"}]
    device = MemoryDevice(400, BLOCK)
    for block in range(200):
        device.write(block, random.Random(block).randbytes(BLOCK))
    return Stack.open({"tiers": tiers, **options}, device, NAMESPACE, registry=registry), device


def test_an_engine_loads_what_another_has_stored():
    blocks = {}
    first, _ = open_stack(blocks)
    second, device = open_stack(blocks)
    with first, second:
        assert second.match(KEYS[:200]) == 0
        first.store(KEYS[:150], range(150))
        first.wait()
        assert first.counts["store"].stored == 150
        third, device = open_stack(blocks)
        with third:
            assert third.load(KEYS[:200], range(200, 400)) == 150
            assert third.counts["store"].loaded == 150
            for at in range(150):
                assert device.read(200 + at) == random.Random(at).randbytes(BLOCK)


@pytest.mark.parametrize("fault", ["error", "late"])
def test_a_store_that_fails_takes_no_block_from_the_others(fault):
    blocks = {}
    first, _ = open_stack(blocks)
    second, _ = open_stack(
        blocks, fault=lambda transfer: fault if transfer.op is Op.STORE else None, store_deadline_s=0.1
    )
    with first, second:
        first.store(KEYS[:4], range(4))
        first.wait()
        second.store(KEYS[:4], range(4))
        second.wait()
        assert second.counts["store"].failed.total() == 4
        queue = second._worker._engine._queues[1]
        until(lambda: not queue.late and not queue.doomed)
        # Whatever was told to the tier has reached it.
        assert second.match(KEYS[900:901]) == 0
        assert set(blocks) == set(KEYS[:4])


def test_a_store_that_hangs_costs_the_deadline_and_a_miss():
    blocks = {}
    stack, _ = open_stack(blocks, fault=lambda transfer: "hang", lookup_deadline_s=0.05)
    with stack:
        assert stack.match(KEYS[:10]) == 0
        # Three transfers hang for ever; the tier's queue has eight places.
        assert stack.counts["store"].failed[("lookup", "deadline")] == 10
