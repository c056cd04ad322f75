"""The writing half of a tier: batches for the keeper, and what becomes of them when it dies."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.config import size_text
from kvbm_core.tier import Completion, Outcome, Reason, TierContext, Transfer
from kvbm_lmdb._directory import OVERHEAD_BYTES, Sizing, slot_bytes
from kvbm_lmdb._link import Fault, KeeperError, Link, Window
from kvbm_lmdb._messages import Commit, Committed, Sync, Synced
from kvbm_lmdb._place import nbytes_of

__all__ = ["Writing", "charge"]

_ERASE_RETRY_S: Final = 1.0
"""Erasures for which a disk had no room are tried again after this."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What is asked of the keeper in one transaction."""

    erase: list[BlockKey]
    stores: list[Transfer]


_NOTHING: Final = _Batch([], [])
_BEHIND: Final = 1
"""Batches that the keeper has not answered while the next is copied: the window has two halves."""


def charge(nbytes: int) -> int:
    """Count the bytes of the capacity that an object takes."""
    return nbytes + OVERHEAD_BYTES if nbytes else 0


def _length(transfer: Transfer) -> int:
    assert transfer.region is not None
    return transfer.region.nbytes


class Writing:
    """What is present, what is on its way, and the thread that hands it to the keeper."""

    _sync_interval_s: float

    def __init__(
        self,
        link: Link,
        found: dict[BlockKey, bytes],
        window: Window,
        context: TierContext,
        sizing: Sizing,
    ) -> None:
        self._link = link
        self._present = found
        self._charged_bytes = sum(charge(nbytes_of(place)) for place in found.values())
        """What is present, and what is on its way."""
        self._window = window
        self._limit = link.lines
        self._context = context
        self._sizing = sizing
        self._data = link.data
        self._down = ""
        self._storing: dict[BlockKey, list[int]] = {}
        self._erasing: dict[BlockKey, None] = {}
        self._erase_s = 0.0
        self._stores: deque[Transfer] = deque()
        self._done: deque[Completion] = deque()
        self._dirty = False
        self._sync_s = 0.0
        self._half = 0
        self._sent: deque[_Batch] = deque()
        self._closing = False
        self._lock = threading.Lock()
        self._to_write = threading.Condition(self._lock)

    def _complete(self, completions: Sequence[Completion]) -> None:
        if completions:
            self._done.extend(completions)
            self._context.wake()

    def _write_until_closed(self) -> None:
        while (batch := self._next()) is not None:
            try:
                self._step(batch)
            except Exception as error:  # noqa: BLE001 - a thread's top: it becomes completions
                self._lose(KeeperError(Fault.KILLED, f"{type(error).__name__}: {error}"), batch)

    def _next(self) -> _Batch | None:
        """Wait for something to do unless the keeper is at a batch. None: closed, and nothing is left."""
        with self._lock:
            while not self._sent and not self._closing:
                due_s = self._due_s()
                wait_s = None if due_s is None else due_s - time.monotonic()
                if (wait_s is not None and wait_s <= 0) or not self._to_write.wait(wait_s):
                    break
            if not self._sent and self._closing and not self._stores and not self._erasing:
                return None if self._down or not self._dirty else _NOTHING
            return self._take_writes()

    def _due_s(self) -> float | None:
        """Say when there is something to do, on the clock of `time.monotonic`."""
        if self._down:
            return self._link.retry_s
        if self._stores:
            return 0.0
        times_s = [self._sync_s] if self._dirty else []
        return min([*times_s, self._erase_s] if self._erasing else times_s, default=None)

    def _take_writes(self) -> _Batch:
        erase = list(islice(self._erasing, self._sizing.most_erased))
        for key in erase:
            del self._erasing[key]
        stores: list[Transfer] = []
        room_bytes = self._sizing.half_bytes
        # While some are left, the room that stores count on is not all free yet.
        while self._stores and not self._erasing and len(stores) < self._sizing.most_stored:
            room_bytes -= slot_bytes(_length(self._stores[0]))
            if room_bytes < 0:
                break
            stores.append(self._stores.popleft())
        return _Batch(erase, stores)

    def _step(self, batch: _Batch) -> None:
        """Copy a batch into the half of the window that is free, and let the keeper go on to it."""
        batch = _Batch(batch.erase, self._fill(self._half, batch.stores))
        try:
            if not self._sent and not self._require_keeper():
                self._erase_later(batch.erase, _ERASE_RETRY_S)
                self._settle(batch.stores, [], Reason.ERROR, self._down)
                return
            if batch.erase or batch.stores:
                keys = [transfer.key for transfer in batch.stores]
                lengths = [_length(transfer) for transfer in batch.stores]
                self._link.send(Commit(batch.erase, keys, lengths, self._half, self._charged_bytes))
                self._sent.append(batch)
                self._half = 1 - self._half
                batch = _NOTHING
            sync = self._dirty and (self._closing or time.monotonic() >= self._sync_s)
            # One is left to the keeper while this thread fills the other half, if there is more.
            if self._sent and (len(self._sent) > _BEHIND or not self._stores):
                self._finish()
            if sync:
                while self._sent:
                    self._finish()
                self._sync()
        except KeeperError as error:
            self._lose(error, batch)

    def _fill(self, half: int, stores: Sequence[Transfer]) -> list[Transfer]:
        now_s = time.monotonic()
        late = [transfer for transfer in stores if transfer.deadline_s < now_s]
        self._settle(late, [], Reason.DEADLINE)
        kept = [transfer for transfer in stores if transfer.deadline_s >= now_s]
        at = 0
        for transfer in kept:
            assert transfer.region is not None
            self._window.fill(half, at, transfer.region)
            at += slot_bytes(transfer.region.nbytes)
        return kept

    def _finish(self) -> None:
        """Wait for the keeper's answer to the oldest batch.

        Raises:
            KeeperError: If there is none.
        """
        reply = self._link.receive()
        assert isinstance(reply, Committed)
        sent = self._sent.popleft()
        self._dirty = True
        self._settle(sent.stores, reply.places, Reason.FULL, reply.full)
        if reply.full:
            used_bytes = self._charged_bytes
            self._limit.warning(
                "full",
                "%s: no room for more at %s of the %s configured (%s); make room on the disk, or "
                "lower 'capacity'",
                self._data.path, size_text(used_bytes), size_text(self._sizing.map_bytes), reply.full,
            )  # fmt: skip
        if not reply.erased:
            self._erase_later(sent.erase, _ERASE_RETRY_S)
            # What waits behind them would find no room either.
            with self._lock:
                stores = list(self._stores)
                self._stores.clear()
            self._settle(stores, [], Reason.FULL, reply.full)

    def _require_keeper(self) -> bool:
        """Say whether there is a keeper; if it is time to, start one."""
        if not self._down and (error := self._link.died()):
            self._lose(error)
        if not self._down:
            return True
        found = None if self._closing else self._link.reopen()
        if found is None:
            return False
        with self._lock:
            # What is there though nobody was told so, or though it was discarded, goes.
            self._erasing = dict.fromkeys(key for key in found if key not in self._present)
            self._charged_bytes -= sum(charge(nbytes_of(place)) for place in self._present.values())
            self._present = {key: place for key, place in found.items() if key in self._present}
            self._charged_bytes += sum(charge(nbytes_of(place)) for place in self._present.values())
            self._data = self._link.data
            self._down = ""
        return True

    def _lose(self, error: KeeperError, batch: _Batch = _NOTHING) -> None:
        """Fail what was under way when the keeper went."""
        self._link.failed(error)
        batches = [*self._sent, batch]
        self._sent.clear()
        with self._lock:
            self._down = self._link.down
            stores = [transfer for batch in batches for transfer in batch.stores] + list(self._stores)
            self._stores.clear()
        for batch in batches:
            self._erase_later(batch.erase, 0.0)
        self._settle(stores, [], Reason.ERROR, self._down)

    def _erase_later(self, erase: Iterable[BlockKey], wait_s: float) -> None:
        with self._lock:
            self._erase_s = time.monotonic() + wait_s
            # Not at close: the thread would never end. What is left is served again after a restart.
            if not self._closing:
                self._erasing.update(dict.fromkeys(key for key in erase if key not in self._present))

    def _settle(
        self, stores: Sequence[Transfer], places: Sequence[bytes], reason: Reason, detail: str = ""
    ) -> None:
        """Complete stores: the first are where `places` say, the others ended with a reason."""
        completions: list[Completion] = []
        with self._lock:
            for at, transfer in enumerate(stores):
                tickets = self._storing.pop(transfer.key, ())
                nbytes = _length(transfer)
                if at < len(places):
                    self._present[transfer.key] = places[at]
                    completions += [Completion(ticket, Outcome.DONE, nbytes=nbytes) for ticket in tickets]
                else:
                    self._charged_bytes -= charge(nbytes)
                    completions += [Completion(ticket, Outcome.FAILED, reason, detail) for ticket in tickets]
        self._complete(completions)

    def _sync(self) -> None:
        """Have what was committed flushed.

        Raises:
            KeeperError: If there is no answer.
        """
        self._link.send(Sync())
        reply = self._link.receive()
        assert isinstance(reply, Synced)
        self._dirty = bool(reply.error) and not self._closing
        self._sync_s = time.monotonic() + self._sync_interval_s
        if reply.error:
            self._limit.error(
                "sync",
                "flushing %s failed, a power cut may lose blocks: %s",
                self._data.path,
                reply.error,
            )
