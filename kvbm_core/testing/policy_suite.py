"""The suite of policies: what every policy of eviction and admission must do.

    from kvbm_core.testing.policy_suite import PolicySuite

    class TestArc(PolicySuite):
        policy = "arc"
        settings = {"ghosts": 0.5}

Run it with pytest. Each test is named for the line of `kvbm_core.EvictionPolicy` that it proves; none can be
overridden, see `kvbm_core.testing.suite`. `PolicyOracle` checks a policy wherever it runs: in a simulation,
or behind a trace of real requests.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import random
import tracemalloc
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from kvbm_core.block import BlockKey
from kvbm_core.config import convert
from kvbm_core.policy import EvictionPolicy, Policy, PolicyConfig, PolicyContext
from kvbm_core.registry import Registry
from kvbm_core.testing._machine import settings_of
from kvbm_core.testing._oracle import MANY, USUAL_BYTES, Calls, Cost, PolicyOracle, block_key, counting
from kvbm_core.testing._process import changes, process_state
from kvbm_core.testing._watch import handles
from kvbm_core.testing._whole import WholeSuite
from kvbm_core.tier import CONTRACT_VERSION

__all__ = ["PolicyOracle", "PolicySuite"]

_OBJECTS: Final = 200
"""Of the usual length that the tier has room for."""
_CAPACITY_BYTES: Final = USUAL_BYTES * _OBJECTS
_EVICTIONS: Final = 8
"""After so many in a row that free too little, the core goes on without the policy."""
_WARM_ROUNDS: Final = 20
_ROUNDS: Final = 100
"""Capacities of new objects that pass through a policy when its memory is measured."""
_GHOST_BYTES: Final = 4
"""Less than a policy that remembers every key keeps for each."""
_STEPS: Final = 40
_MOST_KEYS: Final = 12
_MOST_COST: Final = 200
_MOST_SHOWN: Final = 500


class _Machine(RuleBasedStateMachine):
    """Random calls, as the core makes them: never above the capacity, never an object that is not known."""

    suite: PolicySuite

    def __init__(self) -> None:
        super().__init__()
        self.policy = self.suite.made(capacity_bytes=8 * USUAL_BYTES)

    @rule(number=st.integers(0, _MOST_KEYS - 1), size=st.integers(1, USUAL_BYTES), spare=st.integers(0, 3))
    def store(self, number: int, size: int, spare: int) -> None:
        """Store an object, making room where there is none: some of the others are protected."""
        key = block_key(number)
        if key in self.policy.known:
            self.policy.touch(key)
            return
        excess = self.policy.nbytes + size - 8 * USUAL_BYTES
        if excess > 0:
            if not self.policy.admits(key, size):
                return
            self.policy.evict(excess, list(self.policy.known)[:spare])
        if self.policy.nbytes + size <= 8 * USUAL_BYTES:
            self.policy.insert(key, size)

    @rule(nbytes=st.integers(1, 3 * USUAL_BYTES), spared=st.sets(st.integers(0, _MOST_KEYS - 1)))
    def evict(self, nbytes: int, spared: set[int]) -> None:
        """Make room beside what a request uses; some of that the tier has not."""
        self.policy.evict(nbytes, {block_key(number) for number in spared})

    @precondition(lambda self: self.policy.known)
    @rule(which=st.integers(0, _MOST_KEYS))
    def touch(self, which: int) -> None:
        """Use a known object."""
        self.policy.touch(self._some(which))

    @precondition(lambda self: self.policy.known)
    @rule(which=st.integers(0, _MOST_KEYS))
    def remove(self, which: int) -> None:
        """Lose a known object."""
        self.policy.remove(self._some(which))

    @precondition(lambda self: self.policy.known)
    @rule()
    def drain(self) -> None:
        """Evict all: the policy must know each."""
        self.policy.evict(self.policy.nbytes, ())
        assert not self.policy.known, f"{len(self.policy.known)} objects are never named"

    def _some(self, which: int) -> BlockKey:
        known = sorted(self.policy.known)
        return bytes(bytearray(known[which % len(known)]))


class PolicySuite(WholeSuite):
    """Subclass it, name a policy, and run pytest."""

    policy: ClassVar[str | Policy]
    """The name of an entry point, or a `kvbm_core.Policy`."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """The keys beside ``name``, as an operator would write them."""
    waivers: ClassVar[Mapping[str, str]] = {}
    """Tests that this policy cannot pass, and why. Each must fail, else the waiver is out of date."""
    programs: ClassVar[int] = 60
    """Random programs that the last test runs."""
    members = frozenset({"policy", "settings", "waivers", "programs"})

    def kind(self) -> Policy:
        """Give what the package registers."""
        return Registry().policy(self.policy) if isinstance(self.policy, str) else self.policy

    def made(self, capacity_bytes: int = _CAPACITY_BYTES) -> PolicyOracle:
        """Make a policy for a tier of so many bytes; each of its answers is checked."""
        return PolicyOracle(self.bare(capacity_bytes))

    def bare(self, capacity_bytes: int = _CAPACITY_BYTES) -> EvictionPolicy:
        """Make a policy whose answers are not checked."""
        kind = self.kind()
        config = convert(self.settings, kind.config_type, "settings")
        return kind.make(config, PolicyContext(capacity_bytes, USUAL_BYTES, "suite"))

    def test_the_policy_is_what_the_core_expects(self) -> None:
        """Its name is its entry point's, its contract ours, what it makes is a policy."""
        kind = self.kind()
        assert kind.contract_version == CONTRACT_VERSION
        assert isinstance(self.policy, Policy) or kind.name == self.policy
        assert issubclass(kind.config_type, PolicyConfig)
        policy = self.bare()
        assert isinstance(policy, EvictionPolicy)
        assert self.bare() is not policy, "each tier has a policy of its own"
        assert "\n" not in repr(policy)

    def test_every_object_is_named_once_and_then_no_more(self) -> None:
        """Until nothing is left, whatever the lengths and the order of use."""
        policy = _filled(self.made(), range(_OBJECTS))
        chance = random.Random(1)
        for number in chance.choices(range(_OBJECTS), k=3 * _OBJECTS):
            policy.touch(block_key(number))
        while policy.known:
            policy.evict(chance.randint(1, 5 * USUAL_BYTES), ())
        assert list(policy.evict(1, ())) == []

    def test_no_more_is_freed_than_is_needed(self) -> None:
        """Without the last object that is named, too few bytes would be free; with it, enough are."""
        policy = self.made()
        numbers = itertools.count()
        for nbytes in [1, USUAL_BYTES - 1, USUAL_BYTES, USUAL_BYTES + 1, 7 * USUAL_BYTES] * 20:
            while policy.nbytes < _CAPACITY_BYTES - USUAL_BYTES:
                _filled(policy, [next(numbers)])
            assert policy.evict(nbytes, ())

    def test_protected_objects_stay(self) -> None:
        """They are named in none of many evictions, and all others are."""
        policy = _filled(self.made(), range(_OBJECTS))
        spared = {block_key(number) for number in range(0, _OBJECTS, 5)}
        for _ in range(_OBJECTS * _EVICTIONS):
            policy.evict(USUAL_BYTES, spared)
        assert set(policy.known) == spared

    def test_an_eviction_gets_past_protected_objects(self) -> None:
        """A long prompt protects every second object: soon another is named, wherever these stand."""
        for spared in (range(_OBJECTS // 2), range(_OBJECTS // 2, _OBJECTS), range(0, _OBJECTS, 2)):
            policy = _filled(self.made(), range(_OBJECTS))
            keys = {block_key(number) for number in spared}
            assert any(policy.evict(USUAL_BYTES, keys) for _ in range(_EVICTIONS)), (
                f"{_EVICTIONS} evictions in a row named no object: the core would go on without the policy"
            )

    def test_where_all_are_protected_none_is_named_and_the_call_ends(self) -> None:
        """Each is asked for once at most, so the time is bounded. Nothing is forgotten by that."""
        policy = _filled(self.made(), range(_OBJECTS))
        for _ in range(3):
            assert list(policy.evict(_CAPACITY_BYTES, set(policy.known))) == []
        policy.evict(policy.nbytes, ())
        assert not policy.known

    def test_a_removed_object_is_forgotten(self) -> None:
        """It is not named, and may come back."""
        policy = _filled(self.made(), range(_OBJECTS))
        for number in range(0, _OBJECTS, 2):
            policy.remove(block_key(number))
        policy.evict(policy.nbytes // 2, ())
        _filled(policy, range(0, _OBJECTS, 4))
        policy.evict(policy.nbytes, ())
        assert not policy.known

    def test_an_evicted_object_may_come_back(self) -> None:
        """Again and again, with another length."""
        policy, chance = self.made(), random.Random(2)
        for _ in range(20):
            numbers = chance.sample(range(2 * _OBJECTS), _OBJECTS)
            for number in numbers:
                if block_key(number) in policy.known:
                    policy.touch(block_key(number))
                elif policy.nbytes + USUAL_BYTES <= _CAPACITY_BYTES:
                    policy.insert(block_key(number), chance.randint(1, USUAL_BYTES))
            policy.evict(_CAPACITY_BYTES // 3, ())

    def test_admission_is_yes_or_no_and_changes_nothing(self) -> None:
        """An object that was asked for is not known by that."""
        policy = _filled(self.made(), range(_OBJECTS))
        for number in range(3 * _OBJECTS):
            policy.admits(block_key(_OBJECTS + number), USUAL_BYTES)
        policy.evict(policy.nbytes, ())
        assert list(policy.evict(1, ())) == []

    def test_an_empty_policy_names_none(self) -> None:
        """Also one that has become empty."""
        policy = self.made()
        assert list(policy.evict(USUAL_BYTES, ())) == []
        _filled(policy, [1]).remove(block_key(1))
        assert list(policy.evict(USUAL_BYTES, ())) == []

    def test_what_is_remembered_is_bounded_by_the_capacity(self) -> None:
        """New objects pass through a full tier, a hundred times its room: the memory does not grow.

        What Python allocates is counted, so a policy's own C code is not seen.
        """
        policy = self.bare()
        numbers = itertools.count()
        tracemalloc.start()
        try:
            _pass_through(policy, numbers, _WARM_ROUNDS)
            before_bytes = _allocated()
            _pass_through(policy, numbers, _ROUNDS)
            grown_bytes = _allocated() - before_bytes
        finally:
            tracemalloc.stop()
        assert grown_bytes < _GHOST_BYTES * _ROUNDS * _OBJECTS, (
            f"it has grown by {grown_bytes} bytes with {_ROUNDS * _OBJECTS} objects that are gone"
        )

    def test_more_than_there_is_frees_all(self) -> None:
        """An eviction of more bytes than all objects take names each, and ends."""
        policy = _filled(self.made(), range(_OBJECTS // 2))
        policy.evict(3 * _CAPACITY_BYTES, ())
        assert not policy.known, f"{len(policy.known)} objects are left"
        policy = _filled(self.made(), range(20))
        spared = {block_key(number) for number in range(5)}
        for _ in range(_EVICTIONS):
            policy.evict(3 * _CAPACITY_BYTES, spared)
        assert set(policy.known) == spared

    def test_a_tier_may_have_room_for_one_object(self) -> None:
        """Or for two: no part of the capacity may come to nothing."""
        for objects in (1, 2):
            policy = self.made(capacity_bytes=objects * USUAL_BYTES)
            for number in range(20):
                if len(policy.known) == objects and policy.admits(block_key(number), USUAL_BYTES):
                    policy.evict(USUAL_BYTES, ())
                if len(policy.known) < objects:
                    policy.insert(block_key(number), USUAL_BYTES)
                    policy.touch(block_key(number))
            policy.evict(objects * USUAL_BYTES, ())
            assert not policy.known

    def test_objects_may_be_much_shorter_than_usual(self) -> None:
        """Then there are many more of them than the capacity has room for of the usual length."""
        policy = self.made()
        numbers = range(20 * _OBJECTS)
        for number in numbers:
            policy.insert(block_key(number), USUAL_BYTES // 20)
        for number in numbers[::7]:
            policy.touch(block_key(number))
        for number in numbers[::11]:
            policy.remove(block_key(number))
        policy.evict(policy.nbytes, ())
        assert not policy.known, f"{len(policy.known)} objects are never named"

    def test_what_evict_gives_is_the_callers_own(self) -> None:
        """A sequence, also of none, that stays as it is."""
        policy = _filled(self.made(), range(_OBJECTS))
        given = [policy.evict(USUAL_BYTES, set(policy.known)), policy.evict(USUAL_BYTES, ())]
        kept = [list(victims) for victims in given]
        given.append(policy.evict(3 * USUAL_BYTES, ()))
        _filled(policy, range(_OBJECTS, _OBJECTS + 20))
        policy.evict(policy.nbytes, ())
        assert [list(victims) for victims in given[:2]] == kept, "what evict() gave has changed since"
        assert all(isinstance(victims, Sequence) for victims in given), f"{type(given[0])} is no sequence"

    def test_what_is_protected_is_asked_and_not_listed(self) -> None:
        """The core gives something that answers `in`, and no more; it is not changed."""
        policy = _filled(self.made(), range(_OBJECTS))
        spared = {block_key(number) for number in range(0, _OBJECTS, 3)}
        before = set(spared)
        for _ in range(20):
            policy.evict(USUAL_BYTES, spared)
        assert spared == before
        assert before <= set(policy.known)

    def test_policies_of_two_tiers_have_nothing_in_common(self) -> None:
        """Each tier has a policy of its own, and the same object may be in both."""
        first, second = self.made(), self.made()
        _filled(first, range(0, 40))
        _filled(second, range(20, 60))
        first.remove(block_key(25))
        second.evict(second.nbytes, ())
        assert not second.known
        first.evict(first.nbytes, ())
        assert not first.known

    def test_a_call_costs_the_same_at_any_number_of_objects(self) -> None:
        """Keys are compared and hashed a few times for each call, not once for each object that is known."""
        cost = Cost()
        policy = self.bare(capacity_bytes=MANY * USUAL_BYTES)
        keys = [counting(cost, number) for number in range(2 * MANY)]
        for key in keys[:MANY]:
            policy.insert(key, USUAL_BYTES)
        calls = Calls(policy, cost, keys)
        for name in ("touch", "remove", "insert", "admits", "evict"):
            each = calls.cost_of(name)
            assert each <= _MOST_COST, (
                f"{name}() of one of {MANY} objects compares or hashes keys {each:.0f} times"
            )

    def test_repr_is_one_line_at_any_time(self) -> None:
        """Also when it has many objects."""
        policy = _filled(self.made(), range(_OBJECTS))
        policy.evict(_CAPACITY_BYTES // 3, ())
        shown = repr(policy)
        assert "\n" not in shown
        assert len(shown) < _MOST_SHOWN, f"{len(shown)} characters: {shown[:100]}"

    def test_the_process_stays_as_it_was_and_nothing_is_printed(self) -> None:
        """No thread, no file, nothing of the engine's; the scheduling loop is its own."""
        self.bare()
        said = io.StringIO()
        before, open_before = process_state(), handles()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            policy = _filled(self.made(), range(_OBJECTS))
            policy.touch(block_key(1))
            policy.evict(_CAPACITY_BYTES // 3, ())
        assert changes(before, process_state()) == []
        assert handles() <= open_before, f"{handles() - open_before} files and threads more"
        assert not said.getvalue(), f"it printed {said.getvalue()[:200]!r}"

    def test_any_sequence_of_calls_keeps_the_contract(self) -> None:
        """Random programs; hypothesis prints the shortest that fails."""
        made = type("Machine", (_Machine,), {"suite": self})
        run_state_machine_as_test(made, settings=settings_of(self.programs, _STEPS))


def _filled(policy: PolicyOracle, numbers: Collection[int]) -> PolicyOracle:
    """Insert numbered objects; each is as long as its number says, and none longer than usual."""
    for number in numbers:
        policy.insert(block_key(number), 1 + number * 37 % USUAL_BYTES)
    return policy


def _pass_through(policy: EvictionPolicy, numbers: Any, rounds: int) -> None:
    """Store so many capacities of new objects in a tier, and use some of them once, as an engine does."""
    known: set[BlockKey] = set()
    for number in itertools.islice(numbers, rounds * _OBJECTS):
        key = block_key(number)
        if len(known) >= _OBJECTS:
            if not policy.admits(key, USUAL_BYTES):
                continue
            known -= set(policy.evict(USUAL_BYTES, ()))
        policy.insert(key, USUAL_BYTES)
        known.add(key)
        if number % 3 == 0:
            policy.touch(key)
    # The caller's own memory is none of the policy's.
    for key in known:
        policy.remove(key)


def _allocated() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]
