"""The suite in a few lines, and what makes it ARC: scans do no harm, ghosts teach and are bounded."""

import hashlib

from kvbm_arc import Arc

from kvbm_core import Lru
from kvbm_core.testing.policy_suite import PolicySuite


class TestArc(PolicySuite):
    policy = "arc"


def key_of(name):
    return hashlib.sha256(str(name).encode()).digest()


def hits(policy, names, capacity=100):
    """Ask for objects of one byte in turn, storing what is not there; how many were there."""
    held, found = set(), 0
    for name in names:
        key = key_of(name)
        if key in held:
            policy.touch(key)
            found += 1
            continue
        if len(held) >= capacity:
            held -= set(policy.evict(len(held) + 1 - capacity, ()))
        policy.insert(key, 1)
        held.add(key)
    return found


def test_a_scan_does_not_displace_what_is_used():
    used = [f"used {number}" for number in range(60)]
    scans = [f"scanned {number}" for number in range(5000)]
    trace = used + used
    for at in range(0, 5000, 200):
        trace += scans[at : at + 200] + used
    assert hits(Lru(), trace) == 60
    assert hits(Arc(100), trace) == 60 + 25 * 60


def test_a_ghost_that_comes_back_moves_the_target_and_is_kept_as_often_used():
    arc = Arc(10)
    for number in range(10):
        arc.insert(key_of(number), 1)
    for number in range(5):
        arc.touch(key_of(number))
    assert list(arc.evict(2, ())) == [key_of(5), key_of(6)]
    assert repr(arc) == "<Arc 3 bytes once, 5 often, target 0; 2 and 0 ghosts>"
    arc.insert(key_of(5), 1)
    assert repr(arc) == "<Arc 3 bytes once, 6 often, target 1; 1 and 0 ghosts>"
    # Those seen once have 3 bytes, above the target.
    assert list(arc.evict(3, ())) == [key_of(7), key_of(8), key_of(0)]


def test_ghosts_take_no_more_than_the_capacity():
    arc = Arc(100)
    hits(arc, range(10_000))
    assert len(arc._once_gone) + len(arc._often_gone) <= 100
