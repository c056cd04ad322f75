"""Movements along the edges of a stack: by the planner alone, and with bytes through a whole stack."""

import dataclasses
import random
import time

import msgspec
import pytest
from test_mover import KEYS, NAMESPACE, Held, Offered, config, device, until
from test_planner import end, key, keys, load, planner, status, store

from kvbm_core import ConfigError, Movement, Op, Reason, Stack, load_config
from kvbm_core.plan import FillReason

DEMOTION = Movement(stores="demotion", low_watermark=0.25, high_watermark=0.5)
EXCLUSIVE = Movement(stores="demotion", copies="exclusive", low_watermark=0.25, high_watermark=0.5)


def two_tiers(movement=DEMOTION, capacities=(8, 32), **options):
    tiers = [status("a", capacities[0], lends=True), status("b", capacities[1])]
    return planner(*tiers, movements=[Movement(), movement], **options)


def settle(made):
    while plan := made.take(0.0):
        assert all(fill.reason is FillReason.DEMOTION for fill in plan.fills)
        end(made, plan)


def have(made, tier, count=64):
    return [number for number in range(count) if made.is_ready(key(number), tier)]


def test_a_block_goes_down_before_it_is_evicted_and_not_earlier():
    made = two_tiers()
    store(made, *range(6))
    settle(made)
    assert [have(made, 0), have(made, 1)] == [[0, 1, 2, 3, 4, 5], []]
    for number in range(6, 9):  # With the first, fewer than two places are left: three more are made sure of.
        store(made, number)
        settle(made)
    assert len(have(made, 0)) == 8
    assert made.counts["b"].stored == 3
    gone = set(range(9)) - {*have(made, 0)}
    assert gone <= {*have(made, 1)}
    assert made.counts["b"].dropped == {}


def test_what_comes_too_late_is_evicted_all_the_same_and_counted():
    made = two_tiers(max_store_blocks=2)
    store(made, *range(8))
    settle(made)
    assert have(made, 1) != []
    before = made.counts["b"].stored
    made.store(keys(*range(20, 28)), list(range(8)), set(), 0.0)
    evicted = made.counts["a"].evicted
    assert made.counts["b"].dropped["late"] == evicted - before > 0


def test_two_blocks_at_most_are_on_their_way_down_at_once():
    made = two_tiers(max_store_blocks=2)
    store(made, *range(8))
    [fill] = made.take(0.0).fills
    assert len(fill.keys) == 2
    assert not made.take(0.0)
    assert made.busy(0.0)


def test_a_block_on_its_way_down_stays_above_and_is_loaded_from_there():
    made = two_tiers()
    store(made, *range(8))
    [fill] = made.take(0.0).fills
    made.store(keys(*range(20, 28)), list(range(8)), set(), 0.0)
    assert {*fill.keys} <= {*map(key, have(made, 0))}
    assert made.match(fill.keys[:1], 0.0) == [0]


def test_nothing_is_demoted_into_a_tier_that_is_left_alone():
    made = two_tiers()
    for _ in range(3):
        made._tiers[1].breaker.note(Op.STORE, Reason.ERROR, 0.0)
    store(made, *range(8))
    assert not made.take(0.5).fills
    assert not made._movements.is_due(0.5)
    made.tiers[1].breaker.left_alone_for = (Op.STORE, Reason.ERROR)
    made.store(keys(*range(20, 28)), list(range(8)), set(), 0.5)
    assert made.counts["b"].dropped["unusable"] == 8


def test_a_demotion_that_fails_leaves_the_block_above_and_is_tried_again():
    made = two_tiers()
    store(made, *range(7))
    plan = made.take(0.0)
    [fill] = plan.fills
    end(made, plan, failures={1: {at: Reason.BUSY for at in range(len(fill.keys))}}, tiers=[1])
    assert have(made, 0) == [*range(7)]
    assert not made.take(0.0).fills  # Not again and again, while nothing changes.
    [again] = store(made, 8).fills + made.take(0.0).fills
    assert {*fill.keys} <= {*again.keys}


def test_a_block_that_the_first_tier_cannot_take_goes_to_the_next():
    made = two_tiers(capacities=(4, 32))
    store(made, *range(10))
    assert have(made, 0) == [0, 1, 2, 3]
    assert have(made, 1) == [4, 5, 6, 7, 8, 9]


def demoted(movement):
    """Give a planner whose first four blocks are in the lower tier alone."""
    made = two_tiers(movement)
    for number in range(20):
        store(made, number)
        settle(made)
    assert have(made, 1, 4) == [0, 1, 2, 3]
    assert have(made, 0, 4) == []
    return made


def test_a_load_from_below_leaves_both_copies():
    made = demoted(DEMOTION)
    end(made, load(made, 0, 1))
    assert [have(made, 0, 4), have(made, 1, 4)] == [[0, 1], [0, 1, 2, 3]]
    assert made.counts["a"].filled_bytes.keys() == {(1, "promotion")}
    assert made.counts["b"].filled_bytes.keys() == {(0, "demotion")}


def come_up(capacity=20):
    """Give a planner whose lower tier is nearly full, and has spare copies of the first two blocks."""
    made = two_tiers(EXCLUSIVE, capacities=(8, capacity))
    for number in range(20):
        store(made, number)
        settle(made)
    end(made, load(made, 0, 1))
    assert [have(made, 0, 4), have(made, 1, 4)] == [[0, 1], [0, 1, 2, 3]]
    return made


def test_an_exclusive_copy_of_a_block_that_has_come_up_is_the_first_to_make_room():
    made = come_up()
    dropped = []
    for number in range(20, 24):
        plan = store(made, number)
        dropped += [key for tier, gone in plan.drops for key in gone if tier == 1]
        settle(made)
    assert {*dropped} <= {*keys(0, 1)}
    assert {2, 3, 4, 5} <= {*have(made, 1)}
    assert {*have(made, 0), *have(made, 1)} == {*range(24)}


def test_a_block_whose_spare_copy_is_still_there_goes_down_without_a_write():
    made = come_up(capacity=64)
    filled = set()
    for number in range(30, 42):
        filled.update(*(fill.keys for fill in store(made, number).fills))
        while plan := made.take(0.0):
            filled.update(*(fill.keys for fill in plan.fills))
            end(made, plan)
    assert [have(made, 0, 4), have(made, 1, 4)] == [[], [0, 1, 2, 3]]
    assert filled
    assert filled.isdisjoint(keys(0, 1))
    [spares] = made._movements._spares.values()
    assert not spares._keys


def test_an_exclusive_copy_that_did_not_come_up_stays():
    made = demoted(EXCLUSIVE)
    end(made, load(made, 0, 1), failures={0: {0: Reason.FULL}})
    [spares] = made._movements._spares.values()
    assert [*spares._keys] == keys(1)


def test_a_spare_copy_that_is_being_read_makes_no_room():
    made = come_up()
    made.load("other", keys(0), [9], [1])
    reading = made.take(0.0)
    for number in range(20, 28):
        store(made, number)
        settle(made)
    assert made.is_ready(key(0), 1)
    assert not made.is_ready(key(1), 1)
    end(made, reading)


def test_never_promoted_is_never_kept_above():
    made = demoted(Movement(stores="demotion", promotion="never", low_watermark=0.25, high_watermark=0.5))
    plan = load(made, 0, 1)
    assert [each.fill for each in plan.loads] == [-1]
    end(made, plan)
    store(made, 0, 1)  # The engine offers them with all others of the prompt.
    assert have(made, 0, 4) == []


def test_blocks_of_a_slow_tier_are_stored_above_again_once_they_were_computed():
    made = demoted(Movement(stores="demotion", promotion="never", low_watermark=0.25, high_watermark=0.5))
    made.cost_model._block_tokens = 1
    made.cost_model.computed(1000, 1.0, 0.0)
    made.cost_model.loaded(1, 100, 100.0, 200.0)
    assert made.cost_model.is_slow(1)
    store(made, 0, 1)
    assert have(made, 0, 4) == [0, 1]


def loop(movement, rounds=40, length=128):
    """Ask again and again for more than fits above, one block after the other; count what comes up."""
    made = two_tiers(movement, capacities=(32, 512))
    all_keys = [random.Random(number).randbytes(32) for number in range(length)]
    for _ in range(rounds):
        for each in all_keys:
            if found := made.match([each], 0.0):
                made.load("r", [each], [0], found)
            settle(made)
            made.store([each], [0], {each}, 0.0)
            settle(made)
    return made.counts


@pytest.mark.parametrize("copies", ["inclusive", "exclusive"])
def test_a_loop_over_more_than_fits_above_is_not_promoted_for_long(copies):
    always = loop(Movement(stores="demotion", copies=copies))
    measured = loop(Movement(stores="demotion", copies=copies, promotion="measured"))
    assert measured["a"].stored < always["a"].stored / 2
    assert measured["b"].stored <= always["b"].stored


def test_what_is_worth_it_is_promoted():
    made = two_tiers(Movement(stores="demotion", promotion="measured"), capacities=(64, 512))
    rng = random.Random(3)
    names = [rng.randbytes(32) for _ in range(200)]
    for _ in range(8000):
        each = names[min(int(rng.expovariate(1 / 40)), 199)]
        if found := made.match([each], 0.0):
            made.load("r", [each], [0], found)
        settle(made)
        made.store([each], [0], {each}, 0.0)
        settle(made)
    [promotion] = made._movements._watched.values()
    assert promotion._promoted.worth > 0.1
    assert not promotion.is_paused


def test_three_tiers_pass_blocks_on():
    tiers = [status(name, size, lends=name == "a") for name, size in (("a", 8), ("b", 8), ("c", 64))]
    down = Movement(stores="demotion", low_watermark=0.5, high_watermark=0.75)
    made = planner(*tiers, movements=[Movement(), EXCLUSIVE, down])
    for number in range(32):
        store(made, number)
        settle(made)
    assert {*have(made, 0), *have(made, 1), *have(made, 2)} == {*range(32)}
    assert len(have(made, 0)) == len(have(made, 1)) == 8


def test_reset_forgets_what_is_due():
    made = two_tiers(max_store_blocks=2)
    store(made, *range(8))
    plan = made.take(0.0)
    made.reset()
    assert not made._movements.is_due(0.0)
    end(made, plan)
    settle(made)
    assert [have(made, 0), have(made, 1)] == [[], []]


@pytest.mark.parametrize(
    ("above", "below", "stores"),
    [({"read_only": True}, {}, "write_through"), ({}, {"read_only": True}, "write_through"),
     ({"shared": True, "capacity_bytes": None}, {}, "write_through"), ({}, {"shared": True}, "demotion")],
)  # fmt: skip
def test_what_an_edge_cannot_do_is_said(above, below, stores, caplog):
    tiers = [
        dataclasses.replace(each, **more) for each, more in
        ((status("a", 8).capabilities, above), (status("b", 8).capabilities, below))
    ]  # fmt: skip
    statuses = [
        msgspec.structs.replace(status(name, 8), capabilities=each)
        for name, each in zip("ab", tiers, strict=True)
    ]
    made = planner(*statuses, movements=[Movement(), EXCLUSIVE])
    assert bool(made._movements._demotions) == (stores == "demotion")
    assert made._movements._spares == {}
    assert "tier b: movement: " in caplog.text


def written(movement):
    return {"tiers": [{"backend": "cpu", "capacity": 1}, {"backend": "lmdb", "movement": movement}]}


def test_a_movement_is_written_as_a_word_or_as_a_mapping():
    entries = load_config(written("demotion")).tiers
    assert [entry.movement.stores for entry in entries] == ["write_through", "demotion"]
    [_, entry] = load_config(written({"stores": "demotion", "copies": "exclusive"})).tiers
    assert entry.movement.copies == "exclusive"


@pytest.mark.parametrize(
    ("movement", "words"),
    [
        ("demote", "stores: not one of write_through, demotion (got 'demote')"),
        (3, "movement: 3; write a mapping like {stores: demotion}"),
        ({"store": "demotion"}, "unknown key 'store'; did you mean 'stores'?"),
        ({"copies": "exclusive"}, "write stores: demotion beside it"),
        ({"low_watermark": 0.5, "high_watermark": 0.2}, "low_watermark: 0.5, high_watermark: 0.2; write"),
        ({"high_watermark": 1.5}, "like 0.2 and 0.4"),
    ],
)  # fmt: skip
def test_a_wrong_movement_is_refused_with_what_to_write(movement, words):
    with pytest.raises(ConfigError, match="tiers\\[1\\]") as raised:
        load_config(written(movement))
    assert words in str(raised.value)


def test_the_first_tier_has_no_movement():
    with pytest.raises(ConfigError, match="write it on a lower one"):
        load_config({"tiers": [{"backend": "cpu", "capacity": 1, "movement": "demotion"}]})


def moving(*names, blocks=(6, 64), **options):
    made = config(*names, **options)
    for entry, count, movement in zip(made["tiers"], blocks, (None, "demotion"), strict=True):
        entry["capacity"] = count * 4096
        if movement:
            entry["movement"] = {"stores": movement, "copies": "exclusive"}
    return made


@pytest.mark.parametrize("names", [("cpu", "memory"), ("memory", "memory")], ids="-".join)
def test_bytes_go_down_and_come_up_whole(names):
    made = device()
    with Stack.open(moving(*names), made, NAMESPACE) as stack:
        for at in range(16):
            stack.store(KEYS[at : at + 1], [at], KEYS[:at])
            stack.wait()
        assert stack.counts[f"{names[1]}1"].stored >= 10
        assert stack.match(KEYS) == 16
        for _ in range(2):
            assert stack.load(KEYS, range(20, 36)) == 16
            stack.wait()
            assert [made.read(20 + at) for at in range(16)] == [made.read(at) for at in range(16)]
        buffers = stack._worker._engine._buffers
        assert not buffers._lent


def test_a_load_overtakes_what_is_read_for_a_demotion():
    registry = Offered(Held)
    settings = config("test", "memory", load_deadline_s=30.0) | {"staging": 64 * 4096}
    settings["tiers"] = [settings["tiers"][0], {**settings["tiers"][1], "movement": "demotion"}]
    with Stack.open(settings, device(), NAMESPACE, registry=registry) as stack:
        [tier] = registry.tiers
        for at in range(12):
            stack.store(KEYS[at : at + 1], [at], KEYS[:at])
            stack.wait()
        queue = stack._worker._engine._queues[0]
        tier.hold = lambda transfer: transfer.op is Op.LOAD and transfer.key != KEYS[11]
        planned = stack._planner.fill(0, 1, KEYS[:8], time.monotonic(), reason=FillReason.DEMOTION)
        assert planned == KEYS[:8]
        stack._go()
        until(lambda: tier.held)
        assert len(queue.copies) + len(queue.open) == 8
        assert stack.load(KEYS[11:12], [40]) == 1
        assert len(queue.copies) + len(queue.open) == 8
        tier.hold = lambda transfer: False
        stack.wait()
        assert stack.counts["memory1"].stored == 8
