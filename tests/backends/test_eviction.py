"""The eviction policies of kvbm_eviction: the suite of policies, and what is their own."""

import random

import pytest

from kvbm_core import Lru, Origin, PolicyContext
from kvbm_core.testing.policy_suite import PolicySuite
from kvbm_eviction import Adaptive, S3Fifo
from kvbm_eviction._ghosts import Ghosts
from kvbm_eviction._model import Model

PROMPT = Origin()


class TestAdaptive(PolicySuite):
    policy = "adaptive"


class TestS3Fifo(PolicySuite):
    policy = "s3fifo"


def key(number):
    return number.to_bytes(32, "little")


def keys(numbers):
    return [key(number) for number in numbers]


class Cache:
    """A tier of equal objects under a policy, asked as the planner asks it."""

    def __init__(self, policy, room):
        self.policy, self.room, self.there, self.gone = policy, room, set(), []
        self.hits = 0

    def request(self, prompt):
        """Ask for the blocks of a prompt, and store them; count the leading ones that were there."""
        policy, there = self.policy, self.there
        self.hits += next((at for at, each in enumerate(prompt) if each not in there), len(prompt))
        if isinstance(policy, Adaptive):
            policy.offered(prompt, PROMPT)
        else:
            for each in reversed(prompt):
                if each in there:
                    policy.touch(each)
        absent = [each for each in prompt if each not in there]
        fitting = self.room - len(there)
        wanted = absent[:fitting]
        for each in absent[fitting:]:
            if not policy.admits(each, 1):
                break
            wanted.append(each)
        if len(wanted) > fitting:
            victims = policy.evict(len(wanted) - fitting, set(prompt))
            self.gone += victims
            there.difference_update(victims)
        for each in reversed(wanted[: self.room - len(there)]):
            policy.insert(each, 1)
            there.add(each)
        assert len(there) <= self.room


def cache(make, room):
    policy = Lru() if make is Lru else make(PolicyContext(room, 1, "test"))
    return Cache(policy, room)


def hits(make, room, prompts):
    made = cache(make, room)
    for prompt in prompts:
        made.request(prompt)
    return made.hits


def loop():
    return [keys(range(doc * 10, doc * 10 + 10)) for _ in range(30) for doc in range(40)]


def zipf_with_scans(seed):
    rng = random.Random(seed)
    fresh, prompts = 1 << 20, []
    for at in range(1500):
        if at % 100 < 40:
            fresh += 10
            prompts.append(keys(range(fresh, fresh + 10)))
        else:
            doc = min(int(rng.paretovariate(0.6)), 200) * 10
            prompts.append(keys(range(doc, doc + 10)))
    return prompts


def fresh_after_recent(seed):
    """What was used a moment ago comes back, what is older never does: LRU is as good as any."""
    rng = random.Random(seed)
    prompts = []
    for at in range(1500):
        doc = (at - rng.randrange(8)) * 10
        prompts.append(keys(range(doc + 1000, doc + 1010)))
    return prompts


def test_a_loop_that_does_not_fit_is_kept_in_part():
    assert hits(Lru, 200, loop()) == 0
    assert hits(Adaptive, 200, loop()) > 0.3 * len(loop()) * 10


@pytest.mark.parametrize("seed", range(3))
def test_a_scan_does_not_empty_the_cache(seed):
    prompts = zipf_with_scans(seed)
    assert hits(Adaptive, 200, prompts) > 1.1 * hits(Lru, 200, prompts)
    assert hits(S3Fifo, 200, prompts) > hits(Lru, 200, prompts)


@pytest.mark.parametrize("seed", range(3))
def test_where_lru_is_best_adaptive_is_lru(seed):
    prompts = fresh_after_recent(seed)
    asked = sum(map(len, prompts))
    assert hits(Adaptive, 200, prompts) >= hits(Lru, 200, prompts) - 0.005 * asked


@pytest.mark.parametrize("make", [Lru, S3Fifo, Adaptive])
def test_the_tail_of_a_prefix_goes_before_its_head(make):
    made = cache(make, 100)
    for prompt in range(20):
        made.request(keys(range(prompt * 10, prompt * 10 + 10)))
    of_each = {}
    for each in made.gone:
        number = int.from_bytes(each, "little")
        of_each.setdefault(number // 10, []).append(number)
    assert len(made.gone) >= 50
    for gone in of_each.values():
        assert gone == sorted(gone, reverse=True)


def test_a_small_object_is_cheaper_to_keep():
    policy = Adaptive(PolicyContext(100_000, 1000, "test"))
    rng = random.Random(0)
    used, lengths = 0, {}
    # Both kinds are used as often; nothing but the length tells them apart. What never comes back is as long.
    for at in range(20_000):
        number = rng.randrange(300) if at % 2 else 1000 + at
        each, nbytes = key(number), 100 if number < 150 else 1000
        policy.offered([each], PROMPT)
        if each in lengths:
            continue
        if used + nbytes > 100_000:
            if not policy.admits(each, nbytes):
                continue
            for gone in policy.evict(used + nbytes - 100_000, {each}):
                used -= lengths.pop(gone)
        if used + nbytes <= 100_000:
            policy.insert(each, nbytes)
            lengths[each] = nbytes
            used += nbytes
    small = sum(1 for each in lengths if int.from_bytes(each, "little") < 150)
    large = sum(1 for each in lengths if 150 <= int.from_bytes(each, "little") < 300)
    assert "density" in repr(policy)
    assert small > 1.2 * large


def test_the_same_calls_give_the_same_victims():
    first, second = cache(Adaptive, 200), cache(Adaptive, 200)
    for prompt in zipf_with_scans(1):
        first.request(prompt)
        second.request(prompt)
    assert first.gone == second.gone


def test_it_names_what_it_evicts_next():
    for make in (Adaptive, S3Fifo):
        made = cache(make, 200)
        for prompt in zipf_with_scans(2):
            made.request(prompt)
        before = made.policy.next_victims(20)
        assert len(set(before)) == len(before) > 0
        assert set(before) <= made.there
        assert set(made.policy.evict(1, ())) <= set(before)


def test_what_is_learned_may_be_damaged_and_nothing_breaks():
    made = cache(Adaptive, 200)
    prompts = zipf_with_scans(3)
    for prompt in prompts[:700]:
        made.request(prompt)
    rng = random.Random(0)
    model = made.policy._model
    for rows in (model.hits, model.watched, model.worth):
        for row in rows:
            row[:] = [rng.choice([0.0, 1e300, 1e-300, value]) for value in row]
    for at in range(len(made.policy._ghosts)):
        made.policy._ghosts._entries[at] ^= rng.getrandbits(32)
    for prompt in prompts[700:]:
        made.request(prompt)
    while made.there:
        made.there.difference_update(made.policy.evict(50, ()))


def test_an_object_that_is_mostly_used_soon_is_worth_more_the_sooner():
    model = Model(room=1000, first=32, span=64_000)
    for at in range(len(model.edges)):
        soon, late = model.hits[0], model.hits[1]
        soon[at], late[at] = (500.0, 5.0) if at < 8 else (0.0, 5.0)
        model.watched[0][at] = model.watched[1][at] = 1e6
    model.learn(0)
    assert model.worth[0][0] > 5 * model.worth[1][0]
    assert model.worth[0][0] > model.worth[0][12]


def test_ghosts_take_a_fixed_room():
    ghosts = Ghosts(1000)
    for number in range(100_000):
        ghosts.put(ghosts.place(key(number)), number + 1)
    assert len(ghosts) == 4096
    assert ghosts.find(key(99_999)) == 100_000
    assert ghosts.take(key(99_999)) == 100_000
    assert ghosts.find(key(99_999)) == 0
    assert sum(ghosts.find(key(number)) == number + 1 for number in range(100_000)) < 4096
