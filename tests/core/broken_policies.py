"""Policies that are wrong on purpose, each in one way, and the test of the suite that must find it.

`Plain` is sound; the others are made from it.
"""

from __future__ import annotations

import os
import threading

from kvbm_core.policy import EvictionPolicy, Policy, PolicyConfig

__all__ = ["BROKEN", "Plain", "kind"]


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


BROKEN = []


def found_by(test):
    def add(made):
        BROKEN.append((made, test))
        return made

    return add


@found_by("test_the_policy_is_what_the_core_expects")
class IsOneForAllTiers(Plain):
    """Is made once, for all tiers."""

    one = None

    def __new__(cls):
        cls.one = cls.one or super().__new__(cls)
        return cls.one


@found_by("test_every_object_is_named_once_and_then_no_more")
class LosesShortObjects(Plain):
    """Does not take short objects in."""

    def insert(self, key, nbytes):
        if nbytes > 20:
            super().insert(key, nbytes)

    def touch(self, key):
        pass


@found_by("test_every_object_is_named_once_and_then_no_more")
class NamesAgain(Plain):
    """Does not forget what it has named."""

    def evict(self, nbytes, protected):
        kept = dict(self.sizes)
        victims = super().evict(nbytes, protected)
        self.sizes = kept
        return victims


@found_by("test_every_object_is_named_once_and_then_no_more")
class NamesTwice(Plain):
    """Names an object twice in one answer."""

    def evict(self, nbytes, protected):
        victims = super().evict(nbytes, protected)
        return victims + victims[:1]


@found_by("test_every_object_is_named_once_and_then_no_more")
class ComparesIdentities(Plain):
    """Knows an object by where its key lies in memory."""

    def insert(self, key, nbytes):
        super().insert(key, nbytes)
        self.own = {*getattr(self, "own", ()), id(key)}

    def touch(self, key):
        assert id(key) in self.own


@found_by("test_no_more_is_freed_than_is_needed")
class FreesOneMore(Plain):
    """Names one object more than is needed."""

    def evict(self, nbytes, protected):
        return [*super().evict(nbytes, protected), *super().evict(1, protected)]


@found_by("test_no_more_is_freed_than_is_needed")
class CountsObjects(Plain):
    """Takes it that every object has the usual length."""

    def evict(self, nbytes, protected):
        return [
            key for _ in range(-(-nbytes // 1000)) for key in super(CountsObjects, self).evict(1, protected)
        ]


@found_by("test_protected_objects_stay")
class EvictsTheProtected(Plain):
    """Does not look at what is protected."""

    def evict(self, nbytes, protected):
        return super().evict(nbytes, ())


@found_by("test_an_eviction_gets_past_protected_objects")
class WaitsForTheFirst(Plain):
    """Names none while its first object is protected."""

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
    """Forgets what it could not name."""

    def evict(self, nbytes, protected):
        victims = super().evict(nbytes, protected)
        self.sizes = {} if not victims else self.sizes
        return victims


@found_by("test_a_removed_object_is_forgotten")
class KeepsTheRemoved(Plain):
    """Names what was removed."""

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
    """Remembers how long an object was when it first came."""

    def __init__(self):
        super().__init__()
        self.first = {}

    def insert(self, key, nbytes):
        super().insert(key, self.first.setdefault(key, nbytes))


@found_by("test_admission_is_yes_or_no_and_changes_nothing")
class AdmitsByInserting(Plain):
    """Takes in what it is asked about."""

    def admits(self, key, nbytes):
        self.insert(key, nbytes)
        return True


@found_by("test_admission_is_yes_or_no_and_changes_nothing")
class AdmitsPerhaps(Plain):
    """Answers with a probability."""

    def admits(self, key, nbytes):
        return 0.5


@found_by("test_an_empty_policy_names_none")
class NeedsAnObject(Plain):
    """Looks at its first object."""

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


@found_by("test_every_object_is_named_once_and_then_no_more")
class FreesUpToTheCapacity(Plain):
    """Frees what is above the capacity, and not what it is asked for."""

    def evict(self, nbytes, protected):
        excess = sum(self.sizes.values()) + nbytes - 200_000
        return super().evict(excess, protected) if excess > 0 else []


@found_by("test_more_than_there_is_frees_all")
class WantsEnough(Plain):
    """Names none where all together are not enough."""

    def evict(self, nbytes, protected):
        if sum(self.sizes.values()) < nbytes:
            return []
        return super().evict(nbytes, protected)


@found_by("test_a_tier_may_have_room_for_one_object")
class KeepsATenth(Plain):
    """Divides by a tenth of the objects that there is room for."""

    def evict(self, nbytes, protected):
        _ = len(self.sizes) // (len(self.sizes) // 2 * 2)
        return super().evict(nbytes, protected)


@found_by("test_objects_may_be_much_shorter_than_usual")
class HasATable(Plain):
    """Has a table for twice the objects of the usual length, and drops the rest."""

    def insert(self, key, nbytes):
        if len(self.sizes) < 400:
            super().insert(key, nbytes)

    def touch(self, key):
        pass

    def remove(self, key):
        self.sizes.pop(key, None)


@found_by("test_what_evict_gives_is_the_callers_own")
class GivesItsOwnList(Plain):
    """Gives one list at every call."""

    def __init__(self):
        super().__init__()
        self.victims = []

    def evict(self, nbytes, protected):
        self.victims[:] = super().evict(nbytes, protected)
        return self.victims


@found_by("test_what_evict_gives_is_the_callers_own")
class GivesAGenerator(Plain):
    """Gives what can be read once."""

    def evict(self, nbytes, protected):
        yield from super().evict(nbytes, protected)


@found_by("test_an_empty_policy_names_none")
class GivesNone(Plain):
    """Gives None where it names none."""

    def evict(self, nbytes, protected):
        return super().evict(nbytes, protected) or None


@found_by("test_what_is_protected_is_asked_and_not_listed")
class ListsTheProtected(Plain):
    """Wants to know all that is protected."""

    def evict(self, nbytes, protected):
        return super().evict(nbytes, set(protected))


@found_by("test_policies_of_two_tiers_have_nothing_in_common")
class SharesItsTable(Plain):
    """Knows the objects of all tiers."""

    table = {}  # noqa: RUF012 - that is the fault

    def __init__(self):
        self.sizes = self.table


@found_by("test_a_call_costs_the_same_at_any_number_of_objects")
class TouchesAList(Plain):
    """Looks for an object in a list when it is used."""

    def __init__(self):
        super().__init__()
        self.order = []

    def insert(self, key, nbytes):
        super().insert(key, nbytes)
        self.order.append(key)

    def touch(self, key):
        self.order.remove(key)
        self.order.append(key)


@found_by("test_a_call_costs_the_same_at_any_number_of_objects")
class SortsAtEachEviction(Plain):
    """Puts all objects in order for each victim."""

    def evict(self, nbytes, protected):
        self.sizes = dict(sorted(self.sizes.items()))
        return super().evict(nbytes, protected)


@found_by("test_repr_is_one_line_at_any_time")
class ShowsAll(Plain):
    """Shows every object."""

    def __repr__(self):
        return f"<Plain {self.sizes}>"


@found_by("test_the_process_stays_as_it_was_and_nothing_is_printed")
class StartsAThread(Plain):
    """Ages its objects in a thread."""

    def __init__(self):
        super().__init__()
        threading.Thread(target=threading.Event().wait, args=(0.5,), daemon=True).start()


@found_by("test_the_process_stays_as_it_was_and_nothing_is_printed")
class SaysWhatItDoes(Plain):
    """Prints a line for each eviction."""

    def evict(self, nbytes, protected):
        print("evict", nbytes)
        return super().evict(nbytes, protected)


@found_by("test_the_process_stays_as_it_was_and_nothing_is_printed")
class SetsTheEnvironment(Plain):
    """Keeps its state in the environment."""

    def insert(self, key, nbytes):
        super().insert(key, nbytes)
        os.environ["BROKEN_POLICY"] = str(len(self.sizes))
