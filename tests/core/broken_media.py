"""Tiers that are wrong on purpose where their medium fails, and in what they leave. See `broken_tiers`."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from broken_habits import BROKEN
from broken_tiers import found_by
from sound_tiers import FolderConfig, FolderTier, SharedFolder

from kvbm_core.block import BlockKey
from kvbm_core.errors import TierOpenError
from kvbm_core.tier import Capabilities, Completion, Op, Outcome, Reason, Region, TierContext, Transfer

__all__ = ["BROKEN"]

# A medium that fails.


@found_by("test_an_error_of_the_medium_is_a_failure_and_no_miss")
class CallsAnErrorAMiss(FolderTier):
    """Takes whatever it cannot open for absent."""

    def end(self, transfer: Transfer) -> Completion:
        try:
            return super().end(transfer)
        except OSError:
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)


@found_by("test_an_error_of_the_medium_is_a_failure_and_no_miss")
class CallsAnErrorFull(FolderTier):
    """Says FULL for every error of its medium, also for that of a load."""

    def end(self, transfer: Transfer) -> Completion:
        try:
            return super().end(transfer)
        except OSError as error:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.FULL, str(error))


@found_by("test_each_ticket_completes_once_while_the_medium_fails")
class ReportsAnErrorTwice(FolderTier):
    """Completes a transfer where it fails, and once more at its end."""

    def end(self, transfer: Transfer) -> Completion:
        try:
            return super().end(transfer)
        except OSError as error:
            self.done.append(Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, str(error)))
            raise


@found_by("test_each_ticket_completes_once_while_the_medium_fails")
class ReportsNoError(FolderTier):
    """Never completes what its medium has failed."""

    def end(self, transfer: Transfer) -> Completion:
        try:
            return super().end(transfer)
        except OSError:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, "never said")

    def poll(self) -> Sequence[Completion]:
        return [completion for completion in super().poll() if completion.detail != "never said"]


@found_by("test_a_failure_says_why_in_one_line")
class DoesNotSayWhy(FolderTier):
    """Fails without a word."""

    def poll(self) -> Sequence[Completion]:
        return [replace(completion, detail="") for completion in super().poll()]


@found_by("test_a_failure_says_why_in_one_line")
class SaysATraceback(FolderTier):
    """Says why in twenty lines."""

    def end(self, transfer: Transfer) -> Completion:
        try:
            return super().end(transfer)
        except OSError:
            why = traceback.format_exc()
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, why)


@found_by("test_a_tier_works_again_when_its_medium_does")
class LosesItsThread(FolderTier):
    """An error of the medium ends its thread."""

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.jobs: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        super().submit([])
        for transfer in transfers:
            self.jobs.put(transfer)

    def work(self) -> None:
        with contextlib.suppress(OSError):
            while transfer := self.jobs.get():
                self.done.append(self.end(transfer))
                self.context.wake()

    def close(self) -> None:
        if not self.closed:
            self.jobs.put(None)
            self.thread.join()
        super().close()


@found_by("test_a_tier_works_again_when_its_medium_does")
class GivesUpForGood(FolderTier):
    """After an error it refuses everything until it is opened anew."""

    broken: bool = False

    def end(self, transfer: Transfer) -> Completion:
        if self.broken:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, "it was broken once")
        try:
            return super().end(transfer)
        except OSError:
            self.broken = True
            raise


@found_by("test_a_tier_works_again_when_its_medium_does")
class ForgetsWhatFailed(FolderTier):
    """Takes an object that could not be read for lost."""

    lost: frozenset[BlockKey] = frozenset()

    def end(self, transfer: Transfer) -> Completion:
        if transfer.key in self.lost:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.CORRUPT, "it could not be read")
        try:
            return super().end(transfer)
        except OSError:
            self.lost |= {transfer.key}
            raise


@found_by("test_a_store_that_failed_is_not_served_and_one_that_is_done_is")
class SwallowsErrors(FolderTier):
    """Says DONE though nothing was written."""

    def write(self, file: Path, region: Region) -> None:
        with contextlib.suppress(OSError):
            super().write(file, region)

    def end(self, transfer: Transfer) -> Completion:
        try:
            return super().end(transfer)
        except OSError as error:
            if transfer.op is Op.STORE:
                return Completion(transfer.ticket, Outcome.DONE)
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, str(error))


@found_by("test_a_store_that_is_cut_short_leaves_no_half")
class LeavesHalf(FolderTier):
    """Writes under an object's own name, and does not take it back when the disk is full."""

    def write(self, file: Path, region: Region) -> None:
        file.write_bytes(region.view())


@found_by("test_a_store_that_is_cut_short_leaves_no_half")
class BelievesInOneWrite(FolderTier):
    """Does not look how many bytes a write has taken."""

    def write(self, file: Path, region: Region) -> None:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, region.view())
        os.close(fd)


@found_by("test_a_store_that_failed_takes_no_room")
class CountsFailedStores(FolderTier):
    """Counts an object before it is written, and not back when that fails."""

    def write(self, file: Path, region: Region) -> None:
        try:
            super().write(file, region)
        except OSError:
            self.used_bytes += self.capabilities.charge(region.nbytes)
            raise


@found_by("test_a_tier_whose_medium_fails_can_be_closed")
class WritesAnIndexAtClose(FolderTier):
    """`close` raises where its index cannot be written."""

    def close(self) -> None:
        if not self.closed:
            (self.folder / "index.json").write_text("[]")
        super().close()


@found_by("test_a_medium_that_fails_is_said_in_a_few_lines")
class LogsEachFailure(FolderTier):
    """Writes a line for each transfer that fails."""

    def end(self, transfer: Transfer) -> Completion:
        try:
            return super().end(transfer)
        except OSError as error:
            logging.getLogger("broken").warning("ticket %d: %s", transfer.ticket, error)
            raise


@found_by("test_a_place_that_cannot_be_used_is_refused_with_a_tier_open_error")
class RaisesWhatItGets(FolderTier):
    """`open` raises the system's error."""

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        try:
            super().__init__(config, context)
        except TierOpenError as error:
            raise error.__cause__ or error from None


def _check(config: FolderConfig) -> None:
    for _ in Path(config.path).parent.iterdir():
        pass


@found_by("test_a_place_that_cannot_be_used_is_refused_with_a_tier_open_error", check=_check)
class ChecksInHaste(FolderTier):
    """`check` raises the system's error."""


@found_by("test_files_that_were_cut_cost_objects_and_nothing_else")
class FillsUpWithZeros(FolderTier):
    """Remembers how long each object is, and gives zeros for what its file has lost."""

    def write(self, file: Path, region: Region) -> None:
        super().write(file, region)
        file.with_suffix(".length").symlink_to(str(region.nbytes))

    def read(self, file: Path, region: Region, ticket: int) -> Completion:
        length = int(os.readlink(file.with_suffix(".length")))
        if length > region.nbytes:
            return Completion(ticket, Outcome.FAILED, Reason.CORRUPT)
        region.view()[:length] = file.read_bytes().ljust(length, b"\0")
        return Completion(ticket, Outcome.DONE, nbytes=length)

    def discard(self, keys: Sequence[BlockKey]) -> None:
        super().discard(keys)
        for key in keys:
            (self.folder / f"{key.hex()}.length").unlink(missing_ok=True)


@found_by("test_files_that_were_cut_cost_objects_and_nothing_else")
class TrustsItsHeader(FolderTier):
    """`open` raises an error of its own where a header is cut."""

    def open(self) -> None:
        super().open()
        header = self.folder / "header.bin"
        if header.exists():
            assert header.read_bytes() == b"version 1", "a bug"
        header.write_bytes(b"version 1")


# What is left on the medium.


@found_by("test_what_is_discarded_makes_room_on_the_medium")
class KeepsWhatIsDiscarded(FolderTier):
    """Forgets a discarded object, and leaves its file."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            file = self.folder / key.hex()
            if file.exists():
                self.used_bytes -= self.capabilities.charge(file.stat().st_size)
                file.rename(file.with_suffix(".gone"))


@found_by("test_what_is_discarded_is_gone_from_the_medium_and_stays_gone")
class DiscardsOnlyHere(SharedFolder):
    """Remembers what was discarded, until it is closed."""

    gone: frozenset[BlockKey] = frozenset()

    def discard(self, keys: Sequence[BlockKey]) -> None:
        self.gone |= set(keys)

    def end(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE:
            self.gone -= {transfer.key}
        if transfer.key in self.gone:
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        return super().end(transfer)


@found_by("test_what_is_discarded_is_gone_from_the_medium_and_stays_gone")
class HidesWhatIsDiscarded(SharedFolder):
    """Renames what is discarded, for ever."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            file = self.folder / key.hex()
            with contextlib.suppress(FileNotFoundError):
                file.rename(file.with_suffix(".gone"))


@found_by("test_other_namespaces_take_no_room_beside_the_capacity")
class KeepsOtherNamespaces(FolderTier):
    """Leaves what was stored with other models where it is."""

    def tidy(self) -> None:
        """Do nothing."""


@found_by("test_ranks_that_are_gone_leave_nothing")
class KeepsLostRanks(FolderTier):
    """Leaves the folders of ranks that there are no more."""

    def tidy(self) -> None:
        world_size = self.context.world_size
        self.context = replace(self.context, world_size=1 << 30)
        super().tidy()
        self.context = replace(self.context, world_size=world_size)


@found_by("test_short_objects_take_no_more_of_the_medium_than_their_charges")
class ChargesBytesForFiles(FolderTier):
    """Charges an object its bytes, though its file takes whole blocks."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, unit_bytes=1)


@found_by("test_what_a_kill_left_half_written_takes_no_room")
class LeavesParts(FolderTier):
    """Writes a whole batch under other names, renames one at each poll, and never looks for the rest."""

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.later: list[tuple[Transfer, Path, Path]] = []

    def tidy(self) -> None:
        """Do nothing."""

    def end(self, transfer: Transfer) -> Completion:
        file, region = self.folder / transfer.key.hex(), transfer.region
        if transfer.op is not Op.STORE or file.exists() or region is None:
            return super().end(transfer)
        if self.used_bytes + self.capabilities.charge(region.nbytes) > (self.capacity_bytes or 0):
            return Completion(transfer.ticket, Outcome.FAILED, Reason.FULL)
        self.used_bytes += self.capabilities.charge(region.nbytes)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(region.view())
        self.later.append((transfer, part, file))
        return Completion(-1, Outcome.DONE)

    def poll(self) -> Sequence[Completion]:
        done = [completion for completion in super().poll() if completion.ticket >= 0]
        for transfer, part, file in self.later[:1]:
            part.rename(file)
            done.append(Completion(transfer.ticket, Outcome.DONE))
        del self.later[:1]
        return done


@found_by("test_a_tier_that_is_not_durable_leaves_no_files")
class LeavesFilesForNobody(FolderTier):
    """Not durable: deletes old objects when it is opened, and not when it is closed."""

    durable = False

    def open(self) -> None:
        super().open()
        super().discard([key for key, _ in self.found])
        self.found = []


@found_by("test_after_a_kill_amid_discards_every_object_has_its_own_bytes")
class ReusesRoomTooSoon(FolderTier):
    """Gives the room of a discarded object to the next at once, and notes the discard at close."""

    def open(self) -> None:
        super().open()
        self.index = self.folder / "index.txt"
        self.slots: dict[BlockKey, tuple[int, int]] = {}
        for line in self.index.read_text().splitlines() if self.index.exists() else ():
            key, slot, nbytes = line.split()
            self.slots[bytes.fromhex(key)] = (int(slot), int(nbytes))
        self.free = sorted(set(range(1000)) - {slot for slot, _ in self.slots.values()}, reverse=True)

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        return [(key, nbytes) for key, (_, nbytes) in self.slots.items()]

    def end(self, transfer: Transfer) -> Completion:
        key, region = transfer.key, transfer.region
        if transfer.op is Op.STORE and key not in self.slots and region is not None:
            slot = self.free.pop()
            (self.folder / f"{slot}.slot").write_bytes(region.view())
            with self.index.open("a") as index:
                index.write(f"{key.hex()} {slot} {region.nbytes}\n")
            self.slots[key] = (slot, region.nbytes)
        if key not in self.slots:
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        slot, nbytes = self.slots[key]
        if transfer.op is Op.LOAD and region is not None:
            region.view()[:nbytes] = (self.folder / f"{slot}.slot").read_bytes().ljust(nbytes, b"\0")[:nbytes]
        return Completion(transfer.ticket, Outcome.DONE, nbytes=nbytes)

    def discard(self, keys: Sequence[BlockKey]) -> None:
        self.free += [self.slots.pop(key)[0] for key in keys if key in self.slots]

    def close(self) -> None:
        if not self.closed and self.slots:
            lines = [f"{key.hex()} {slot} {nbytes}\n" for key, (slot, nbytes) in self.slots.items()]
            self.index.write_text("".join(lines))
        super().close()
