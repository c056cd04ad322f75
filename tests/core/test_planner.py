import pytest

from kvbm_core import Capabilities, ConfigError, Op, Planner, Reason, Report, TierStatus

NOW = 100.0


def key(number):
    return number.to_bytes(32, "big")


def keys(*numbers):
    return [key(number) for number in numbers]


def status(name, capacity, lends=False, found=()):
    return TierStatus(
        name, Capabilities(capacity_bytes=capacity, addressable=lends), [(each, 1) for each in keys(*found)]
    )


def planner(*tiers, ranks=1, **options):
    return Planner([list(tiers)] * ranks, **options)


def end(made, plan, failures=None, tiers=None, rank_count=1):
    """Report every operation of a plan, well unless `failures` says (tier → positions → reason)."""
    finished = []
    for op in [*plan.stores, *plan.loads, *plan.fills]:
        legs = op.tiers if hasattr(op, "tiers") else [op.tier, *([op.fill] if op.fill >= 0 else [])]
        for leg in legs:
            if tiers is None or leg in tiers:
                for _ in range(rank_count):
                    finished += made.report([Report(op.op, leg, (failures or {}).get(leg, {}))], NOW)
    return finished


def store(made, *numbers, ancestors=()):
    made.store(keys(*numbers), list(numbers), {*keys(*ancestors), *keys(*numbers)}, NOW)
    plan = made.take(NOW)
    end(made, plan)
    return plan


def load(made, *numbers):
    tiers = made.match(keys(*numbers), NOW)
    made.load("r", keys(*numbers)[: len(tiers)], list(numbers)[: len(tiers)], tiers)
    return made.take(NOW)


def test_stores_are_written_through_to_every_tier():
    made = planner(status("cpu", 4, lends=True), status("disk", 4))
    plan = store(made, 1, 2)
    assert [(op.keys, op.blocks, op.tiers) for op in plan.stores] == [(keys(1, 2), [1, 2], [0, 1])]
    assert made.match(keys(1, 2, 3), NOW) == [0, 0]
    assert made.occupancy == {"cpu": 2, "disk": 2}


def test_what_is_being_stored_is_not_matched_before_every_rank_has_it():
    made = planner(status("cpu", 4, lends=True), ranks=2)
    made.store(keys(1), [1], [], NOW)
    [op] = made.take(NOW).stores
    made.report([Report(op.op, 0)], NOW)
    assert made.match(keys(1), NOW) == []
    made.report([Report(op.op, 0)], NOW)
    assert made.match(keys(1), NOW) == [0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    ("reasons", "counted", "forgotten"),
    [
        ((Reason.MISSING, Reason.ERROR), "error", False),
        ((Reason.ERROR, Reason.CORRUPT), "corrupt", True),
        ((Reason.MISSING, Reason.MISSING), "missing", True),
    ],
)
def test_of_what_two_ranks_say_of_a_block_the_graver_counts(order, reasons, counted, forgotten):
    made = planner(status("disk", 4, found=(1,)), ranks=2)
    [op] = load(made, 1).loads
    made.report([Report(op.op, 0, {0: reasons[rank]}) for rank in order], NOW)
    assert made.counts["disk"].failed == {("load", counted): 1}
    assert (made.match(keys(1), NOW) == []) is forgotten


def test_a_rank_that_fails_fails_the_block_and_the_others_drop_it():
    made = planner(status("cpu", 4, lends=True), ranks=2)
    made.store(keys(1, 2), [1, 2], [], NOW)
    [op] = made.take(NOW).stores
    made.report([Report(op.op, 0), Report(op.op, 0, {1: Reason.FULL})], NOW)
    assert made.match(keys(1, 2), NOW) == [0]
    assert made.take(NOW).drops == [(0, keys(2))]
    assert made.counts["cpu"].failed == {("store", "full"): 1}


def test_the_least_recently_used_goes():
    made = planner(status("cpu", 3, lends=True))
    store(made, 1)
    store(made, 2)
    store(made, 3)
    end(made, load(made, 1))
    assert store(made, 4).drops == [(0, keys(2))]
    assert made.counts["cpu"].evicted == 1


def test_a_block_being_loaded_is_not_evicted():
    made = planner(status("cpu", 2, lends=True))
    store(made, 1, 2)
    plan = load(made, 1, 2)
    assert store(made, 3, 4).stores == []
    end(made, plan)
    assert store(made, 3, 4).drops == [(0, keys(2, 1))]


def test_a_prefix_longer_than_the_tier_keeps_its_head():
    made = planner(status("cpu", 3, lends=True))
    store(made, 1, 2)
    store(made, 3, 4, 5, ancestors=(1, 2))
    assert made.match(keys(1, 2, 3, 4, 5), NOW) == [0, 0, 0]


def test_a_lower_hit_is_kept_by_the_lender_on_its_way():
    made = planner(status("cpu", 4, lends=True), status("disk", 4, found=(1, 2)))
    plan = load(made, 1, 2)
    assert [(op.tier, op.fill) for op in plan.loads] == [(1, 0)]
    end(made, plan)
    assert made.match(keys(1, 2), NOW) == [0, 0]


def test_a_prefix_over_two_tiers_is_loaded_in_runs():
    made = planner(status("cpu", 9, lends=True), status("disk", 9, found=(3, 4)))
    made.store(keys(1, 2), [1, 2], [], NOW)
    end(made, made.take(NOW))
    assert [(op.tier, op.keys) for op in load(made, 1, 2, 3, 4).loads] == [(0, keys(1, 2)), (1, keys(3, 4))]


def test_what_is_too_much_at_once_is_owed_and_paid_from_the_lender():
    made = planner(status("cpu", 9, lends=True), status("disk", 9), max_store_blocks=2)
    made.store(keys(1, 2, 3), [1, 2, 3], [], NOW)
    plan = made.take(NOW)
    assert {tuple(op.tiers): op.keys for op in plan.stores} == {(0, 1): keys(1, 2), (0,): keys(3)}
    end(made, plan)
    assert made.busy(NOW)
    plan = made.take(NOW)
    assert [(op.keys, op.source, op.tiers) for op in plan.fills] == [(keys(3), 0, [1])]
    end(made, plan)
    assert made.occupancy == {"cpu": 3, "disk": 3}
    assert not made.busy(NOW)


def test_without_a_lender_what_is_too_much_is_dropped_and_counted():
    made = planner(status("disk", 9), max_store_blocks=2)
    store(made, 1, 2, 3)
    assert made.occupancy == {"disk": 2}
    assert made.counts["disk"].dropped == {"backlog": 1}


def test_a_corrupt_block_is_forgotten_and_the_load_is_reported():
    made = planner(status("disk", 9, found=(1, 2)))
    plan = load(made, 1, 2)
    [(op, failures)] = end(made, plan, {0: {1: Reason.CORRUPT}})
    assert (op.request, failures) == ("r", {1: Reason.CORRUPT})
    assert made.match(keys(1, 2), NOW) == [0]
    assert made.take(NOW).drops == [(0, keys(2))]


def test_the_breaker_opens_after_three_faults_and_lets_one_trial_through_later():
    made = planner(status("disk", 9, found=(1,)))
    for _ in range(3):
        end(made, load(made, 1), {0: {0: Reason.DEADLINE}})
    assert made.match(keys(1), NOW) == []
    assert made.match(keys(1), NOW + 2) == [0]
    plan = made.load("r", keys(1), [1], [0]) or made.take(NOW + 2)
    made.report([Report(plan.loads[0].op, 0, {0: Reason.ERROR})], NOW + 2)
    assert made.match(keys(1), NOW + 3) == []
    assert made.match(keys(1), NOW + 5) == [0]


def test_a_missing_block_does_not_speak_against_the_tier():
    made = planner(status("disk", 9, found=range(1, 9)))
    for number in range(1, 6):
        end(made, load(made, number), {0: {0: Reason.MISSING}})
    assert made.match(keys(6), NOW) == [0]


def test_reset_forgets_what_is_there_and_what_is_on_its_way():
    made = planner(status("cpu", 9, lends=True, found=()), status("disk", 9, found=(1, 2)))
    loading = load(made, 1)
    made.store(keys(5), [5], [], NOW)
    storing = made.take(NOW)
    made.reset()
    assert made.match(keys(2), NOW) == []
    end(made, loading)
    end(made, storing)
    plan = made.take(NOW)
    assert sorted(plan.drops[0][1] + plan.drops[1][1]) == sorted(keys(1, 1, 2, 5, 5))
    assert made.occupancy == {"cpu": 0, "disk": 0}
    assert not made.busy(NOW)


def test_inventories_are_intersected_and_the_rest_is_dropped():
    made = Planner([[status("disk", 9, found=(1, 2, 3))], [status("disk", 9, found=(2, 3, 4))]])
    assert made.match(keys(2, 3), NOW) == [0, 0]
    assert made.match(keys(1), NOW) == made.match(keys(4), NOW) == []
    [(tier, dropped)] = made.take(NOW).drops
    assert (tier, sorted(dropped)) == (0, keys(1, 4))


def test_an_inventory_beyond_the_capacity_loses_its_oldest():
    made = planner(status("disk", 2, found=(1, 2, 3)))
    assert made.occupancy == {"disk": 2}
    assert made.take(NOW).drops == [(0, keys(1))]


def test_workers_with_different_stacks_are_refused():
    with pytest.raises(ConfigError, match=r"rank 1 has the tiers \['disk'\], rank 0 has \['cpu'\]"):
        Planner([[status("cpu", 1)], [status("disk", 1)]])


def test_a_block_that_is_there_is_not_evicted_for_the_rest_of_its_own_prefix():
    made = planner(status("cpu", 2, lends=True))
    store(made, 1)
    store(made, 1, 2, 3)
    assert made.match(keys(1, 2, 3), NOW) == [0, 0]


def test_storing_again_keeps_the_head_longest():
    made = planner(status("cpu", 3, lends=True))
    store(made, 1, 2, 3)
    store(made, 1, 2, 3)
    assert store(made, 4).drops == [(0, keys(3))]


def test_a_store_to_a_tier_whose_breaker_is_open_goes_to_the_others():
    made = planner(status("cpu", 9, lends=True), status("disk", 9))
    for number in range(3):
        made.store(keys(number), [number], [], NOW)
        end(made, made.take(NOW), {1: {0: Reason.ERROR}})
    assert [op.tiers for op in store(made, 7).stores] == [[0]]
    made.store(keys(8), [8], [], NOW + 1)
    # And what it was owed meanwhile is copied from the host pool.
    plan = made.take(NOW + 1)
    assert [(op.tiers, op.keys) for op in [*plan.stores, *plan.fills]] == [([0, 1], keys(8)), ([1], keys(7))]


def test_what_a_tier_is_owed_waits_for_its_breaker_and_keeps_nobody_busy():
    made = planner(status("cpu", 9, lends=True), status("disk", 9), max_store_blocks=1)
    made.store(keys(1, 2), [1, 2], [], NOW)
    plan = made.take(NOW)
    for _ in range(3):
        made._tiers[1].breaker.note(Op.STORE, Reason.ERROR, NOW)
    end(made, plan)
    assert not made.busy(NOW + 0.5)
    assert made.busy(NOW + 1)
    assert [op.keys for op in made.take(NOW + 1).fills] == [keys(2)]


def test_what_is_owed_is_dropped_if_the_lender_has_it_no_more():
    made = planner(status("cpu", 1, lends=True), status("disk", 9), max_store_blocks=1)
    made.store(keys(1), [1], [], NOW)
    first = made.take(NOW)
    end(made, first, tiers=[0])
    made.store(keys(2), [2], [], NOW)  # Evicts 1 from the host pool; the other tier has no place yet.
    end(made, made.take(NOW))
    made.store(keys(3), [3], [], NOW)
    end(made, made.take(NOW))
    end(made, first, tiers=[1])
    end(made, made.take(NOW))
    # 3 found the queue full, 2 left the host pool before its turn came.
    assert made.counts["disk"].dropped == {"backlog": 1, "gone": 1}
    assert made.occupancy == {"cpu": 1, "disk": 1}


def test_a_block_that_is_being_copied_to_another_tier_is_not_evicted():
    made = planner(status("cpu", 1, lends=True), status("disk", 9), max_store_blocks=1)
    made.store(keys(1), [1], [], NOW)
    end(made, made.take(NOW), {1: {0: Reason.FULL}})
    made.store(keys(1), [1], [], NOW)  # The host pool has it: it is copied from there.
    copy = made.take(NOW)
    assert [(op.source, op.tiers) for op in copy.fills] == [(0, [1])]
    assert store(made, 2).drops == []
    end(made, copy)
    assert store(made, 2).drops == [(0, keys(1))]


def test_a_reset_while_a_block_is_copied_forgets_it_in_both_tiers():
    made = planner(status("cpu", 9, lends=True), status("disk", 9), max_store_blocks=1)
    made.store(keys(1, 2), [1, 2], [], NOW)
    end(made, made.take(NOW))
    copy = made.take(NOW)
    made.reset()
    end(made, copy)
    drops = {tier: sorted(dropped) for tier, dropped in made.take(NOW).drops}
    assert drops == {0: keys(1, 2), 1: keys(1, 2)}
    assert made.occupancy == {"cpu": 0, "disk": 0}


def test_a_reset_while_a_fill_is_on_its_way_forgets_it():
    made = planner(status("cpu", 9, lends=True), status("disk", 9, found=(1,)))
    plan = load(made, 1)
    made.reset()
    [(_, failures)] = end(made, plan)
    assert failures == {}
    assert made.match(keys(1), NOW) == []
    assert {tier: dropped for tier, dropped in made.take(NOW).drops} == {0: keys(1), 1: keys(1)}


def test_a_load_is_complete_when_every_rank_has_both_loaded_and_kept_it():
    made = planner(status("cpu", 9, lends=True), status("disk", 9, found=(1, 2)), ranks=2)
    [op] = load(made, 1, 2).loads
    assert made.loading_blocks == 2
    late, early = (
        [Report(op.op, 0), Report(op.op, 1)],
        [Report(op.op, 1, {1: Reason.CORRUPT}), Report(op.op, 0)],
    )
    assert made.report(late, NOW) == []
    assert made.report(early[:1], NOW) == []
    assert made.loading_blocks == 0
    assert made.report(early[1:], NOW) == [(op, {1: Reason.CORRUPT})]


def test_two_requests_may_load_one_block_and_the_first_that_finds_it_corrupt_ends_it_for_both():
    made = planner(status("disk", 9, found=(1,)))
    first, second = load(made, 1), load(made, 1)
    end(made, first, {0: {0: Reason.CORRUPT}})
    assert made.match(keys(1), NOW) == []
    assert made.take(NOW).drops == []  # The other one still reads it.
    end(made, second)
    assert made.take(NOW).drops == [(0, keys(1))]


def test_its_state_in_one_line():
    made = planner(status("cpu", 9, lends=True), status("disk", None, found=(1,)))
    load(made, 1)
    assert repr(made) == "<Planner cpu 1/9, disk 1/None; 1 operations pending, 1 blocks loading>"
