"""Tiers that are wrong on purpose, each in one way, and the test of the suite that must find it.

A suite that passes everything proves nothing: this repository runs the named test on each of these
and insists that it fails. `FolderTier` and `LendingTier` are sound; the others are made from them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from kvbm_core.block import BlockKey
from kvbm_core.config import ByteSize
from kvbm_core.errors import QueueFullError
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing._sound import FolderConfig, FolderTier, LendingTier, SharedFolder
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

__all__ = ["BROKEN", "SOUND", "BrokenTier", "FolderConfig", "FolderTier", "LendingTier"]


@dataclass(frozen=True, slots=True)
class BrokenTier:
    """A backend that is wrong, and what must find it."""

    backend: Backend
    found_by: str
    """The name of a test of `TierSuite`."""

    def settings(self, folder: Path) -> Mapping[str, Any]:
        """Give the settings that the suite needs."""
        return _settings(self.backend, folder)


def _settings(backend: Backend, folder: Path) -> Mapping[str, Any]:
    path = {"path": str(folder / "kv")} if backend.config_type is FolderConfig else {}
    return {"capacity": "400KiB", **path}


BROKEN: Final[list[BrokenTier]] = []
"""One for each fault."""


def _found_by(test: str) -> Callable[[type[Tier]], type[Tier]]:
    def add(made: type[Tier]) -> type[Tier]:
        config = FolderConfig if issubclass(made, FolderTier) else MemoryConfig
        BROKEN.append(BrokenTier(Backend(made.__name__.lower(), config, made), test))
        return made

    return add


# What goes wrong with one block.


@_found_by("test_a_stored_block_is_loaded_with_the_same_bytes")
class LosesAStore(MemoryTier):
    """Says DONE and stores nothing, now and then."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE and transfer.ticket % 5 == 0:
            return Completion(transfer.ticket, Outcome.DONE)
        return super()._run(transfer)


@_found_by("test_a_stored_block_is_loaded_with_the_same_bytes")
class MixesBlocksUp(MemoryTier):
    """Gives another key's bytes."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.key in self._blocks:
            transfer = replace(transfer, key=next(iter(self._blocks)))
        return super()._run(transfer)


@_found_by("test_a_stored_block_is_loaded_with_the_same_bytes")
class ReadsHalf(MemoryTier):
    """Fills the first half of a region and says DONE."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.key in self._blocks and transfer.region:
            half = transfer.region.nbytes // 2
            transfer.region.view()[:half] = self._blocks[transfer.key][:half]
            return Completion(transfer.ticket, Outcome.DONE)
        return super()._run(transfer)


@_found_by("test_a_stored_block_is_loaded_with_the_same_bytes")
class FlipsABit(MemoryTier):
    """One bit of each load is wrong."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if transfer.op is Op.LOAD and completion.outcome is Outcome.DONE and transfer.region:
            transfer.region.view()[-1] ^= 1
        return completion


@_found_by("test_storing_a_present_key_completes_done_and_writes_nothing")
class Overwrites(MemoryTier):
    """Writes the second store over the first."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE:
            self._blocks.pop(transfer.key, None)
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


@_found_by("test_a_second_store_of_a_key_completes_as_before_or_after_or_busy")
class FailsTheSecondStore(_Batches):
    """Takes two stores of a key in one batch for an error."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE and transfer.key in self.storing:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR)
        return super()._run(transfer)


@_found_by("test_a_load_beside_a_store_of_its_key_completes_as_before_or_after_or_busy")
class ReadsWhatIsBeingWritten(_Batches):
    """Gives the half that is written already."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.key in self.storing and transfer.region:
            half = transfer.region.nbytes // 2
            transfer.region.view()[:half] = self._blocks[transfer.key][:half]
            return Completion(transfer.ticket, Outcome.DONE)
        return super()._run(transfer)


@_found_by("test_loading_an_absent_key_completes_missing_and_leaves_the_region_as_it_was")
class SaysDoneForNothing(MemoryTier):
    """A load of what is absent ends DONE."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.key not in self._blocks:
            return Completion(transfer.ticket, Outcome.DONE)
        return super()._run(transfer)


@_found_by("test_loading_an_absent_key_completes_missing_and_leaves_the_region_as_it_was")
class WipesOnAMiss(MemoryTier):
    """Touches the region although there is nothing to load."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.key not in self._blocks and transfer.region:
            transfer.region.view()[:8] = bytes(8)
        return super()._run(transfer)


@_found_by("test_lookup_says_done_or_missing")
class FindsEverything(MemoryTier):
    """Every lookup ends DONE."""

    def _run(self, transfer: Transfer) -> Completion:
        return (
            Completion(transfer.ticket, Outcome.DONE) if transfer.op is Op.LOOKUP else super()._run(transfer)
        )


@_found_by("test_nothing_outside_the_regions_pages_is_written")
class WritesTooFar(MemoryTier):
    """Writes a page behind the region's own."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and transfer.region and transfer.key in self._blocks:
            ctypes.memset(transfer.region.address + transfer.region.nbytes, 0, PAGE_BYTES)
        return super()._run(transfer)


@_found_by("test_a_store_reads_its_region_and_does_not_change_it")
class ScribblesOnStores(MemoryTier):
    """Uses the region of a store as scratch memory."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if transfer.op is Op.STORE and transfer.region:
            transfer.region.view()[:4] = b"\0\0\0\0"
        return completion


@_found_by("test_a_region_is_not_used_after_its_completion")
class KeepsReferences(MemoryTier):
    """Stores a reference to the region in place of its bytes."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        if transfer.op is Op.STORE and transfer.region and completion.outcome is Outcome.DONE:
            self._blocks[transfer.key] = cast("bytes", transfer.region.view())
        return completion


# Tickets, the queue, and calls.


@_found_by("test_each_ticket_completes_exactly_once")
class AnswersTwice(MemoryTier):
    """Completes a ticket a second time, one poll later."""

    again: Sequence[Completion] = ()

    def poll(self) -> Sequence[Completion]:
        done = super().poll()
        out, self.again = [*done, *self.again], done[:1]
        return out


@_found_by("test_each_ticket_completes_exactly_once")
class ForgetsATicket(MemoryTier):
    """Never completes the last of a batch."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        super().submit(transfers[:-1] if len(transfers) > 3 else transfers)


@_found_by("test_a_batch_that_does_not_fit_the_queue_is_refused_whole")
class StartsAPart(MemoryTier):
    """Starts what fits of a batch, and refuses the rest."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        depth = self.capabilities.queue_depth
        super().submit(transfers[: depth - len(self._done)])
        if len(self._done) + len(transfers) > depth:
            raise QueueFullError("poll first")


@_found_by("test_a_place_is_taken_until_poll_has_returned_the_completion")
class CountsNothing(MemoryTier):
    """Looks at each batch alone."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        before, self._done = self._done, []
        try:
            super().submit(transfers)
        finally:
            self._done = before + self._done


@_found_by("test_as_many_transfers_as_the_queue_has_places_are_taken")
class PromisesTooLongAQueue(MemoryTier):
    """Takes fewer transfers than it says."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, queue_depth=1000)


@_found_by("test_wake_is_called_when_there_is_something_to_poll")
class NeverWakes(MemoryTier):
    """The core would find out only by looking."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, replace(context, wake=lambda: None))


@_found_by("test_close_finishes_or_fails_what_is_in_flight_and_poll_returns_it")
class ForgetsAtClose(MemoryTier):
    """What is in flight at close never completes."""

    def close(self) -> None:
        self._done = []
        super().close()


@_found_by("test_close_may_be_called_twice")
class ClosesOnce(MemoryTier):
    """The second close raises."""

    def close(self) -> None:
        if self._closed:
            raise RuntimeError("closed already")
        super().close()


@_found_by("test_submit_after_close_raises")
class WorksOnWhenClosed(MemoryTier):
    """Takes transfers after close."""

    def close(self) -> None:
        """Leave everything as it is."""


@_found_by("test_the_capabilities_are_the_same_from_open_to_close")
class ChangesItsMind(MemoryTier):
    """Says the room that is left."""

    @property
    def capabilities(self) -> Capabilities:
        said = super().capabilities
        return replace(said, capacity_blocks=(said.capacity_blocks or 0) - len(self._blocks))


# Room.


@_found_by("test_as_many_blocks_as_the_capacity_says_are_held_and_more_are_refused")
class IgnoresItsCapacity(MemoryTier):
    """Takes whatever comes."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(MemoryConfig(capacity=ByteSize(1 << 40)), context)
        self._said = replace(
            self._capabilities, capacity_blocks=config.capacity // context.world_size // context.block_bytes
        )

    @property
    def capabilities(self) -> Capabilities:
        return self._said


@_found_by("test_as_many_blocks_as_the_capacity_says_are_held_and_more_are_refused")
class EvictsByItself(MemoryTier):
    """Makes room without being told, so that the core's index is wrong."""

    def _run(self, transfer: Transfer) -> Completion:
        full = len(self._blocks) >= (self._capabilities.capacity_blocks or 0)
        if transfer.op is Op.STORE and transfer.key not in self._blocks and full:
            self._blocks.pop(next(iter(self._blocks)))
        return super()._run(transfer)


@_found_by("test_the_room_of_a_discarded_block_is_free_for_a_later_store")
class LeaksRoom(MemoryTier):
    """What is discarded takes its room for ever."""

    leaked: int = 0

    def discard(self, keys: Sequence[BlockKey]) -> None:
        self.leaked += sum(key in self._blocks for key in keys)
        super().discard(keys)

    def _run(self, transfer: Transfer) -> Completion:
        full = len(self._blocks) + self.leaked >= (self._capabilities.capacity_blocks or 0)
        if transfer.op is Op.STORE and transfer.key not in self._blocks and full:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.FULL)
        return super()._run(transfer)


@_found_by("test_the_capacity_is_for_all_ranks_together")
class TakesAllForEachRank(MemoryTier):
    """Every rank takes the whole capacity."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, replace(context, world_size=1))


@_found_by("test_a_transfer_after_discard_does_not_see_the_block")
class NeverForgets(MemoryTier):
    """Ignores `discard`."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """Do nothing."""


@_found_by("test_discarding_an_absent_key_is_ignored")
class InsistsOnDiscards(MemoryTier):
    """Raises for a key that it does not have."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            del self._blocks[key]


# Over restarts.


@_found_by("test_what_was_stored_is_served_after_a_restart")
class OnlySaysItIsDurable(MemoryTier):
    """Has nothing after a restart."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, durable=True)


@_found_by("test_what_was_reported_stored_is_served_after_a_kill")
class WritesAtClose(FolderTier):
    """Keeps blocks in memory until it is closed."""

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        self.kept: dict[Path, bytes] = {}
        super().__init__(config, context)

    def end(self, transfer: Transfer) -> tuple[Outcome, Reason]:
        file = self.folder / transfer.key.hex()
        if transfer.op is Op.STORE and transfer.region and not file.exists():
            self.kept[file] = bytes(transfer.region.view())
            return Outcome.DONE, Reason.NONE
        if transfer.op is Op.LOAD and transfer.region and file in self.kept:
            transfer.region.view()[:] = self.kept[file]
            return Outcome.DONE, Reason.NONE
        return super().end(transfer)

    def close(self) -> None:
        for file, content in self.kept.items():
            file.write_bytes(content)
        super().close()


@_found_by("test_a_block_of_another_length_is_not_loaded")
class ServesTornBlocks(FolderTier):
    """Does not look at a file's length."""

    def end(self, transfer: Transfer) -> tuple[Outcome, Reason]:
        file = self.folder / transfer.key.hex()
        if transfer.op is Op.LOAD and transfer.region and file.exists():
            content = file.read_bytes()[: transfer.region.nbytes]
            transfer.region.view()[: len(content)] = content
            return Outcome.DONE, Reason.NONE
        return super().end(transfer)


@_found_by("test_blocks_of_another_namespace_are_neither_listed_nor_served")
class MixesNamespaces(FolderTier):
    """Keeps the blocks of all models in one place."""

    def place(self, path: Path) -> Path:
        return path / str(self.context.rank)


@_found_by("test_ranks_do_not_see_each_others_blocks")
class MixesRanks(FolderTier):
    """Keeps the blocks of all ranks in one place."""

    def place(self, path: Path) -> Path:
        return path / self.context.namespace.hex()


@_found_by("test_the_inventory_is_what_was_stored_and_not_discarded")
class ListsWhatIsGone(FolderTier):
    """Remembers discarded blocks in a list of its own."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            file = self.folder / key.hex()
            if file.exists():
                file.rename(file.with_suffix(".gone"))

    def inventory(self) -> Iterable[BlockKey]:
        gone = [bytes.fromhex(file.stem) for file in self.folder.glob("*.gone")]
        return [*self.found, *gone]


@_found_by("test_the_capacity_holds_over_restarts")
class CountsFromZero(FolderTier):
    """Counts only what it has stored itself."""

    stored: int = 0

    def end(self, transfer: Transfer) -> tuple[Outcome, Reason]:
        if transfer.op is Op.STORE and transfer.region:
            file = self.folder / transfer.key.hex()
            if not file.exists() and self.stored < (self.capacity_blocks or 0):
                self.stored += 1
                self.write(file, transfer.region)
                return Outcome.DONE, Reason.NONE
        return super().end(transfer)


@_found_by("test_a_tier_that_is_not_durable_starts_empty")
class RemembersSecretly(FolderTier):
    """Not durable by its word, and full of old blocks."""

    durable = False


# Shared.


@_found_by("test_one_engine_finds_what_another_stores")
class SeesOnlyItsOwn(SharedFolder):
    """Serves what it has stored itself."""

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.own = {bytes.fromhex(file.name) for file in self.files()}

    def end(self, transfer: Transfer) -> tuple[Outcome, Reason]:
        if transfer.op is Op.STORE:
            self.own.add(transfer.key)
        elif transfer.key not in self.own:
            return Outcome.MISSING, Reason.MISSING
        return super().end(transfer)


@_found_by("test_engines_that_store_the_same_blocks_at_once_do_no_harm")
class FailsWhereAnotherStores(SharedFolder):
    """Takes a file that another engine made a moment ago for an error."""

    def end(self, transfer: Transfer) -> tuple[Outcome, Reason]:
        if transfer.op is Op.STORE and (self.folder / transfer.key.hex()).exists():
            return Outcome.FAILED, Reason.ERROR
        return super().end(transfer)


@_found_by("test_a_tier_that_is_asked_lists_nothing")
class ListsAMillion(SharedFolder):
    """Lists a shared store at open."""

    def inventory(self) -> Iterable[BlockKey]:
        return [bytes.fromhex(file.name) for file in self.files()]


# Lending.


@_found_by("test_the_backend_is_what_the_core_expects")
class LendsInSecret(LendingTier):
    """Lends its memory and does not say so."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, addressable=False)


@_found_by("test_a_reserved_block_is_not_loadable_before_publish")
class PublishesEarly(LendingTier):
    """A reserved block is there at once."""

    def view(self, key: BlockKey) -> Region | None:
        return self.region(self.reserved[key]) if key in self.reserved else super().view(key)


@_found_by("test_reserve_gives_none_for_a_known_key_or_without_room")
class ReservesTwice(LendingTier):
    """Gives memory for a key that it has."""

    def reserve(self, key: BlockKey) -> Region | None:
        self.discard([key])
        return super().reserve(key)


@_found_by("test_abandoned_and_discarded_memory_is_free_again")
class LosesAbandonedMemory(LendingTier):
    """Does not take memory back."""

    def abandon(self, key: BlockKey) -> None:
        super().abandon(key)
        self.free.pop()


@_found_by("test_lent_regions_start_on_pages_and_own_them_whole")
class LendsUnaligned(LendingTier):
    """Packs blocks without regard to pages."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        base = min(self.free)
        self.free = [base + at * context.block_bytes for at in range(len(self.free))]


@_found_by("test_publish_and_abandon_refuse_a_key_that_is_not_reserved")
class PublishesAnything(LendingTier):
    """Takes a publish for what was never reserved."""

    def publish(self, key: BlockKey) -> None:
        if key in self.reserved:
            super().publish(key)


# What only a sequence of calls shows.


@_found_by("test_any_sequence_of_calls_agrees_with_the_memory_tier")
class BreaksAfterSomeDiscards(MemoryTier):
    """Loses a block with every third discard."""

    discards: int = 0

    def discard(self, keys: Sequence[BlockKey]) -> None:
        super().discard(keys)
        self.discards += 1
        if self.discards % 3 == 0 and self._blocks:
            self._blocks.pop(next(iter(self._blocks)))


SOUND: Final = [
    Backend("foldertier", FolderConfig, FolderTier),
    Backend("sharedfolder", FolderConfig, SharedFolder),
    Backend("lendingtier", MemoryConfig, LendingTier),
    Backend("memorytier", MemoryConfig, MemoryTier),
]
"""What the broken ones are made from: these pass the whole suite."""
