"""Keeps blocks in one SQLite file.

    caller ── STORE, LOAD, LOOKUP, discard ──► one queue ── kvbm-toy-rank0 ──► rank0/blocks.sqlite

One thread does everything in the order it was asked, so nothing can overtake anything else.

Durable: a commit has been written to the file when it is reported, so it survives a `kill -9`. It is
not flushed: a power cut may lose blocks or damage the file.

Bounded: SQLite never lets the file grow beyond the capacity (`max_page_count`). Its rollback journal
lies beside the file while a transaction runs; room for it is set aside, but nothing enforces that.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvbm_core import (
    Backend,
    BlockKey,
    ByteSize,
    Capabilities,
    Completion,
    Op,
    Outcome,
    QueueFullError,
    Reason,
    Tier,
    TierConfig,
    TierContext,
    TierError,
    TierOpenError,
    Transfer,
    hookimpl,
)

__all__ = ["ToyConfig", "ToyTier", "kvbm_backends"]

_log = logging.getLogger("kvbm_toy")

_QUEUE_DEPTH = 64
_PAGE_BYTES = 4096
_FIXED_PAGES = 24
"""The schema, the roots of the trees, the first pages of the journal."""
_MISSING = (Outcome.MISSING, Reason.MISSING)
_DONE = (Outcome.DONE, Reason.NONE)
_REASONS = {
    sqlite3.SQLITE_FULL: Reason.FULL,
    sqlite3.SQLITE_CORRUPT: Reason.CORRUPT,
    sqlite3.SQLITE_NOTADB: Reason.CORRUPT,
}
_TABLE = "CREATE TABLE IF NOT EXISTS block (id INTEGER PRIMARY KEY, space BLOB, key BLOB UNIQUE, data BLOB)"


class ToyConfig(TierConfig, frozen=True):
    """Settings of a `ToyTier`."""

    path: str
    """Directory on a local disk; rank r uses ``<path>/rank<r>``. Made if it is not there."""
    capacity: ByteSize
    """Bytes on the disk, over all ranks."""


class ToyTier(Tier):
    """Blocks as rows of one table."""

    def __init__(self, config: ToyConfig, context: TierContext) -> None:
        self._context = context
        self._folder = Path(config.path).expanduser() / f"rank{context.rank}"
        self._pages = config.capacity // context.world_size // _PAGE_BYTES
        # A row takes whole pages of 4092 usable bytes, and a page of its tree; a sixteenth of a page is
        # for the trees' upper pages. Two rows' room is the journal's.
        row_pages = -(-(context.block_bytes + 128) // 4092) + 1 + 1 / 16
        blocks = max(0, int((self._pages - _FIXED_PAGES) / row_pages - 2))
        if not blocks:
            least = int(_PAGE_BYTES * (_FIXED_PAGES + 3 * row_pages + 1) * context.world_size)
            message = f"capacity: {config.capacity} holds no block; write at least {least}"
            raise TierOpenError(message, operation="open", tier="toy")
        self._capabilities = Capabilities(blocks, _QUEUE_DEPTH, durable=True, detail=f"{self._folder}")
        self._lock_file = _lock(self._folder)
        try:
            self._database = self._open()
            self._found = self._take_stock()
        except (OSError, sqlite3.Error) as error:
            os.close(self._lock_file)
            message = f"path: {self._folder}: {error}; write a directory on a local disk"
            raise TierOpenError(message, operation="open", tier="toy") from error
        self._count = len(self._found)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done: deque[Completion] = deque()
        self._unpolled = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"kvbm-toy-rank{context.rank}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._unpolled} in flight"
        blocks = f"{self._count}/{self._capabilities.capacity_blocks} blocks"
        return f"<ToyTier {self._folder} {blocks}, {state}>"

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[BlockKey]:
        """See `Tier.inventory`. Oldest first."""
        return self._found

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        if self._closed:
            raise TierError("the tier is closed", operation="submit", tier="toy")
        if self._unpolled + len(transfers) > _QUEUE_DEPTH:
            message = f"{len(transfers)} do not fit beside {self._unpolled}; the queue takes {_QUEUE_DEPTH}"
            raise QueueFullError(message, operation="submit", tier="toy")
        self._unpolled += len(transfers)
        for transfer in transfers:
            self._jobs.put(lambda transfer=transfer: self._run(transfer))

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        done = [self._done.popleft() for _ in range(len(self._done))]
        self._unpolled -= len(done)
        return done

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`. Queued before everything that is submitted later."""
        if not self._closed:
            self._jobs.put(lambda: self._erase(keys))

    def close(self) -> None:
        """See `Tier.close`. Finishes what is queued."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join()
            self._database.close()
            os.close(self._lock_file)

    def _open(self) -> sqlite3.Connection:
        file = self._folder / "blocks.sqlite"
        too_large = file.exists() and file.stat().st_size > self._pages * _PAGE_BYTES
        if too_large:
            _log.warning("%s is larger than its capacity: dropping it", file)
        try:
            return self._connect(file, fresh=too_large)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", None) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise
            _log.warning("%s is damaged (%s): dropping it", file, error)
            return self._connect(file, fresh=True)

    def _connect(self, file: Path, *, fresh: bool) -> sqlite3.Connection:
        if fresh:
            file.unlink(missing_ok=True)
            file.with_name(file.name + "-journal").unlink(missing_ok=True)
        file.touch(mode=0o600)
        database = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        # Nothing is flushed; the order of writes alone makes it whole again after a kill.
        script = f"PRAGMA page_size={_PAGE_BYTES}; PRAGMA synchronous=OFF; PRAGMA journal_mode=DELETE; {_TABLE}"
        try:
            database.executescript(script)
            database.execute(f"PRAGMA max_page_count={self._pages}")
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _take_stock(self) -> list[BlockKey]:
        """List the blocks that are served, oldest first, and delete all others."""
        served = (self._context.namespace, self._context.block_bytes)
        self._database.execute("DELETE FROM block WHERE space != ? OR length(data) != ?", served)
        newest = "SELECT id FROM block ORDER BY id DESC LIMIT ?"
        capacity = self._capabilities.capacity_blocks
        self._database.execute(f"DELETE FROM block WHERE id NOT IN ({newest})", (capacity,))
        return [bytes(key) for (key,) in self._database.execute("SELECT key FROM block ORDER BY id")]

    # From here on: the tier's own thread.

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _run(self, transfer: Transfer) -> None:
        late = time.monotonic() > transfer.deadline_s
        try:
            end = (Outcome.FAILED, Reason.DEADLINE) if late else _STEPS[transfer.op](self, transfer)
        except Exception as error:  # noqa: BLE001 - a thread's top: it becomes a completion
            reason = _REASONS.get(getattr(error, "sqlite_errorcode", -1), Reason.ERROR)
            _log.error("%s of %s: %s", transfer.op.value, transfer.key.hex()[:16], error)
            end = (Outcome.FAILED, reason)
        self._done.append(Completion(transfer.ticket, *end))
        self._context.wake()

    def _lookup(self, transfer: Transfer) -> tuple[Outcome, Reason]:
        row = self._database.execute("SELECT 1 FROM block WHERE key = ?", (transfer.key,)).fetchone()
        return _DONE if row else _MISSING

    def _store(self, transfer: Transfer) -> tuple[Outcome, Reason]:
        if self._lookup(transfer) is _DONE:
            return _DONE
        if self._count >= (self._capabilities.capacity_blocks or 0):
            return Outcome.FAILED, Reason.FULL
        row = (self._context.namespace, transfer.key, transfer.region.view())
        self._database.execute("INSERT INTO block (space, key, data) VALUES (?, ?, ?)", row)
        self._count += 1
        return _DONE

    def _load(self, transfer: Transfer) -> tuple[Outcome, Reason]:
        query = "SELECT data FROM block WHERE key = ?"
        row = self._database.execute(query, (transfer.key,)).fetchone()
        if row is None:
            return _MISSING
        if len(row[0]) != transfer.region.nbytes:
            return Outcome.FAILED, Reason.CORRUPT
        transfer.region.view()[:] = row[0]
        return _DONE

    def _erase(self, keys: Sequence[BlockKey]) -> None:
        try:
            for key in keys:
                self._count -= self._database.execute("DELETE FROM block WHERE key = ?", (key,)).rowcount
        except sqlite3.Error as error:
            _log.error("%s: blocks were not erased: %s", self._folder, error)


_STEPS = {Op.STORE: ToyTier._store, Op.LOAD: ToyTier._load, Op.LOOKUP: ToyTier._lookup}


def _lock(folder: Path) -> int:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        message = f"path: {folder}: {error.strerror}; write a directory that can be written to"
        raise TierOpenError(message, operation="open", tier="toy") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        message = f"path: {folder} is used by another engine; write another directory"
        raise TierOpenError(message, operation="open", tier="toy") from error
    return file


def _check(config: ToyConfig) -> None:
    place = Path(config.path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        message = f"path: {config.path!r}: {place} is no directory that can be written to; write another"
        raise TierOpenError(message, operation="check", tier="toy")


@hookimpl
def kvbm_backends() -> Sequence[Backend]:
    """Offer the backend ``toy``."""
    return [Backend("toy", ToyConfig, ToyTier, _check, contract_version=1)]
