"""Tiers that are wrong on purpose in calls, settings, places and manners. See `broken_tiers`."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import msgspec
from broken_media import BROKEN
from broken_tiers import found_by
from sound_tiers import FolderTier, LendingTier, ReadOnlyFolder, SharedFolder

from kvbm_core.block import BlockKey
from kvbm_core.config import ByteSize
from kvbm_core.errors import QueueFullError, TierOpenError
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.tier import PAGE_BYTES, Completion, Op, Outcome, Reason, Region, TierContext, Transfer

__all__ = ["BROKEN"]

# Transfers.


@found_by("test_the_head_of_a_prompt_names_no_object")
class FilesByHead(MemoryTier):
    """Keeps objects in folders named for `Transfer.head`, and finds them only there."""

    def _run(self, transfer: Transfer) -> Completion:
        key = (
            hashlib.sha256((transfer.head or b"") + transfer.key).digest() if transfer.head else transfer.key
        )
        return super()._run(replace(transfer, key=key))


@found_by("test_a_deadline_is_on_the_clock_of_monotonic")
class LooksAtTheWallClock(MemoryTier):
    """Compares deadlines with the time of the day."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.deadline_s < time.time():
            return Completion(transfer.ticket, Outcome.FAILED, Reason.DEADLINE)
        return super()._run(transfer)


@found_by("test_loads_of_one_key_at_once_are_each_filled")
class FillsOneOfTwins(MemoryTier):
    """Reads an object once for a batch, into the first of its regions."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        self.read: set[BlockKey] = set()
        super().submit(transfers)

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.key in self.read:
            return Completion(transfer.ticket, Outcome.DONE, nbytes=len(self._objects[transfer.key]))
        if transfer.op is Op.LOAD and transfer.key in self._objects:
            self.read.add(transfer.key)
        return super()._run(transfer)


@found_by("test_asking_for_an_object_changes_nothing")
class FindsWhatItWasAskedFor(MemoryTier):
    """A question makes an entry, and the next finds it."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.asked: set[BlockKey] = set()

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOOKUP and transfer.key in self.asked:
            return Completion(transfer.ticket, Outcome.DONE)
        self.asked.add(transfer.key)
        return super()._run(transfer)


@found_by("test_a_batch_may_be_empty_and_is_not_changed")
class NeedsATransfer(MemoryTier):
    """Looks at the first of each batch."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        assert transfers[0].ticket >= 0
        super().submit(transfers)


@found_by("test_a_batch_may_be_empty_and_is_not_changed")
class SortsTheBatch(MemoryTier):
    """Puts the caller's list in the order of its medium."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        if isinstance(transfers, list):
            transfers.sort(key=lambda transfer: transfer.key)
        super().submit(transfers)


@found_by("test_a_batch_may_be_empty_and_is_not_changed")
class WantsAList(MemoryTier):
    """Joins a batch to a list of its own."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        super().submit([] + transfers)  # noqa: RUF005 - that is the fault


# Regions.


@found_by("test_a_region_may_lie_anywhere_in_its_owners_memory")
class ReadsTheOwner(MemoryTier):
    """Takes an object's bytes from the second page of what owns its memory."""

    def _run(self, transfer: Transfer) -> Completion:
        region = transfer.region
        if transfer.op is Op.STORE and region and isinstance(region.owner, mmap.mmap):
            nbytes = region.nbytes
            self._objects[transfer.key] = region.owner[PAGE_BYTES : PAGE_BYTES + nbytes]
            return Completion(transfer.ticket, Outcome.DONE, nbytes=nbytes)
        return super()._run(transfer)


@found_by("test_memory_is_let_go_of_after_the_completion")
class KeepsTransfers(MemoryTier):
    """Keeps every transfer that it was ever given."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.history: list[Transfer] = []

    def submit(self, transfers: Sequence[Transfer]) -> None:
        super().submit(transfers)
        self.history += transfers


@found_by("test_no_region_is_used_after_close")
class ReadsOnAfterClose(MemoryTier):
    """`close` fails what is in flight, and its thread goes on with it."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.flying: list[Transfer] = []

    def submit(self, transfers: Sequence[Transfer]) -> None:
        loads = [transfer for transfer in transfers if transfer.op is Op.LOAD]
        super().submit([transfer for transfer in transfers if transfer.op is not Op.LOAD])
        if loads:
            self.flying += loads
            threading.Thread(target=self.read, args=(loads, dict(self._objects)), daemon=True).start()

    def read(self, loads: Sequence[Transfer], objects: dict[BlockKey, bytes]) -> None:
        time.sleep(0.05)
        for load in loads:
            assert load.region is not None
            content = objects.get(load.key, b"")
            load.region.view()[: len(content)] = content

    def close(self) -> None:
        self._done += [Completion(load.ticket, Outcome.FAILED, Reason.DEADLINE) for load in self.flying]
        self.flying = []
        super().close()


@found_by("test_long_objects_are_kept_whole")
class CountsTo65535(MemoryTier):
    """Keeps an object's length in 16 bits."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        return replace(completion, nbytes=completion.nbytes & 0xFFFF)


# The queue.


@found_by("test_a_full_queue_of_loads_is_served")
class HasFewBuffers(MemoryTier):
    """Has staging memory for fewer loads than its queue has places."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        self.buffers = 16
        super().submit(transfers)

    def _run(self, transfer: Transfer) -> Completion:
        self.buffers -= transfer.op is Op.LOAD
        if self.buffers < 0:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, "no buffer")
        return super()._run(transfer)


@found_by("test_a_place_is_free_again_however_a_transfer_ended")
class LosesPlacesToMisses(MemoryTier):
    """Frees the place of a transfer when it was DONE."""

    taken: int = 0

    def submit(self, transfers: Sequence[Transfer]) -> None:
        if self.taken + len(transfers) > self.capabilities.queue_depth:
            raise QueueFullError("poll first")
        self.taken += len(transfers)
        super().submit(transfers)

    def poll(self) -> Sequence[Completion]:
        done = super().poll()
        self.taken -= sum(completion.outcome is Outcome.DONE for completion in done)
        return done


@found_by("test_every_completion_is_announced_by_a_wake")
class GivesOneAtATime(MemoryTier):
    """`poll` gives one completion, and nobody is woken for the rest."""

    def poll(self) -> Sequence[Completion]:
        done, self._done = self._done[:1], self._done[1:]
        return done


# Room.


@found_by("test_storing_a_present_key_takes_no_room_and_needs_none")
class CountsPresentAgain(MemoryTier):
    """Counts an object each time that it is stored."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE and transfer.key in self._objects and transfer.region:
            self._used_bytes += transfer.region.nbytes
        return super()._run(transfer)


@found_by("test_storing_a_present_key_takes_no_room_and_needs_none")
class LooksForRoomFirst(MemoryTier):
    """Says FULL before it sees that the object is there."""

    def _run(self, transfer: Transfer) -> Completion:
        region = transfer.region
        most = self._capabilities.capacity_bytes or 0
        if transfer.op is Op.STORE and region and self._used_bytes + region.nbytes > most:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.FULL)
        return super()._run(transfer)


@found_by("test_an_object_that_was_refused_can_be_stored_when_there_is_room")
class TakesRefusedForStored(MemoryTier):
    """Notes a key before it knows whether there is room."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.refused: set[BlockKey] = set()

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE and transfer.key in self.refused:
            return Completion(transfer.ticket, Outcome.DONE)
        completion = super()._run(transfer)
        if completion.reason is Reason.FULL:
            self.refused.add(transfer.key)
        return completion


@found_by("test_many_objects_are_discarded_at_once")
class BindsFewKeys(MemoryTier):
    """Writes all keys into one statement, which takes 999."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        if len(keys) > 999:
            raise RuntimeError("too many SQL variables")
        super().discard(keys)


# Lending.


@found_by("test_lent_memory_stays_where_it_is")
class MovesLentMemory(LendingTier):
    """Closes the gaps that discarded objects leave."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        super().discard(keys)
        for key, region in self.published.items():
            self.published[key] = self.take(region.nbytes)
            self.published[key].view()[:] = region.view()


@found_by("test_a_store_of_a_reserved_key_is_busy_and_the_reservation_stays")
class StoresOverAReservation(LendingTier):
    """Takes a store of a key that is reserved for its publication."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE and transfer.key in self.reserved and transfer.region:
            self.reserved[transfer.key].view()[:] = transfer.region.view()
            self.publish(transfer.key)
        return super()._run(transfer)


# Settings.


class LooseConfig(msgspec.Struct, frozen=True):
    """Takes any key."""

    capacity: ByteSize


@found_by("test_the_settings_are_of_a_type_that_refuses_unknown_keys", config_type=LooseConfig)
class TakesAnyKey(MemoryTier):
    """Does not say that a key is misspelled."""


class WideConfig(MemoryConfig, frozen=True):
    """Has a key for everything."""

    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    e: int = 0
    f: int = 0
    g: int = 0
    h: int = 0
    i: int = 0
    j: int = 0


@found_by("test_the_settings_are_of_a_type_that_refuses_unknown_keys", config_type=WideConfig)
class HasManyKeys(MemoryTier):
    """Has eleven keys."""


@found_by("test_the_backend_and_its_tiers_say_the_same", shared=False)
class SharesInSecret(SharedFolder):
    """Its backend does not say that its tiers are shared."""


@found_by("test_the_backend_and_its_tiers_say_the_same")
class SaysALot(MemoryTier):
    """Says how it works in two lines."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self._capabilities = replace(self._capabilities, detail="in memory\nand nowhere else")


@found_by("test_repr_is_one_line_at_any_time")
class ShowsItsConnection(MemoryTier):
    """Cannot be shown when it is closed."""

    def __repr__(self) -> str:
        if self._closed:
            raise AttributeError("connection")
        return super().__repr__()


@found_by("test_repr_is_one_line_at_any_time")
class ShowsItsQueue(MemoryTier):
    """Shows a line for each transfer in flight."""

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *map(repr, self._done)])


@found_by(
    "test_the_share_that_blocks_take_has_room_for_them", share_bytes=lambda blocks, nbytes: blocks * nbytes
)
class PromisesTooSmallAShare(FolderTier):
    """Forgets that files take whole blocks when it says what so many objects need."""


@found_by("test_the_shares_of_all_ranks_are_no_more_than_the_capacity")
class GivesAllToTheFirst(MemoryTier):
    """Divides the capacity among the ranks behind the first."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context if context.rank else replace(context, world_size=1))


# Places.


@found_by("test_tiers_in_two_places_have_nothing_in_common")
class HasOneTable(MemoryTier):
    """Keeps the objects of all its tiers in one table."""

    table: ClassVar[dict[BlockKey, bytes]] = {}

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self._objects = self.table


@found_by("test_namespaces_are_compared_whole")
class CutsNamespaces(FolderTier):
    """Names a folder for the first half of a namespace."""

    def place(self, path: Path) -> Path:
        return path / str(self.context.rank) / self.context.namespace[:8].hex()


@found_by("test_namespaces_are_compared_whole")
class TakesANamespaceForText(FolderTier):
    """Decodes a namespace, and leaves out what is no text."""

    def place(self, path: Path) -> Path:
        name = self.context.namespace.decode("ascii", "ignore").strip("\0/.")
        return path / str(self.context.rank) / f"n{name.lower().replace('/', '')[:12]}"


@found_by("test_what_strangers_put_beside_the_files_is_left_out")
class TripsOverStrangers(FolderTier):
    """Takes every file for one of its own."""

    def files(self) -> list[Path]:
        files = [file for file in self.folder.iterdir() if not file.suffix]
        return [file for file in files if bytes.fromhex(file.name)]


@found_by("test_what_strangers_put_beside_the_files_is_left_out")
class ListsEmptyFiles(FolderTier):
    """Takes an empty file for an object."""

    def files(self) -> list[Path]:
        return [file for file in self.folder.iterdir() if len(file.name) == 64]


@found_by("test_any_facts_are_taken")
class WantsPlainFacts(FolderTier):
    """Writes facts as ASCII."""

    def open(self) -> None:
        super().open()
        facts = json.dumps(dict(self.context.facts), ensure_ascii=False)
        (self.folder / "facts.json").write_text(facts, encoding="ascii")


@found_by("test_any_facts_are_taken")
class StartsAnewWithOtherFacts(FolderTier):
    """Takes other facts for another namespace."""

    def open(self) -> None:
        super().open()
        facts, file = json.dumps(dict(self.context.facts)), self.folder / "facts.json"
        if file.exists() and file.read_text() != facts:
            self.discard([key for key, _ in self.found])
        file.write_text(facts)


@found_by("test_a_refused_open_leaves_nothing_behind")
class LeavesARefusedOpen(FolderTier):
    """Opens its folder before it sees that its capacity is too small."""

    def open(self) -> None:
        super().open()
        if (self.capacity_bytes or 0) < self.context.max_bytes:
            self.close()
            os.open(self.folder, os.O_RDONLY)
            raise TierOpenError("capacity: it is too small; write more")


@found_by("test_a_refused_open_leaves_nothing_behind")
class KeepsTheLockOfARefusedOpen(FolderTier):
    """Does not give its lock up when it refuses to open."""

    def open(self) -> None:
        super().open()
        if (self.capacity_bytes or 0) < self.context.max_bytes:
            raise TierOpenError("capacity: it is too small; write more")


@found_by("test_a_read_only_tier_changes_nothing")
class TidiesAsAReader(ReadOnlyFolder):
    """Deletes what it cannot use, though others put it there."""

    def read(self, file: Path, region: Region, ticket: int) -> Completion:
        completion = super().read(file, region, ticket)
        if completion.reason is Reason.CORRUPT:
            file.unlink()
        return completion


@found_by("test_a_read_only_tier_changes_nothing")
class WritesAsAReader(ReadOnlyFolder):
    """Writes down that it was there."""

    def open(self) -> None:
        super().open()
        (self.folder / "last.used").write_text(str(time.time_ns()))


# Over restarts.


@found_by("test_what_is_stored_between_restarts_adds_up")
class WritesItsListOnce(FolderTier):
    """Writes its list of objects when there is none, and believes it from then on."""

    def files(self) -> list[Path]:
        names = self.folder / "names.txt"
        found = super().files()
        if names.exists():
            known = names.read_text().split()
            for file in found:
                if file.name not in known:
                    file.unlink()
            return [file for file in found if file.name in known]
        if found:
            names.write_text("\n".join(file.name for file in found))
        return found


@found_by("test_storing_what_was_there_before_a_restart_takes_no_room")
class CountsOldObjectsAnew(FolderTier):
    """Counts an object of before the restart once more when it is stored."""

    def open(self) -> None:
        super().open()
        self.old = {key for key, _ in self.found}

    def end(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE and transfer.key in self.old and transfer.region:
            self.old.remove(transfer.key)
            self.used_bytes += self.capabilities.charge(transfer.region.nbytes)
        return super().end(transfer)


# Beside other engines.


@found_by("test_what_another_engine_discards_is_missing_and_can_be_stored_again")
class MissesItAsAnError(SharedFolder):
    """Takes it for an error that an object that it has seen is gone."""

    seen: frozenset[BlockKey] = frozenset()

    def end(self, transfer: Transfer) -> Completion:
        completion = super().end(transfer)
        if completion.outcome is Outcome.DONE:
            self.seen |= {transfer.key}
        elif completion.outcome is Outcome.MISSING and transfer.key in self.seen:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, "the file is gone")
        return completion


@found_by("test_what_another_engine_discards_is_missing_and_can_be_stored_again")
class BelievesWhatItSaw(SharedFolder):
    """What was there once it never stores again."""

    seen: frozenset[BlockKey] = frozenset()

    def end(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE and transfer.key in self.seen:
            return Completion(transfer.ticket, Outcome.DONE)
        completion = super().end(transfer)
        if completion.outcome is Outcome.DONE:
            self.seen |= {transfer.key}
        return completion

    def discard(self, keys: Sequence[BlockKey]) -> None:
        super().discard(keys)
        self.seen -= set(keys)
