"""The suite in a few lines, and what it learns: lengths, and classes that are never used."""

import hashlib
import random
from types import MappingProxyType

import pytest
from kvbm_learned import Learned, LearnedConfig

from kvbm_core import ConfigError, Lru
from kvbm_core.testing.policy_suite import PolicySuite


class TestLearned(PolicySuite):
    policy = "learned"
    settings = MappingProxyType({"rate": 0.1})


def key_of(name):
    return hashlib.sha256(str(name).encode()).digest()


def hits(policy, trace, capacity_bytes):
    """Ask for objects in turn, storing what is not there; how many were there."""
    held, used_bytes, found = {}, 0, 0
    for name, nbytes in trace:
        key = key_of(name)
        if key in held:
            policy.touch(key)
            found += 1
            continue
        if used_bytes + nbytes > capacity_bytes:
            for gone in policy.evict(used_bytes + nbytes - capacity_bytes, ()):
                used_bytes -= held.pop(gone)
        policy.insert(key, nbytes)
        held[key] = nbytes
        used_bytes += nbytes
    return found


def test_short_objects_are_worth_more_room_than_long_ones():
    chance = random.Random(1)
    objects = [(number, 100 if number % 2 else 2000) for number in range(400)]
    trace = chance.choices(objects, k=20_000)
    room = 60_000
    learned = hits(Learned(room, 2000, 0.05), trace, room)
    assert learned > 1.5 * hits(Lru(), trace, room)


def test_a_class_that_is_never_used_again_is_learned_to_go_first():
    # Long prompts of which nothing is asked twice, beside short ones that come back, not at once.
    trace, often = [], 0
    for turn in range(20_000):
        if turn % 4:
            trace.append((f"once {turn}", 150))
        else:
            trace.append((f"often {often % 300}", 100))
            often += 1
    room = 40_000
    assert hits(Lru(), trace, room) == 0
    assert hits(Learned(room, 150, 0.05), trace, room) > 0.8 * (often - 300)


def test_touches_do_not_make_the_heap_grow():
    learned = Learned(1000, 10, 0.05)
    for number in range(100):
        learned.insert(key_of(number), 10)
    for turn in range(10_000):
        learned.touch(key_of(turn % 100))
    assert len(learned._heap) + len(learned._aside) <= 3 * 100 + 64


@pytest.mark.parametrize("rate", [0, -1, 1.5])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ConfigError, match=f"rate: {rate}; write a number above 0"):
        LearnedConfig(rate=rate)
