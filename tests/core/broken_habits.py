"""More tiers that are wrong on purpose: faults that a tier has beside its bytes, see `broken_tiers`."""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from broken_tiers import BROKEN, found_by
from sound_tiers import FolderConfig, FolderTier, SharedFolder

__all__ = ["BROKEN"]

from kvbm_core.block import BlockKey
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.tier import PAGE_BYTES, Completion, Op, Outcome, Reason, Region, TierContext, Transfer

# Memory.


@found_by("test_an_object_longer_than_the_region_completes_corrupt_and_stays")
class WritesFromTheEnd(MemoryTier):
    """Writes the last page of an object first, and only then compares lengths."""

    def _run(self, transfer: Transfer) -> Completion:
        content = self._objects.get(transfer.key, b"")
        if transfer.op is Op.LOAD and transfer.region and content:
            last = (len(content) - 1) // PAGE_BYTES * PAGE_BYTES
            ctypes.memmove(transfer.region.address + last, content[last:], len(content) - last)
        return super()._run(transfer)


# Keys, tickets, lists.


class _ShortKeys(MemoryTier):
    def short(self, key: BlockKey) -> BlockKey:
        return key

    def _run(self, transfer: Transfer) -> Completion:
        return super()._run(replace(transfer, key=self.short(transfer.key)))

    def discard(self, keys: Sequence[BlockKey]) -> None:
        super().discard([self.short(key) for key in keys])


@found_by("test_keys_are_compared_whole")
class ComparesTheFirstHalf(_ShortKeys):
    """Names an object by the first bytes of its key."""

    def short(self, key: BlockKey) -> BlockKey:
        return key[:16]


@found_by("test_keys_are_compared_whole")
class ComparesTheSecondHalf(_ShortKeys):
    """Names an object by the last bytes of its key."""

    def short(self, key: BlockKey) -> BlockKey:
        return key[1:]


@found_by("test_keys_are_compared_whole")
class FoldsCase(_ShortKeys):
    """Takes a key for text."""

    def short(self, key: BlockKey) -> BlockKey:
        return key.lower()


@found_by("test_keys_are_compared_whole")
class RefusesAKeyOfZeros(MemoryTier):
    """Takes the key of zeros for an empty slot."""

    def _run(self, transfer: Transfer) -> Completion:
        if not any(transfer.key):
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        return super()._run(transfer)


@found_by("test_any_bytes_are_an_object")
class TakesZerosForAHole(MemoryTier):
    """Takes an object of zeros for one that was never written."""

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.LOAD and not any(self._objects.get(transfer.key, b"")):
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        return super()._run(transfer)


@found_by("test_any_bytes_are_an_object")
class ForgetsTwins(MemoryTier):
    """Keeps equal bytes once, and forgets them with the first of their keys."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        gone = [self._objects[key] for key in keys if key in self._objects]
        super().discard([key for key, content in self._objects.items() if content in gone])


@found_by("test_any_ticket_is_returned_as_it_was_given")
class CutsTickets(MemoryTier):
    """Keeps a ticket in 32 bits."""

    def _run(self, transfer: Transfer) -> Completion:
        completion = super()._run(transfer)
        return replace(completion, ticket=completion.ticket & 0xFFFFFFFF)


@found_by("test_any_ticket_is_returned_as_it_was_given")
class HasNoTicketZero(MemoryTier):
    """Takes the ticket 0 for none."""

    def poll(self) -> Sequence[Completion]:
        return [completion for completion in super().poll() if completion.ticket]


@found_by("test_any_ticket_is_returned_as_it_was_given")
class RemembersTickets(MemoryTier):
    """Takes a ticket that comes again for one that it has answered."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.answered: set[int] = set()

    def poll(self) -> Sequence[Completion]:
        done = [completion for completion in super().poll() if completion.ticket not in self.answered]
        self.answered.update(completion.ticket for completion in done)
        return done


@found_by("test_batches_and_completions_are_the_callers_own")
class KeepsTheBatch(MemoryTier):
    """Looks at the caller's list when it is polled."""

    later: Sequence[Transfer] = ()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        super().submit([])
        self.later = transfers

    def poll(self) -> Sequence[Completion]:
        later, self.later = self.later, ()
        return [self._run(transfer) for transfer in later]


@found_by("test_batches_and_completions_are_the_callers_own")
class GivesItsOwnList(MemoryTier):
    """Gives one list at every poll."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.given: list[Completion] = []

    def poll(self) -> Sequence[Completion]:
        self.given[:] = super().poll()
        return self.given


@found_by("test_all_calls_from_submit_on_may_come_from_another_thread")
class KnowsItsThread(MemoryTier):
    """Its connection belongs to the thread that opened it."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.opened_by = threading.get_ident()

    def _run(self, transfer: Transfer) -> Completion:
        if threading.get_ident() != self.opened_by:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, "another thread")
        return super()._run(transfer)


@found_by("test_all_calls_from_submit_on_may_come_from_another_thread")
class ClosesInItsThread(MemoryTier):
    """Only the thread that opened it may close it."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.opened_by = threading.get_ident()

    def close(self) -> None:
        if threading.get_ident() != self.opened_by:
            raise RuntimeError("another thread")
        super().close()


# Room.


@found_by("test_a_batch_that_straddles_the_limit_keeps_what_fits_and_refuses_the_rest")
class CountsABatchOnce(MemoryTier):
    """Looks for room before a batch, and takes all of it or nothing."""

    full: bool = False

    def submit(self, transfers: Sequence[Transfer]) -> None:
        new = sum(transfer.region.nbytes for transfer in transfers if transfer.op is Op.STORE)
        self.full = self._used_bytes + new > (self._capabilities.capacity_bytes or 0)
        super().submit(transfers)

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE and transfer.key not in self._objects and self.full:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.FULL)
        return super()._run(transfer)


@found_by("test_a_batch_that_straddles_the_limit_keeps_what_fits_and_refuses_the_rest")
class CountsAfterABatch(MemoryTier):
    """Counts what a batch has stored when it is over."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        self.before = self._used_bytes
        super().submit(transfers)
        self._used_bytes = sum(map(len, self._objects.values()))

    def _run(self, transfer: Transfer) -> Completion:
        self._used_bytes = self.before
        return super()._run(transfer)


@found_by("test_a_key_named_twice_in_one_discard_gives_its_room_back_once")
class GivesRoomBackTwice(MemoryTier):
    """Subtracts an object's bytes for each time that its key is named."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        known = {key: len(self._objects.get(key, b"")) for key in keys}
        super().discard(keys)
        self._used_bytes -= sum(known[key] for key in keys) - sum(known.values())


@found_by("test_a_smaller_capacity_at_reopen_is_kept")
class ListsTooMuch(FolderTier):
    """Lists what it has, however small its capacity has become."""

    def shrink(self) -> None:
        """Do nothing."""


@found_by("test_a_smaller_capacity_at_reopen_is_kept")
class LeavesItInTheFolder(FolderTier):
    """Forgets what is too much, and leaves the files."""

    def shrink(self) -> None:
        while self.used_bytes > (self.capacity_bytes or 0):
            key, nbytes = self.found.pop(0)
            (self.folder / key.hex()).rename(self.folder / f"{key.hex()}.old")
            self.used_bytes -= self.capabilities.charge(nbytes)


# Beside other engines.


@found_by("test_what_another_engine_stores_is_found_after_a_miss")
class RemembersMisses(SharedFolder):
    """What was absent once is absent for ever."""

    absent: frozenset[BlockKey] = frozenset()

    def end(self, transfer: Transfer) -> Completion:
        if transfer.op is not Op.STORE and transfer.key in self.absent:
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        completion = super().end(transfer)
        if completion.outcome is Outcome.MISSING:
            self.absent |= {transfer.key}
        return completion


# Time.


@found_by("test_submit_poll_and_discard_do_not_wait")
class SubmitWaits(MemoryTier):
    """Comes back from `submit` when the work is done."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        time.sleep(0.1)
        super().submit(transfers)


@found_by("test_submit_poll_and_discard_do_not_wait")
class PollWaits(MemoryTier):
    """Waits a while for something to return."""

    def poll(self) -> Sequence[Completion]:
        done = super().poll()
        if not done:
            time.sleep(0.1)
        return done


@found_by("test_submit_poll_and_discard_do_not_wait")
class PollHangs(MemoryTier):
    """Waits for ever for something to return."""

    def poll(self) -> Sequence[Completion]:
        return super().poll() or queue.SimpleQueue[Sequence[Completion]]().get()


@found_by("test_submit_poll_and_discard_do_not_wait")
class DiscardWaits(MemoryTier):
    """Flushes the medium before `discard` returns."""

    def discard(self, keys: Sequence[BlockKey]) -> None:
        time.sleep(0.1)
        super().discard(keys)


@found_by("test_close_returns")
class CloseWaits(MemoryTier):
    """Gives its medium time."""

    def close(self) -> None:
        if not self._closed:
            time.sleep(0.1)
        super().close()


@found_by("test_close_returns")
class CloseHangs(MemoryTier):
    """Waits for a thread that never ends."""

    hanging: bool = True

    def close(self) -> None:
        if self.hanging and self._objects:
            self.hanging = False
            queue.SimpleQueue[None]().get()
        super().close()


# Waking.


class _Threaded(MemoryTier):
    """Does its work in threads."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, replace(context, wake=lambda: None))
        self.wake = context.wake
        self.mutex = threading.Lock()
        self.inner: list[Completion] = []

    def submit(self, transfers: Sequence[Transfer]) -> None:
        threading.Thread(target=self.work, args=(list(transfers),), daemon=True).start()

    def work(self, transfers: Sequence[Transfer]) -> None:
        raise NotImplementedError

    def poll(self) -> Sequence[Completion]:
        with self.mutex:
            done, self.inner = self.inner, []
        return done


@found_by("test_wake_is_called_when_poll_has_something_and_without_a_lock")
class WakesUnderALock(_Threaded):
    """Calls `wake` while it holds the lock that `poll` takes."""

    def work(self, transfers: Sequence[Transfer]) -> None:
        with self.mutex:
            self.inner += [self._run(transfer) for transfer in transfers]
            self.wake()


@found_by("test_wake_is_called_when_poll_has_something_and_without_a_lock")
class WakesTooEarly(_Threaded):
    """Calls `wake` before `poll` can return anything, and then no more."""

    def work(self, transfers: Sequence[Transfer]) -> None:
        done = [self._run(transfer) for transfer in transfers]
        self.wake()
        with self.mutex:
            self.inner += done


# What is left behind.

_LEFT: list[object] = []


@found_by("test_close_lets_go_of_files_and_memory")
class LeavesAFileOpen(FolderTier):
    """Does not close its file."""

    def close(self) -> None:
        if not self.closed:
            _LEFT.append((self.folder / "left.open").open("w"))
        super().close()


@found_by("test_close_lets_go_of_files_and_memory")
class LeavesAMap(FolderTier):
    """Does not unmap its file."""

    def close(self) -> None:
        if not self.closed:
            with (self.folder / "left.map").open("w+b") as file:
                file.truncate(PAGE_BYTES)
                _LEFT.append(mmap.mmap(file.fileno(), PAGE_BYTES))
        super().close()


@found_by("test_close_lets_go_of_files_and_memory")
class LeavesAPipe(MemoryTier):
    """Does not close a pipe that it has made."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        os.pipe()


@found_by("test_files_are_for_their_owner_alone")
class OpenToAll(FolderTier):
    """Makes files and folders as the system would."""

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.folder.chmod(0o755)


@found_by("test_a_second_engine_in_the_same_place_is_refused")
class LetsASecondIn(FolderTier):
    """Knows nothing of other engines, though they would count its room twice."""

    def lock(self) -> int:
        return os.open(self.folder / "engine.lock", os.O_RDWR | os.O_CREAT, 0o600)

    def close(self) -> None:
        if self.lock_fd is not None:
            os.close(self.lock_fd)
            self.lock_fd = None
        super().close()


# Killed, or read, in the midst of it.


@found_by("test_what_was_reported_stored_is_served_after_a_kill")
class CommitsWithTheNextCall(FolderTier):
    """Says DONE, and writes what it has when it is called again."""

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.kept: dict[Path, bytes] = {}

    def commit(self) -> None:
        while self.kept:
            file, content = self.kept.popitem()
            file.write_bytes(content)

    def write(self, file: Path, region: Region) -> None:
        self.kept[file] = bytes(region.view())

    def end(self, transfer: Transfer) -> Completion:
        if transfer.op is not Op.STORE:
            self.commit()
        completion = super().end(transfer)
        if transfer.op is Op.STORE and completion.outcome is Outcome.MISSING:
            return Completion(transfer.ticket, Outcome.DONE)
        return completion

    def submit(self, transfers: Sequence[Transfer]) -> None:
        self.commit()
        super().submit(transfers)

    def close(self) -> None:
        self.commit()
        super().close()


@found_by("test_after_a_kill_with_a_batch_in_flight_only_whole_objects_are_there")
class ListsHalves(FolderTier):
    """Writes under an object's own name, and takes what it finds there for whole."""

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.later: list[Transfer] = []

    def submit(self, transfers: Sequence[Transfer]) -> None:
        super().submit([transfer for transfer in transfers if transfer.op is not Op.STORE])
        for transfer in transfers:
            if transfer.op is Op.STORE:
                content = bytes(transfer.region.view())
                (self.folder / transfer.key.hex()).write_bytes(content[: len(content) // 2])
                self.later.append(transfer)

    def poll(self) -> Sequence[Completion]:
        for transfer in self.later[:1]:
            (self.folder / transfer.key.hex()).write_bytes(transfer.region.view())
            self.done.append(Completion(transfer.ticket, Outcome.DONE))
        del self.later[:1]
        return super().poll()


@found_by("test_what_another_engine_is_storing_is_loaded_whole_or_not_at_all")
class WritesInPlace(SharedFolder):
    """Writes under an object's own name: whoever reads meanwhile has half of it."""

    def write(self, file: Path, region: Region) -> None:
        with file.open("wb", buffering=0) as out:
            out.write(region.view()[: region.nbytes // 2])
            time.sleep(0.002)
            out.write(region.view()[region.nbytes // 2 :])
