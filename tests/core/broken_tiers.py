"""Tiers that are wrong on purpose, each in one way, and the test of the suite that must find it.

A suite that passes everything proves nothing: this repository runs the named test on each of these
and insists that it fails. `FolderTier` and `LendingTier` are sound; the others are made from them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from sound_tiers import (
    FolderConfig,
    FolderTier,
    LendingTier,
    ReadOnlyFolder,
    SharedFolder,
    fill_folder,
)

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.config import ByteSize
from kvbm_core.errors import QueueFullError
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.tier import (
    PAGE_BYTES,
    Backend,
    Capabilities,
    Completion,
    Op,
    Outcome,
    Reason,
    Region,
    Tier,
    TierContext,
    Transfer,
)

__all__ = ["BROKEN", "SOUND", "BrokenTier", "FolderConfig", "FolderTier", "LendingTier", "found_by"]


@dataclass(frozen=True, slots=True)
class BrokenTier:
    """A backend that is wrong, and what must find it."""

    backend: Backend
    found_by: str
    """The name of a test of `TierSuite`."""
    fault: str
    """What is wrong with it, in a sentence."""

    def settings(self, folder: Path) -> Mapping[str, Any]:
        """Give the settings that the suite needs."""
        return _settings(self.backend, folder)


def _fill(folder: Path, namespace: Namespace, objects: Mapping[BlockKey, bytes]) -> None:
    fill_folder(folder / "kv", namespace, objects)


def _settings(backend: Backend, folder: Path) -> Mapping[str, Any]:
    path = {"path": str(folder / "kv")} if issubclass(backend.config_type, FolderConfig) else {}
    return {"capacity": "400KiB", **path}


BROKEN: Final[list[BrokenTier]] = []
"""One for each fault."""


def found_by(test: str, **members: Any) -> Callable[[type[Tier]], type[Tier]]:
    """Note a tier that is wrong, and what must find it; `members` are those of its `Backend`."""

    def add(made: type[Tier]) -> type[Tier]:
        config = FolderConfig if issubclass(made, FolderTier) else MemoryConfig
        said = {"config_type": config, "open": made, "shared": getattr(made, "shared", False), **members}
        BROKEN.append(BrokenTier(Backend(made.__name__.lower(), **said), test, made.__doc__ or ""))
        return made

    return add


# What goes wrong with one object.


@found_by("test_a_stored_object_is_loaded_with_the_same_bytes")
class LosesAStore(MemoryTier):
    """Says DONE and stores nothing, now and then."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE and transfer.ticket % 5 == 0:
            return Completion(transfer.ticket, Outcome.DONE)
        return super()._run(transfer)


@found_by("test_a_stored_object_is_loaded_with_the_same_bytes")
class MixesObjectsUp(MemoryTier):
    """Gives another key's bytes."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.key in self._objects:
            transfer = replace(transfer, key=next(iter(self._objects)))
        return super()._run(transfer)


@found_by("test_a_stored_object_is_loaded_with_the_same_bytes")
class ReadsHalf(MemoryTier):
    """Fills the first half of a region and says DONE."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.key in self._objects and transfer.region:
            content = self._objects[transfer.key]
            half = len(content) // 2
            transfer.region.view()[:half] = content[:half]
            return Completion(transfer.ticket, Outcome.DONE, nbytes=len(content))
        return super()._run(transfer)


@found_by("test_a_stored_object_is_loaded_with_the_same_bytes")
class FlipsABit(MemoryTier):
    """One bit of each load is wrong."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if transfer.op is Op.LOAD and completion.outcome is Outcome.DONE and transfer.region:
            transfer.region.view()[completion.nbytes - 1] ^= 1
        return completion


@found_by("test_objects_of_every_length_are_loaded_with_their_length")
class RoundsUp(MemoryTier):
    """Says the whole pages that it has read."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if transfer.op is Op.LOAD and completion.outcome is Outcome.DONE and transfer.region:
            pages_bytes = -(-completion.nbytes // PAGE_BYTES) * PAGE_BYTES
            return replace(completion, nbytes=min(pages_bytes, transfer.region.nbytes))
        return completion


@found_by("test_objects_of_every_length_are_loaded_with_their_length")
class SaysNoLength(MemoryTier):
    """Leaves it to the core to know how long an object is."""

    def _run(self, transfer: Transfer) -> Completion:
        return replace(super()._run(transfer), nbytes=0)


@found_by("test_objects_of_every_length_are_loaded_with_their_length")
class WantsTheLongest(MemoryTier):
    """Loads only into regions of the longest length, as when all objects had one."""

    def _run(self, transfer: Transfer) -> Completion:
        longest = self._context.max_bytes
        if transfer.op is Op.LOAD and transfer.region and transfer.region.nbytes != longest:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.CORRUPT)
        return super()._run(transfer)


@found_by("test_a_load_into_a_longer_region_fills_the_pages_of_the_object_alone")
class WipesTheRest(MemoryTier):
    """Fills the region behind the object with zeros."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if transfer.op is Op.LOAD and completion.outcome is Outcome.DONE and transfer.region:
            rest = transfer.region.view()[completion.nbytes :]
            rest[:] = bytes(len(rest))
        return completion


@found_by("test_an_object_longer_than_the_region_completes_corrupt_and_stays")
class CutsToTheRegion(MemoryTier):
    """Gives what fits of an object, and says DONE."""

    def _run(self, transfer: Transfer) -> Completion:
        content = self._objects.get(transfer.key, b"")
        if transfer.op is Op.LOAD and transfer.region and len(content) > transfer.region.nbytes:
            transfer.region.view()[:] = content[: transfer.region.nbytes]
            return Completion(transfer.ticket, Outcome.DONE, nbytes=transfer.region.nbytes)
        return super()._run(transfer)


@found_by("test_an_object_longer_than_the_region_completes_corrupt_and_stays")
class LooksTooLate(MemoryTier):
    """Compares lengths when the bytes are written."""

    def _run(self, transfer: Transfer) -> Completion:
        content = self._objects.get(transfer.key, b"")
        if transfer.op is Op.LOAD and transfer.region and content:
            pages_bytes = (-(-transfer.region.nbytes // PAGE_BYTES) + 1) * PAGE_BYTES
            ctypes.memmove(transfer.region.address, content, min(len(content), pages_bytes))
        return super()._run(transfer)


@found_by("test_an_object_longer_than_the_region_completes_corrupt_and_stays")
class DropsWhatDoesNotFit(MemoryTier):
    """Takes a short region for damage, and forgets the object without being told."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if completion.reason is Reason.CORRUPT:
            self.discard([transfer.key])
        return completion


@found_by("test_a_store_says_the_bytes_that_are_kept")
class SaysItsSlot(MemoryTier):
    """Says the longest length of every object that it has stored."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if transfer.op is Op.STORE and completion.outcome is Outcome.DONE:
            return replace(completion, nbytes=self._context.max_bytes)
        return completion


@found_by("test_storing_a_present_key_completes_done_and_writes_nothing")
class Overwrites(MemoryTier):
    """Writes the second store over the first."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE:
            self.discard([transfer.key])
        return super()._run(transfer)


class _Batches(MemoryTier):
    """Knows which keys are stored in the batch at hand."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        self.storing: set[BlockKey] = set()
        super().submit(transfers)

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE:
            self.storing.add(transfer.key)
        return super()._run(transfer)


@found_by("test_a_second_store_of_a_key_completes_as_before_or_after_or_busy")
class FailsTheSecondStore(_Batches):
    """Takes two stores of a key in one batch for an error."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE and transfer.key in self.storing:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR)
        return super()._run(transfer)


@found_by("test_a_load_beside_a_store_of_its_key_completes_as_before_or_after_or_busy")
class ReadsWhatIsBeingWritten(_Batches):
    """Gives the half that is written already."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.key in self.storing and transfer.region:
            content = self._objects[transfer.key]
            half = len(content) // 2
            transfer.region.view()[:half] = content[:half]
            return Completion(transfer.ticket, Outcome.DONE, nbytes=len(content))
        return super()._run(transfer)


@found_by("test_loading_an_absent_key_completes_missing_and_leaves_the_region_as_it_was")
class SaysDoneForNothing(MemoryTier):
    """A load of what is absent ends DONE."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.key not in self._objects:
            return Completion(transfer.ticket, Outcome.DONE)
        return super()._run(transfer)


@found_by("test_loading_an_absent_key_completes_missing_and_leaves_the_region_as_it_was")
class WipesOnAMiss(MemoryTier):
    """Touches the region although there is nothing to load."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.key not in self._objects and transfer.region:
            transfer.region.view()[:8] = bytes(8)
        return super()._run(transfer)


@found_by("test_lookup_says_done_or_missing")
class FindsEverything(MemoryTier):
    """Every lookup ends DONE."""

    def _run(self, transfer: Transfer) -> Completion:
        return (
            Completion(transfer.ticket, Outcome.DONE) if transfer.op is Op.LOOKUP else super()._run(transfer)
        )


@found_by("test_nothing_outside_the_regions_pages_is_written")
class WritesTooFar(MemoryTier):
    """Writes a page behind the region's own."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.region and transfer.key in self._objects:
            ctypes.memset(transfer.region.address + transfer.region.nbytes, 0, PAGE_BYTES)
        return super()._run(transfer)


@found_by("test_a_store_reads_its_region_and_does_not_change_it")
class ScribblesOnStores(MemoryTier):
    """Uses the region of a store as scratch memory."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if transfer.op is Op.STORE and transfer.region:
            transfer.region.view()[:1] = b"\0"
        return completion


@found_by("test_a_region_is_not_used_after_its_completion")
class KeepsReferences(MemoryTier):
    """Stores a reference to the region in place of its bytes."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if transfer.op is Op.STORE and transfer.region and completion.outcome is Outcome.DONE:
            self._objects[transfer.key] = cast("bytes", transfer.region.view())
        return completion


# Tickets, the queue, and calls.


@found_by("test_each_ticket_completes_exactly_once")
class AnswersTwice(MemoryTier):
    """Completes a ticket a second time, one poll later."""

    again: Sequence[Completion] = ()

    def poll(self) -> Sequence[Completion]:
        done = super().poll()
        out, self.again = [*done, *self.again], done[:1]
        return out


@found_by("test_each_ticket_completes_exactly_once")
class ForgetsATicket(MemoryTier):
    """Never completes the last of a batch."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        super().submit(transfers[:-1] if len(transfers) > 3 else transfers)


@found_by("test_a_batch_that_does_not_fit_the_queue_is_refused_whole")
class StartsAPart(MemoryTier):
    """Starts what fits of a batch, and refuses the rest."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        depth = self.capabilities.queue_depth
        super().submit(transfers[: depth - len(self._done)])
        if len(self._done) + len(transfers) > depth:
            raise QueueFullError("poll first")


@found_by("test_a_place_is_taken_until_poll_has_returned_the_completion")
class CountsNothing(MemoryTier):
    """Looks at each batch alone."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        before, self._done = self._done, []
        try:
            super().submit(transfers)
        finally:
            self._done = before + self._done


@found_by("test_as_many_transfers_as_the_queue_has_places_are_taken")
class PromisesTooLongAQueue(MemoryTier):
    """Takes fewer transfers than it says."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, queue_depth=1000)


@found_by("test_wake_is_called_when_there_is_something_to_poll")
class NeverWakes(MemoryTier):
    """The core would find out only by looking."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, replace(context, wake=lambda: None))


@found_by("test_close_finishes_or_fails_what_is_in_flight_and_poll_returns_it")
class ForgetsAtClose(MemoryTier):
    """What is in flight at close never completes."""

    def close(self) -> None:
        self._done = []
        super().close()


@found_by("test_close_may_be_called_twice")
class ClosesOnce(MemoryTier):
    """The second close raises."""

    def close(self) -> None:
        if self._closed:
            raise RuntimeError("closed already")
        super().close()


@found_by("test_submit_after_close_raises")
class WorksOnWhenClosed(MemoryTier):
    """Takes transfers after close."""

    def close(self) -> None:
        """Leave everything as it is."""


@found_by("test_the_capabilities_are_the_same_from_open_to_close")
class ChangesItsMind(MemoryTier):
    """Says the room that is left."""

    @property
    def capabilities(self) -> Capabilities:
        said = super().capabilities
        return replace(said, capacity_bytes=(said.capacity_bytes or 0) - self._used_bytes)


# Room.


@found_by("test_as_many_objects_as_the_capacity_says_are_held_and_more_are_refused")
class IgnoresItsCapacity(MemoryTier):
    """Takes whatever comes."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(MemoryConfig(capacity=ByteSize(1 << 40)), context)
        self._said = replace(self._capabilities, capacity_bytes=config.capacity // context.world_size)

    @property
    def capabilities(self) -> Capabilities:
        return self._said


@found_by("test_as_many_objects_as_the_capacity_says_are_held_and_more_are_refused")
class EvictsByItself(MemoryTier):
    """Makes room without being told, so that the core's index is wrong."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if completion.reason is Reason.FULL:
            self.discard([next(iter(self._objects))])
            return self._run(transfer)
        return completion


@found_by("test_the_room_of_a_discarded_object_is_free_for_a_later_store")
class LeaksRoom(MemoryTier):
    """What is discarded takes its room for ever."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        used_bytes = self._used_bytes
        super().discard(keys)
        self._used_bytes = used_bytes


@found_by("test_the_sum_of_the_charges_alone_decides_what_has_room")
class CountsObjects(MemoryTier):
    """Has room for so many objects, however short they are."""

    def _run(self, transfer: Transfer) -> Completion:
        most = (self._capabilities.capacity_bytes or 0) // self._context.max_bytes
        if transfer.op is Op.STORE and transfer.key not in self._objects and len(self._objects) >= most:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.FULL)
        return super()._run(transfer)


@found_by("test_the_sum_of_the_charges_alone_decides_what_has_room")
class TakesMoreThanItCharges(MemoryTier):
    """Says that an object takes a kilobyte beside its own bytes, and counts only these."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self._capabilities = replace(self._capabilities, overhead_bytes=1024)


@found_by("test_the_sum_of_the_charges_alone_decides_what_has_room")
class ReturnsTooLittleRoom(MemoryTier):
    """Gives back whole pages: of what short objects took, nothing."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            nbytes = len(self._objects.pop(key, b""))
            self._used_bytes -= nbytes // PAGE_BYTES * PAGE_BYTES


@found_by("test_the_sum_of_the_charges_alone_decides_what_has_room")
class FillsUpWithHoles(MemoryTier):
    """Wants neighbouring pages for each object, and says nothing of the holes between them."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        pages = (self._capabilities.capacity_bytes or 0) // PAGE_BYTES
        self._capabilities = replace(self._capabilities, unit_bytes=PAGE_BYTES)
        self._pages: list[BlockKey | None] = [None] * pages

    def _run(self, transfer: Transfer) -> Completion:
        region, key = transfer.region, transfer.key
        if transfer.op is Op.STORE and region and key not in self._objects:
            need = self._capabilities.charge(region.nbytes) // PAGE_BYTES
            starts = range(len(self._pages) - need + 1)
            start = next((at for at in starts if not any(self._pages[at : at + need])), None)
            if start is None:
                return Completion(transfer.ticket, Outcome.FAILED, Reason.FULL)
            self._pages[start : start + need] = [key] * need
        return super()._run(transfer)

    def discard(self, keys: Sequence[BlockKey]) -> None:
        super().discard(keys)
        self._pages = [None if key in keys else key for key in self._pages]


class _Generous(Capabilities):
    """Charges nothing for what is shorter than a page."""

    def charge(self, nbytes: int) -> int:
        return nbytes // PAGE_BYTES * PAGE_BYTES


class _Whimsical(Capabilities):
    """Charges more for a page than for a page and a byte."""

    def charge(self, nbytes: int) -> int:
        return nbytes + PAGE_BYTES * (nbytes == PAGE_BYTES)


@found_by("test_charges_grow_with_the_length_and_cover_it")
class ChargesTooLittle(MemoryTier):
    """Keeps short objects for nothing, by its word."""

    @property
    def capabilities(self) -> Capabilities:
        return _Generous(super().capabilities.capacity_bytes)


@found_by("test_charges_grow_with_the_length_and_cover_it")
class ChargesAtRandom(MemoryTier):
    """Takes more for a shorter object."""

    @property
    def capabilities(self) -> Capabilities:
        return _Whimsical(super().capabilities.capacity_bytes)


@found_by("test_the_capacity_is_for_all_ranks_together")
class TakesAllForEachRank(MemoryTier):
    """Every rank takes the whole capacity."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, replace(context, world_size=1))


@found_by("test_a_transfer_after_discard_does_not_see_the_object")
class NeverForgets(MemoryTier):
    """Ignores `discard`."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """Do nothing."""


@found_by("test_discarding_an_absent_key_is_ignored")
class InsistsOnDiscards(MemoryTier):
    """Raises for a key that it does not have."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            self._used_bytes -= len(self._objects.pop(key))


# Over restarts.


@found_by("test_what_was_stored_is_served_after_a_restart")
class OnlySaysItIsDurable(MemoryTier):
    """Has nothing after a restart."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, durable=True)


@found_by("test_what_was_reported_stored_is_served_after_a_kill")
class WritesAtClose(FolderTier):
    """Keeps objects in memory until it is closed."""

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        self.kept: dict[Path, bytes] = {}
        super().__init__(config, context)

    def end(self, transfer: Transfer) -> Completion:
        file = self.folder / transfer.key.hex()
        if transfer.op is Op.STORE and transfer.region and not file.exists():
            self.kept[file] = bytes(transfer.region.view())
            return Completion(transfer.ticket, Outcome.DONE)
        if transfer.op is Op.LOAD and transfer.region and file in self.kept:
            content = self.kept[file]
            transfer.region.view()[: len(content)] = content
            return Completion(transfer.ticket, Outcome.DONE, nbytes=len(content))
        return super().end(transfer)

    def close(self) -> None:
        for file, content in self.kept.items():
            file.write_bytes(content)
        super().close()


@found_by("test_after_a_change_of_the_longest_length_only_whole_objects_are_loaded")
class CutsToTheLongest(FolderTier):
    """Knows no object longer than the longest of today: it gives the beginning of it."""

    def read(self, file: Path, region: Region, ticket: int) -> Completion:
        content = file.read_bytes()[: self.context.max_bytes]
        if len(content) > region.nbytes:
            return Completion(ticket, Outcome.FAILED, Reason.CORRUPT)
        region.view()[: len(content)] = content
        return Completion(ticket, Outcome.DONE, nbytes=len(content))


@found_by("test_objects_of_another_namespace_are_neither_listed_nor_served")
class MixesNamespaces(FolderTier):
    """Keeps the objects of all models in one place."""

    def place(self, path: Path) -> Path:
        return path / str(self.context.rank) / "all"


@found_by("test_ranks_do_not_see_each_others_objects")
class MixesRanks(FolderTier):
    """Keeps the objects of all ranks in one place."""

    def place(self, path: Path) -> Path:
        return path / "all" / self.context.namespace.hex()

    def lock(self) -> int:
        return os.open(self.folder, os.O_RDONLY)


@found_by("test_the_inventory_is_what_was_stored_and_not_discarded")
class ListsWhatIsGone(FolderTier):
    """Remembers discarded objects in a list of its own."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            file = self.folder / key.hex()
            if file.exists():
                file.rename(file.with_suffix(".gone"))

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        gone = [(bytes.fromhex(file.stem), file.stat().st_size) for file in self.folder.glob("*.gone")]
        return [*self.found, *gone]


@found_by("test_the_inventory_is_what_was_stored_and_not_discarded")
class ListsTheRoomTheyTake(FolderTier):
    """Gives the charge of each object for its length."""

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        return [(key, self.capabilities.charge(nbytes)) for key, nbytes in self.found]


@found_by("test_the_capacity_holds_over_restarts")
class CountsFromZero(FolderTier):
    """Counts only what it has stored itself."""

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.used_bytes = 0


@found_by("test_a_tier_that_is_not_durable_starts_empty")
class RemembersSecretly(FolderTier):
    """Not durable by its word, and full of old objects."""

    durable = False


# Shared.


@found_by("test_one_engine_finds_what_another_stores")
class SeesOnlyItsOwn(SharedFolder):
    """Serves what it has stored itself."""

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.own = {bytes.fromhex(file.name) for file in self.files()}

    def end(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE:
            self.own.add(transfer.key)
        elif transfer.key not in self.own:
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        return super().end(transfer)


@found_by("test_engines_that_store_the_same_objects_at_once_do_no_harm")
class FailsWhereAnotherStores(SharedFolder):
    """Takes a file that another engine made a moment ago for an error."""

    def end(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE and (self.folder / transfer.key.hex()).exists():
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR)
        return super().end(transfer)


@found_by("test_a_tier_that_is_asked_lists_nothing")
class ListsAMillion(SharedFolder):
    """Lists a shared store at open."""

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        return [(bytes.fromhex(file.name), file.stat().st_size) for file in self.files()]


# Read-only.


@found_by("test_a_read_only_tier_serves_what_others_have_filled_in")
class LooksElsewhere(ReadOnlyFolder):
    """Has nothing of what others have put into its folder."""

    def place(self, path: Path) -> Path:
        return path / "own"


@found_by("test_a_read_only_tier_serves_what_others_have_filled_in")
class SkipsShortObjects(ReadOnlyFolder):
    """Takes a file that is shorter than a page for a torn one."""

    def files(self) -> list[Path]:
        return [file for file in super().files() if file.stat().st_size >= PAGE_BYTES]


# Lending.


@found_by("test_the_backend_is_what_the_core_expects")
class LendsInSecret(LendingTier):
    """Lends its memory and does not say so."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, addressable=False)


@found_by("test_a_reserved_object_is_not_loadable_before_publish")
class PublishesEarly(LendingTier):
    """A reserved object is there at once."""

    def view(self, key: BlockKey) -> Region | None:
        return self.reserved.get(key) or super().view(key)


@found_by("test_reserve_gives_none_for_a_known_key_or_without_room")
class ReservesTwice(LendingTier):
    """Gives memory for a key that it has."""

    def reserve(self, key: BlockKey, nbytes: int) -> Region | None:
        self.discard([key])
        return super().reserve(key, nbytes)


@found_by("test_reserve_gives_none_for_a_known_key_or_without_room")
class ReservesWithoutEnd(LendingTier):
    """Counts an object when it is published."""

    def reserve(self, key: BlockKey, nbytes: int) -> Region | None:
        used_bytes = self._used_bytes
        lent = super().reserve(key, nbytes)
        self._used_bytes = used_bytes
        return lent

    def publish(self, key: BlockKey) -> None:
        super().publish(key)
        self._used_bytes += self._capabilities.charge(self.published[key].nbytes)


@found_by("test_abandoned_and_discarded_memory_is_free_again")
class LosesAbandonedMemory(LendingTier):
    """Does not take memory back."""

    def abandon(self, key: BlockKey) -> None:
        used_bytes = self._used_bytes
        super().abandon(key)
        self._used_bytes = used_bytes


@found_by("test_lent_regions_are_as_long_as_asked_and_own_their_pages")
class LendsUnaligned(LendingTier):
    """Keeps a header before each object."""

    def take(self, nbytes: int) -> Region:
        return super().take(nbytes + 64).part(64, nbytes)


@found_by("test_lent_regions_are_as_long_as_asked_and_own_their_pages")
class LendsOverlapping(LendingTier):
    """Takes it that every object has one page."""

    arena: Region | None = None
    taken: int = 0

    def take(self, nbytes: int) -> Region:
        self.arena = self.arena or super().take(self._capabilities.capacity_bytes or 0)
        self.taken += 1
        return self.arena.part((self.taken - 1) * PAGE_BYTES, nbytes)


@found_by("test_lent_regions_are_as_long_as_asked_and_own_their_pages")
class LendsWholePages(LendingTier):
    """Its regions are as long as the pages that they own."""

    def take(self, nbytes: int) -> Region:
        return super().take(self._capabilities.charge(nbytes))


@found_by("test_a_stored_object_is_lent_with_its_length")
class LendsTheLongest(LendingTier):
    """Forgets how long an object is once it is published."""

    def view(self, key: BlockKey) -> Region | None:
        region = super().view(key)
        return region and replace(region, nbytes=self._capabilities.charge(region.nbytes))


@found_by("test_publish_and_abandon_refuse_a_key_that_is_not_reserved")
class PublishesAnything(LendingTier):
    """Takes a publish for what was never reserved."""

    def publish(self, key: BlockKey) -> None:
        if key in self.reserved:
            super().publish(key)


# What only a sequence of calls shows.


@found_by("test_any_sequence_of_calls_agrees_with_the_memory_tier")
class BreaksAfterSomeDiscards(MemoryTier):
    """Loses an object with every third discard."""

    discards: int = 0

    def discard(self, keys: Sequence[BlockKey]) -> None:
        super().discard(keys)
        self.discards += 1
        if self.discards % 3 == 0 and self._objects:
            super().discard([next(iter(self._objects))])


@found_by("test_any_sequence_of_calls_agrees_with_the_memory_tier")
class KeepsAnOldLength(MemoryTier):
    """Remembers how long an object was when its key was first stored."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.known: dict[BlockKey, int] = {}

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if completion.outcome is Outcome.DONE and transfer.op is Op.STORE:
            self.known.setdefault(transfer.key, completion.nbytes)
        return replace(completion, nbytes=self.known.get(transfer.key, 0))


SOUND: Final = [
    Backend("foldertier", FolderConfig, FolderTier),
    Backend("sharedfolder", FolderConfig, SharedFolder, shared=True),
    Backend("lendingtier", MemoryConfig, LendingTier),
    Backend("memorytier", MemoryConfig, MemoryTier),
    Backend("readonlyfolder", FolderConfig, ReadOnlyFolder),
]
"""What the broken ones are made from: these pass the whole suite."""
