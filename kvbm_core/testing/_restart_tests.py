"""Tests of what a restart, a kill and other settings leave: a part of the suite."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from kvbm_core.testing._bound_tests import bytes_in
from kvbm_core.testing._child import KilledChild
from kvbm_core.testing._needs import bounded, durable, fleeting, kept_apart, listing, writable
from kvbm_core.testing._rig import Rig, key_of, lengths
from kvbm_core.testing._room import Room, count_of
from kvbm_core.tier import PAGE_BYTES, Outcome

__all__ = ["RestartTests"]

_OTHER_NAMESPACE: Final = b"another-namespac"


class RestartTests:
    """A part of `TierSuite`."""

    @writable
    @fleeting
    def test_a_tier_that_is_not_durable_starts_empty(self, rig: Rig) -> None:
        """What it does not list it must not serve."""
        tier = rig.open()
        rig.must_store(tier, 1)
        rig.close(tier)
        tier = rig.open()
        assert list(tier.inventory()) == []
        rig.must_miss(tier, 1)

    @writable
    @durable
    def test_what_was_stored_is_served_after_a_restart(self, rig: Rig) -> None:
        """And what was not is not."""
        tier = rig.open()
        rig.must_store(tier, *range(9))
        rig.close(tier)
        tier = rig.open()
        rig.must_hold(tier, *range(9))
        rig.must_miss(tier, 9)

    @writable
    @durable
    def test_what_was_reported_stored_is_served_after_a_kill(self, rig: Rig) -> None:
        """`kill -9` of a process of its own, as soon as `poll` has returned: nothing is left to do then."""
        tier = rig.open()
        after = 8 if tier.capabilities.capacity_bytes is None else min(8, count_of(rig, tier) // 2)
        rig.close(tier)
        child = KilledChild(rig.name, rig.settings(), rig.max_bytes)
        stored = child.acknowledged(after)
        tier = rig.open()
        rig.must_hold(tier, *stored)
        # What was on its way may be there, whole, or not.
        completion, memory = rig.load(tier, len(stored))
        if completion.outcome is Outcome.DONE:
            rig.must_be(len(stored), memory, completion)

    @writable
    @durable
    def test_after_a_kill_with_a_batch_in_flight_only_whole_objects_are_there(self, rig: Rig) -> None:
        """What was reported stored is; what is listed can be loaded, and is as long as the list says."""
        tier = rig.open()
        batch, room = min(8, tier.capabilities.queue_depth), tier.capabilities.capacity_bytes
        if room is not None:
            batch = min(batch, count_of(rig, tier) // 3)
        rig.close(tier)
        child = KilledChild(rig.name, rig.settings(), rig.max_bytes)
        stored = child.acknowledged(batch + batch // 2, batch=batch)
        tier = rig.open()
        listed = dict(tier.inventory())
        rig.must_hold(tier, *stored)
        for number in range(4 * batch):
            completion, memory = rig.load(tier, number)
            if completion.outcome is Outcome.DONE:
                rig.must_be(number, memory, completion)
            if key_of(number) in listed:
                assert completion.outcome is Outcome.DONE, f"object {number} is listed: {completion}"
                assert listed[key_of(number)] == rig.length(number), f"object {number} is listed"

    @writable
    @listing
    def test_the_inventory_is_what_was_stored_and_not_discarded(self, rig: Rig) -> None:
        """Each key once, with its object's length."""
        tier = rig.open()
        for number in range(9):
            rig.must_store(tier, number)
        tier.discard([key_of(2), key_of(4)])
        rig.must_store(tier, 10)
        rig.close(tier)
        found = list(rig.open().inventory())
        left = (0, 1, 3, 5, 6, 7, 8, 10)
        assert sorted(found) == sorted((key_of(number), rig.length(number)) for number in left)

    @listing
    @bounded
    def test_the_capacity_holds_over_restarts(self, rig: Rig) -> None:
        """A full tier is full again, whatever the lengths."""
        tier = rig.open()
        count_of(rig, tier)
        room = Room(rig, tier)
        room.fill(1, rig.max_bytes)
        room.top_up()
        before = tier.capabilities
        rig.close(tier)
        tier = rig.open()
        # The detail is for people: a tier may choose another way of moving bytes each time.
        assert replace(tier.capabilities, detail=before.detail) == before
        assert dict(tier.inventory()) == {key_of(number): nbytes for number, nbytes in room.held.items()}
        room.reopened(tier)
        room.fill(1, rig.max_bytes)
        room.forget_some(0.3)
        room.fill(rig.max_bytes // 2, rig.max_bytes)
        room.top_up()
        room.check()

    @listing
    @bounded
    def test_a_smaller_capacity_at_reopen_is_kept(self, rig: Rig) -> None:
        """What is too much is gone, from the list and from the folder. Here each of two ranks has half."""
        tier = rig.open()
        count = count_of(rig, tier)
        rig.set_length(rig.max_bytes, *range(2 * count))
        rig.must_store(tier, *range(count))
        rig.close(tier)
        before_bytes = bytes_in(rig.folder)
        tier = rig.open(world_size=2)
        charge, room = tier.capabilities.charge, tier.capabilities.capacity_bytes or 0
        listed = dict(tier.inventory())
        used_bytes = sum(map(charge, listed.values()))
        assert used_bytes <= room, f"{len(listed)} objects take {used_bytes} of {room} bytes"
        rig.must_hold(tier, *(number for number in range(count) if key_of(number) in listed))
        rig.must_miss(tier, *(number for number in range(count) if key_of(number) not in listed))
        rig.store(tier, *range(count, 2 * count))
        rig.close(tier)
        after_bytes = bytes_in(rig.folder)
        assert after_bytes < 0.85 * before_bytes or before_bytes == 0, (
            f"half of the capacity, and the folder has {after_bytes} bytes of the {before_bytes} that it had"
        )

    @kept_apart
    def test_objects_of_another_namespace_are_neither_listed_nor_served(self, rig: Rig) -> None:
        """Though the keys are the same."""
        rig.close(rig.stocked(1))
        tier = rig.open(namespace=_OTHER_NAMESPACE)
        assert list(tier.inventory()) == []
        assert rig.lookup(tier, 1) is Outcome.MISSING
        rig.must_miss(tier, 1)

    @kept_apart
    def test_after_a_change_of_the_longest_length_only_whole_objects_are_loaded(self, rig: Rig) -> None:
        """What is longer than the region completes FAILED or MISSING; the rest may be gone, or is whole."""
        numbers = range(len(lengths(rig.max_bytes)))
        rig.close(rig.stocked(*numbers))
        for max_bytes in (rig.max_bytes - PAGE_BYTES, rig.max_bytes - 1, rig.max_bytes + PAGE_BYTES):
            tier = rig.open(max_bytes=max_bytes)
            for number in numbers:
                completion, memory = rig.load(tier, number, max_bytes)
                if completion.outcome is Outcome.DONE:
                    rig.must_be(number, memory, completion)
            rig.close(tier)
