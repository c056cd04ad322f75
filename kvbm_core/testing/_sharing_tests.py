"""Tests of tiers beside those of other engines: a part of the suite."""

from __future__ import annotations

import itertools

from kvbm_core.testing._child import KilledChild
from kvbm_core.testing._needs import asked, shared, writable
from kvbm_core.testing._rig import Rig
from kvbm_core.tier import Op, Outcome, Reason

__all__ = ["SharingTests"]


class SharingTests:
    """A part of `TierSuite`."""

    @writable
    @shared
    def test_one_engine_finds_what_another_stores(self, rig: Rig) -> None:
        """While both are open."""
        first, second = rig.open(), rig.open()
        rig.must_store(first, 1)
        rig.must_hold(second, 1)
        assert rig.lookup(second, 1) is Outcome.DONE

    @writable
    @shared
    def test_what_another_engine_stores_is_found_after_a_miss(self, rig: Rig) -> None:
        """A tier may remember for a while that a key was absent, and not for ever."""
        first, second = rig.open(), rig.open()
        for number in (1, 2):
            rig.must_miss(second, number)
            assert rig.lookup(second, number) is Outcome.MISSING
        rig.must_store(first, 1, 2)
        for _ in rig.patience("a key that was absent once is never found"):
            ends = [rig.lookup(second, 1), rig.load(second, 2)[0].outcome]
            if ends == [Outcome.DONE, Outcome.DONE]:
                break
        rig.must_hold(second, 1, 2)

    @writable
    @shared
    def test_what_another_engine_is_storing_is_loaded_whole_or_not_at_all(self, rig: Rig) -> None:
        """Asked for again and again while a process stores it: MISSING, BUSY or all of its bytes."""
        free = rig.capabilities().capacity_bytes is None
        longest, count = (16 * rig.max_bytes, 60) if free else (rig.max_bytes, 8)
        wide = rig.another(max_bytes=longest)
        tier, found = rig.open(max_bytes=longest), itertools.count()
        number = next(found)

        def look() -> None:
            nonlocal number
            completion, memory = wide.load(tier, number)
            if completion.outcome is Outcome.DONE:
                wide.must_be(number, memory, completion)
                number = next(found)
            assert completion.reason in (Reason.NONE, Reason.MISSING, Reason.BUSY), completion

        KilledChild(rig.name, rig.settings(), longest).acknowledged(count, meanwhile=look)

    @writable
    @shared
    def test_engines_that_store_the_same_objects_at_once_do_no_harm(self, rig: Rig) -> None:
        """Each reads whole objects at every moment."""
        tiers = [rig.open() for _ in range(2)]
        for number in range(9):
            stores = [rig.transfer(Op.STORE, number, rig.memory(number)) for _ in tiers]
            for tier, store in zip(tiers, stores, strict=True):
                tier.submit([store])
            for tier, store in zip(tiers, stores, strict=True):
                assert rig.wait(tier, [store])[store.ticket].outcome is Outcome.DONE
            for tier in tiers:
                rig.must_hold(tier, number)

    @asked
    def test_a_tier_that_is_asked_lists_nothing(self, rig: Rig) -> None:
        """And keeps its own bound."""
        rig.close(rig.stocked(1))
        tier = rig.open()
        assert list(tier.inventory()) == []
        assert tier.capabilities.capacity_bytes is None
        assert rig.lookup(tier, 1) is Outcome.DONE
