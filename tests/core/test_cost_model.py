"""What is loaded and what is computed, from what was measured of both."""

import pytest

from kvbm_core.block import chain_keys, root_key
from kvbm_core.leader.cost_model import CostModel
from kvbm_core.leader.planner import Planner
from kvbm_core.plan import Report, TierStatus
from kvbm_core.tier import Capabilities

TOKENS = 16


def cost_model(computing_s=None, *loading_s, trusted=-1):
    """Blocks take these seconds to compute and, by tier, to load; None: not measured."""
    made = CostModel(len(loading_s), TOKENS, trusted)
    if computing_s is not None:
        made.computed(1024, computing_s / TOKENS * 1024, 100.0)
    for tier, seconds in enumerate(loading_s):
        if seconds is not None:
            made.loaded(tier, 100, 100 * seconds, 100.0)
    return made


def load(made, tiers, now_s):
    """Load of a prefix what is worth it, and say how much that is."""
    count = made.blocks_to_load(tiers, now_s)
    made.tried(tiers[:count], now_s)
    return count


def test_a_try_that_came_to_nothing_is_not_used_up():
    """The engine had no room for it, or the request ended before."""
    made = cost_model(0.01, 0.04)
    assert [made.blocks_to_load([0] * 1000, at) for at in (101.0, 102.0)] == [12, 12]


def test_what_is_faster_than_computing_is_loaded_and_the_rest_is_computed():
    fast_then_slow = [0] * 10 + [1] * 50
    assert (
        cost_model(0.01, 0.001, 0.02).blocks_to_load(fast_then_slow, 101.0) == 10 + 1
    )  # One block: the first try.
    made = cost_model(0.01, 0.001, 0.02)
    load(made, fast_then_slow, 101.0)
    assert made.blocks_to_load(fast_then_slow, 102.0) == 10
    assert cost_model(0.01, 0.001, 0.009).blocks_to_load(fast_then_slow, 101.0) == 60
    assert cost_model(0.01, 0.02, 0.001).blocks_to_load([1] * 5, 101.0) == 5


def test_a_step_that_waited_for_a_delayed_one_is_not_thought_slow():
    made = CostModel(1, TOKENS)
    made.computed(0, 10.0, 110.0)  # A load held it up.
    made.computed(1000, 10.9, 111.0)  # It was planned at 100.1 and could begin at 110.
    assert "computed 16," in repr(made)


def test_tiers_load_side_by_side():
    """A slow head is worth its time where a long fast tail follows it; alone it is not."""
    made = cost_model(0.01, 0.001, 0.02)
    load(made, [1] * 100, 101.0)
    assert made.blocks_to_load([1] * 5 + [0] * 95, 102.0) == 100
    assert made.blocks_to_load([1] * 5, 102.0) == 0


def test_while_the_engine_has_not_computed_anything_all_is_loaded():
    assert cost_model(None, 5.0).blocks_to_load([0] * 1000, 1.0) == 1000
    assert CostModel(1).blocks_to_load([0] * 1000, 1.0) == 1000
    made = CostModel(1)
    made.computed(4096, 0.001, 1.0)
    made.loaded(0, 100, 100.0, 1.0)
    assert made.blocks_to_load([0] * 10, 2.0) == 10
    assert not made.is_slow(0)


def test_a_tier_of_which_nothing_is_known_is_tried_with_a_few_blocks():
    assert cost_model(0.01, None).blocks_to_load([0] * 1000, 101.0) == 16
    assert cost_model(0.01, None, trusted=0).blocks_to_load([0] * 1000, 101.0) == 1000


def test_a_slow_tier_is_tried_again_later_at_a_twentieth_of_the_cost():
    made = cost_model(0.01, 0.04)
    assert load(made, [0] * 1000, 101.0) == 12  # 12 * 0.04 s are 4.8 % of 1000 * 0.01 s.
    assert made.blocks_to_load([0] * 1000, 130.9) == 0
    assert load(made, [0] * 1000, 131.1) == 12
    assert made.blocks_to_load([0] * 10, 134.0) == 0  # Not even one block is cheap enough.
    assert load(made, [0] * 10, 170.0) == 1  # It takes a hundredth of 4 s: after such a time it is.
    for at in range(12):
        made.loaded(0, 12, 12 * 0.001, 200.0 + at)
    assert not made.is_slow(0)
    assert made.blocks_to_load([0] * 1000, 220.0) == 1000


def test_loads_that_waited_for_others_are_not_slow():
    """Ten loads of 100 blocks arrive at once and end one after the other, 1 ms a block."""
    made = cost_model(0.01, None)
    for at in range(1, 11):
        made.loaded(0, 100, 0.1 * at, 50.0 + 0.1 * at)
    made.loaded(0, 100, 1.0, 51.0)  # In the same step as the one before.
    assert not made.is_slow(0)
    assert "computed 10, loaded" in repr(made)
    assert made._loading[0].seconds == pytest.approx(0.001, rel=0.35)


def test_steps_of_a_few_tokens_and_loads_of_a_few_blocks_say_nothing():
    made = cost_model(0.01, 0.001)
    made.computed(16, 1.0, 200.0)
    made.loaded(0, 7, 0.31, 200.0)  # As long as 31 blocks take to compute.
    assert repr(made) == "<CostModel ms a block: computed 10, loaded 1>"


@pytest.mark.parametrize(("blocks", "in_part"), [(1, False), (7, False), (7, True), (32, True)])
def test_a_load_that_takes_longer_than_computing_512_tokens_is_slow_however_few_blocks_it_brings(
    blocks, in_part
):
    made = cost_model(0.01, None)
    made.loaded(0, blocks, 0.31, 200.0, in_part=in_part)
    assert not made.is_slow(0)
    made.loaded(0, blocks, 0.33, 300.0, in_part=in_part)
    assert made.is_slow(0)


def test_a_load_that_failed_in_part_does_not_show_that_a_tier_is_fast():
    made = cost_model(0.01, 0.04)
    for at in range(20):
        made.loaded(0, 100, 0.001, 200.0 + at, in_part=True)
    assert "loaded 40>" in repr(made)


def test_of_a_slow_tier_the_last_try_counts():
    """One block that takes a second may cost a hundredth of the time, once in 100 s."""
    made = cost_model(0.01, 1.0)
    assert [load(made, [0] * 50, at) for at in (199.0, 201.0, 231.0)] == [0, 1, 0]
    made.loaded(0, 1, 4.0, 205.0)
    assert [load(made, [0] * 50, at) for at in (306.0, 604.0, 606.0)] == [0, 0, 1]
    made.loaded(0, 1, 0.02, 607.0)  # Still slow; and now a twentieth is a block.
    assert [load(made, [0] * 50, at) for at in (636.5, 638.0)] == [1, 0]
    made.loaded(0, 1, 0.009, 639.0)
    assert load(made, [0] * 50, 640.0) == 50


def test_steps_of_a_few_tokens_show_what_is_slow_as_long_as_nothing_else_does():
    made = cost_model(None, 0.04)
    made.computed(31, 0.001, 100.0)
    assert load(made, [0] * 1000, 101.0) == 1000
    made.computed(100, 0.1, 102.0)  # A block in 16 ms at most.
    assert made.is_slow(0)
    assert load(made, [0] * 10, 103.0) == 0
    unknown = cost_model(None, None)
    unknown.computed(100, 0.1, 102.0)
    assert unknown.blocks_to_load([0] * 1000, 103.0) == 1000
    made.computed(1000, 3.0, 110.0)
    assert not made.is_slow(0)


def test_the_planner_measures_its_loads_and_counts_what_it_declines():
    ready = Capabilities(capacity_bytes=200, queue_depth=64, durable=True)
    keys = chain_keys(root_key(), range(100), 1)
    planner = Planner([[TierStatus("disk", ready, [(key, 1) for key in keys])]], block_tokens=TOKENS)
    tiers = planner.match(keys, 1.0)
    assert planner.cost_model.blocks_to_load(tiers, 1.0) == 100
    planner.load("a", keys, range(100), tiers)
    (op,) = planner.take(1.0).loads
    planner.report([Report(op.op, 0, {}, 2.0)], 3.0)
    planner.cost_model.computed(1600, 1.0, 3.0)
    assert planner.cost_model.is_slow(0)
    assert load(planner.cost_model, tiers, 3.0) == 2  # A try: 0.04 s of 1 s.
    planner.decline(tiers[2:])
    assert planner.cost_model.blocks_to_load(tiers, 3.1) == 0
    assert planner.counts["disk"].declined == 98


def test_a_load_on_several_ranks_is_measured_once_and_by_the_slowest():
    ready = Capabilities(capacity_bytes=200, queue_depth=64, durable=True)
    keys = chain_keys(root_key(), range(100), 1)
    planner = Planner([[TierStatus("disk", ready, [(key, 1) for key in keys])]] * 4, block_tokens=TOKENS)
    planner.load("a", keys, range(100), planner.match(keys, 1.0))
    (op,) = planner.take(1.0).loads
    planner.cost_model.computed(1600, 1.0, 3.0)
    planner.report([Report(op.op, 0, {}, seconds) for seconds in (1.0, 2.0, 1.5, 1.0)], 3.0)
    assert repr(planner.cost_model) == "<CostModel ms a block: computed 10, loaded 20>"


def test_a_slow_tier_that_must_be_asked_is_asked_again_when_a_try_is_due():
    remote = Capabilities(capacity_bytes=None, durable=True, shared=True, remote_lookup=True)
    keys = chain_keys(root_key(), range(1000), 1)
    planner = Planner([[TierStatus("remote", remote, [])]], block_tokens=TOKENS)
    planner.cost_model.computed(1600, 1.0, 3.0)
    planner.cost_model.loaded(0, 100, 4.0, 3.0)
    assert planner.lookup(keys, 4.0)
    (op,) = planner.take(4.0).lookups
    planner.report([Report(op.op, 0, {})], 4.0)
    tiers = planner.match(keys, 4.0)
    assert load(planner.cost_model, tiers, 4.0) > 0
    others = chain_keys(root_key(), range(1000, 2000), 1)
    assert not planner.lookup(others, 5.0)
    # A try of one block takes 0.04 s: that is too much for a short prompt, until 4 s are over.
    planner.cost_model.loaded(0, 100, 4.0, 39.0)
    assert not planner.lookup(others[:10], 40.0)
    assert planner.lookup(others, 40.0)
    assert planner.lookup(others[:10], 44.0)
