"""What the leader knows of one tier, against a plain model of it."""

import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbm_core import BlockState, TransitionError
from kvbm_core.leader.ground.guarded_policies import GuardedPolicy
from kvbm_core.leader.ground.tier_index import LatestKeys, TierIndex
from kvbm_core.policies import Fifo, Lru

KEYS = [bytes([number]) * 32 for number in range(8)]


def index(capacity=4, *found):
    made = TierIndex(capacity, Lru())
    for key in found:
        made.found(key, 1)
    return made


def test_its_state_in_one_line():
    made = index(6, *KEYS[:3])
    made.pin(KEYS[:2])
    made.drop(KEYS[0])
    made.reserve([KEYS[4]], 1)
    assert repr(made) == "<TierIndex 4/6 bytes: 2 ready, 2 pinned, 1 filling, 1 leaving>"


def test_room_is_made_by_evicting_the_oldest():
    assert index(2, *KEYS[:2]).reserve(KEYS[2:3], 1) == (KEYS[2:3], KEYS[:1])


def test_equal_charges_are_one_number_however_they_came():
    order = Lru()
    made = TierIndex(10**9, order)
    made.found(KEYS[0], int("100000"))
    made.reserve(KEYS[1:], 200_000)
    made.stored(KEYS[1:4], [int("100000") for _ in range(3)])
    assert len({id(number) for number in order.values()}) == 1


def test_many_different_charges_are_few_numbers_a_little_more_and_never_above_what_was_reserved():
    order, rng, most = Lru(), random.Random(3), 2**21 - 1
    made, charges = TierIndex(None, order), {}
    for at in range(30_000):
        key = at.to_bytes(32, "big")
        charges[key] = most if at > 29_990 else rng.randrange(2**19, most)
        if at % 2:
            made.found(key, charges[key])
        else:
            made.reserve([key], most)
            made.stored([key], [charges[key]])
    assert all(order[key] == charge for key, charge in list(charges.items())[:4096])
    assert all(charge <= order[key] <= charge * (1 + 1 / 2048) for key, charge in charges.items())
    assert all(order[key] <= most for key in list(charges)[::2])
    assert len({id(number) for number in order.values()}) <= 4096 + 2 * 2048 + 1
    assert made.used_bytes == sum(order.values())


def test_only_what_is_absent_is_reserved_and_once():
    made = index(4, KEYS[0])
    assert made.reserve([KEYS[0], KEYS[1], KEYS[1]], 1) == ([KEYS[1]], [])
    assert made.reserve([KEYS[1]], 1) == ([], [])


def test_a_leading_part_is_reserved_if_there_is_not_room_for_all():
    made = index(4, KEYS[0], KEYS[1])
    made.pin(KEYS[:2])
    assert made.reserve(KEYS[2:6], 1) == (KEYS[2:4], [])


def test_ancestors_are_not_evicted_and_others_are_even_if_used_later():
    made = index(3, KEYS[1], KEYS[0], KEYS[2])
    assert made.reserve(KEYS[4:7], 1, KEYS[:2]) == ([KEYS[4]], [KEYS[2]])
    assert list(made) == [KEYS[1], KEYS[0]]


def test_without_a_capacity_nothing_is_evicted():
    assert index(None).reserve(KEYS, 1) == (KEYS, [])


def test_a_touched_block_goes_last_and_an_absent_one_is_not_made():
    made = index(2, *KEYS[:2])
    made.touch([KEYS[0], KEYS[5]])
    assert list(made) == [KEYS[1], KEYS[0]]


def test_a_pinned_block_that_is_dropped_is_gone_with_its_last_pin():
    made = index(2, KEYS[0])
    made.pin([KEYS[0]])
    made.pin([KEYS[0]])
    assert not made.drop(KEYS[0])
    assert KEYS[0] not in made
    assert made.state(KEYS[0]) is BlockState.LEAVING
    assert not made.drop(KEYS[0])
    assert [made.unpin(KEYS[:1]), made.unpin(KEYS[:1])] == [[], KEYS[:1]]
    assert made.state(KEYS[0]) is BlockState.ABSENT


@pytest.mark.parametrize(("move", "what"), [("stored", KEYS[:1]), ("not_stored", KEYS[0])])
def test_what_is_not_filling_cannot_end(move, what):
    with pytest.raises(TransitionError, match="absent"):
        getattr(index(), move)(what)
    with pytest.raises(TransitionError, match="ready"):
        getattr(index(1, KEYS[0]), move)(what)


def test_a_block_is_found_once():
    with pytest.raises(TransitionError, match="ready cannot reserve"):
        index(2, KEYS[0], KEYS[0])


def test_only_ready_blocks_are_pinned_and_the_others_are_named():
    made = index(4, KEYS[0])
    assert made.pin(KEYS[:2]) == [KEYS[1]]
    assert made.unpin(KEYS[:1]) == []
    assert list(made) == [KEYS[0]]


class Picky(Fifo):
    """Lets every object in but those that are named, and says what it was asked."""

    def __init__(self, *strangers):
        super().__init__()
        self.strangers, self.admissions, self.evictions = strangers, [], []

    def admits(self, key, nbytes):
        self.admissions.append(key)
        return key not in self.strangers

    def evict(self, nbytes, protected):
        self.evictions.append((nbytes, [key for key in self if key in protected]))
        return super().evict(nbytes, protected)


def test_a_policy_is_asked_for_what_does_not_fit_up_to_the_first_that_it_does_not_let_in():
    adviser = Picky(KEYS[5])
    made = TierIndex(4, GuardedPolicy(adviser, "disk", "picky"))
    assert made.reserve(KEYS[:3], 1) == (KEYS[:3], [])
    assert adviser.admissions == []
    made.stored(KEYS[:3])
    made.pin(KEYS[:1])
    assert made.reserve(KEYS[3:7], 1, KEYS[2:3]) == (KEYS[3:5], [KEYS[1]])
    assert adviser.admissions == KEYS[4:6]
    assert adviser.evictions == [(1, [KEYS[0], KEYS[2]])]


@pytest.mark.parametrize("smaller_by", [0, 1])
def test_a_policy_is_not_asked_to_evict_for_what_it_does_not_let_in(smaller_by):
    adviser = Picky(*KEYS[3:])
    made = TierIndex(3, GuardedPolicy(adviser, "disk", "picky"))
    for key in KEYS[:3]:
        made.found(key, 1)
    made.capacity_bytes -= smaller_by
    assert made.reserve(KEYS[3:4], 1) == ([], KEYS[:smaller_by])
    assert adviser.evictions == [(1, [])] * smaller_by


class Asked(list):
    """Counts the questions."""

    times = 0

    def __contains__(self, key):
        self.times += 1
        return super().__contains__(key)


def test_protected_blocks_are_met_a_bounded_number_of_times_for_each_eviction():
    """A tier that is full of one prefix must not be searched through for each block of it."""
    family = [number.to_bytes(32, "big") for number in range(1, 1001)]
    made = index(1001, *family, KEYS[0])
    asked = Asked(family)
    rounds = 0
    while not (reserved := made.reserve([KEYS[1]], 1, asked))[0]:
        rounds += 1
        assert asked.times <= rounds * 100
    assert reserved == ([KEYS[1]], [KEYS[0]])
    assert asked.times < 1100, "each is met once until the last has had its turn"
    assert list(made) == family


def test_a_departure_counts_for_its_family_and_what_is_not_remembered_for_all():
    gone = LatestKeys()
    made = TierIndex(2, Lru(), gone)
    for key in KEYS[:2]:
        made.found(key, 1)
    before = gone.count
    assert not gone.any_since(before, KEYS)
    made.reserve(KEYS[2:3], 1)
    assert gone.any_since(before, KEYS[:1])
    assert not gone.any_since(before, KEYS[1:])
    assert not gone.any_since(gone.count, KEYS)
    made.pin([KEYS[1]])
    made.drop(KEYS[1])
    assert gone.any_since(before, [KEYS[1]])
    gone.note([KEYS[5]] * LatestKeys.max_remembered)
    assert gone.any_since(before, KEYS[6:])


class Model(RuleBasedStateMachine):
    """Every order of moves, against a dictionary of states and a list of the order of use."""

    capacity = 4

    def __init__(self):
        super().__init__()
        self.index = index(self.capacity)
        self.state, self.pins, self.order = dict.fromkeys(KEYS, BlockState.ABSENT), dict.fromkeys(KEYS, 0), []

    def those(self, state):
        return [key for key in KEYS if self.state[key] is state]

    @rule(
        keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=5), family=st.sets(st.sampled_from(KEYS))
    )
    def reserve(self, keys, family):
        wanted = [key for key in keys if self.state[key] is BlockState.ABSENT]
        filling, evicted = self.index.reserve(keys, 1, sorted(family))
        assert filling == wanted[: len(filling)]
        assert not family.intersection(evicted)
        used = sum(state is not BlockState.ABSENT for state in self.state.values())
        outsiders = [key for key in self.order if key not in family and not self.pins[key]]
        assert evicted == outsiders[: max(0, used + len(wanted) - self.capacity)]
        for key in evicted:
            self.state[key] = BlockState.ABSENT
            self.order.remove(key)
        for key in filling:
            self.state[key] = BlockState.FILLING
        self.order = list(self.index)
        assert len(filling) == len(wanted) or len(self.index) == self.capacity

    @precondition(lambda self: self.those(BlockState.FILLING))
    @rule(data=st.data(), well=st.booleans())
    def end(self, data, well):
        key = data.draw(st.sampled_from(self.those(BlockState.FILLING)))
        if well:
            self.index.stored([key])
        else:
            self.index.not_stored(key)
        self.state[key] = BlockState.READY if well else BlockState.ABSENT
        self.order += [key] * well

    @precondition(lambda self: self.those(BlockState.READY))
    @rule(data=st.data())
    def pin(self, data):
        key = data.draw(st.sampled_from(self.those(BlockState.READY)))
        self.index.pin([key])
        self.pins[key] += 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data):
        key = data.draw(st.sampled_from([key for key in KEYS if self.pins[key]]))
        self.pins[key] -= 1
        gone = self.state[key] is BlockState.LEAVING and not self.pins[key]
        assert self.index.unpin([key]) == [key] * gone
        if gone:
            self.state[key] = BlockState.ABSENT
        elif self.state[key] is BlockState.READY and not self.pins[key]:
            self.order.remove(key)
            self.order.append(key)

    @rule(key=st.sampled_from(KEYS))
    def drop(self, key):
        ready = self.state[key] is BlockState.READY
        assert self.index.drop(key) == (ready and not self.pins[key])
        if ready:
            self.state[key] = BlockState.LEAVING if self.pins[key] else BlockState.ABSENT
            self.order = [other for other in self.order if other != key]

    @rule(key=st.sampled_from(KEYS))
    def touch(self, key):
        self.index.touch([key])
        if key in self.order:
            self.order.remove(key)
            self.order.append(key)

    @invariant()
    def agree(self):
        assert {key: self.index.state(key) for key in KEYS} == self.state
        assert len(self.index) == len(KEYS) - len(self.those(BlockState.ABSENT)) <= self.capacity
        assert list(self.index) == self.order
        assert sorted(self.index) == self.those(BlockState.READY)
        assert self.index.used_bytes == len(self.index)


TestIndexAgainstAModel = Model.TestCase


def test_a_pin_that_nobody_took_cannot_be_taken_back():
    with pytest.raises(TransitionError):
        index().unpin(KEYS[:1])
    with pytest.raises(TransitionError):
        index(4, KEYS[0]).unpin(KEYS[:1])
