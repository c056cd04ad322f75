"""The environment as the keeper opens it: what is in it, and whether it can be trusted."""

from __future__ import annotations

import logging
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import lmdb

from kvbm_core.block import KEY_BYTES, NAMESPACE_BYTES
from kvbm_core.localdir import FILE_MODE
from kvbm_lmdb._data_file import HEADER

__all__ = ["DAMAGE", "INDEX_ROW", "Entry", "Store", "open_store"]

_log = logging.getLogger("kvbm_lmdb")

INDEX_ROW: Final = struct.Struct("<QQQ")
_OLD_ROW: Final = struct.Struct("<QQ")
"""Without the offset: such a block cannot be read any more and is given up first."""
DAMAGE: Final = (
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
_BEAT_ROWS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Entry:
    """A block found at open."""

    full_key: bytes
    """Namespace and key."""
    sequence: int
    """Stored later: higher."""
    nbytes: int
    offset: int
    """Where its bytes begin in the file. 0: cannot be told."""


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
    env = lmdb.open(
        f"/proc/self/fd/{fd}",
        subdir=False,
        lock=False,
        map_size=map_bytes,
        sync=False,
        mode=FILE_MODE,
        max_dbs=2,
    )
    if env.stat()["psize"] != mmap.PAGESIZE:
        raise lmdb.InvalidError("it was made on a machine with memory pages of another size")
    # Reading a page beyond the end of the file would end this process (SIGBUS).
    if (env.info()["last_pgno"] + 1) * mmap.PAGESIZE > os.fstat(fd).st_size:
        raise lmdb.CorruptedError("the file was cut short")
    blocks, index = env.open_db(b"blocks"), env.open_db(b"index")
    return Store(env, blocks, index, _entries(env, index, os.fstat(fd).st_size, beat))


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
            if len(full_key) == NAMESPACE_BYTES + KEY_BYTES and len(row) in (INDEX_ROW.size, _OLD_ROW.size):
                found.append(_entry(full_key, row, file_bytes))
    found.sort(key=lambda entry: entry.sequence)
    return found


def _entry(full_key: bytes, row: bytes, file_bytes: int) -> Entry:
    if len(row) == _OLD_ROW.size:
        row += bytes(INDEX_ROW.size - _OLD_ROW.size)
    sequence, nbytes, offset = INDEX_ROW.unpack(row)
    sound = offset % mmap.PAGESIZE == HEADER.size and offset + nbytes <= file_bytes
    return Entry(full_key, sequence, nbytes, offset if sound else 0)
