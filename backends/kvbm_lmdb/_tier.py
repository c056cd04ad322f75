"""Objects in LMDB: bounded, over restarts, one engine per directory, in a process that may die.

    caller ── STORE, discard ──► writer ── window, channel ──► keeper ── transaction ──► data.mdb
    caller ── LOAD ──► readers ── a read of the file for each run of the object's pages, into the region
    caller ── LOOKUP ──► answered at once from the keys that are present

LMDB lives in the keeper alone (see `_keeper`). The keys that are present, and where their objects lie in
the file, are known here: a load asks nobody. An object's pages are used again only when it was erased, and
the core erases none that is being loaded.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import lmdb  # noqa: F401 - only the keeper calls it; here its absence is found before a model is loaded

from kvbm_core.block import BlockKey
from kvbm_core.config import size_text
from kvbm_core.errors import QueueFullError, TierError, TierOpenError
from kvbm_core.localdir import HeldFolder
from kvbm_core.log_limit import LogLimit, TierLog
from kvbm_core.namespace_facts import keep_facts, room_bytes
from kvbm_core.tier import Capabilities, Completion, Op, Outcome, Reason, Tier, TierContext, Transfer
from kvbm_lmdb._config import LmdbConfig
from kvbm_lmdb._data_file import DataFile
from kvbm_lmdb._directory import (
    OVERHEAD_BYTES,
    Sizing,
    directory_of,
    least_share_bytes,
    plan_sizing,
)
from kvbm_lmdb._link import Link, Window
from kvbm_lmdb._messages import Settings
from kvbm_lmdb._place import nbytes_of
from kvbm_lmdb._writing import Writing, charge

__all__ = ["LmdbTier"]

_QUEUE_DEPTH: Final = 256
_READ_BATCH_BYTES: Final = 4 << 20
"""A reader takes this much at a time: it costs one wake-up."""
_CLOSE_WAIT_S: Final = 5.0
"""What is queued at close is finished for so long; the rest fails."""


@dataclass(frozen=True, slots=True)
class _Load:
    """A load, and where its object lies."""

    transfer: Transfer
    place: bytes
    data: DataFile


class LmdbTier(Writing, Tier):
    """Objects in one LMDB environment per rank."""

    def __init__(self, config: LmdbConfig, context: TierContext) -> None:
        sizing = _sizing(config, context)
        directory, log = directory_of(config), TierLog("kvbm_lmdb", context.name)
        folder = directory.hold(context.rank, log)
        try:
            directory.drop_other_ranks(context.rank, context.world_size, log)
            window = Window(sizing.half_bytes)
            link, found = _open(folder, window, sizing, context, log)
            facts_bytes = room_bytes(config.capacity // context.world_size)
            keep_facts(folder, context, facts_bytes, log, starts_empty=not found)
        except BaseException:
            folder.release()
            raise
        super().__init__(link, found, window, context, sizing)
        self._folder = folder
        self._sync_interval_s = config.sync_interval_s
        self._inventory = tuple((key, nbytes_of(place)) for key, place in found.items())
        self._capabilities = Capabilities(
            capacity_bytes=sizing.capacity_bytes,
            queue_depth=_QUEUE_DEPTH,
            durable=True,
            overhead_bytes=OVERHEAD_BYTES,
        )
        self._loads: deque[_Load] = deque()
        self._unpolled = 0
        self._pid = os.getpid()
        self._to_read = threading.Condition(self._lock)
        self._threads = self._start(config.readers)

    def __repr__(self) -> str:
        if self._closing:
            return f"<LmdbTier {self._folder.path} closed>"
        charged, capacity = size_text(self._charged_bytes), size_text(self._sizing.capacity_bytes)
        return (
            f"<LmdbTier {self._folder.path} {len(self._present)} objects, {charged} of {capacity}, "
            f"{self._unpolled} in flight>"
        )

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        """See `Tier.inventory`. Oldest first; an object longer than the longest now is not listed."""
        return self._inventory

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`.

        Raises:
            TierError: If the tier is closed.
        """
        if self._closing:
            raise TierError("the tier is closed", operation="submit", tier=self._context.name)
        if self._unpolled + len(transfers) > _QUEUE_DEPTH:
            raise QueueFullError(
                f"{len(transfers)} transfers do not fit beside {self._unpolled} in flight; "
                f"the queue takes {_QUEUE_DEPTH}",
                operation="submit",
                tier=self._context.name,
            )
        self._unpolled += len(transfers)
        with self._lock:
            answers = [answer for transfer in transfers if (answer := self._accept(transfer)) is not None]
            if self._stores:
                self._to_write.notify()
            if self._loads:
                self._to_read.notify_all()
        self._complete(answers)

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        # Only this thread takes, so that many are there.
        done = [self._done.popleft() for _ in range(len(self._done))]
        self._unpolled -= len(done)
        return done

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`. The keys are gone at once, their bytes with the next transaction."""
        with self._lock:
            for key in keys:
                if (place := self._present.pop(key, None)) is not None:
                    self._charged_bytes -= charge(nbytes_of(place))
                    # Bounded: by the keys that were present.
                    self._erasing[key] = None
            if self._erasing:
                self._to_write.notify()

    def close(self) -> None:
        """See `Tier.close`. Finishes what is queued for up to 5 s, then fails the rest."""
        # The threads and the keeper are not a forked child's.
        if self._closing or os.getpid() != self._pid:
            return
        with self._lock:
            self._closing = True
            self._to_write.notify_all()
            self._to_read.notify_all()
        self._join(_CLOSE_WAIT_S)
        self._fail_queued()
        # With empty queues a thread ends after the batch it is at.
        if not self._join(_CLOSE_WAIT_S):
            self._link.kill()
            self._join(_CLOSE_WAIT_S)
        if not self._link.close():
            self._limit.error(
                "end", "%s: the disk hangs; a process that waits for it is left", self._folder.path
            )
        if self._join(0.0):
            self._window.close()
            self._link.data.close()
        self._limit.close()
        self._folder.release()

    def _join(self, wait_s: float) -> bool:
        give_up_s = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, give_up_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _start(self, readers: int) -> list[threading.Thread]:
        jobs = [("writer", self._write_until_closed)]
        jobs += [(f"reader{number}", self._read_until_closed) for number in range(readers)]
        threads = [threading.Thread(target=job, name=f"kvbm-lmdb-{name}", daemon=True) for name, job in jobs]
        for thread in threads:
            thread.start()
        return threads

    def _accept(self, transfer: Transfer) -> Completion | None:
        """Answer a transfer at once, or queue it. Holds the lock."""
        ticket, key = transfer.ticket, transfer.key
        if transfer.op is Op.STORE:
            return self._accept_store(transfer)
        place = self._present.get(key)
        if place is None:
            return Completion(ticket, Outcome.MISSING, Reason.MISSING)
        if transfer.op is Op.LOOKUP:
            return Completion(ticket, Outcome.DONE)
        self._loads.append(_Load(transfer, place, self._data))
        return None

    def _accept_store(self, transfer: Transfer) -> Completion | None:
        ticket, key, region = transfer.ticket, transfer.key, transfer.region
        assert region is not None
        if (place := self._present.get(key)) is not None:
            return Completion(ticket, Outcome.DONE, nbytes=nbytes_of(place))
        if key in self._storing:
            # The same key is on its way: it ends as that one ends.
            self._storing[key].append(ticket)
            return None
        if self._down:
            return Completion(ticket, Outcome.FAILED, Reason.ERROR, self._down)
        if region.nbytes > self._context.max_bytes:
            said = f"{region.nbytes} bytes, and the longest object has {self._context.max_bytes}"
            return Completion(ticket, Outcome.FAILED, Reason.ERROR, said)
        if self._charged_bytes + charge(region.nbytes) > self._sizing.capacity_bytes:
            return Completion(ticket, Outcome.FAILED, Reason.FULL)
        self._charged_bytes += charge(region.nbytes)
        self._storing[key] = [ticket]
        self._stores.append(transfer)
        return None

    # --- the readers' threads ---

    def _read_until_closed(self) -> None:
        while loads := self._take_loads():
            now_s = time.monotonic()
            self._complete([self._read(load, now_s) for load in loads])

    def _take_loads(self) -> list[_Load]:
        with self._lock:
            while not self._loads and not self._closing:
                self._to_read.wait()
            # At most half, so that the other reader has work as well.
            most = max(1, min(_READ_BATCH_BYTES // self._context.max_bytes, len(self._loads) // 2))
            return [self._loads.popleft() for _ in range(min(most, len(self._loads)))]

    def _read(self, load: _Load, now_s: float) -> Completion:
        ticket, key, region = load.transfer.ticket, load.transfer.key, load.transfer.region
        assert region is not None
        if load.transfer.deadline_s < now_s:
            return Completion(ticket, Outcome.FAILED, Reason.DEADLINE)
        try:
            whole = load.data.read(load.place, region)
        except Exception as error:  # noqa: BLE001 - a thread's top: it becomes a completion
            self._limit.error("read", "reading %s failed: %s", load.data.path, error)
            return Completion(ticket, Outcome.FAILED, Reason.ERROR, str(error))
        if not whole:
            self._limit.error(
                "damaged",
                "object %s in %s is damaged, cut off, or longer than asked for",
                key.hex()[:16],
                load.data.path,
            )
            return Completion(ticket, Outcome.FAILED, Reason.CORRUPT)
        return Completion(ticket, Outcome.DONE, nbytes=nbytes_of(load.place))

    def _fail_queued(self) -> None:
        with self._lock:
            stores, loads = list(self._stores), list(self._loads)
            self._stores.clear()
            self._loads.clear()
            self._erasing.clear()
        self._settle(stores, [], Reason.ERROR)
        self._complete([Completion(load.transfer.ticket, Outcome.FAILED, Reason.ERROR) for load in loads])


def _open(
    folder: HeldFolder, window: Window, sizing: Sizing, context: TierContext, log: TierLog
) -> tuple[Link, dict[BlockKey, bytes]]:
    settings = Settings(str(folder.path), os.getpid(), context.namespace, context.max_bytes, sizing)
    try:
        link = Link(settings, window, LogLimit(log), folder)
        try:
            return link, link.open()
        except BaseException:
            link.close()
            raise
    except BaseException:
        window.close()
        raise


def _sizing(config: LmdbConfig, context: TierContext) -> Sizing:
    sizing = plan_sizing(config.capacity // context.world_size, context.max_bytes)
    if sizing is None:
        least_bytes = least_share_bytes(context.max_bytes) * context.world_size
        raise TierOpenError(
            f"capacity: {size_text(config.capacity)} over {context.world_size} ranks hold no object of "
            f"{size_text(context.max_bytes, up=True)} with the room LMDB needs to work; write at least "
            f"{size_text(least_bytes, up=True)}",
            operation="open",
            tier=context.name,
        )
    return sizing
