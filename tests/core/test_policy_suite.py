"""The suite of policies proves itself: it finds every policy that is broken on purpose, and passes ours."""

import pytest
from hypothesis import Phase

from kvbm_core.policies import Fifo
from kvbm_core.policy import EvictionPolicy, Policy, PolicyConfig
from kvbm_core.testing.policy_suite import PolicyOracle, PolicySuite


class TestLru(PolicySuite):
    policy = "lru"


class TestFifo(PolicySuite):
    policy = "fifo"


class NoSettings(PolicyConfig, frozen=True):
    pass


class Plain(EvictionPolicy):
    """First in, first out, as briefly as can be; sound."""

    def __init__(self):
        self.sizes = {}

    def insert(self, key, nbytes):
        self.sizes[key] = nbytes

    def touch(self, key):
        assert key in self.sizes

    def remove(self, key):
        del self.sizes[key]

    def evict(self, nbytes, protected):
        victims = []
        for key in self.sizes:
            if nbytes <= 0:
                break
            if key not in protected:
                victims.append(key)
                nbytes -= self.sizes[key]
        for key in victims:
            del self.sizes[key]
        return victims


def kind(made, name="mine", **members):
    return Policy(name, NoSettings, lambda config, context: made(), **members)


class TestPlain(PolicySuite):
    policy = kind(Plain)


BROKEN = []


def found_by(test):
    def add(made):
        BROKEN.append((made, test))
        return made

    return add


@found_by("test_the_policy_is_what_the_core_expects")
class IsOneForAllTiers(Plain):
    one = None

    def __new__(cls):
        cls.one = cls.one or super().__new__(cls)
        return cls.one


@found_by("test_every_object_is_named_once_and_then_no_more")
class LosesShortObjects(Plain):
    def insert(self, key, nbytes):
        if nbytes > 20:
            super().insert(key, nbytes)

    def touch(self, key):
        pass


@found_by("test_every_object_is_named_once_and_then_no_more")
class NamesAgain(Plain):
    def evict(self, nbytes, protected):
        kept = dict(self.sizes)
        victims = super().evict(nbytes, protected)
        self.sizes = kept
        return victims


@found_by("test_every_object_is_named_once_and_then_no_more")
class NamesTwice(Plain):
    def evict(self, nbytes, protected):
        victims = super().evict(nbytes, protected)
        return victims + victims[:1]


@found_by("test_every_object_is_named_once_and_then_no_more")
class ComparesIdentities(Plain):
    def insert(self, key, nbytes):
        super().insert(key, nbytes)
        self.own = {*getattr(self, "own", ()), id(key)}

    def touch(self, key):
        assert id(key) in self.own


@found_by("test_no_more_is_freed_than_is_needed")
class FreesOneMore(Plain):
    def evict(self, nbytes, protected):
        return [*super().evict(nbytes, protected), *super().evict(1, protected)]


@found_by("test_no_more_is_freed_than_is_needed")
class CountsObjects(Plain):
    def evict(self, nbytes, protected):
        return [
            key for _ in range(-(-nbytes // 1000)) for key in super(CountsObjects, self).evict(1, protected)
        ]


@found_by("test_protected_objects_stay")
class EvictsTheProtected(Plain):
    def evict(self, nbytes, protected):
        return super().evict(nbytes, ())


@found_by("test_an_eviction_gets_past_protected_objects")
class WaitsForTheFirst(Plain):
    def evict(self, nbytes, protected):
        if self.sizes and next(iter(self.sizes)) in protected:
            return []
        return super().evict(nbytes, protected)


@found_by("test_where_all_are_protected_none_is_named_and_the_call_ends")
class StartsAnew(Plain):
    """Looks for each victim from the front, and twice before it gives up."""

    def evict(self, nbytes, protected):
        return super().evict(nbytes, protected) or super().evict(nbytes, protected)


@found_by("test_where_all_are_protected_none_is_named_and_the_call_ends")
class ForgetsTheProtected(Plain):
    def evict(self, nbytes, protected):
        victims = super().evict(nbytes, protected)
        self.sizes = {} if not victims else self.sizes
        return victims


@found_by("test_a_removed_object_is_forgotten")
class KeepsTheRemoved(Plain):
    def remove(self, key):
        pass


@found_by("test_an_evicted_object_may_come_back")
class KnowsGhosts(Plain):
    """Takes an object that comes back for one that it still has."""

    def __init__(self):
        super().__init__()
        self.ghosts = set()

    def insert(self, key, nbytes):
        if key not in self.ghosts:
            super().insert(key, nbytes)

    def evict(self, nbytes, protected):
        victims = super().evict(nbytes, protected)
        self.ghosts.update(victims)
        return victims

    def touch(self, key):
        pass


@found_by("test_an_evicted_object_may_come_back")
class KeepsTheFirstLength(Plain):
    def __init__(self):
        super().__init__()
        self.first = {}

    def insert(self, key, nbytes):
        super().insert(key, self.first.setdefault(key, nbytes))


@found_by("test_admission_is_yes_or_no_and_changes_nothing")
class AdmitsByInserting(Plain):
    def admits(self, key, nbytes):
        self.insert(key, nbytes)
        return True


@found_by("test_admission_is_yes_or_no_and_changes_nothing")
class AdmitsPerhaps(Plain):
    def admits(self, key, nbytes):
        return 0.5


@found_by("test_an_empty_policy_names_none")
class NeedsAnObject(Plain):
    def evict(self, nbytes, protected):
        next(iter(self.sizes.items()))[0]
        return super().evict(nbytes, protected)


@found_by("test_what_is_remembered_is_bounded_by_the_capacity")
class RemembersAll(Plain):
    """Keeps eight bytes of each object that it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = bytearray()

    def insert(self, key, nbytes):
        super().insert(key, nbytes)
        self.seen += key[:8]


@found_by("test_any_sequence_of_calls_keeps_the_contract")
class LosesItsPlace(Plain):
    """Forgets an object that is used twice, with a removal in between."""

    used = removed = None

    def touch(self, key):
        if key == self.removed and len(self.sizes) > 1:
            self.sizes.pop(key)
        self.used = key

    def remove(self, key):
        super().remove(key)
        self.removed = self.used


def tried(policy, test, monkeypatch):
    monkeypatch.setattr("kvbm_core.testing._machine._PHASES", (Phase.generate,))  # Nobody reads it.
    suite = type("Suite", (PolicySuite,), {"policy": policy, "programs": 500})
    getattr(suite(), test)()


@pytest.mark.parametrize(("made", "test"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_policy_is_found_by_the_test_named_for_its_fault(made, test, monkeypatch):
    with pytest.raises((AssertionError, LookupError, StopIteration)):
        tried(kind(made), test, monkeypatch)


def test_every_test_of_the_suite_is_named_by_a_broken_policy():
    tests = {name for name in vars(PolicySuite) if name.startswith("test_")}
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
