"""Tests of the bytes that a tier takes on its medium: a part of the suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from kvbm_core.testing._child import KilledChild
from kvbm_core.testing._needs import bounded, durable, fleeting, kept_apart, listing, writable
from kvbm_core.testing._rig import Rig, key_of
from kvbm_core.testing._room import count_of

__all__ = ["BoundTests", "bytes_in"]

_SLACK: Final = 1.1
_SLACK_BYTES: Final = 64 * 1024
"""A file system's own, and what a tier keeps beside its objects."""


def bytes_in(folder: Path) -> int:
    """Count the bytes that the files of a folder take on the disk."""
    return sum(512 * path.lstat().st_blocks for path in folder.rglob("*") if path.is_file())


class BoundTests:
    """A part of `TierSuite`."""

    @bounded
    @durable
    def test_what_is_discarded_makes_room_on_the_medium(self, rig: Rig) -> None:
        """A full tier whose objects are exchanged, again and again, does not grow."""
        full_bytes = _fill(rig)
        tier = rig.open()
        count = count_of(rig, tier)
        for turn in range(1, 4):
            tier.discard([key_of(number) for number in range((turn - 1) * count, turn * count)])
            rig.set_length(rig.max_bytes, *range(turn * count, (turn + 1) * count))
            rig.must_store(tier, *range(turn * count, (turn + 1) * count))
        rig.close(tier)
        _insist(rig, full_bytes, "the objects of a full tier were exchanged three times")

    @writable
    @kept_apart
    def test_what_is_discarded_is_gone_from_the_medium_and_stays_gone(self, rig: Rig) -> None:
        """When the tier has been closed. Without a bound its bytes are gone, too."""
        tier = rig.open()
        empty_bytes = bytes_in(rig.folder)
        numbers = range(8)
        rig.set_length(rig.max_bytes, *numbers)
        rig.must_store(tier, *numbers)
        full_bytes = bytes_in(rig.folder)
        tier.discard([key_of(number) for number in numbers])
        rig.close(tier)
        left_bytes = bytes_in(rig.folder)
        tier = rig.open()
        rig.must_miss(tier, *numbers)
        assert list(tier.inventory()) == []
        assert tier.capabilities.capacity_bytes is not None or left_bytes - empty_bytes <= full_bytes / 2, (
            f"all objects are discarded, and {left_bytes} of {full_bytes} bytes are still there"
        )

    @bounded
    @durable
    def test_other_namespaces_take_no_room_beside_the_capacity(self, rig: Rig) -> None:
        """Each engine that comes with another model fills the tier; the capacity is for all of them."""
        full_bytes = _fill(rig)
        for number in range(2):
            _fill(rig, namespace=b"model no. %6d" % number)
        _insist(rig, full_bytes, "three namespaces have used it, one after the other")

    @bounded
    @durable
    def test_ranks_that_are_gone_leave_nothing(self, rig: Rig) -> None:
        """A tier of three ranks, and then of one: the capacity is for all of them."""
        for rank in range(3):
            _fill(rig, rank=rank, world_size=3)
        before_bytes = bytes_in(rig.folder)
        _fill(rig)
        _insist(rig, before_bytes, "three ranks have used it before")

    @bounded
    @durable
    def test_short_objects_take_no_more_of_the_medium_than_their_charges(self, rig: Rig) -> None:
        """A file of one byte takes a block of the file system."""
        rig.close(rig.open())
        empty_bytes = bytes_in(rig.folder)
        tier = rig.open()
        charge = tier.capabilities.charge(1)
        numbers = range(1000, 1000 + min(200, (tier.capabilities.capacity_bytes or 0) // charge))
        rig.set_length(1, *numbers)
        rig.must_store(tier, *numbers)
        rig.close(tier)
        taken_bytes = bytes_in(rig.folder) - empty_bytes
        assert taken_bytes <= _SLACK * len(numbers) * charge + _SLACK_BYTES, (
            f"{len(numbers)} objects of a byte cost {len(numbers) * charge}, and take {taken_bytes} bytes"
        )

    @listing
    @bounded
    def test_what_a_kill_left_half_written_takes_no_room(self, rig: Rig) -> None:
        """Killed with a batch in flight, twice; then it is filled."""
        capabilities = rig.capabilities()
        most = (capabilities.capacity_bytes or 0) // capabilities.charge(rig.max_bytes)
        batch = min(8, capabilities.queue_depth, most // 3)
        for _ in range(2):
            KilledChild(rig.name, rig.settings(), rig.max_bytes).acknowledged(1, batch=batch, longest=True)
        tier = rig.open()
        tier.discard([key for key, _ in tier.inventory()])
        rig.close(tier)
        _fill(rig)
        _insist(rig, capabilities.capacity_bytes or 0, "it was killed twice with a batch in flight")

    @writable
    @fleeting
    def test_a_tier_that_is_not_durable_leaves_no_files(self, rig: Rig) -> None:
        """Nobody would find them again."""
        tier = rig.open()
        rig.must_store(tier, *range(8))
        rig.close(tier)
        left_bytes = bytes_in(rig.folder)
        assert left_bytes == 0, f"{left_bytes} bytes are left"


def _fill(rig: Rig, **context: Any) -> int:
    """Fill a tier with the longest objects; give the bytes that the folder then has."""
    tier = rig.open(**context)
    room = tier.capabilities.capacity_bytes or 0
    numbers = range(room // tier.capabilities.charge(rig.max_bytes))
    rig.set_length(rig.max_bytes, *numbers)
    rig.must_store(tier, *numbers)
    rig.close(tier)
    return bytes_in(rig.folder)


def _insist(rig: Rig, full_bytes: int, what: str) -> None:
    capacity_bytes = getattr(rig.config(), "capacity", 0)
    most_bytes = _SLACK * max(full_bytes, capacity_bytes) + _SLACK_BYTES
    found_bytes = bytes_in(rig.folder)
    assert found_bytes <= most_bytes, (
        f"{what}: files have {found_bytes} bytes, when it was full {full_bytes}, capacity {capacity_bytes}"
    )
