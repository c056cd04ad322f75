"""What one batch of stores and erasures does to the environment, and what happens if it does not fit."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import lmdb

from kvbm_core.localdir import free_bytes
from kvbm_lmdb._data_file import ASIDE, HEADER, remove
from kvbm_lmdb._directory import ERASE_BLOCKS, PAGE_BYTES, Sizing, pages_of
from kvbm_lmdb._environment import DAMAGE, INDEX_ROW, Entry, Store
from kvbm_lmdb._messages import Committed

__all__ = ["Value", "Writer"]

_log = logging.getLogger("kvbm_lmdb")

_TICK: Final = b"tick"
"""A row of the index that is no block's: rewritten to make LMDB count a transaction on."""
_ROUNDS: Final = 4
"""Attempts to make room for stores that did not fit."""
_DISK_RESERVE_BYTES: Final = 1 << 20
"""Left free on the disk: LMDB writes new pages even to erase, so a disk filled to the last page by
stores could never be emptied again."""
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Value = tuple[bytes, memoryview]
"""A block's key, and its bytes in the window."""


class Writer:
    """Commits batches; used by one thread.

    It also keeps the blocks it does not serve (of other namespaces, of another length) within what the
    capacity leaves, and gives the oldest of them up first; before them, a damaged file put aside.
    """

    def __init__(self, store: Store, sizing: Sizing, folder: str, namespace: bytes, block_bytes: int) -> None:
        self._store = store
        self._sizing = sizing
        self._folder = Path(folder)
        self._namespace = namespace
        self._block_bytes = block_bytes
        self._others: OrderedDict[bytes, int] = OrderedDict()
        self._other_pages = 0
        self._sequence = max((entry.sequence for entry in store.entries), default=0)
        aside = self._folder / ASIDE
        self._aside_pages = -(-aside.lstat().st_size // PAGE_BYTES) if os.path.lexists(aside) else 0

    def __repr__(self) -> str:
        return f"<Writer {len(self._others)} other blocks>"

    def take_stock(self) -> list[tuple[bytes, int]]:
        """Sort what was found into what is served and what is only kept; make both fit.

        Returns:
            Keys that are served and where their bytes begin, oldest first.

        Raises:
            lmdb.Error: If it cannot be trimmed to its capacity.
        """
        entries, prefix = self._store.entries, len(self._namespace)
        own = [
            entry
            for entry in entries
            if entry.offset
            and entry.nbytes == self._block_bytes
            and entry.full_key.startswith(self._namespace)
        ]
        own = own[-self._sizing.capacity_blocks :]
        served = {entry.full_key for entry in own}
        self._adopt(entry for entry in entries if entry.full_key not in served)
        entries.clear()
        self._trim(len(own))
        return [(entry.full_key[prefix:], entry.offset) for entry in own]

    def write(self, erase: Sequence[bytes], stores: Sequence[Value], own_blocks: int) -> Committed:
        """Commit a batch, whole or in part.

        Args:
            erase: Keys to erase, before the stores.
            stores: What to put.
            own_blocks: How many blocks of this namespace there are after it.

        Raises:
            lmdb.Error: If it is not for want of room that it fails. Nothing was committed.
        """
        keys = [self._namespace + key for key in erase]
        try:
            self._trim(own_blocks)
            self._make_room_of_aside(len(stores))
            if stores and self._disk_is_short(len(stores), own_blocks):
                self._commit(keys, ())
                return Committed(True, [], os.strerror(errno.ENOSPC))
        except (lmdb.Error, OSError) as error:
            return Committed(False, [], self._no_room(error, len(stores)))
        offsets, error_first = self._try(keys, stores)
        if error_first is None:
            return Committed(True, offsets)
        full = self._no_room(error_first, len(stores))
        if not stores:
            return Committed(False, [], full)
        return self._write_again(keys, stores, error_first, full)

    def sync(self) -> None:
        """Flush everything committed to the disk.

        Raises:
            lmdb.Error: If the disk refuses.
        """
        # Without force, LMDB obeys sync=False even here and does nothing.
        self._store.env.sync(True)

    def _write_again(
        self, keys: Sequence[bytes], stores: Sequence[Value], error: Exception, full: str
    ) -> Committed:
        """Erase first, let LMDB have the freed pages, and store what fits then."""
        offsets: list[int] = []
        try:
            for _ in range(_ROUNDS if isinstance(error, lmdb.MapFullError) else 0):
                # Others of another size leave room in pieces that do not fit: give up more than counts.
                self._commit([*keys, *islice(self._others, ERASE_BLOCKS)], ())
                keys = ()
                self._tick()
                offsets, error_again = self._try((), stores)
                if error_again is None:
                    return Committed(True, offsets)
                if not self._others:
                    break
            self._commit(keys, ())
            keys = ()
            # The stores ahead of the one that did not fit.
            offsets, error_again = self._try((), stores[: len(offsets)])
            return Committed(True, [] if error_again else offsets, full)
        except (lmdb.Error, OSError) as error_again:
            return Committed(not keys, [], self._no_room(error_again, len(stores)))

    def _try(self, keys: Sequence[bytes], stores: Sequence[Value]) -> tuple[list[int], Exception | None]:
        """Say where stores went before an error, and the error; after one nothing is committed."""
        offsets: list[int] = []
        try:
            self._commit(keys, stores, offsets)
        except (lmdb.Error, OSError) as error:
            # At the commit everything was put, and still it did not fit.
            return (offsets if len(offsets) < len(stores) else []), error
        return offsets, None

    def _commit(
        self, keys: Sequence[bytes], stores: Sequence[Value], offsets: list[int] | None = None
    ) -> None:
        if not keys and not stores:
            return
        blocks, index, nbytes = self._store.blocks, self._store.index, self._block_bytes
        with self._store.env.begin(write=True, buffers=True) as txn:
            for key in keys:
                txn.delete(key, db=blocks)
                txn.delete(key, db=index)
            for count, (short_key, value) in enumerate(stores):
                key = self._namespace + short_key
                txn.put(key, value, db=blocks)
                offset = _offset_of(txn.get(key, db=blocks))
                txn.put(key, INDEX_ROW.pack(self._sequence + count + 1, nbytes, offset), db=index)
                if offsets is not None:
                    offsets.append(offset)
        self._sequence += len(stores)
        self._forget(keys)
        self._forget(self._namespace + key for key, _ in stores)

    def _adopt(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            pages = self._others[entry.full_key] = pages_of(entry.nbytes)
            self._other_pages += pages

    def _forget(self, keys: Iterable[bytes]) -> None:
        if self._others:
            for key in keys:
                self._other_pages -= self._others.pop(key, 0)

    def _trim(self, own_blocks: int) -> None:
        while victims := self._victims(own_blocks):
            self._commit(victims, ())

    def _victims(self, own_blocks: int) -> list[bytes]:
        """Choose others to give up so that `own_blocks` fit; a bounded number at a time."""
        excess = own_blocks * self._sizing.block_pages + self._other_pages - self._sizing.budget_pages
        victims = []
        for key, pages in islice(self._others.items(), ERASE_BLOCKS):
            if excess <= 0:
                break
            victims.append(key)
            excess -= pages
        return victims

    def _tick(self) -> None:
        """Let LMDB move on, so that pages freed two transactions ago can be used."""
        try:
            for _ in range(3):
                with self._store.env.begin(write=True, db=self._store.index) as txn:
                    # An unchanged value would be no change, and no transaction.
                    self._sequence += 1
                    txn.put(_TICK, INDEX_ROW.pack(self._sequence, 0, 0))
        except lmdb.MapFullError as error:
            _log.debug("no room even for a tick: %s", error)

    def _make_room_of_aside(self, stores: int) -> None:
        """Delete the damaged file put aside if there may soon be no room for both."""
        if not self._aside_pages:
            return
        grown = self._file_pages() + self._sizing.growth_pages
        needed_bytes = stores * self._sizing.block_pages * PAGE_BYTES
        short = free_bytes(self._folder) < needed_bytes + _DISK_RESERVE_BYTES
        if short or (grown + self._aside_pages) * PAGE_BYTES > self._sizing.map_bytes:
            remove(self._folder, ASIDE, f"{ASIDE}.txt")
            self._aside_pages = 0

    def _disk_is_short(self, stores: int, own_blocks: int) -> bool:
        """Say whether stores would take the last of the disk, which erasing needs as well."""
        needed_bytes = stores * self._sizing.block_pages * PAGE_BYTES
        if free_bytes(self._folder) >= needed_bytes + _DISK_RESERVE_BYTES:
            return False
        # Unless the file has free pages of its own.
        needed_pages = self._sizing.needed_pages(own_blocks, stores) + self._other_pages
        return needed_pages > self._file_pages()

    def _file_pages(self) -> int:
        return int(self._store.env.info()["last_pgno"]) + 1

    def _no_room(self, error: Exception, stores: int) -> str:
        """Say why there is no room, if that is what an error says.

        Raises:
            Exception: The error, if it is another one.
        """
        needed_bytes = stores * self._sizing.block_pages * PAGE_BYTES
        if isinstance(error, lmdb.MapFullError):
            return "the map is full"
        if any(os.strerror(number) in str(error) for number in _NO_ROOM):
            return str(error)
        # A disk that fills within a write is reported by LMDB as an input/output error.
        known = isinstance(error, (*DAMAGE, lmdb.PanicError))
        if not known and free_bytes(self._folder) < max(2 * needed_bytes, PAGE_BYTES):
            return os.strerror(errno.ENOSPC)
        raise error


class _Buffer(ctypes.Structure):
    """Python's ``Py_buffer``, of which the address alone is read."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("owner", ctypes.c_void_p),
        ("numbers", ctypes.c_ssize_t * 3),
        ("pointers", ctypes.c_void_p * 5),
    )


def _offset_of(value: Any) -> int:
    """Say where a value put in this transaction will lie in the file: its first page bears its number."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(value), ctypes.byref(buffer), 0)
    try:
        header = ctypes.string_at((buffer.address or 0) - HEADER.size, HEADER.size)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return int(HEADER.unpack(header)[0]) * mmap.PAGESIZE + HEADER.size
