"""A stranger's policy that makes mistakes: one line, no exception, and the tier goes on with lru."""

import random

import pytest

from kvbm_core.leader.ground.guarded_policies import GuardedPolicy
from kvbm_core.policies import Fifo, Lru
from kvbm_core.policy import EvictionPolicy

USUAL = 10


def key(number):
    return number.to_bytes(32, "big")


class Broken(Lru):
    """Least recently used first, until `mistake` says otherwise."""

    mistake = None

    def evict(self, nbytes, protected):
        if self.mistake is not None:
            return self.mistake(self, nbytes, protected)
        return super().evict(nbytes, protected)


class Opaque(EvictionPolicy):
    """Another policy, of which the guard sees the contract alone."""

    def __init__(self, inner):
        self.inner = inner

    def insert(self, key, nbytes):
        self.inner.insert(key, nbytes)

    def touch(self, key):
        self.inner.touch(key)

    def remove(self, key):
        self.inner.remove(key)

    def evict(self, nbytes, protected):
        return self.inner.evict(nbytes, protected)


def guarded(adviser=None, objects=20):
    adviser = Broken() if adviser is None else adviser
    policy = GuardedPolicy(adviser, "disk", "'odd' of kvbm-odd 1.0")
    for number in range(objects):
        policy.insert(key(number), USUAL)
    return adviser, policy


def said(caplog, why):
    """The one line that names the tier, the policy with its package, the reason and what to do."""
    [line] = caplog.messages
    assert line == (
        f"tier disk goes on with policy lru: policy 'odd' of kvbm-odd 1.0 is at fault ({why}). Tell its "
        "authors, or write another policy for the tier"
    )
    return True


def goes_on_as_lru(policy, lru):
    """Both are told the same from now on, and choose the same."""
    chance = random.Random(0)
    for number in range(1000, 1200):
        used = chance.choice(list(lru))
        for each in (policy, lru):
            each.touch(used)
            each.insert(key(number), USUAL)
        assert policy.evict(2 * USUAL, ()) == lru.evict(2 * USUAL, ())
        assert policy.nbytes == lru.nbytes
        for each in (policy, lru):
            each.insert(key(number + 10_000), USUAL)
    assert list(policy) == list(lru)


def lru_of(policy):
    lru = Lru()
    for each, nbytes in policy.items():
        lru.insert(each, nbytes)
    return lru


CALLS = {
    "insert": lambda policy: policy.insert(key(500), USUAL),
    "touch": lambda policy: policy.touch(key(3)),
    "remove": lambda policy: policy.remove(key(3)),
    "admits": lambda policy: policy.admits(key(500), USUAL),
    "evict": lambda policy: policy.evict(3 * USUAL, ()),
}


@pytest.mark.parametrize("method", CALLS)
def test_one_that_raises_is_dismissed_with_one_line_and_what_was_asked_is_done(method, caplog, monkeypatch):
    adviser, policy = guarded()
    lru = lru_of(policy)

    def fail(*args):
        raise ZeroDivisionError("a stranger's mistake")

    monkeypatch.setattr(adviser, method, fail, raising=False)
    assert CALLS[method](policy) == CALLS[method](lru)
    assert said(caplog, f"{method}() raised ZeroDivisionError")
    # The authors find where.
    assert caplog.records[0].exc_info[1].args == ("a stranger's mistake",)
    monkeypatch.undo()
    goes_on_as_lru(policy, lru)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ([key(999)], "the tier has not"),
        ([key(5), key(5)], "the tier has not"),
        ([bytearray(key(5))], "the tier has not"),
        ([7], "the tier has not"),
        ([key(5), key(0)], "is protected"),
        ([key(5), key(6), key(7)], "need not go"),
    ],
    ids=["unknown", "twice", "unhashable", "a number", "protected", "too many"],
)
def test_one_that_names_what_must_not_go_is_dismissed_and_the_rest_is_chosen_by_lru(named, why, caplog):
    adviser, policy = guarded()
    adviser.mistake = lambda *args: named
    spared = {key(0), key(1)}
    victims = policy.evict(2 * USUAL, spared)
    assert len(victims) == len(set(victims)) == 2
    assert not spared.intersection(victims)
    # What was right in its answer holds.
    assert (key(5) in victims) is (named[0] == key(5) and type(named[0]) is bytes)
    assert not set(victims).intersection(policy)
    assert said(caplog, f"evict() named an object that {why}")
    goes_on_as_lru(policy, lru_of(policy))


@pytest.mark.parametrize("answer", [None, 7, [None]])
def test_an_answer_that_is_no_list_of_keys_is_a_mistake(answer, caplog):
    adviser, policy = guarded()
    adviser.mistake = lambda *args: answer
    assert policy.evict(USUAL, ()) == [key(0)]
    assert len(caplog.messages) == 1


def names_none(adviser, nbytes, protected):
    return []


def names_one(adviser, nbytes, protected):
    return Lru.evict(adviser, 1, protected)


@pytest.mark.parametrize("mistake", [names_none, names_one])
def test_one_that_frees_too_little_is_dismissed_after_eight_times_and_no_room_was_missing(mistake, caplog):
    adviser, policy = guarded(objects=200)
    adviser.mistake = mistake
    for time in range(1, 9):
        assert not caplog.messages
        assert len(policy.evict(3 * USUAL, ())) == 3
        assert len(policy) == 200 - 3 * time
        # It is told what has gone.
        assert time == 8 or set(adviser) == set(policy)
    assert said(caplog, "evict() has freed too little 8 times in a row")
    goes_on_as_lru(policy, lru_of(policy))


def test_eight_times_are_in_a_row(caplog):
    adviser, policy = guarded(objects=200)
    for _ in range(4):
        adviser.mistake = names_one
        for _ in range(7):
            policy.evict(2 * USUAL, ())
        adviser.mistake = None
        policy.evict(2 * USUAL, ())
    assert not caplog.messages


def test_where_all_are_protected_nobody_is_at_fault(caplog):
    """A prompt that is longer than the tier stores block after block."""
    _, policy = guarded(Opaque(Fifo()), objects=100)
    for _ in range(50):
        assert policy.evict(USUAL, set(policy)) == []
    assert not caplog.messages
    assert policy.evict(USUAL, ()) == [key(0)]


def test_one_that_is_busy_with_a_long_prompt_is_not_at_fault(caplog):
    """Its oldest are protected, and it passes over a bounded number of them in each eviction."""
    adviser, policy = guarded(Opaque(Fifo()), objects=6000)
    spared = {key(number) for number in range(4000)}
    # Least recently used are others.
    for number in range(4000):
        policy.touch(key(number))
    for _ in range(200):
        assert len(policy.evict(USUAL, spared)) == 1
    assert not caplog.messages
    assert adviser.inner.nbytes == policy.nbytes


def test_it_is_the_policys_choice_as_long_as_it_makes_none(caplog):
    _, policy = guarded(Opaque(Fifo()))
    policy.touch(key(0))
    assert policy.evict(2 * USUAL, {key(1)}) == [key(0), key(2)]
    assert not caplog.messages


def test_what_it_does_not_let_in_stays_out_until_it_is_dismissed():
    adviser, policy = guarded()
    adviser.admits = lambda name, nbytes: False
    assert policy.admits(key(500), USUAL) is False
    adviser.mistake = lambda *args: [7]
    policy.evict(USUAL, ())
    assert policy.admits(key(500), USUAL) is True


def test_its_repr_shows_the_policy_or_that_there_is_none_any_more():
    adviser, policy = guarded(Opaque(Fifo()), objects=0)
    assert repr(policy) == f"<GuardedPolicy {adviser!r}>"
    adviser.insert = None
    policy.insert(key(1), USUAL)
    assert repr(policy) == "<GuardedPolicy None>"


class Foreseeing(Broken):
    """Names as next what `named` says."""

    named = ()

    def next_victims(self, count):
        return self.named(count) if callable(self.named) else self.named


def test_what_a_policy_evicts_next_is_asked_and_what_it_names_wrongly_left_out():
    adviser, policy = guarded(Foreseeing())
    adviser.named = [key(7), b"?" * 32, 3, key(5), key(6)]
    assert policy.next_victims(4) == [key(7), key(5)]
    assert policy.next_victims(9) == [key(7), key(5), key(6)]


def test_of_a_policy_that_names_nothing_the_least_recently_used_are_next():
    _, policy = guarded(Opaque(Fifo()))
    policy.touch(key(0))
    assert policy.next_victims(2) == [key(1), key(2)]


def test_a_policy_that_fails_to_say_what_is_next_is_dismissed(caplog):
    adviser, policy = guarded(Foreseeing())
    adviser.named = lambda count: 1 / 0
    assert policy.next_victims(2) == [key(0), key(1)]
    assert "next_victims() raised ZeroDivisionError" in caplog.text
