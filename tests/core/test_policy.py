import random
from collections import Counter

import pytest

from kvbm_core.leader.ground.breaker import Breaker
from kvbm_core.policies import Fifo, Lru
from kvbm_core.policy import EvictionPolicy
from kvbm_core.tier import Op, Reason


def fill(policy, *keys):
    for key in keys:
        policy.insert(key, 1)
    return policy


def test_the_least_recently_used_goes_first():
    policy = fill(Lru(), b"a", b"b", b"c")
    policy.touch(b"a")
    assert list(policy) == [b"b", b"c", b"a"]
    assert policy.evict(2, ()) == [b"b", b"c"]
    assert policy.evict(9, ()) == [b"a"]
    assert policy.evict(1, ()) == []


def test_first_in_first_out_knows_no_use():
    policy = fill(Fifo(), b"a", b"b", b"c")
    policy.touch(b"a")
    assert policy.evict(2, ()) == [b"a", b"b"]


def test_lengths_are_counted_and_no_more_goes_than_must():
    policy = Lru()
    for key, nbytes in ((b"a", 10), (b"b", 1), (b"c", 5)):
        policy.insert(key, nbytes)
    assert policy.nbytes == 16
    assert policy.evict(11, ()) == [b"a", b"b"]
    assert policy.nbytes == 5


def test_a_policy_is_what_the_index_is_given():
    assert issubclass(Lru, EvictionPolicy)
    with pytest.raises(TypeError, match="abstract"):
        EvictionPolicy()


@pytest.mark.parametrize("kind", [Lru, Fifo])
def test_against_a_list(kind):
    rng, policy, model = random.Random(7), kind(), {}
    for number in range(6000):
        key = rng.choice(list(model)) if model and rng.random() < 0.5 else b"%d" % number
        move = rng.choice(["insert", "insert", "touch", "remove", "evict"])
        count = rng.randrange(12)
        assert list(policy.next_victims(count)) == list(model)[:count]
        if move == "insert" and key not in model:
            model[key] = rng.randrange(1, 9)
            policy.insert(key, model[key])
        elif move == "touch" and key in model:
            policy.touch(key)
            if kind is Lru:
                model[key] = model.pop(key)
        elif move == "remove" and key in model:
            policy.remove(key)
            del model[key]
        elif move == "evict":
            wanted = rng.randrange(1, 20)
            protected = set(rng.sample(sorted(model), len(model) // 8))
            victims = policy.evict(wanted, protected)
            right, freed = [], 0
            for each in list(model):
                if freed >= wanted:
                    break
                if each in protected:
                    model[each] = model.pop(each)
                else:
                    freed += model.pop(each)
                    right.append(each)
            assert victims == right
        assert (list(policy), policy.nbytes) == (list(model), sum(model.values()))


def opened(breaker, now_s, reason=Reason.ERROR):
    return Counter(breaker.note(Op.LOAD, reason, now_s) for _ in range(breaker.threshold))[True] == 1


def test_a_breaker_opens_after_faults_in_a_row_and_closes_with_time():
    breaker = Breaker()
    assert breaker.closed(0)
    assert opened(breaker, 10)
    assert not breaker.closed(10.9)
    assert breaker.closed(11)
    assert repr(breaker) == "<Breaker load 3 faults, open until 11.0 s>"


@pytest.mark.parametrize("reason", [Reason.FULL, Reason.BUSY])
def test_what_is_answered_without_the_medium_neither_opens_nor_ends_the_row(reason):
    breaker = Breaker()
    assert not opened(breaker, 0, reason)
    breaker.note(Op.LOAD, Reason.ERROR, 0)
    breaker.note(Op.LOAD, Reason.ERROR, 0)
    assert not breaker.note(Op.LOAD, reason, 0)
    assert breaker.note(Op.LOAD, Reason.ERROR, 0)


@pytest.mark.parametrize("reason", [Reason.NONE, Reason.MISSING])
def test_what_is_not_the_tiers_fault_opens_no_breaker_and_ends_the_row(reason):
    breaker = Breaker()
    assert not opened(breaker, 0, reason)
    breaker.note(Op.LOAD, Reason.ERROR, 0)
    breaker.note(Op.LOAD, Reason.ERROR, 0)
    breaker.note(Op.LOAD, reason, 0)
    assert not breaker.note(Op.LOAD, Reason.ERROR, 0)
    assert breaker.closed(0)


def test_the_pause_doubles_with_every_trial_that_fails_and_has_a_limit():
    breaker, now_s, pauses = Breaker(), 0.0, []
    opened(breaker, now_s)
    for _ in range(9):
        until_s = breaker._until_s
        pauses.append(until_s - now_s)
        now_s = until_s
        assert breaker.note(Op.LOAD, Reason.DEADLINE, now_s)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    breaker.note(Op.LOAD, Reason.NONE, now_s + 60)
    assert opened(breaker, now_s + 100)
    assert breaker.closed(now_s + 101)


def test_what_was_under_way_when_it_opened_does_not_lengthen_the_pause():
    breaker = Breaker()
    for _ in range(20):
        breaker.note(Op.LOAD, Reason.DEADLINE, 10)
    assert breaker.closed(11)


@pytest.mark.parametrize("failing", Op)
@pytest.mark.parametrize("reason", [Reason.ERROR, Reason.DEADLINE])
def test_what_works_says_nothing_of_other_kinds(failing, reason):
    breaker, opened_at = Breaker(), []
    for at in range(8):
        for op in Op:
            if breaker.note(op, reason if op is failing else Reason.NONE, float(at)):
                opened_at.append(at)
    # The third fault, then the trials after 1, 2 and 4 s, those that came too early left out.
    assert opened_at == [2, 3, 5]
    assert breaker.since_s == 0.0
    breaker.note(failing, Reason.NONE, 9.0)
    assert breaker.since_s is None


def test_faults_of_all_kinds_count_together():
    """A server that is gone fails whatever it is asked: three of anything are enough."""
    breaker = Breaker()
    assert [breaker.note(op, Reason.ERROR, 0.0) for op in Op] == [False, False, True]
    breaker.close(1.0)
    assert repr(breaker) == "<Breaker no faults, open until 1.0 s>"
