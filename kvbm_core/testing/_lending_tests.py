"""Tests of memory that a tier lends: a part of the suite."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from kvbm_core.errors import TransitionError
from kvbm_core.testing._needs import lending
from kvbm_core.testing._rig import Rig, key_of, lengths
from kvbm_core.testing._room import count_of
from kvbm_core.tier import PAGE_BYTES, Outcome

__all__ = ["LendingTests"]


class LendingTests:
    """A part of `TierSuite`."""

    @lending
    def test_a_reserved_object_is_not_loadable_before_publish(self, rig: Rig) -> None:
        """Nor is it lent."""
        tier: Any = rig.open()
        for number in range(len(lengths(rig.max_bytes))):
            region = tier.reserve(key_of(number), rig.length(number))
            region.view()[:] = rig.content(number)
            assert tier.view(key_of(number)) is None
            assert rig.lookup(tier, number) is Outcome.MISSING
            rig.must_miss(tier, number)
            tier.publish(key_of(number))
            assert bytes(tier.view(key_of(number)).view()) == rig.content(number)
            rig.must_hold(tier, number)

    @lending
    def test_a_stored_object_is_lent_with_its_length(self, rig: Rig) -> None:
        """The region is as long as the object, not as its memory."""
        tier: Any = rig.open()
        numbers = range(len(lengths(rig.max_bytes)))
        rig.must_store(tier, *numbers)
        for number in numbers:
            assert bytes(tier.view(key_of(number)).view()) == rig.content(number)

    @lending
    def test_reserve_gives_none_for_a_known_key_or_without_room(self, rig: Rig) -> None:
        """Known: reserved, published or stored. Room: as the charges of all these say."""
        tier: Any = rig.open()
        rig.must_store(tier, 0)
        assert tier.reserve(key_of(0), rig.length(0)) is None
        charge = tier.capabilities.charge
        left = tier.capabilities.capacity_bytes - charge(rig.length(0))
        for number in range(1, 3 * count_of(rig, tier)):
            fits = charge(rig.length(number)) <= left
            assert (tier.reserve(key_of(number), rig.length(number)) is not None) is fits
            left -= charge(rig.length(number)) * fits
            assert not fits or tier.reserve(key_of(number), rig.length(number)) is None

    @lending
    def test_abandoned_and_discarded_memory_is_free_again(self, rig: Rig) -> None:
        """An abandoned object was never there."""
        tier: Any = rig.open()
        rounds = range(3 * count_of(rig, tier))
        rig.set_length(rig.max_bytes, *rounds)
        for number in rounds:
            assert tier.reserve(key_of(number), rig.length(number)) is not None
            tier.abandon(key_of(number))
            rig.must_miss(tier, number)
            assert tier.reserve(key_of(number), rig.length(number)) is not None
            tier.publish(key_of(number))
            tier.discard([key_of(number)])
            assert tier.view(key_of(number)) is None

    @lending
    def test_lent_regions_are_as_long_as_asked_and_own_their_pages(self, rig: Rig) -> None:
        """Each starts on a page; no two overlap, the padding included."""
        tier: Any = rig.open()
        numbers = range(count_of(rig, tier))
        regions = [tier.reserve(key_of(number), rig.length(number)) for number in numbers]
        assert [region.nbytes for region in regions] == [rig.length(number) for number in numbers]
        assert all(region.address % PAGE_BYTES == 0 for region in regions)
        regions.sort(key=lambda region: region.address)
        for low, high in itertools.pairwise(regions):
            owned_bytes = -(-low.nbytes // PAGE_BYTES) * PAGE_BYTES
            assert high.address - low.address >= owned_bytes

    @lending
    def test_publish_and_abandon_refuse_a_key_that_is_not_reserved(self, rig: Rig) -> None:
        """It would be a bug of the core."""
        tier: Any = rig.open()
        for call in (tier.publish, tier.abandon):
            with pytest.raises(TransitionError):
                call(key_of(1))
