import random
from collections import Counter

import pytest

from kvbm_core.leader.breaker import Breaker
from kvbm_core.policy import EvictionPolicy, Lru
from kvbm_core.tier import Reason


def test_the_least_recently_used_goes_first():
    policy = Lru()
    for key in (b"a", b"b", b"c", b"a"):
        policy.add(key)
    assert list(policy.keys()) == [b"b", b"c", b"a"]
    assert [policy.victim() for _ in range(4)] == [b"b", b"c", b"a", None]


def test_what_is_taken_out_is_gone():
    policy = Lru()
    policy.add(b"a")
    assert policy.remove(b"a")
    assert not policy.remove(b"a")
    assert b"a" not in policy
    assert len(policy) == 0


def test_a_policy_is_what_the_index_is_given():
    assert issubclass(Lru, EvictionPolicy)
    with pytest.raises(TypeError, match="abstract"):
        EvictionPolicy()


def test_least_recently_used_against_a_list():
    rng, policy, model = random.Random(7), Lru(), []
    for _ in range(3000):
        key = bytes([rng.randrange(40)])
        move = rng.choice(["add", "add", "remove", "victim"])
        if move == "add":
            policy.add(key)
            model = [other for other in model if other != key] + [key]
        elif move == "remove":
            assert policy.remove(key) == (key in model)
            model = [other for other in model if other != key]
        else:
            assert policy.victim() == (model.pop(0) if model else None)
        assert (list(policy.keys()), len(policy)) == (model, len(model))


def opened(breaker, now_s, reason=Reason.ERROR):
    return Counter(breaker.note(reason, now_s) for _ in range(breaker.threshold))[True] == 1


def test_a_breaker_opens_after_faults_in_a_row_and_closes_with_time():
    breaker = Breaker()
    assert breaker.closed(0)
    assert opened(breaker, 10)
    assert not breaker.closed(10.9)
    assert breaker.closed(11)
    assert repr(breaker) == "<Breaker 3 faults, open until 11.0 s>"


@pytest.mark.parametrize("reason", [Reason.FULL, Reason.BUSY])
def test_what_is_answered_without_the_medium_neither_opens_nor_ends_the_row(reason):
    breaker = Breaker()
    assert not opened(breaker, 0, reason)
    breaker.note(Reason.ERROR, 0)
    breaker.note(Reason.ERROR, 0)
    assert not breaker.note(reason, 0)
    assert breaker.note(Reason.ERROR, 0)


@pytest.mark.parametrize("reason", [Reason.NONE, Reason.MISSING, Reason.CORRUPT])
def test_what_is_not_the_tiers_fault_opens_no_breaker_and_ends_the_row(reason):
    breaker = Breaker()
    assert not opened(breaker, 0, reason)
    breaker.note(Reason.ERROR, 0)
    breaker.note(Reason.ERROR, 0)
    breaker.note(reason, 0)
    assert not breaker.note(Reason.ERROR, 0)
    assert breaker.closed(0)


def test_the_pause_doubles_with_every_trial_that_fails_and_has_a_limit():
    breaker, now_s, pauses = Breaker(), 0.0, []
    opened(breaker, now_s)
    for _ in range(9):
        until_s = breaker._until_s
        pauses.append(until_s - now_s)
        now_s = until_s
        assert breaker.note(Reason.DEADLINE, now_s)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    breaker.note(Reason.NONE, now_s + 60)
    assert opened(breaker, now_s + 100)
    assert breaker.closed(now_s + 101)


def test_what_was_under_way_when_it_opened_does_not_lengthen_the_pause():
    breaker = Breaker()
    for _ in range(20):
        breaker.note(Reason.DEADLINE, 10)
    assert breaker.closed(11)
