"""The admission policies of kvbm_admission, alone and in a planner that asks them."""

import pytest

from kvbm_core import (
    AdmissionPolicy,
    Capabilities,
    ConfigError,
    Origin,
    Planner,
    PolicyContext,
    Registry,
    Report,
    TierStatus,
    load_config,
)
from kvbm_core.leader.ground.guarded_policies import GuardedAdmission
from kvbm_core.leader.ground.tier_policies import TierPolicies

DAY_S = 86_400.0
PROMPT = Origin(0, 1000)


def key(number):
    return number.to_bytes(32, "big")


def keys(*numbers):
    return [key(number) for number in numbers]


def made(name, ranks=1, capacity_bytes=1 << 20, **settings):
    config = load_config({"tiers": [{"backend": "cpu", "admission": {"name": name, **settings}}]})
    return Registry().policies(config).admission(0, PolicyContext(capacity_bytes, 1000, "disk", ranks))


def planner(*admissions, capacity=100):
    tiers = [{"backend": "cpu", "name": str(at), "admission": each} for at, each in enumerate(admissions)]
    policies = Registry().policies(load_config({"tiers": tiers}))
    statuses = [
        TierStatus(str(at), Capabilities(capacity_bytes=capacity, addressable=not at), [])
        for at in range(len(admissions))
    ]
    return Planner([statuses], policies=policies)


def stored(made, numbers, now_s=0.0, origin=PROMPT):
    """Store blocks, let all end, and say which came into which tier."""
    made.store(keys(*numbers), list(numbers), {*keys(*numbers)}, now_s, 0, origin)
    arrived = {}
    while plan := made.take(now_s):
        for op in [*plan.stores, *plan.fills]:
            for leg in op.tiers:
                made.report([Report(op.op, leg, {})], now_s)
                if leg != getattr(op, "source", None):
                    arrived.setdefault(leg, []).extend(int.from_bytes(each) for each in op.keys)
    return arrived


def test_always_writes_everything():
    assert made("always").admitted(keys(1, 2), 1000, PROMPT, 0.0) == 2


def test_prompts_only_leaves_out_what_was_generated():
    policy = made("prompts-only")
    assert policy.admitted(keys(1, 2), 1000, Origin(8, 10), 0.0) == 2
    assert policy.admitted(keys(1, 2), 1000, Origin(10, 10), 0.0) == 0
    assert policy.admitted(keys(1, 2), 1000, Origin(), 0.0) == 2


def test_second_touch_writes_the_leading_blocks_that_were_offered_before():
    policy = made("second-touch")
    policy.offered(keys(1, 2), PROMPT)
    assert policy.admitted(keys(1, 2), 1000, PROMPT, 0.0) == 0
    policy.offered(keys(1, 2, 3), PROMPT)
    assert policy.admitted(keys(1, 2, 3), 1000, PROMPT, 0.0) == 2
    assert policy.admitted(keys(3, 1), 1000, PROMPT, 0.0) == 0


def test_second_touch_forgets_what_was_offered_long_ago_and_its_memory_has_a_bound():
    policy = made("second-touch")
    policy.offered(keys(0), PROMPT)
    for start in range(1, 20_000, 100):
        policy.offered(keys(*range(start, start + 100)), PROMPT)
    policy.offered(keys(0), PROMPT)
    assert policy.admitted(keys(0), 1000, PROMPT, 0.0) == 0
    touches = policy._adviser._policy._touches
    assert len(touches._young) + len(touches._old) < 2 * 4096 + 200


def written(policy, days, per_day, nbytes=1000, start=0):
    """Offer blocks that are all new, evenly over days; give the bytes that were written."""
    total = 0
    for at in range(int(days * per_day)):
        each = keys(start + at)
        policy.offered(each, PROMPT)
        total += nbytes * policy.admitted(each, nbytes, PROMPT, at * DAY_S / per_day)
    return total


def test_a_budget_is_kept_over_days_and_what_was_not_used_is_saved_up_for_an_hour():
    budget = 24_000_000
    policy = made("write-budget", bytes_per_day=budget)
    assert written(policy, 0.1, 240_000) <= budget / 24 + 0.1 * budget
    policy = made("write-budget", bytes_per_day=budget)
    total = written(policy, 2, 48_000)
    assert 1.9 * budget < total <= 2 * budget + budget / 24
    assert written(made("write-budget", bytes_per_day=budget), 2, 12_000) == 2 * 12_000 * 1000


def test_when_bytes_become_scarce_second_touches_are_written_alone():
    policy = made("write-budget", bytes_per_day=24_000_000)
    fresh = keys(*range(600))
    policy.offered(fresh, PROMPT)
    assert policy.admitted(fresh, 1000, PROMPT, 0.0) == 500
    again = keys(*range(1000, 1400))
    policy.offered(again, PROMPT)
    assert policy.admitted(again, 1000, PROMPT, 0.0) == 0
    policy.offered(again, PROMPT)
    assert policy.admitted(again, 1000, PROMPT, 0.0) == 400
    policy.offered(again, PROMPT)
    assert policy.admitted(again, 1000, PROMPT, 0.0) == 100


def test_drive_writes_a_day_and_ranks():
    one = made("write-budget", drive="24MB", drive_writes_per_day=0.5)
    assert written(one, 2, 48_000) == pytest.approx(24_000_000, rel=0.06)
    two = made("write-budget", ranks=2, bytes_per_day=24_000_000)
    assert written(two, 2, 48_000) == pytest.approx(24_000_000, rel=0.06)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "bytes_per_day, drive: write one of them"),
        ({"bytes_per_day": "1GB", "drive": "1TB"}, "bytes_per_day, drive: write one of them"),
        ({"drive": "1TB", "drive_writes_per_day": 0}, "drive_writes_per_day: 0"),
        ({"bytes_per_day": 0}, "write a size above 0"),
        ({"bytes_a_day": "1GB"}, "bytes_a_day"),
    ],
)
def test_a_wrong_budget_is_refused_with_what_to_write(settings, said):
    with pytest.raises(ConfigError, match=r"write-budget|tiers\[0\]") as caught:
        made("write-budget", **settings)
    assert said in str(caught.value)


def test_a_planner_asks_for_each_tier_and_counts_what_is_refused():
    made = planner("always", "second-touch")
    assert stored(made, [1, 2]) == {0: [1, 2]}
    assert made.counts["1"].dropped["admission"] == 2
    assert stored(made, [1, 2, 3]) == {0: [3], 1: [1, 2]}
    assert made.counts["1"].dropped["admission"] == 3


def test_a_planner_passes_on_what_was_generated():
    made = planner("always", "prompts-only")
    assert stored(made, [1, 2], origin=Origin(0, 2)) == {0: [1, 2], 1: [1, 2]}
    assert stored(made, [3], origin=Origin(2, 2)) == {0: [3]}


def test_the_budget_of_a_tier_bounds_what_a_planner_writes_there():
    made = planner("always", {"name": "write-budget", "bytes_per_day": 2400}, capacity=1000)
    total = 0
    for at in range(1000):
        total += len(stored(made, [at], at * 86.4).get(1, []))
    assert total <= 2400 + 100
    assert total > 900


class Failing(AdmissionPolicy):
    def admitted(self, keys, nbytes, origin, now_s):
        raise ZeroDivisionError("a mistake")


def test_a_strangers_mistake_lets_everything_in_with_one_line(caplog):
    policy = GuardedAdmission(Failing(), "disk", "'odd' of kvbm-odd 1.0")
    assert policy.admitted(keys(1, 2), 1, PROMPT, 0.0) == 2
    assert policy.admitted(keys(1, 2), 1, PROMPT, 0.0) == 2
    [line] = caplog.messages
    assert "tier disk goes on without an admission policy" in line
    assert "'odd' of kvbm-odd 1.0 is at fault (admitted() raised ZeroDivisionError)" in line


def test_a_tier_without_a_bound_has_an_admission_policy_too():
    policies = TierPolicies({}, {0: lambda context: made("prompts-only")})
    status = TierStatus("far", Capabilities(capacity_bytes=None), [])
    far = Planner([[status]], policies=policies)
    assert stored(far, [1], origin=Origin(0, 0)) == {}
    assert stored(far, [2], origin=Origin(0, 1)) == {0: [2]}


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(Exception, match="second-touch"):
        made("second-tuch")
