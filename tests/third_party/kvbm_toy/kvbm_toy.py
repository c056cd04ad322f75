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
import sqlite3
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kvbm_core as kvbm
from kvbm_core import Completion, Outcome, Reason

__all__ = ["ToyConfig", "ToyTier", "kvbm_backends"]

_log = logging.getLogger("kvbm_toy")

_QUEUE_DEPTH = 64
_PAGE_BYTES = 4096
_FIXED_PAGES = 24
"""The schema, the roots of the trees, the first pages of the journal."""
_DONE, _MISSING = (Outcome.DONE, Reason.NONE), (Outcome.MISSING, Reason.MISSING)
_REASONS = {sqlite3.SQLITE_FULL: Reason.FULL, sqlite3.SQLITE_CORRUPT: Reason.CORRUPT}
_TABLE = "CREATE TABLE IF NOT EXISTS block (id INTEGER PRIMARY KEY, space BLOB, key BLOB UNIQUE, data BLOB)"


class ToyConfig(kvbm.TierConfig, frozen=True):
    """Settings of a `ToyTier`."""

    path: str
    """Directory on a local disk; rank r uses ``<path>/rank<r>``. Made if it is not there."""
    capacity: kvbm.ByteSize
    """Bytes on the disk, over all ranks."""


class ToyTier(kvbm.Tier):
    """Blocks as rows of one table."""

    def __init__(self, config: ToyConfig, context: kvbm.TierContext) -> None:
        self._context = context
        self._folder = Path(config.path).expanduser() / f"rank{context.rank}"
        self._pages = config.capacity // context.world_size // _PAGE_BYTES
        # A row takes whole pages of 4092 usable bytes, and a page of its tree; a sixteenth of a page is
        # for the trees' upper pages. Two rows' room is the journal's.
        row_pages = -(-(context.block_bytes + 128) // 4092) + 1 + 1 / 16
        blocks = max(0, int((self._pages - _FIXED_PAGES) / row_pages - 2))
        if not blocks:
            least = int(_PAGE_BYTES * (_FIXED_PAGES + 3 * row_pages + 1) * context.world_size)
            raise _refusal(f"capacity: {config.capacity} holds no block; write at least {least}")
        self._capabilities = kvbm.Capabilities(blocks, _QUEUE_DEPTH, durable=True, detail=f"{self._folder}")
        self._lock_file = _lock(self._folder)
        try:
            self._database = self._open(self._folder / "blocks.sqlite")
            self._found = self._take_stock()
        except (OSError, sqlite3.Error) as error:
            os.close(self._lock_file)
            raise _refusal(f"path: {self._folder}: {error}; write another directory, or delete it") from error
        self._count = len(self._found)
        self._done: deque[Completion] = deque()
        self._unpolled = 0
        self._closed = False
        self._thread = ThreadPoolExecutor(1, f"kvbm-toy-rank{context.rank}")

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._unpolled} in flight"
        return f"<ToyTier {self._folder} {self._count}/{self._capabilities.capacity_blocks} blocks, {state}>"

    @property
    def capabilities(self) -> kvbm.Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[kvbm.BlockKey]:
        """See `Tier.inventory`. Oldest first."""
        return self._found

    def submit(self, transfers: Sequence[kvbm.Transfer]) -> None:
        """See `Tier.submit`."""
        if self._closed:
            raise kvbm.TierError("the tier is closed", operation="submit", tier="toy")
        if self._unpolled + len(transfers) > _QUEUE_DEPTH:
            raise kvbm.QueueFullError(f"it takes {_QUEUE_DEPTH}; poll first", operation="submit", tier="toy")
        self._unpolled += len(transfers)
        for transfer in transfers:
            self._thread.submit(self._run, transfer)

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        done = [self._done.popleft() for _ in range(len(self._done))]
        self._unpolled -= len(done)
        return done

    def discard(self, keys: Sequence[kvbm.BlockKey]) -> None:
        """See `Tier.discard`. Queued before everything that is submitted later."""
        if not self._closed:
            self._thread.submit(self._erase, keys)

    def close(self) -> None:
        """See `Tier.close`. Finishes what is queued."""
        if not self._closed:
            self._closed = True
            self._thread.shutdown()
            self._database.close()
            os.close(self._lock_file)

    def _open(self, file: Path) -> sqlite3.Connection:
        if file.exists() and file.stat().st_size > self._pages * _PAGE_BYTES:
            _log.warning("%s is larger than its capacity: dropping it", file)
            for path in self._folder.glob("blocks.sqlite*"):
                path.unlink()
        file.touch(mode=0o600)
        database = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        try:
            # Nothing is flushed; the order of writes alone makes it whole again after a kill.
            for setting in (f"page_size={_PAGE_BYTES}", "synchronous=OFF", f"max_page_count={self._pages}"):
                database.execute(f"PRAGMA {setting}")
            database.execute(_TABLE)
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _take_stock(self) -> list[kvbm.BlockKey]:
        """List the blocks that are served, oldest first, and delete all others."""
        served = (self._context.namespace, self._context.block_bytes)
        self._database.execute("DELETE FROM block WHERE space != ? OR length(data) != ?", served)
        trim = "DELETE FROM block WHERE id NOT IN (SELECT id FROM block ORDER BY id DESC LIMIT ?)"
        self._database.execute(trim, (self._capabilities.capacity_blocks,))
        return [bytes(key) for (key,) in self._database.execute("SELECT key FROM block ORDER BY id")]

    # From here on: the tier's own thread.

    def _run(self, transfer: kvbm.Transfer) -> None:
        try:
            end = getattr(self, f"_{transfer.op.value}")(transfer)
        except Exception as error:  # noqa: BLE001 - a thread's top: it becomes a completion
            _log.error("%s of %s: %s", transfer.op.value, transfer.key.hex()[:16], error)
            end = (Outcome.FAILED, _REASONS.get(getattr(error, "sqlite_errorcode", -1), Reason.ERROR))
        self._done.append(Completion(transfer.ticket, *end))
        self._context.wake()

    def _lookup(self, transfer: kvbm.Transfer) -> tuple[Outcome, Reason]:
        row = self._database.execute("SELECT 1 FROM block WHERE key = ?", (transfer.key,)).fetchone()
        return _DONE if row else _MISSING

    def _store(self, transfer: kvbm.Transfer) -> tuple[Outcome, Reason]:
        if self._lookup(transfer) is _DONE:
            return _DONE
        if self._count >= (self._capabilities.capacity_blocks or 0):
            return Outcome.FAILED, Reason.FULL
        row = (self._context.namespace, transfer.key, transfer.region.view())
        self._database.execute("INSERT INTO block (space, key, data) VALUES (?, ?, ?)", row)
        self._count += 1
        return _DONE

    def _load(self, transfer: kvbm.Transfer) -> tuple[Outcome, Reason]:
        row = self._database.execute("SELECT data FROM block WHERE key = ?", (transfer.key,)).fetchone()
        if row is None:
            return _MISSING
        if len(row[0]) != transfer.region.nbytes:
            return Outcome.FAILED, Reason.CORRUPT
        transfer.region.view()[:] = row[0]
        return _DONE

    def _erase(self, keys: Sequence[kvbm.BlockKey]) -> None:
        # What an error leaves is served on: equal keys have equal bytes, and its room stays counted.
        for key in keys:
            self._count -= self._database.execute("DELETE FROM block WHERE key = ?", (key,)).rowcount


def _refusal(message: str) -> kvbm.TierOpenError:
    return kvbm.TierOpenError(message, operation="open", tier="toy")


def _lock(folder: Path) -> int:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _refusal(f"path: {folder}: {error.strerror}; write a directory you may write to") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise _refusal(f"path: {folder} is used by another engine; write another directory") from error
    return file


def _check(config: ToyConfig) -> None:
    place = Path(config.path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise _refusal(f"path: {config.path!r}: {place} is no directory you may write to; write another")


@kvbm.hookimpl
def kvbm_backends() -> Sequence[kvbm.Backend]:
    """Offer the backend ``toy``."""
    return [kvbm.Backend("toy", ToyConfig, ToyTier, _check, contract_version=1)]
