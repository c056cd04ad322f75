"""The suite of policies proves itself: it finds every policy that is broken on purpose, and passes ours."""

import pytest
from broken_policies import BROKEN, KeepsTheRemoved, Plain, kind
from hypothesis import Phase

from kvbm_core.policies import Fifo
from kvbm_core.testing._whole import members_of
from kvbm_core.testing.policy_suite import PolicyOracle, PolicySuite


class TestLru(PolicySuite):
    policy = "lru"


class TestFifo(PolicySuite):
    policy = "fifo"


class TestPlain(PolicySuite):
    policy = kind(Plain)


def tried(policy, test, monkeypatch):
    monkeypatch.setattr("kvbm_core.testing._machine._PHASES", (Phase.generate,))  # Nobody reads it.
    suite = type("Suite", (PolicySuite,), {"policy": policy, "programs": 500})
    getattr(suite(), test)()


@pytest.mark.parametrize(("made", "test"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_policy_is_found_by_the_test_named_for_its_fault(made, test, monkeypatch):
    monkeypatch.delenv("BROKEN_POLICY", raising=False)
    with pytest.raises((AssertionError, LookupError, StopIteration, ArithmeticError, TypeError)):
        tried(kind(made), test, monkeypatch)


def test_every_test_of_the_suite_is_named_by_a_broken_policy():
    tests = {name for name in members_of(PolicySuite) if name.startswith("test_")}
    assert tests == {test for _, test in BROKEN}


def test_a_policy_of_another_contract_is_found(monkeypatch):
    with pytest.raises(AssertionError):
        tried(kind(Plain, contract_version=1), "test_the_policy_is_what_the_core_expects", monkeypatch)


def test_a_test_cannot_be_overridden_and_a_waiver_must_fail(monkeypatch):
    with pytest.raises(TypeError, match=r"overrides .*test_protected_objects_stay"):
        type("Mine", (PolicySuite,), {"policy": "lru", "test_protected_objects_stay": lambda self: None})
    name = "test_a_removed_object_is_forgotten"
    waived = {"policy": kind(KeepsTheRemoved), "waivers": {name: "its library cannot"}}
    with pytest.raises(pytest.xfail.Exception, match="its library cannot"):
        getattr(type("Mine", (PolicySuite,), waived)(), name)()
    with pytest.raises(pytest.fail.Exception, match="remove the waiver"):
        getattr(type("Mine", (PolicySuite,), {**waived, "policy": "lru"})(), name)()


def test_the_oracle_says_what_it_holds():
    oracle = PolicyOracle(Fifo())
    oracle.insert(b"a", 3)
    assert repr(oracle).startswith("<PolicyOracle 1 objects, 3 bytes: ")
    assert oracle.evict(2, ()) == [b"a"]
    assert oracle.known == {}
