"""Blocks in LMDB: bounded, over restarts, one engine per directory.

    caller ── STORE, discard ──► writer ── one transaction for several ──► data.mdb ── sync, on a timer
    caller ── LOAD ──► readers ── one copy, from the mapped page into the region
    caller ── LOOKUP ──► answered at once from the set of keys

The keys that are present are known in memory; the environment is read for bytes only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Final

import lmdb
import numpy as np

from kvbm_core.block import BlockKey
from kvbm_core.errors import QueueFullError, TierError, TierOpenError
from kvbm_core.tier import Capabilities, Completion, Op, Outcome, Reason, Tier, TierContext, Transfer
from kvbm_lmdb._config import LmdbConfig
from kvbm_lmdb._directory import (
    DAMAGE,
    ERASE_BLOCKS,
    Sizing,
    directory_of,
    drop,
    least_share_bytes,
    open_store,
    plan_sizing,
)
from kvbm_lmdb._writer import Writer

__all__ = ["LmdbTier"]

_log = logging.getLogger("kvbm_lmdb")

_QUEUE_DEPTH: Final = 256
_READ_BATCH_BYTES: Final = 4 << 20
"""A reader takes this much at a time: it costs one wake-up, and holds freed pages back no longer."""
_CLOSE_WAIT_S: Final = 5.0
"""What is queued at close is finished for so long; the rest fails."""


class LmdbTier(Tier):
    """Blocks in one LMDB environment per rank."""

    def __init__(self, config: LmdbConfig, context: TierContext) -> None:
        sizing = _sizing(config, context)
        self._context = context
        self._sizing = sizing
        self._sync_interval_s = config.sync_interval_s
        self._readers = config.readers
        directory = directory_of(config)
        self._folder = directory.hold(context.rank)
        try:
            directory.drop_other_ranks(context.rank, context.world_size, _log)
            self._store = open_store(self._folder, sizing, config.readers)
            self._writer = Writer(self._store, sizing, self._folder.path, context.namespace)
            self._inventory = self._take_stock()
        except BaseException:
            self._folder.release()
            raise
        self._capabilities = Capabilities(
            capacity_blocks=sizing.capacity_blocks, queue_depth=_QUEUE_DEPTH, durable=True
        )
        self._present: set[BlockKey] = set(self._inventory)
        self._storing: dict[BlockKey, list[int]] = {}
        self._erasing: dict[BlockKey, None] = {}
        self._stores: deque[Transfer] = deque()
        self._loads: deque[Transfer] = deque()
        self._done: deque[Completion] = deque()
        self._unpolled = 0
        self._closing = False
        self._lock = threading.Lock()
        self._to_write = threading.Condition(self._lock)
        self._to_read = threading.Condition(self._lock)
        self._threads = self._start()

    def __repr__(self) -> str:
        if self._closing:
            return f"<LmdbTier {self._folder.path} closed>"
        return (
            f"<LmdbTier {self._folder.path} {len(self._present)}/{self._sizing.capacity_blocks} blocks, "
            f"{self._unpolled} in flight>"
        )

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[BlockKey]:
        """See `Tier.inventory`. Oldest first; a block of another length is not listed."""
        return self._inventory

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`.

        Raises:
            TierError: If the tier is closed.
        """
        if self._closing:
            raise TierError("the tier is closed", operation="submit", tier="lmdb")
        if self._unpolled + len(transfers) > _QUEUE_DEPTH:
            raise QueueFullError(
                f"{len(transfers)} transfers do not fit beside {self._unpolled} in flight; "
                f"the queue takes {_QUEUE_DEPTH}",
                operation="submit",
                tier="lmdb",
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
                if key in self._present:
                    self._present.remove(key)
                    # Bounded: by the keys that were present.
                    self._erasing[key] = None
            if self._erasing:
                self._to_write.notify()

    def close(self) -> None:
        """See `Tier.close`. Finishes what is queued for up to 5 s, then fails the rest."""
        if self._closing:
            return
        with self._lock:
            self._closing = True
            self._to_write.notify_all()
            self._to_read.notify_all()
        give_up_s = time.monotonic() + _CLOSE_WAIT_S
        for thread in self._threads:
            thread.join(max(0.0, give_up_s - time.monotonic()))
        self._fail_queued()
        for thread in self._threads:
            # With empty queues a thread ends after the batch it is at.
            thread.join(_CLOSE_WAIT_S)
        if any(thread.is_alive() for thread in self._threads):
            # Closing the environment under a thread that reads it would kill the process.
            _log.error("%s: the disk does not answer; leaving the environment open", self._folder.path)
            return
        self._store.env.close()
        self._folder.release()

    def _take_stock(self) -> tuple[BlockKey, ...]:
        """Sort what was found into what is served and what is only kept; make both fit."""
        namespace, nbytes = self._context.namespace, self._context.block_bytes
        entries = self._store.entries
        own = [e for e in entries if e.nbytes == nbytes and e.full_key.startswith(namespace)]
        own = own[-self._sizing.capacity_blocks :]
        served = {entry.full_key for entry in own}
        self._writer.adopt(entry for entry in entries if entry.full_key not in served)
        entries.clear()
        try:
            self._writer.trim(len(own))
        except lmdb.Error as error:
            _log.warning("%s: cannot be trimmed to its capacity (%s): dropping it", self._folder.path, error)
            self._start_empty()
            return ()
        return tuple(entry.full_key[len(namespace) :] for entry in own)

    def _start_empty(self) -> None:
        self._store.env.close()
        drop(self._folder.path)
        self._store = open_store(self._folder, self._sizing, self._readers)
        self._writer = Writer(self._store, self._sizing, self._folder.path, self._context.namespace)

    def _start(self) -> list[threading.Thread]:
        jobs = [("writer", self._write_until_closed)]
        jobs += [(f"reader{number}", self._read_until_closed) for number in range(self._readers)]
        threads = [threading.Thread(target=job, name=f"kvbm-lmdb-{name}", daemon=True) for name, job in jobs]
        for thread in threads:
            thread.start()
        return threads

    def _accept(self, transfer: Transfer) -> Completion | None:
        """Answer a transfer at once, or queue it. Holds the lock."""
        ticket, key = transfer.ticket, transfer.key
        if transfer.op is Op.STORE:
            return self._accept_store(transfer)
        if key not in self._present:
            return Completion(ticket, Outcome.MISSING, Reason.MISSING)
        if transfer.op is Op.LOOKUP:
            return Completion(ticket, Outcome.DONE)
        self._loads.append(transfer)
        return None

    def _accept_store(self, transfer: Transfer) -> Completion | None:
        ticket, key = transfer.ticket, transfer.key
        if key in self._present:
            return Completion(ticket, Outcome.DONE)
        if key in self._storing:
            # The same key is on its way: it ends as that one ends.
            self._storing[key].append(ticket)
            return None
        if len(self._present) + len(self._storing) >= self._sizing.capacity_blocks:
            return Completion(ticket, Outcome.FAILED, Reason.FULL)
        self._storing[key] = [ticket]
        self._stores.append(transfer)
        return None

    def _complete(self, completions: Sequence[Completion]) -> None:
        if completions:
            self._done.extend(completions)
            self._context.wake()

    # --- the writer's thread ---

    def _write_until_closed(self) -> None:
        next_sync_s = 0.0
        while True:
            with self._lock:
                self._wait_for_writes(next_sync_s)
                if self._closing and not self._stores and not self._erasing:
                    break
                erase, stores = self._take_writes()
                own_blocks = len(self._present) + len(stores)
            self._write(erase, stores, own_blocks)
            if self._writer.dirty and time.monotonic() >= next_sync_s:
                self._sync()
                next_sync_s = time.monotonic() + self._sync_interval_s
        if self._writer.dirty:
            self._sync()

    def _wait_for_writes(self, next_sync_s: float) -> None:
        while not (self._stores or self._erasing or self._closing):
            wait_s = max(0.0, next_sync_s - time.monotonic()) if self._writer.dirty else None
            if not self._to_write.wait(wait_s):
                return

    def _take_writes(self) -> tuple[list[BlockKey], list[Transfer]]:
        erase = list(islice(self._erasing, ERASE_BLOCKS))
        for key in erase:
            del self._erasing[key]
        if self._erasing:
            # The room that stores count on is not all free yet.
            return erase, []
        count = min(len(self._stores), self._sizing.batch_blocks)
        return erase, [self._stores.popleft() for _ in range(count)]

    def _write(self, erase: list[BlockKey], stores: list[Transfer], own_blocks: int) -> None:
        now_s = time.monotonic()
        late = [transfer for transfer in stores if transfer.deadline_s < now_s]
        stores = [transfer for transfer in stores if transfer.deadline_s >= now_s]
        try:
            reasons = self._writer.write(erase, stores, own_blocks)
        except Exception as error:  # noqa: BLE001 - a thread's top: it becomes completions
            _log.error("writing to %s failed: %s: %s", self._folder.path, type(error).__name__, error)
            reasons = [Reason.ERROR] * len(stores)
            self._erase_later(erase)
        self._settle(late, [Reason.DEADLINE] * len(late))
        self._settle(stores, reasons)

    def _erase_later(self, erase: list[BlockKey]) -> None:
        with self._lock:
            # Not at close: the thread would never end. What is left is served again after a restart.
            if not self._closing:
                self._erasing.update(dict.fromkeys(key for key in erase if key not in self._present))
        # Nothing wakes a disk that fails; do not spin meanwhile.
        time.sleep(0.05)

    def _settle(self, stores: Sequence[Transfer], reasons: Sequence[Reason]) -> None:
        completions: list[Completion] = []
        with self._lock:
            for transfer, reason in zip(stores, reasons, strict=True):
                stored = reason is Reason.NONE
                if stored:
                    self._present.add(transfer.key)
                    self._erasing.pop(transfer.key, None)
                outcome = Outcome.DONE if stored else Outcome.FAILED
                tickets = self._storing.pop(transfer.key)
                completions += [Completion(ticket, outcome, reason) for ticket in tickets]
        self._complete(completions)

    def _sync(self) -> None:
        try:
            self._writer.sync()
        except lmdb.Error as error:
            _log.error("flushing %s failed, a power cut may lose blocks: %s", self._folder.path, error)

    # --- the readers' threads ---

    def _read_until_closed(self) -> None:
        while transfers := self._take_loads():
            try:
                completions = self._read(transfers)
            except Exception as error:  # noqa: BLE001 - a thread's top: it becomes completions
                _log.error("reading %s failed: %s: %s", self._folder.path, type(error).__name__, error)
                completions = [Completion(t.ticket, Outcome.FAILED, Reason.ERROR) for t in transfers]
            self._complete(completions)

    def _take_loads(self) -> list[Transfer]:
        with self._lock:
            while not self._loads and not self._closing:
                self._to_read.wait()
            # At most half, so that the other reader has work as well.
            most = max(1, min(_READ_BATCH_BYTES // self._context.block_bytes, len(self._loads) // 2))
            return [self._loads.popleft() for _ in range(min(most, len(self._loads)))]

    def _read(self, transfers: Sequence[Transfer]) -> list[Completion]:
        now_s = time.monotonic()
        with self._store.env.begin(db=self._store.blocks, buffers=True) as txn:
            return [
                Completion(transfer.ticket, Outcome.FAILED, Reason.DEADLINE)
                if transfer.deadline_s < now_s
                else self._read_one(txn, transfer)
                for transfer in transfers
            ]

    def _read_one(self, txn: Any, transfer: Transfer) -> Completion:
        try:
            value = txn.get(self._context.namespace + transfer.key)
        except DAMAGE as error:
            _log.error("block %s in %s is damaged: %s", transfer.key.hex()[:16], self._folder.path, error)
            return Completion(transfer.ticket, Outcome.FAILED, Reason.CORRUPT)
        if value is None:
            with self._lock:
                self._present.discard(transfer.key)
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        if len(value) != self._context.block_bytes:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.CORRUPT)
        assert transfer.region is not None
        # Releases the interpreter lock, which a copy between memoryviews does not.
        np.copyto(np.frombuffer(transfer.region.view(), np.uint8), np.frombuffer(value, np.uint8))
        return Completion(transfer.ticket, Outcome.DONE)

    def _fail_queued(self) -> None:
        with self._lock:
            stores, loads = list(self._stores), list(self._loads)
            self._stores.clear()
            self._loads.clear()
            self._erasing.clear()
        self._settle(stores, [Reason.ERROR] * len(stores))
        self._complete([Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR) for transfer in loads])


def _sizing(config: LmdbConfig, context: TierContext) -> Sizing:
    sizing = plan_sizing(config.capacity // context.world_size, context.block_bytes)
    if sizing is None:
        least_bytes = least_share_bytes(context.block_bytes) * context.world_size
        raise TierOpenError(
            f"capacity: {int(config.capacity)} bytes over {context.world_size} ranks hold no block of "
            f"{context.block_bytes} bytes with the room LMDB needs to work; write at least {least_bytes}",
            operation="open",
            tier="lmdb",
        )
    return sizing
