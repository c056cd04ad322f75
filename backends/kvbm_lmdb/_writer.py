"""What one batch of stores and erasures does to the environment, and what happens if it does not fit.

An object goes into one run of neighbouring pages. Where lengths are mixed, there may be enough free pages
and no run that is long enough: then the object is cut into pieces, see `_cut`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import lmdb

from kvbm_core.localdir import free_bytes
from kvbm_lmdb._cut import STEP_PAGES, Value, delete, put_cut, put_whole
from kvbm_lmdb._data_file import ASIDE, remove
from kvbm_lmdb._directory import OVERHEAD_BYTES, PAGE_BYTES, Sizing
from kvbm_lmdb._environment import DAMAGE, PIECE, Entry, Store
from kvbm_lmdb._messages import Committed
from kvbm_lmdb._place import SEQUENCE, TICK_KEY, nbytes_of

__all__ = ["Writer"]

_ROUNDS: Final = 4
"""Attempts to make room for stores that did not fit."""
_CUT_BATCHES: Final = 64
"""So many batches look for room object by object after one found none as a whole: each that fails is
written twice."""
_DISK_RESERVE_BYTES: Final = 1 << 20
"""Left free on the disk: LMDB writes new pages even to erase, so a disk filled to the last page by
stores could never be emptied again."""
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAP_IS_FULL: Final = "the map is full"


class Writer:
    """Commits batches; used by one thread.

    It also keeps the objects it does not serve (of other namespaces, too long, or half erased) within what
    the capacity leaves, and gives the oldest of them up first; before them, a damaged file put aside.
    """

    def __init__(self, store: Store, sizing: Sizing, folder: str, namespace: bytes, max_bytes: int) -> None:
        self._store = store
        self._sizing = sizing
        self._folder = Path(folder)
        self._namespace = namespace
        self._max_bytes = max_bytes
        self._map_bytes = sizing.map_bytes
        """As LMDB has it now: less than it may be while the disk is short."""
        self._cutting = 0
        """Batches that do not try first to go in whole."""
        self._others: OrderedDict[bytes, int] = OrderedDict()
        self._other_bytes = 0
        self._sequence = max(_last_sequence(store), *(entry.sequence for entry in store.entries), 0)
        aside = self._folder / ASIDE
        self._aside_bytes = aside.lstat().st_size if os.path.lexists(aside) else 0

    def __repr__(self) -> str:
        return f"<Writer {len(self._others)} other objects>"

    def take_stock(self) -> list[tuple[bytes, bytes]]:
        """Sort what was found into what is served and what is only kept; make both fit.

        Returns:
            Keys that are served and where their objects lie, oldest first.

        Raises:
            lmdb.Error: If it cannot be trimmed to its capacity.
        """
        entries, own_bytes = self._store.entries, 0
        own: list[Entry] = []
        for entry in reversed(entries):
            if not entry.place or not entry.full_key.startswith(self._namespace):
                continue
            nbytes = nbytes_of(entry.place)
            if (
                nbytes <= self._max_bytes
                and own_bytes + nbytes + OVERHEAD_BYTES <= self._sizing.capacity_bytes
            ):
                own_bytes += nbytes + OVERHEAD_BYTES
                own.append(entry)
        own.reverse()
        served = {entry.full_key for entry in own}
        for entry in entries:
            if entry.full_key not in served:
                charge = self._others[entry.full_key] = entry.pages * PAGE_BYTES + OVERHEAD_BYTES
                self._other_bytes += charge
        entries.clear()
        self._trim(own_bytes)
        return [(entry.full_key[len(self._namespace) :], entry.place) for entry in own]

    def write(self, erase: Sequence[bytes], stores: Sequence[Value], own_bytes: int) -> Committed:
        """Commit a batch, whole or in part.

        Args:
            erase: Keys to erase, before the stores.
            stores: What to put.
            own_bytes: What objects of this namespace take of the capacity after it.

        Raises:
            lmdb.Error: If it is not for want of room that it fails.
        """
        keys, places, full = [self._namespace + key for key in erase], list[bytes](), ""
        stores = [(self._namespace + key, value) for key, value in stores]
        nbytes = sum(len(value) for _, value in stores)
        try:
            self._trim(own_bytes)
            self._make_room_of_aside(nbytes)
            self._limit_map(nbytes)
            full = self._write(keys, stores, places)
        except (lmdb.Error, OSError) as error:
            full = self._no_room(error, nbytes)
            try:
                # Without the stores there may be room.
                self._erase(keys)
                keys = []
            except (lmdb.Error, OSError) as error_again:
                full = self._no_room(error_again, nbytes)
        return Committed(not keys, places, full)

    def sync(self) -> None:
        """Flush everything committed to the disk.

        Raises:
            lmdb.Error: If the disk refuses.
        """
        # Without force, LMDB obeys sync=False even here and does nothing.
        self._store.env.sync(True)

    def _write(self, keys: list[bytes], stores: Sequence[Value], places: list[bytes]) -> str:
        """Empty `keys` and fill `places` as far as it gets, and say why it got no further.

        Raises:
            lmdb.Error: If there is no room even to erase, or it fails for another reason.
        """
        if not self._attempt(keys, stores, places):
            # Erase first, and let LMDB have the freed pages.
            for _ in range(_ROUNDS):
                victims = list(islice(self._others, self._sizing.most_erased))
                self._erase([*keys, *victims])
                keys.clear()
                self._tick()
                if self._attempt(keys, stores[len(places) :], places):
                    break
                if not victims:
                    return _MAP_IS_FULL
            else:
                return _MAP_IS_FULL
        return ""

    def _attempt(self, keys: list[bytes], stores: Sequence[Value], places: list[bytes]) -> bool:
        """Erase and store in one transaction, and say whether all of it fitted."""
        for cut in (False, True):
            if not cut and self._cutting:
                continue
            try:
                self._cutting = max(0, self._cutting - 1)
                found = self._commit(keys, stores, cut=cut)
            except lmdb.MapFullError:
                self._cutting = _CUT_BATCHES
                continue
            keys.clear()
            places += found
            return len(found) == len(stores)
        return False

    def _commit(self, keys: Sequence[bytes], stores: Sequence[Value], *, cut: bool = False) -> list[bytes]:
        """Give the places of the stores that fitted: all of them, unless they may be cut."""
        places: list[bytes] = []
        if not keys and not stores:
            return places
        with self._store.env.begin(write=True, buffers=True) as txn:
            for key in keys:
                delete(self._store, txn, key)
            for sequence, value in enumerate(stores, self._sequence + 1):
                if not cut:
                    places.append(put_whole(self._store, txn, sequence, value))
                elif place := put_cut(self._store, txn, sequence, value):
                    places.append(place)
                else:
                    break
        self._sequence += len(places)
        self._forget(keys)
        self._forget(key for key, _ in stores[: len(places)])
        return places

    def _erase(self, keys: Sequence[bytes]) -> None:
        """Erase objects, and if they are too many for one transaction in a few pages at a time."""
        # It may take the last of the disk.
        limit_bytes = self._map_bytes
        self._set_map(self._sizing.map_bytes)
        try:
            self._commit(keys, ())
        except lmdb.MapFullError:
            self._erase_in_steps(deque(keys))
        finally:
            self._set_map(limit_bytes)

    def _erase_in_steps(self, keys: deque[bytes]) -> None:
        while keys:
            pages: float = STEP_PAGES
            gone = []
            with self._store.env.begin(write=True, buffers=True) as txn:
                while keys and pages > 0:
                    pages = delete(self._store, txn, keys[0], pages)
                    if pages >= 0:
                        gone.append(keys.popleft())
            self._forget(gone)

    def _forget(self, keys: Iterable[bytes]) -> None:
        if self._others:
            for key in keys:
                self._other_bytes -= self._others.pop(key, 0)

    def _trim(self, own_bytes: int) -> None:
        while victims := self._victims(own_bytes):
            self._erase(victims)

    def _victims(self, own_bytes: int) -> list[bytes]:
        """Choose others to give up so that `own_bytes` fit; a bounded number at a time."""
        excess_bytes = own_bytes + self._other_bytes - self._sizing.capacity_bytes
        victims = []
        for key, charge in islice(self._others.items(), self._sizing.most_erased):
            if excess_bytes <= 0:
                break
            victims.append(key)
            excess_bytes -= charge
        return victims

    def _tick(self) -> None:
        """Let LMDB move on, so that pages freed two transactions ago can be used."""
        # There may be no room even for that.
        with contextlib.suppress(lmdb.MapFullError):
            for _ in range(3):
                with self._store.env.begin(write=True, db=self._store.index) as txn:
                    # An unchanged value would be no change, and no transaction.
                    self._sequence += 1
                    txn.put(TICK_KEY, SEQUENCE.pack(self._sequence))

    def _make_room_of_aside(self, nbytes: int) -> None:
        """Delete the damaged file put aside if there may soon be no room for both."""
        if not self._aside_bytes:
            return
        grown_bytes = self._file_bytes() + self._sizing.growth_bytes
        short = free_bytes(self._folder) < nbytes + _DISK_RESERVE_BYTES
        if short or grown_bytes + self._aside_bytes > self._sizing.map_bytes:
            remove(self._folder, ASIDE, f"{ASIDE}.txt")
            self._aside_bytes = 0

    def _limit_map(self, nbytes: int) -> None:
        """Let stores have the last of the disk only within the file: erasing needs new pages as well."""
        room_bytes = max(0, free_bytes(self._folder) - _DISK_RESERVE_BYTES)
        if not nbytes or room_bytes >= self._sizing.growth_bytes:
            self._set_map(self._sizing.map_bytes)
        else:
            within_bytes = self._file_bytes() + room_bytes // PAGE_BYTES * PAGE_BYTES
            self._set_map(min(self._sizing.map_bytes, within_bytes))

    def _set_map(self, nbytes: int) -> None:
        if nbytes != self._map_bytes:
            self._store.env.set_mapsize(nbytes)
            self._map_bytes = nbytes

    def _file_bytes(self) -> int:
        return (int(self._store.env.info()["last_pgno"]) + 1) * PAGE_BYTES

    def _no_room(self, error: Exception, nbytes: int) -> str:
        """Say why there is no room for `nbytes`, if that is what an error says.

        Raises:
            Exception: The error, if it is another one.
        """
        if isinstance(error, lmdb.MapFullError):
            return _MAP_IS_FULL
        if any(os.strerror(number) in str(error) for number in _NO_ROOM):
            return str(error)
        # A disk that fills within a write is reported by LMDB as an input/output error.
        known = isinstance(error, (*DAMAGE, lmdb.PanicError))
        if not known and free_bytes(self._folder) < max(2 * nbytes, PAGE_BYTES):
            return os.strerror(errno.ENOSPC)
        raise error


def _last_sequence(store: Store) -> int:
    """Give the last sequence of which there are bytes: of a damaged file the index may not know it."""
    with store.env.begin(db=store.blocks) as txn, txn.cursor() as cursor:
        key: Any = cursor.key() if cursor.last() else b""
    return int(PIECE.unpack(key)[0]) if len(key) == PIECE.size else 0
