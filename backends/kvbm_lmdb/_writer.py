"""What one batch of stores and erasures does to the environment, and what happens if it does not fit."""

from __future__ import annotations

import errno
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import lmdb

from kvbm_core.localdir import free_bytes
from kvbm_core.tier import Reason, Transfer
from kvbm_lmdb._directory import (
    DAMAGE,
    ERASE_BLOCKS,
    INDEX_ROW,
    PAGE_BYTES,
    Entry,
    Sizing,
    Store,
    pages_of,
)

__all__ = ["Writer"]

_log = logging.getLogger("kvbm_lmdb")

_TICK: Final = b"tick"
"""A row of the index that is no block's: rewritten to make LMDB count a transaction on."""
_ROUNDS: Final = 4
"""Attempts to make room for stores that did not fit."""
_DISK_RESERVE_BYTES: Final = 1 << 20
"""Left free on the disk: LMDB writes new pages even to erase, so a disk filled to the last page by
stores could never be emptied again."""
_READERS_WAIT_S: Final = 0.05
"""A reader that holds freed pages back is done with its batch by then."""


class Writer:
    """Commits batches; used by one thread.

    It also keeps the blocks it does not serve (of other namespaces, of another length) within what the
    capacity leaves, and gives the oldest of them up first.
    """

    def __init__(self, store: Store, sizing: Sizing, folder: Path, namespace: bytes) -> None:
        self._store = store
        self._sizing = sizing
        self._folder = folder
        self._namespace = namespace
        self._others: OrderedDict[bytes, int] = OrderedDict()
        self._other_pages = 0
        self._sequence = max((entry.sequence for entry in store.entries), default=0)
        self.dirty = False
        """Something was committed that `sync` has not flushed."""

    def __repr__(self) -> str:
        return f"<Writer {len(self._others)} other blocks, {'dirty' if self.dirty else 'clean'}>"

    def adopt(self, entries: Iterable[Entry]) -> None:
        """Take charge of blocks that are not served, oldest first."""
        for entry in entries:
            pages = self._others[entry.full_key] = pages_of(entry.nbytes)
            self._other_pages += pages

    def trim(self, own_blocks: int) -> None:
        """Give up others until they and `own_blocks` fit.

        Raises:
            lmdb.Error: If it cannot be written.
        """
        while victims := self._victims(own_blocks):
            self._commit(victims, ())

    def write(self, erase: Sequence[bytes], stores: Sequence[Transfer], own_blocks: int) -> list[Reason]:
        """Commit a batch, whole or in part.

        Args:
            erase: Keys to erase, before the stores.
            stores: What to put.
            own_blocks: How many blocks of this namespace there are after it.

        Returns:
            A reason for each store, in order; NONE if it is committed.

        Raises:
            lmdb.Error: If the erasures could not be committed. No store was either.
        """
        self.trim(own_blocks)
        keys = [self._namespace + key for key in erase]
        if stores and self._disk_is_short(stores, own_blocks):
            self._commit(keys, ())
            return [Reason.FULL] * len(stores)
        error = self._try(keys, stores)[1]
        if error is None:
            return [Reason.NONE] * len(stores)
        if not stores:
            raise error
        return self._write_again(keys, stores, error)

    def sync(self) -> None:
        """Flush everything committed to the disk.

        Raises:
            lmdb.Error: If the disk refuses.
        """
        self.dirty = False
        # Without force, LMDB obeys sync=False even here and does nothing.
        self._store.env.sync(True)

    def _write_again(
        self, keys: Sequence[bytes], stores: Sequence[Transfer], error: Exception
    ) -> list[Reason]:
        """Erase first, let LMDB have the freed pages, and store what fits then."""
        reason = self._reason(error, stores)
        fitted = 0
        for _ in range(_ROUNDS if isinstance(error, lmdb.MapFullError) else 0):
            # Others of another size leave room in pieces that do not fit: give up more than counts.
            self._commit([*keys, *islice(self._others, ERASE_BLOCKS)], ())
            keys = ()
            self._tick()
            fitted, error_again = self._try((), stores)
            if error_again is None:
                return [Reason.NONE] * len(stores)
            if not self._others:
                break
        self._commit(keys, ())
        # The stores ahead of the one that did not fit.
        if fitted and self._try((), stores[:fitted])[1] is None:
            return [Reason.NONE] * fitted + [reason] * (len(stores) - fitted)
        return [reason] * len(stores)

    def _try(self, keys: Sequence[bytes], stores: Sequence[Transfer]) -> tuple[int, Exception | None]:
        """Say how many stores went in before an error, and the error; it leaves nothing committed."""
        fitted = [0]
        try:
            self._commit(keys, stores, fitted)
        except (lmdb.Error, OSError) as error:
            # At the commit everything was put, and still it did not fit.
            return (fitted[0] if fitted[0] < len(stores) else 0), error
        return len(stores), None

    def _commit(
        self, keys: Sequence[bytes], stores: Sequence[Transfer], fitted: list[int] | None = None
    ) -> None:
        if not keys and not stores:
            return
        blocks, index = self._store.blocks, self._store.index
        with self._store.env.begin(write=True) as txn:
            for key in keys:
                txn.delete(key, db=blocks)
                txn.delete(key, db=index)
            for count, transfer in enumerate(stores):
                assert transfer.region is not None
                key = self._namespace + transfer.key
                if fitted is not None:
                    fitted[0] = count
                txn.put(key, transfer.region.view(), db=blocks)
                txn.put(key, INDEX_ROW.pack(self._sequence + count + 1, transfer.region.nbytes), db=index)
            if fitted is not None:
                fitted[0] = len(stores)
        self.dirty = True
        self._sequence += len(stores)
        self._forget(keys)
        self._forget(self._namespace + transfer.key for transfer in stores)

    def _forget(self, keys: Iterable[bytes]) -> None:
        if self._others:
            for key in keys:
                self._other_pages -= self._others.pop(key, 0)

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
        time.sleep(_READERS_WAIT_S)
        try:
            for _ in range(3):
                with self._store.env.begin(write=True, db=self._store.index) as txn:
                    # An unchanged value would be no change, and no transaction.
                    self._sequence += 1
                    txn.put(_TICK, INDEX_ROW.pack(self._sequence, 0))
        except lmdb.Error as error:
            _log.debug("no room even for a tick: %s", error)

    def _disk_is_short(self, stores: Sequence[Transfer], own_blocks: int) -> bool:
        """Say whether stores would take the last of the disk, which erasing needs as well."""
        needed_bytes = len(stores) * self._sizing.block_pages * PAGE_BYTES
        if free_bytes(self._folder) >= needed_bytes + _DISK_RESERVE_BYTES:
            return False
        # Unless the file has free pages of its own.
        file_pages = self._store.env.info()["last_pgno"] + 1
        needed_pages = self._sizing.needed_pages(own_blocks, len(stores)) + self._other_pages
        return bool(needed_pages > file_pages)

    def _reason(self, error: Exception, stores: Sequence[Transfer]) -> Reason:
        needed_bytes = sum(transfer.region.nbytes for transfer in stores if transfer.region is not None)
        # A disk that fills within a write is reported by LMDB as an input/output error.
        full = (
            isinstance(error, lmdb.MapFullError)
            or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
            or free_bytes(self._folder) < 2 * needed_bytes
        )
        if full and not isinstance(error, DAMAGE):
            _log.debug("no room for %d stores: %s", len(stores), error)
            return Reason.FULL
        _log.error("%d stores into %s failed: %s", len(stores), self._folder, error)
        return Reason.ERROR
