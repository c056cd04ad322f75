"""Keeps objects of any length in one SQLite file.

    caller ── STORE, LOAD, LOOKUP, discard ──► one queue ── kvbm-toy-rank0 ──► rank0/blocks.sqlite

One thread does everything in the order it was asked, so nothing can overtake anything else.

Durable: a commit has been written to the file when it is reported, so it survives a `kill -9`. It is
not flushed: a power cut may lose blocks or damage the file.

Bounded: SQLite never lets the file grow beyond the capacity (`max_page_count`). Its rollback journal
lies beside the file while a transaction runs; room for it is set aside, but nothing enforces that.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kvbm_core as kvbm
from kvbm_core import Completion, Outcome, Reason
from kvbm_core.log_limit import LogLimit, TierLog

__all__ = ["ToyConfig", "ToyTier", "kvbm_backends"]

_QUEUE_DEPTH = 64
_PAGE_BYTES = 4096
_USABLE_BYTES = 4092
"""Of a page that continues a row."""
_OVERHEAD_BYTES = 3072
"""A row's head, its page of the tree, its place in the index. After much coming and going a row has a page
of the tree to itself in the worst case: measured at most 1,850 bytes, for rows just above half a page."""
_FIXED_PAGES = 24
"""The schema, the roots of the trees, the first pages of the journal."""
_End = tuple[tuple[Outcome, Reason], int]
"""How a transfer ended, and the length of the object."""
_DONE = Outcome.DONE, Reason.NONE
_MISSING = Outcome.MISSING, Reason.MISSING
_REASONS = {sqlite3.SQLITE_FULL: Reason.FULL, sqlite3.SQLITE_CORRUPT: Reason.CORRUPT}
_TABLE = "CREATE TABLE IF NOT EXISTS block (id INTEGER PRIMARY KEY, space BLOB, key BLOB UNIQUE, data BLOB)"


class ToyConfig(kvbm.TierConfig, frozen=True):
    """Settings of a `ToyTier`."""

    path: str
    """Directory on a local disk; rank r uses ``<path>/rank<r>``. Made if it is not there."""
    capacity: kvbm.ByteSize
    """Bytes on the disk, over all ranks."""


class ToyTier(kvbm.Tier):
    """Objects as rows of one table."""

    def __init__(self, config: ToyConfig, context: kvbm.TierContext) -> None:
        self._context = context
        self._log = TierLog("kvbm_toy", context.name)
        self._lines = LogLimit(self._log)
        self._folder = Path(config.path).expanduser() / f"rank{context.rank}"
        self._pages = config.capacity // context.world_size // _PAGE_BYTES
        self._capabilities = kvbm.Capabilities(
            self._room(config),
            _QUEUE_DEPTH,
            durable=True,
            detail=f"{self._folder}",
            overhead_bytes=_OVERHEAD_BYTES,
        )
        self._lock_file = _lock(self._folder)
        try:
            self._drop_other_ranks()
            self._database = self._open(self._folder / "blocks.sqlite")
            self._found = self._take_stock()
        except (OSError, sqlite3.Error) as error:
            os.close(self._lock_file)
            raise _refusal(f"path: {self._folder}: {error}; write another directory, or delete it") from error
        self._used_bytes = sum(self._capabilities.charge(nbytes) for _, nbytes in self._found)
        self._done: deque[Completion] = deque()
        self._unpolled = 0
        self._closed = False
        self._thread = ThreadPoolExecutor(1, f"kvbm-toy-rank{context.rank}")

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._unpolled} in flight"
        return (
            f"<ToyTier {self._folder} {self._used_bytes}/{self._capabilities.capacity_bytes} bytes, {state}>"
        )

    @property
    def capabilities(self) -> kvbm.Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[tuple[kvbm.BlockKey, int]]:
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
            self._lines.close()

    def _drop_other_ranks(self) -> None:
        """Delete what more ranks than there are now have left: the capacity is for all of them."""
        if self._context.rank == 0:
            for folder in self._folder.parent.glob("rank*"):
                if int(folder.name.removeprefix("rank")) >= self._context.world_size:
                    self._log.warning("%s: more ranks than there are now left it; dropping it", folder)
                    shutil.rmtree(folder)

    def _room(self, config: ToyConfig) -> int:
        """Count the bytes of objects that the pages hold. The room of two of the longest is the journal's."""
        longest_bytes = self._context.max_bytes + _OVERHEAD_BYTES
        longest_pages = -(-longest_bytes // _USABLE_BYTES)
        room = (self._pages - _FIXED_PAGES - 2 * longest_pages) * _USABLE_BYTES
        if room < longest_bytes:
            least = _PAGE_BYTES * (_FIXED_PAGES + 3 * longest_pages) * self._context.world_size
            raise _refusal(f"capacity: {config.capacity} holds no object; write at least {least}")
        return room

    def _open(self, file: Path) -> sqlite3.Connection:
        if file.exists() and file.stat().st_size > self._pages * _PAGE_BYTES:
            self._log.warning("%s is larger than its capacity: dropping it", file)
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

    def _take_stock(self) -> list[tuple[kvbm.BlockKey, int]]:
        """List the objects that are served, oldest first, and delete all others."""
        served = (self._context.namespace, self._context.max_bytes)
        self._database.execute(
            "DELETE FROM block WHERE space != ? OR length(data) NOT BETWEEN 1 AND ?", served
        )
        found: list[tuple[kvbm.BlockKey, int]] = []
        room = self._capabilities.capacity_bytes or 0
        rows = self._database.execute("SELECT id, key, length(data) FROM block ORDER BY id DESC").fetchall()
        for number, key, nbytes in rows:
            room -= self._capabilities.charge(nbytes)
            if room < 0:
                self._database.execute("DELETE FROM block WHERE id <= ?", (number,))
                break
            found.append((bytes(key), nbytes))
        return found[::-1]

    # From here on: the tier's own thread.

    def _run(self, transfer: kvbm.Transfer) -> None:
        nbytes, why = 0, ""
        try:
            end, nbytes = getattr(self, f"_{transfer.op.value}")(transfer)
        except Exception as error:  # noqa: BLE001 - a thread's top: it becomes a completion
            why = str(error)
            self._lines.error((transfer.op, why), "%s: %s", transfer.op.value, why)
            end = (Outcome.FAILED, _REASONS.get(getattr(error, "sqlite_errorcode", -1), Reason.ERROR))
        self._done.append(Completion(transfer.ticket, *end, why, nbytes))
        self._context.wake()

    def _lookup(self, transfer: kvbm.Transfer) -> _End:
        row = self._database.execute(
            "SELECT length(data) FROM block WHERE key = ?", (transfer.key,)
        ).fetchone()
        return (_DONE, row[0]) if row else (_MISSING, 0)

    def _store(self, transfer: kvbm.Transfer) -> _End:
        found = self._lookup(transfer)
        if found[0] is _DONE:
            return found
        charge = self._capabilities.charge(transfer.region.nbytes)
        if self._used_bytes + charge > (self._capabilities.capacity_bytes or 0):
            return (Outcome.FAILED, Reason.FULL), 0
        row = (self._context.namespace, transfer.key, transfer.region.view())
        self._database.execute("INSERT INTO block (space, key, data) VALUES (?, ?, ?)", row)
        self._used_bytes += charge
        return _DONE, transfer.region.nbytes

    def _load(self, transfer: kvbm.Transfer) -> _End:
        end, nbytes = self._lookup(transfer)
        if end is _MISSING:
            return end, 0
        if not 0 < nbytes <= transfer.region.nbytes:
            return (Outcome.FAILED, Reason.CORRUPT), 0
        [data] = self._database.execute("SELECT data FROM block WHERE key = ?", (transfer.key,)).fetchone()
        transfer.region.view()[:nbytes] = data
        return end, nbytes

    def _erase(self, keys: Sequence[kvbm.BlockKey]) -> None:
        # What an error leaves is served on: equal keys have equal bytes, and its room stays counted.
        for key in keys:
            gone = "DELETE FROM block WHERE key = ? RETURNING length(data)"
            for (nbytes,) in self._database.execute(gone, (key,)).fetchall():
                self._used_bytes -= self._capabilities.charge(nbytes)


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


def _share_bytes(blocks: int, block_bytes: int) -> int:
    """Give the share of the capacity in which so many blocks have room, see `ToyTier._room`."""
    each_bytes = block_bytes + _OVERHEAD_BYTES
    pages = -(-blocks * each_bytes // _USABLE_BYTES) + 2 * -(-each_bytes // _USABLE_BYTES)
    return _PAGE_BYTES * (_FIXED_PAGES + pages)


def _check(config: ToyConfig) -> None:
    place = Path(config.path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise _refusal(f"path: {config.path!r}: {place} is no directory you may write to; write another")


@kvbm.hookimpl
def kvbm_backends() -> Sequence[kvbm.Backend]:
    """Offer the backend ``toy``."""
    return [kvbm.Backend("toy", ToyConfig, ToyTier, _check, contract_version=2, share_bytes=_share_bytes)]
