"""Tests of the room that objects have, and of what is discarded: a part of the suite."""

from __future__ import annotations

from kvbm_core.errors import TierOpenError
from kvbm_core.testing._needs import bounded, writable
from kvbm_core.testing._rig import Rig, key_of, lengths
from kvbm_core.testing._room import Room, count_of
from kvbm_core.tier import Outcome, Reason

__all__ = ["RoomTests"]


class RoomTests:
    """A part of `TierSuite`."""

    # Forgetting.

    @writable
    def test_a_transfer_after_discard_does_not_see_the_object(self, rig: Rig) -> None:
        """Its neighbours stay."""
        tier = rig.open()
        rig.must_store(tier, 1, 2, 3)
        tier.discard([key_of(1), key_of(3)])
        assert rig.lookup(tier, 1) is Outcome.MISSING
        rig.must_miss(tier, 1, 3)
        rig.must_hold(tier, 2)

    @writable
    def test_discarding_an_absent_key_is_ignored(self, rig: Rig) -> None:
        """Also one that was discarded before."""
        tier = rig.open()
        tier.discard([])
        tier.discard([key_of(1)])
        rig.must_store(tier, 1)
        tier.discard([key_of(2), key_of(1)])
        tier.discard([key_of(1)])
        rig.must_miss(tier, 1)

    @writable
    def test_a_discarded_object_can_be_stored_again_at_once(self, rig: Rig) -> None:
        """Again and again, also with another length."""
        tier = rig.open()
        for nbytes in lengths(rig.max_bytes) * 2:
            rig.set_length(nbytes, 1)
            rig.must_store(tier, 1)
            rig.must_hold(tier, 1)
            tier.discard([key_of(1)])
        rig.must_miss(tier, 1)

    # Room.

    @bounded
    def test_as_many_objects_as_the_capacity_says_are_held_and_more_are_refused(self, rig: Rig) -> None:
        """An object too many ends FULL and costs no other."""
        tier = rig.open()
        numbers = range(count_of(rig, tier))
        more = (len(numbers), len(numbers) + 1)
        rig.set_length(rig.max_bytes, *numbers, *more)
        rig.must_store(tier, *numbers)
        for completion in rig.store(tier, *more):
            assert (completion.outcome, completion.reason) == (Outcome.FAILED, Reason.FULL)
        rig.must_miss(tier, len(numbers))
        rig.must_hold(tier, *numbers)

    @bounded
    def test_the_room_of_a_discarded_object_is_free_for_a_later_store(self, rig: Rig) -> None:
        """Round after round, so that nothing leaks."""
        tier = rig.open()
        count = count_of(rig, tier)
        rig.set_length(rig.max_bytes, *range(3 * count))
        rig.must_store(tier, *range(count))
        for number in range(count, 3 * count):
            tier.discard([key_of(number - count)])
            rig.must_store(tier, number)
        rig.must_hold(tier, *range(2 * count, 3 * count))

    @bounded
    def test_a_batch_that_straddles_the_limit_keeps_what_fits_and_refuses_the_rest(self, rig: Rig) -> None:
        """As if its stores had come one by one."""
        tier = rig.open()
        count, size = count_of(rig, tier), min(6, tier.capabilities.queue_depth)
        room, numbers = size // 2, range(count - size // 2, count - size // 2 + size)
        rig.set_length(rig.max_bytes, *range(numbers.stop))
        rig.must_store(tier, *range(numbers.start))
        ends = [(end.outcome, end.reason) for end in rig.store(tier, *numbers)]
        stored = [number for number, end in zip(numbers, ends, strict=True) if end[0] is Outcome.DONE]
        assert len(stored) == room, f"room for {room} of a batch of {size}: {ends}"
        assert set(ends) <= {(Outcome.DONE, Reason.NONE), (Outcome.FAILED, Reason.FULL)}
        rig.must_hold(tier, *range(numbers.start), *stored)
        rig.must_miss(tier, *(set(numbers) - set(stored)))

    @bounded
    def test_a_key_named_twice_in_one_discard_gives_its_room_back_once(self, rig: Rig) -> None:
        """Else the tier would hold more than its capacity."""
        tier = rig.open()
        count = count_of(rig, tier)
        rig.set_length(rig.max_bytes, *range(count + 3))
        rig.must_store(tier, *range(count))
        tier.discard([key_of(0)] * 3)
        rig.must_store(tier, count)
        for completion in rig.store(tier, count + 1, count + 2):
            assert (completion.outcome, completion.reason) == (Outcome.FAILED, Reason.FULL), completion

    @bounded
    def test_the_sum_of_the_charges_alone_decides_what_has_room(self, rig: Rig) -> None:
        """To the last byte, for any mix of lengths, in any order of stores and discards."""
        tier, longest = rig.open(), rig.max_bytes
        count_of(rig, tier)
        room = Room(rig, tier)
        room.fill(1, longest)
        room.top_up()
        room.forget(*list(room.held)[::2])  # Holes of all lengths, and longer objects into them.
        room.fill(longest * 3 // 4, longest)
        room.top_up()
        room.forget_some(0.7)
        room.fill(longest // 8, longest // 4)
        room.check()
        room.forget(*list(room.held)[::2])
        room.fill(longest, longest)
        room.check()
        room.forget_some(1)
        room.fill(longest, longest)
        assert len(room.held) == count_of(rig, tier)

    @bounded
    def test_the_capacity_is_for_all_ranks_together(self, rig: Rig) -> None:
        """A rank has its share of it."""
        tier = rig.open()
        count_of(rig, tier)
        whole = tier.capabilities.capacity_bytes
        rig.close_all()
        share = rig.open(rank=1, world_size=2).capabilities.capacity_bytes
        assert whole is not None
        assert share is not None
        assert 0 < share <= whole / 2

    @bounded
    def test_a_capacity_of_less_than_an_object_is_refused(self, rig: Rig) -> None:
        """By `open`, with the key in the message; or it has no room for the longest, and the core refuses."""
        refusal, room, charge = "", 0, 1
        try:
            capabilities = rig.open(world_size=1 << 20).capabilities
            room, charge = capabilities.capacity_bytes or 0, capabilities.charge(rig.max_bytes)
        except TierOpenError as error:
            refusal = str(error)
        assert room < charge
        assert not refusal or "capacity" in refusal

    @writable
    def test_ranks_do_not_see_each_others_objects(self, rig: Rig) -> None:
        """Each keeps its own part of every block under the same key."""
        first, second = rig.open(rank=0, world_size=2), rig.open(rank=1, world_size=2)
        rig.must_store(first, 1)
        rig.must_miss(second, 1)
