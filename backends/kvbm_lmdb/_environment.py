"""The environment as the keeper opens it: what is in it, and whether it can be trusted."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import lmdb

from kvbm_core.block import KEY_BYTES, NAMESPACE_BYTES
from kvbm_core.localdir import FILE_MODE
from kvbm_lmdb._place import FORMAT_KEY, SEQUENCE, is_given_up, is_sound, pieces_of

__all__ = ["DAMAGE", "PIECE", "Entry", "Store", "open_store"]

PIECE: Final = struct.Struct(">QH")
"""A key of `blocks`: the object's sequence and the number of the piece. In order of time, so that what is
stored goes to the end of the tree."""
_FORMAT: Final = b"2"
"""Of the two databases; a row of the index."""
DAMAGE: Final = (
    lmdb.BadTxnError,  # In a transaction of ours nothing has failed before.
    lmdb.CorruptedError,
    lmdb.CursorFullError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.NotFoundError,
    lmdb.PageFullError,
    lmdb.PageNotFoundError,
    lmdb.ProblemError,
    lmdb.VersionMismatchError,
)
"""What LMDB raises when the file is not, or no longer, a sound environment."""
_OTHER_FORMAT: Final = "LMDB data format v"
_BEAT_ROWS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Entry:
    """An object found at open."""

    full_key: bytes
    """Namespace and key."""
    sequence: int
    """Stored later: higher."""
    place: bytes
    """See `_place`. Empty: it cannot be told, or is being given up."""
    pages: int
    """That its pieces take."""


@dataclass(frozen=True, slots=True)
class Store:
    """An open environment, its two databases and what was found in them, oldest first."""

    env: Any
    blocks: Any
    index: Any
    entries: list[Entry]


def open_store(fd: int, map_bytes: int, beat: Callable[[], None]) -> Store:
    """Open the environment in a file and list it.

    Args:
        fd: Of the file. LMDB gets it, and not a name that may mean another file meanwhile.
        map_bytes: Beyond which the file cannot grow.
        beat: Called now and then, as a sign of life.

    Raises:
        lmdb.Error: If it cannot be opened; of `DAMAGE` if the file is not sound.
    """
    # No lock: this process alone has the file, and no reading transaction is open while it writes. Not
    # writemap: slower for large values, and damaged by a power cut more often.
    try:
        env = lmdb.open(
            f"/proc/self/fd/{fd}",
            subdir=False,
            lock=False,
            map_size=map_bytes,
            sync=False,
            mode=FILE_MODE,
            max_dbs=2,
        )
    except lmdb.Error as error:
        # py-lmdb 3 looks at the format's number before LMDB does, and has no class for what it finds.
        if _OTHER_FORMAT in str(error):
            raise lmdb.VersionMismatchError(str(error)) from error
        raise
    if env.stat()["psize"] != mmap.PAGESIZE:
        raise lmdb.InvalidError("it was made on a machine with memory pages of another size")
    # Reading a page beyond the end of the file would end this process (SIGBUS).
    if (env.info()["last_pgno"] + 1) * mmap.PAGESIZE > os.fstat(fd).st_size:
        raise lmdb.CorruptedError("the file was cut short")
    blocks, index = _databases(env)
    return Store(env, blocks, index, _entries(env, index, os.fstat(fd).st_size, beat))


def _databases(env: Any) -> tuple[Any, Any]:
    with env.begin(write=True) as txn:
        is_new = not txn.stat()["entries"]
        blocks, index = env.open_db(b"blocks", txn), env.open_db(b"index", txn)
        if is_new:
            txn.put(FORMAT_KEY, _FORMAT, db=index)
        elif (found := txn.get(FORMAT_KEY, b"1", db=index)) != _FORMAT:
            said = found[:16].decode(errors="replace")
            raise lmdb.VersionMismatchError(
                f"its databases have format {said}, and this is {_FORMAT.decode()}"
            )
    return blocks, index


def _entries(env: Any, index: Any, file_bytes: int, beat: Callable[[], None]) -> list[Entry]:
    found, previous = [], b""
    with env.begin(db=index) as txn:
        for count, (full_key, row) in enumerate(txn.cursor()):
            if full_key <= previous:
                # A tree that was damaged may lead in circles.
                raise lmdb.CorruptedError("the index is not in order")
            previous = full_key
            if count % _BEAT_ROWS == 0:
                beat()
            if len(full_key) == NAMESPACE_BYTES + KEY_BYTES and len(row) > SEQUENCE.size:
                found.append(_entry(full_key, row, file_bytes))
    found.sort(key=lambda entry: entry.sequence)
    return found


def _entry(full_key: bytes, row: bytes, file_bytes: int) -> Entry:
    (sequence,), place = SEQUENCE.unpack_from(row), row[SEQUENCE.size :]
    if is_sound(place, file_bytes):
        return Entry(full_key, sequence, place, sum(pages for _, pages in pieces_of(place)))
    pages = sum(pages for _, pages in pieces_of(place)) if is_given_up(place) else 0
    return Entry(full_key, sequence, b"", pages)
