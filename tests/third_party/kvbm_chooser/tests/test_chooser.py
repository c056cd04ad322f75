"""The suite in a few lines, and whether it finds the best candidate, and again when the load changes."""

import hashlib
import random
from types import MappingProxyType

import pytest
from kvbm_chooser import Chooser, ChooserConfig

from kvbm_core import ConfigError, Lru, PolicyContext
from kvbm_core.testing.policy_suite import PolicySuite


class TestChooser(PolicySuite):
    policy = "chooser"
    settings = MappingProxyType({"window": 20, "margin": 0.0})


def key_of(name):
    return hashlib.sha256(str(name).encode()).digest()


def chooser(capacity=1000, **settings):
    return Chooser(ChooserConfig(**settings), PolicyContext(capacity, 1, "test"))


def hits(policy, names, capacity=1000, held=None):
    """Ask for objects of one byte in turn, storing what is not there; how many were there."""
    held, found = set() if held is None else held, 0
    for name in names:
        key = key_of(name)
        if key in held:
            policy.touch(key)
            found += 1
            continue
        if len(held) >= capacity:
            held.difference_update(policy.evict(len(held) + 1 - capacity, ()))
        policy.insert(key, 1)
        held.add(key)
    return found


def scans(rounds, seed):
    """Some objects that are used all the time, between long scans of others."""
    trace = []
    for turn in range(rounds):
        trace += [f"used {number}" for number in range(400)] * 2
        trace += [f"scanned {seed} {turn} {number}" for number in range(1500)]
    return trace


def drift(count):
    """What is used next was used lately: the older, the less."""
    chance = random.Random(3)
    return [f"drift {at // 4 - int(chance.expovariate(1 / 500))}" for at in range(count)]


def test_with_scans_it_follows_arc_and_hits_as_often():
    follower = chooser()
    found = hits(follower, scans(30, 1))
    assert follower.leader == "arc"
    # In the second half it knows.
    assert found > 1.2 * hits(Lru(), scans(30, 1))


def test_it_changes_its_leader_when_the_load_changes():
    follower, held = chooser(window=256, margin=0.0), set()
    hits(follower, scans(20, 1), held=held)
    assert follower.leader == "arc"
    before = follower.hit_ratios
    hits(follower, drift(40_000), held=held)
    ratios = follower.hit_ratios
    assert ratios != before
    assert ratios[follower.leader] >= max(ratios.values()) - 0.02


def test_only_a_part_of_the_keys_is_sampled_in_a_large_tier_and_the_ratios_agree():
    whole, part = chooser(1000), chooser(20_000, window=512, margin=1.0)
    assert (whole._one_in, part._one_in) == (3, 64)
    chance, held = random.Random(5), set()
    hits(part, chance.choices(range(30_000), k=60_000), 20_000, held)
    found = hits(part, chance.choices(range(30_000), k=60_000), 20_000, held)
    assert part.leader == "lru"
    assert abs(part.hit_ratios["lru"] - found / 60_000) < 0.08


def test_the_shadow_caches_agree_on_nothing_but_their_bound():
    follower = chooser(1000)
    hits(follower, range(20_000))
    assert all(shadow._used_bytes <= 1000 // 3 for shadow in follower._shadows.values())


@pytest.mark.parametrize(
    ("setting", "said"), [({"window": 0}, "window: 0"), ({"margin": 2.0}, "margin: 2.0")]
)
def test_a_setting_out_of_range_is_refused(setting, said):
    with pytest.raises(ConfigError, match=said):
        ChooserConfig(**setting)
