"""The conformance suite: what every tier must do, by its capabilities.

    from kvbm_core.testing.suite import TierSuite

    class TestShelf(TierSuite):
        backend = "shelf"

        def settings(self, folder):
            return {"path": str(folder), "capacity": "4MiB"}

Run it with pytest. Each test is named for the line of the contract that it proves. A test cannot be
overridden; one that a backend cannot pass is waived, with the reason, and must then fail:

    waivers = {"test_wake_is_called_when_there_is_something_to_poll": "the vendor's library has no callback"}
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.errors import QueueFullError, TierError, TierOpenError, TransitionError
from kvbm_core.testing._bound_tests import BoundTests, bytes_in
from kvbm_core.testing._call_tests import CallTests
from kvbm_core.testing._child import KilledChild
from kvbm_core.testing._machine import run_machine
from kvbm_core.testing._medium_tests import MediumTests
from kvbm_core.testing._needs import (
    asked,
    bounded,
    durable,
    filled,
    fleeting,
    kept_apart,
    lending,
    listing,
    needs,
    owned,
    shared,
    writable,
)
from kvbm_core.testing._place_tests import PlaceTests
from kvbm_core.testing._process_tests import ProcessTests
from kvbm_core.testing._rig import PATIENCE_S, Memory, Rig, key_of, lengths
from kvbm_core.testing._room import Room, count_of
from kvbm_core.testing._watch import Fastest, files_held, handles, returns
from kvbm_core.testing._whole import WholeSuite, insist_on_the_whole
from kvbm_core.tier import (
    CONTRACT_VERSION,
    PAGE_BYTES,
    Addressable,
    Backend,
    Capabilities,
    Op,
    Outcome,
    Reason,
    Tier,
)

__all__ = ["TierSuite", "needs"]

_OTHER_NAMESPACE: Final = b"another-namespac"
CALL_S: Final = 1.0
"""`submit`, `poll` and `discard` return long before."""
CLOSE_S: Final = 10.0
"""As long as the core waits for `close`."""


class TierSuite(CallTests, PlaceTests, BoundTests, MediumTests, ProcessTests, WholeSuite):
    """Subclass it, name a backend, give settings for a small tier, and run pytest."""

    backend: ClassVar[str | Backend]
    """The name of an entry point, or a `Backend`."""
    waivers: ClassVar[Mapping[str, str]] = {}
    """Tests that this backend cannot pass, and why. Each must fail, else the waiver is out of date."""
    members = frozenset({"backend", "settings", "waivers", "fill", "broken_medium", "max_bytes", "programs"})
    max_bytes: ClassVar[int] = 16 * 1024 + 96
    """Length of the longest object; not a multiple of a page, as in service. Others are shorter."""
    _capabilities: ClassVar[Capabilities]
    programs: ClassVar[int] = 60
    """Random programs that the last test runs. Each opens a tier: fewer where that takes long."""

    def settings(self, folder: Path) -> Mapping[str, Any]:
        """Give the settings as an operator would write them, for a tier of some dozen of the longest objects.

        Args:
            folder: Of the test's own, empty at its start.
        """
        raise NotImplementedError("write a method `settings`")

    def fill(self, folder: Path, namespace: Namespace, objects: Mapping[BlockKey, bytes]) -> None:
        """Put objects where a `read_only` tier finds them when it is opened. Not called for others.

        Args:
            folder: As in `settings`.
            namespace: 16 bytes; see `TierContext.namespace`.
            objects: Key to bytes.
        """
        raise NotImplementedError("write a method `fill`: the tier is read_only, so the suite cannot store")

    @pytest.fixture
    def rig(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
        """Give the test its tiers, and close them."""
        insist_on_the_whole(type(self))
        folders = [tmp_path / name for name in ("look", "tier")]
        for folder in folders:
            folder.mkdir()
        look, rig = (
            Rig(self.backend, self.settings, folder, self.max_bytes, self.fill) for folder in folders
        )
        what, having = getattr(request.function, "needs", ("", lambda capabilities: True))
        try:
            if not having(self._looked(look)):
                if request.function.__name__ in self.waivers:
                    pytest.fail(f"waived, but not run for a tier that is not {what}: remove the waiver")
                pytest.skip(f"left out: the tier is not {what}")
            yield rig
        finally:
            rig.close_all()

    def _looked(self, rig: Rig) -> Capabilities:
        """Say what the tiers can do; a class has one kind, and opening one may take long."""
        if "_capabilities" not in vars(type(self)):
            type(self)._capabilities = rig.capabilities()
        return type(self)._capabilities

    # The backend.

    def test_the_backend_is_what_the_core_expects(self, rig: Rig) -> None:
        """Its name is its entry point's, its contract ours, its tiers are tiers."""
        assert rig.backend.contract_version == CONTRACT_VERSION
        assert isinstance(self.backend, Backend) or rig.backend.name == self.backend
        tier = rig.open()
        assert isinstance(tier, Tier)
        assert isinstance(tier, Addressable) is tier.capabilities.addressable
        assert "\n" not in repr(tier)

    def test_check_accepts_what_can_be_opened_and_changes_nothing(self, rig: Rig) -> None:
        """See `Backend.check`."""
        before = _listing(rig.folder)
        rig.backend.check(rig.config())
        assert _listing(rig.folder) == before

    @bounded
    def test_charges_grow_with_the_length_and_cover_it(self, rig: Rig) -> None:
        """Of no bytes there is none; the longest object has room."""
        capabilities = rig.open().capabilities
        assert capabilities.unit_bytes >= 1
        assert capabilities.overhead_bytes >= 0
        sizes = sorted({0, *range(1, rig.max_bytes, 97), *lengths(rig.max_bytes)})
        charges = [capabilities.charge(nbytes) for nbytes in sizes]
        assert charges[0] == 0
        assert charges == sorted(charges), "a longer object takes less room"
        short = [nbytes for nbytes, charge in zip(sizes, charges, strict=True) if charge < nbytes]
        assert not short, f"objects of {short[:3]} bytes take less room than they have bytes"
        assert charges[-1] <= (capabilities.capacity_bytes or 0)

    # Storing and loading.

    @writable
    def test_a_stored_object_is_loaded_with_the_same_bytes(self, rig: Rig) -> None:
        """Every object has its own."""
        tier = rig.open()
        rig.must_store(tier, *range(12))
        rig.must_hold(tier, *reversed(range(12)))

    def test_objects_of_every_length_are_loaded_with_their_length(self, rig: Rig) -> None:
        """From one byte to the longest, around pages; into a region of the object's length, and a longer."""
        numbers = range(len(lengths(rig.max_bytes)))
        tier = rig.stocked(*numbers)
        for number in numbers:
            for nbytes in {rig.length(number), min(rig.length(number) + 1, rig.max_bytes), rig.max_bytes}:
                completion, memory = rig.load(tier, number, nbytes)
                assert completion.outcome is Outcome.DONE, (
                    f"{rig.length(number)} bytes are not loaded into {nbytes}: {completion}"
                )
                rig.must_be(number, memory, completion)

    def test_a_load_into_a_longer_region_fills_the_pages_of_the_object_alone(self, rig: Rig) -> None:
        """Behind them the region is as it was."""
        numbers = range(len(lengths(rig.max_bytes)))
        tier = rig.stocked(*numbers)
        for number in numbers:
            completion, memory = rig.load(tier, number)
            assert completion.outcome is Outcome.DONE, completion
            assert memory.untouched_behind(rig.length(number)), "bytes behind the object were written"

    def test_an_object_longer_than_the_region_completes_corrupt_and_stays(self, rig: Rig) -> None:
        """By one byte, by a page, by all but one; nothing is written behind the region's pages."""
        numbers = range(len(lengths(rig.max_bytes)))
        tier = rig.stocked(*numbers)
        for number in numbers:
            length = rig.length(number)
            for nbytes in sorted({length - 1, length - PAGE_BYTES, length // 2, 1} - {length}):
                if nbytes > 0:
                    completion, _ = rig.load(tier, number, nbytes)
                    assert (completion.outcome, completion.reason) == (Outcome.FAILED, Reason.CORRUPT), (
                        f"{length} bytes into a region of {nbytes}: {completion}"
                    )
        rig.must_hold(tier, *numbers)

    @writable
    def test_a_store_says_the_bytes_that_are_kept(self, rig: Rig) -> None:
        """`Completion.nbytes`, or 0 for all of them. Also of a key that is present."""
        tier = rig.open()
        for number in [*range(len(lengths(rig.max_bytes)))] * 2:
            [end] = rig.store(tier, number)
            assert end.outcome is Outcome.DONE, end
            assert end.nbytes in (0, rig.length(number)), (
                f"object {number} has {rig.length(number)} bytes: {end}"
            )

    @writable
    def test_each_ticket_completes_exactly_once(self, rig: Rig) -> None:
        """In any order, also when nothing is left to do."""
        tier = rig.open()
        rig.must_store(tier, *range(4))
        transfers = [
            rig.transfer(op, number, rig.memory(number)) for number in range(4) for op in (Op.LOAD, Op.STORE)
        ]
        transfers += [rig.transfer(Op.LOOKUP, number) for number in range(8)]
        transfers += [rig.transfer(Op.LOAD, number, rig.memory()) for number in range(20, 24)]
        rig.run(tier, transfers)
        for _ in range(50):
            assert list(tier.poll()) == []

    @writable
    def test_storing_a_present_key_completes_done_and_writes_nothing(self, rig: Rig) -> None:
        """Equal keys have equal bytes, so the second store has nothing to do."""
        tier = rig.open()
        rig.must_store(tier, 1)
        for content in (rig.memory(2), Memory(rig.length(1))):
            other = rig.transfer(Op.STORE, 1, content)
            assert rig.run(tier, [other])[other.ticket].outcome is Outcome.DONE
            rig.must_hold(tier, 1)

    @writable
    def test_a_second_store_of_a_key_completes_as_before_or_after_or_busy(self, rig: Rig) -> None:
        """Both in one batch."""
        tier = rig.open()
        twins = [rig.transfer(Op.STORE, 1, rig.memory(1)) for _ in range(2)]
        ends = [(c.outcome, c.reason) for c in rig.run(tier, twins).values()]
        assert (Outcome.DONE, Reason.NONE) in ends
        assert set(ends) <= {(Outcome.DONE, Reason.NONE), (Outcome.FAILED, Reason.BUSY)}
        rig.must_hold(tier, 1)

    @writable
    def test_a_load_beside_a_store_of_its_key_completes_as_before_or_after_or_busy(self, rig: Rig) -> None:
        """Never with half of the bytes."""
        tier = rig.open()
        for number in range(8):
            memory = rig.memory()
            store, load = (
                rig.transfer(Op.STORE, number, rig.memory(number)),
                rig.transfer(Op.LOAD, number, memory),
            )
            end = rig.run(tier, [store, load])[load.ticket]
            if end.outcome is Outcome.DONE:
                rig.must_be(number, memory, end)
            else:
                assert end.reason in (Reason.MISSING, Reason.BUSY)

    def test_loading_an_absent_key_completes_missing_and_leaves_the_region_as_it_was(self, rig: Rig) -> None:
        """Where nothing was stored, and beside what was."""
        rig.must_miss(rig.open(), 1)
        rig.close_all()
        rig.must_miss(rig.stocked(2), 1)

    def test_lookup_says_done_or_missing(self, rig: Rig) -> None:
        """A LOOKUP has no region. It may say the object's length, and no other."""
        tier = rig.stocked(1)
        lookup = rig.transfer(Op.LOOKUP, 1)
        end = rig.run(tier, [lookup])[lookup.ticket]
        assert end.outcome is Outcome.DONE
        assert end.nbytes in (0, rig.length(1))
        assert rig.lookup(tier, 2) is Outcome.MISSING

    @writable
    def test_nothing_outside_the_regions_pages_is_written(self, rig: Rig) -> None:
        """Neither by loads nor by stores."""
        tier = rig.open()
        numbers = range(len(lengths(rig.max_bytes)))
        memories = [rig.memory(number) for number in numbers]
        rig.run(tier, [rig.transfer(Op.STORE, at, memory) for at, memory in enumerate(memories)])
        rig.run(tier, [rig.transfer(Op.LOAD, at, memory) for at, memory in enumerate(memories)])
        assert all(memory.sound for memory in memories)

    @writable
    def test_a_store_reads_its_region_and_does_not_change_it(self, rig: Rig) -> None:
        """Other tiers may be reading the same region."""
        tier = rig.open()
        memories = [rig.memory(number) for number in range(4)]
        rig.run(tier, [rig.transfer(Op.STORE, at, memory) for at, memory in enumerate(memories)])
        assert [memory.read() for memory in memories] == [rig.content(number) for number in range(4)]

    @writable
    def test_a_region_is_not_used_after_its_completion(self, rig: Rig) -> None:
        """Stored bytes are the tier's own, and a loaded region stays as it was loaded."""
        tier = rig.open()
        memories = [rig.memory(number) for number in range(6)]
        rig.run(tier, [rig.transfer(Op.STORE, at, memory) for at, memory in enumerate(memories)])
        for memory in memories:
            memory.write(b"\x11" * memory.region.nbytes)
        rig.must_hold(tier, *range(6))
        rig.run(tier, [rig.transfer(Op.LOAD, at, memory) for at, memory in enumerate(memories)])
        for memory in memories:
            memory.write(b"\x22" * memory.region.nbytes)
        rig.must_hold(tier, *range(6))
        rig.close(tier)
        assert all(set(memory.read()) == {0x22} for memory in memories)

    @writable
    def test_keys_are_compared_whole(self, rig: Rig) -> None:
        """One bit anywhere makes another key; and any 32 bytes are one."""
        tier = rig.open()
        rig.must_store(tier, 1)
        near = [replace(rig.transfer(Op.LOOKUP, 1), key=_flipped(key_of(1), bit)) for bit in range(0, 256, 7)]
        taken = [end.ticket for end in rig.run(tier, near).values() if end.outcome is not Outcome.MISSING]
        assert not taken, f"{len(taken)} keys that differ in one bit are taken for the one that is stored"
        for key in (_flipped(key_of(1), 255), bytes(32), b"\xff" * 32, b"/../" * 8, b" \n" * 16):
            memory, into = rig.memory(2), rig.memory()
            store = replace(rig.transfer(Op.STORE, 2, memory), key=key)
            load = replace(rig.transfer(Op.LOAD, 2, into), key=key)
            assert rig.run(tier, [store])[store.ticket].outcome is Outcome.DONE, f"key {key!r}"
            rig.must_be(2, into, rig.run(tier, [load])[load.ticket])
            tier.discard([key])
            assert rig.run(tier, [load])[load.ticket].outcome is Outcome.MISSING, f"key {key!r}"
            rig.must_hold(tier, 1)

    @writable
    def test_any_bytes_are_an_object(self, rig: Rig) -> None:
        """Nothing but zeros, too; and equal bytes under two keys are two objects."""
        tier = rig.open()
        rig.set_length(rig.max_bytes, *range(6))
        for at, byte in enumerate((b"\0", b"\xff", b"\n")):
            memories = [Memory(rig.max_bytes, byte * rig.max_bytes) for _ in range(2)]
            twins = [rig.transfer(Op.STORE, 2 * at + twin, memory) for twin, memory in enumerate(memories)]
            rig.run(tier, twins)
            for forgotten in (2 * at + 1, 2 * at):
                for number in range(2 * at, forgotten + 1):
                    completion, memory = rig.load(tier, number)
                    assert completion.outcome is Outcome.DONE, f"object {number} of {byte!r}: {completion}"
                    assert memory.read() == byte * rig.max_bytes, f"object {number} is not all {byte!r}"
                tier.discard([key_of(forgotten)])

    def test_any_ticket_is_returned_as_it_was_given(self, rig: Rig) -> None:
        """Zero, one that needs 64 bits, and one that was used before."""
        tier = rig.open()
        for ticket in (0, 5, 5, 1 << 32, (1 << 32) + 5, (1 << 62) + 1, 0):
            lookup = replace(rig.transfer(Op.LOOKUP, 1), ticket=ticket)
            tier.submit([lookup])
            rig.wait(tier, [lookup])

    def test_batches_and_completions_are_the_callers_own(self, rig: Rig) -> None:
        """A list that was submitted may be used anew, and what `poll` gave stays as it is."""
        tier = rig.open()
        lookups = [rig.transfer(Op.LOOKUP, number) for number in range(tier.capabilities.queue_depth)]
        kept: list[tuple[Any, list[Any]]] = []
        expected = {transfer.ticket for transfer in lookups}
        batch = list(lookups)
        tier.submit(batch)
        batch.clear()
        for _ in rig.patience("not every lookup has completed"):
            got = tier.poll()
            kept.append((got, list(got)))
            expected -= {completion.ticket for completion in got}
            if not expected:
                break
        again = [rig.transfer(Op.LOOKUP, 1)]
        tier.submit(again)
        rig.wait(tier, again)
        assert all(list(got) == before for got, before in kept), "what poll gave has changed since"

    def test_all_calls_from_submit_on_may_come_from_another_thread(self, rig: Rig) -> None:
        """The core opens a tier in one thread and uses it in another, which closes it as well."""
        tier = rig.stocked(1, 2)
        rig.close(tier)
        tier = rig.open()
        list(tier.inventory())

        def use() -> None:
            if not tier.capabilities.read_only:
                rig.must_store(tier, 1, 2)
                tier.discard([key_of(2)])
            rig.must_hold(tier, 1)
            assert rig.lookup(tier, 3) is Outcome.MISSING
            rig.close(tier)

        rig.elsewhere(use)

    # Read-only.

    @filled
    def test_a_read_only_tier_serves_what_others_have_filled_in(self, rig: Rig) -> None:
        """And nothing else; where it lists its objects, these with their lengths."""
        numbers = range(len(lengths(rig.max_bytes)))
        tier = rig.stocked(*numbers)
        if not tier.capabilities.remote_lookup:
            assert dict(tier.inventory()) == {key_of(number): rig.length(number) for number in numbers}
        rig.must_hold(tier, *numbers)
        rig.must_miss(tier, len(numbers))

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

    # The queue.

    def test_as_many_transfers_as_the_queue_has_places_are_taken(self, rig: Rig) -> None:
        """All in one batch."""
        tier = rig.open()
        depth = tier.capabilities.queue_depth
        assert depth >= 1
        lookups = [rig.transfer(Op.LOOKUP, number) for number in range(depth)]
        tier.submit(lookups)
        rig.wait(tier, lookups)

    def test_a_batch_that_does_not_fit_the_queue_is_refused_whole(self, rig: Rig) -> None:
        """Nothing of it is started."""
        tier, memory = rig.open(), rig.memory(0)
        op = Op.LOAD if tier.capabilities.read_only else Op.STORE
        batch = [rig.transfer(op, number, memory) for number in range(tier.capabilities.queue_depth + 1)]
        with pytest.raises(QueueFullError):
            tier.submit(batch)
        assert {rig.lookup(tier, number) for number in range(len(batch))} == {Outcome.MISSING}
        assert list(tier.poll()) == []

    def test_a_place_is_taken_until_poll_has_returned_the_completion(self, rig: Rig) -> None:
        """Not only until the transfer has ended."""
        woken = threading.Event()
        tier = rig.open(wake=woken.set)
        full = [rig.transfer(Op.LOOKUP, number) for number in range(tier.capabilities.queue_depth)]
        tier.submit(full)
        assert woken.wait(PATIENCE_S), "no wake"
        with pytest.raises(QueueFullError):
            tier.submit([rig.transfer(Op.LOOKUP, 0)])
        rig.wait(tier, full)
        assert rig.lookup(tier, 0) is Outcome.MISSING

    def test_wake_is_called_when_there_is_something_to_poll(self, rig: Rig) -> None:
        """For every kind of transfer, also those that end at once."""
        woken = threading.Event()
        tier = rig.open(wake=woken.set)
        for op in (Op.LOOKUP, Op.LOAD) if tier.capabilities.read_only else (Op.STORE, Op.LOOKUP, Op.LOAD):
            woken.clear()
            transfer = rig.transfer(op, 1, None if op is Op.LOOKUP else rig.memory(1))
            tier.submit([transfer])
            assert woken.wait(PATIENCE_S), f"no wake for {op}"
            rig.wait(tier, [transfer])

    def test_wake_is_called_when_poll_has_something_and_without_a_lock(self, rig: Rig) -> None:
        """While a tier's thread is in `wake`, `poll` returns the completion and does not wait."""
        called, polled = threading.Event(), threading.Event()
        caller = threading.current_thread()
        held: list[str] = []

        def wake() -> None:
            called.set()
            if threading.current_thread() is not caller and not polled.wait(PATIENCE_S):
                held.append("`poll` waits for a lock that is held while `wake` is called")

        polled.set()
        tier = rig.open(wake=wake)
        op = Op.LOOKUP if tier.capabilities.read_only else Op.STORE
        for number in range(4):
            called.clear()
            polled.clear()
            transfer = rig.transfer(op, number, None if op is Op.LOOKUP else rig.memory(number))
            tier.submit([transfer])
            assert called.wait(PATIENCE_S), "no wake"
            got = list(tier.poll())
            polled.set()
            assert not held, held[0]
            assert [completion.ticket for completion in got] == [transfer.ticket], f"woken too early: {got}"

    # Time.

    def test_submit_poll_and_discard_do_not_wait(self, rig: Rig) -> None:
        """Not for the medium, nor for something to return. The fastest of several calls is what counts."""
        returns(lambda: _insist_on_speed(rig), PATIENCE_S)

    def test_close_returns(self, rig: Rig) -> None:
        """With transfers in flight, too. The core waits for ten seconds, and leaves the tier behind."""

        def use() -> None:
            fastest = Fastest()
            for _ in range(3):
                tier = rig.stocked(*range(4))
                tier.submit([rig.transfer(Op.LOAD, 0, rig.memory())])
                fastest.call("close", functools.partial(rig.close, tier))
                if not fastest.longer_than(CLOSE_S):
                    return
            raise AssertionError(f"`close` takes longer than {CLOSE_S} s every time")

        returns(use, PATIENCE_S)

    # From open to close.

    def test_close_ends_the_tiers_threads(self, rig: Rig) -> None:
        """And those it had for what was in flight."""
        before = set(threading.enumerate())
        tier = rig.stocked(*range(4))
        rig.must_hold(tier, *range(4))
        rig.close(tier)
        left = set(threading.enumerate()) - before
        for thread in left:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in left), f"left behind: {left}"

    def test_close_lets_go_of_files_and_memory(self, rig: Rig) -> None:
        """No file of its folder is open, mapped or locked; nothing grows with each tier that was opened."""
        counts = []
        for _ in range(4):
            tier = rig.stocked(1)
            rig.must_hold(tier, 1)
            rig.close(tier)
            counts.append(handles())
        give_up_s = time.monotonic() + PATIENCE_S
        while files_held(rig.folder) or handles() >= counts[0] + 3:  # What it left to others ends soon.
            assert time.monotonic() < give_up_s, (
                f"left open or mapped: {files_held(rig.folder)}; files and threads, tier by tier: {counts}"
            )
            gc.collect()
            time.sleep(0.01)

    @writable
    @durable
    def test_files_are_for_their_owner_alone(self, rig: Rig) -> None:
        """They hold people's prompts. A file may have any mode below a folder that is closed to others."""
        before = os.umask(0o022)
        try:
            tier = rig.open()
            rig.must_store(tier, 1)
            found = _readable_by_others(rig.folder)
            rig.close(tier)
        finally:
            os.umask(before)
        assert not found, f"others may read or write {found[:3]}: files need mode 0600, folders 0700"
        assert not _readable_by_others(rig.folder)

    @writable
    @owned
    def test_a_second_engine_in_the_same_place_is_refused(self, rig: Rig) -> None:
        """By `open`, unless the tier is `shared`. The first goes on, and after it the place is free."""
        tier = rig.open()
        rig.must_store(tier, 1)
        with pytest.raises(TierOpenError):
            rig.open()
        rig.must_hold(tier, 1)
        rig.must_store(tier, 2)
        rig.close(tier)
        rig.must_hold(rig.open(), 1, 2)

    def test_the_capabilities_are_the_same_from_open_to_close(self, rig: Rig) -> None:
        """And after it."""
        tier = rig.open()
        before = tier.capabilities
        if not before.read_only:
            rig.must_store(tier, 1)
        assert tier.capabilities == before
        rig.close(tier)
        assert tier.capabilities == before

    def test_a_new_tier_lists_nothing(self, rig: Rig) -> None:
        """And serves nothing."""
        tier = rig.open()
        assert list(tier.inventory()) == []
        rig.must_miss(tier, 1)

    def test_close_finishes_or_fails_what_is_in_flight_and_poll_returns_it(self, rig: Rig) -> None:
        """Each ticket still completes once."""
        tier = rig.open()
        count = min(tier.capabilities.queue_depth, 16)
        op = Op.LOAD if tier.capabilities.read_only else Op.STORE
        memories = [rig.memory(number) for number in range(count)]
        transfers = [rig.transfer(op, at, memory) for at, memory in enumerate(memories)]
        tier.submit(transfers)
        rig.close(tier)
        done = [completion.ticket for _ in range(3) for completion in tier.poll()]
        assert sorted(done) == sorted(transfer.ticket for transfer in transfers)

    def test_close_may_be_called_twice(self, rig: Rig) -> None:
        """The second does nothing."""
        tier = rig.stocked(1)
        tier.close()
        tier.close()
        assert list(tier.poll()) == []

    def test_submit_after_close_raises(self, rig: Rig) -> None:
        """`TierError`: nothing was started."""
        tier = rig.open()
        rig.close(tier)
        with pytest.raises(TierError):
            tier.submit([rig.transfer(Op.LOOKUP, 1)])

    # Over restarts.

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
        child = KilledChild(self.backend, rig.settings(), rig.max_bytes)
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
        child = KilledChild(self.backend, rig.settings(), rig.max_bytes)
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
        for max_bytes in (self.max_bytes - PAGE_BYTES, self.max_bytes - 1, self.max_bytes + PAGE_BYTES):
            tier = rig.open(max_bytes=max_bytes)
            for number in numbers:
                completion, memory = rig.load(tier, number, max_bytes)
                if completion.outcome is Outcome.DONE:
                    rig.must_be(number, memory, completion)
            rig.close(tier)

    # Beside other engines.

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
        wide = Rig(self.backend, self.settings, rig.folder, longest)
        tier, found = rig.open(max_bytes=longest), itertools.count()
        number = next(found)

        def look() -> None:
            nonlocal number
            completion, memory = wide.load(tier, number)
            if completion.outcome is Outcome.DONE:
                wide.must_be(number, memory, completion)
                number = next(found)
            assert completion.reason in (Reason.NONE, Reason.MISSING, Reason.BUSY), completion

        KilledChild(self.backend, rig.settings(), longest).acknowledged(count, meanwhile=look)

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

    # Lending.

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

    # All together.

    @writable
    def test_any_sequence_of_calls_agrees_with_the_memory_tier(self, rig: Rig) -> None:
        """Random programs; hypothesis prints the shortest that fails."""
        run_machine(rig, self.programs)


def _insist_on_speed(rig: Rig) -> None:
    tier, fastest = rig.stocked(1), Fastest()
    read_only = tier.capabilities.read_only
    for turn in range(5):
        fastest.call("poll of an idle tier", tier.poll)
        numbers = [] if read_only else [10 + 2 * turn, 11 + 2 * turn]
        batch = [rig.transfer(Op.STORE, number, rig.memory(number)) for number in numbers]
        batch = [rig.transfer(Op.LOAD, 1, rig.memory()), *batch][: tier.capabilities.queue_depth]
        fastest.call("submit", functools.partial(tier.submit, batch))
        early = {completion.ticket for completion in fastest.call("poll", tier.poll)}
        rig.wait(tier, [transfer for transfer in batch if transfer.ticket not in early])
        if not read_only:
            fastest.call("discard", functools.partial(tier.discard, [key_of(number) for number in numbers]))
        if not fastest.longer_than(CALL_S):
            break
    slow = fastest.longer_than(CALL_S)
    assert not slow, f"{slow} took longer than {CALL_S} s each time: hand the work to a thread"
    rig.close(tier)


def _readable_by_others(folder: Path) -> list[str]:
    """List what other users can read or write in a folder, as far as they can get into its own folders."""
    found = []
    for path in folder.iterdir():
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            if mode & 0o022:
                found.append(str(path))
            if mode & 0o011:
                found += _readable_by_others(path)
        elif stat.S_ISREG(mode) and mode & 0o066:
            found.append(str(path))
    return found


def _flipped(key: BlockKey, bit: int) -> BlockKey:
    return (int.from_bytes(key, "big") ^ (1 << bit)).to_bytes(32, "big")


def _listing(folder: Path) -> list[tuple[str, int]]:
    # Not the times of folders: whoever tries whether he may write there changes them.
    found = ((path, path.stat()) for path in folder.rglob("*"))
    return sorted((str(path), 0 if path.is_dir() else status.st_mtime_ns) for path, status in found)
