"""The file ``data.mdb`` as the engine has it: opened with care, read by offset, never mapped.

A read of a file that was cut short, or of a page that the disk cannot give, is an error here and not a
signal, as it would be in mapped memory.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterable, Sequence
from mmap import PAGESIZE
from pathlib import Path
from typing import Final

from kvbm_core.localdir import HeldFolder, unusable
from kvbm_core.tier import Region
from kvbm_lmdb._place import Piece, nbytes_of, pieces_of, room_bytes

__all__ = ["ASIDE", "DataFile", "remove"]

_NAME: Final = "data.mdb"
ASIDE: Final = "data.mdb.damaged"
"""What a damaged file is called from then on; beside it a text says why. There is one at most."""
HEADER: Final = struct.Struct("<QxxHI")
"""LMDB's, ahead of a piece's bytes at the start of its first page: its number, its kind, how many pages."""
_PAGES_OF_A_VALUE: Final = 4
"""LMDB's flag for such a page."""
_MOST_IN_A_READ: Final = 500
"""Pieces; the system takes two buffers for each, and 1,024 at most."""


class DataFile:
    """An open ``data.mdb``. Closed by `close`, or when nobody refers to it: a reader may keep it.

    Args:
        held: The folder that it is in.

    Raises:
        TierOpenError: If it cannot be opened, or somebody else put it there, see `HeldFolder.open`.
    """

    def __init__(self, held: HeldFolder) -> None:
        self._held = held
        self.path = held.path / _NAME
        self.fd = -1
        try:
            self.fd = held.open(_NAME, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise unusable(held.path, error, "lmdb") from error

    def __repr__(self) -> str:
        return f"<DataFile {self.path}, {self.nbytes} bytes>"

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it. Nobody may read any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def nbytes(self) -> int:
        """How long the file is."""
        return os.fstat(self.fd).st_size

    @property
    def is_gone(self) -> bool:
        """True if its name leads to another file, or to none: somebody deleted or replaced it."""
        try:
            return not os.path.samestat(self.path.lstat(), os.fstat(self.fd))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # The medium fails: that says nothing about the file.
            return False

    def read(self, place: bytes, region: Region) -> bool:
        """Fill the first bytes of a region with the object at a place.

        Returns:
            False if the file does not hold it there (it was cut short, or overwritten), or if the object is
            longer than the region.

        Raises:
            OSError: If the medium fails.
        """
        nbytes, pieces, view = nbytes_of(place), pieces_of(place), region.view()
        if nbytes > len(view):
            return False
        if len(pieces) == 1:
            return self._read_run(pieces, [view if len(view) == nbytes else view[:nbytes]])
        at = 0
        for run in _runs(pieces):
            parts = []
            for _, pages in run:
                parts.append(view[at : min(nbytes, at + room_bytes(pages))])
                at += len(parts[-1])
            if not self._read_run(run, parts):
                return False
        return True

    def _read_run(self, run: Sequence[Piece], parts: Sequence[memoryview]) -> bool:
        """Fill parts from pieces that lie next to each other."""
        headers = [bytearray(HEADER.size) for _ in parts]
        buffers = [buffer for pair in zip(headers, parts, strict=True) for buffer in pair]
        # One call, which releases the interpreter lock: the headers cost no second.
        got = os.preadv(self.fd, buffers, run[0][0] * PAGESIZE)
        for header, part, (page, pages) in zip(headers, parts, run, strict=True):
            got -= HEADER.size + len(part)
            if HEADER.unpack(header) != (page, _PAGES_OF_A_VALUE, pages):
                return False
        return got == 0

    def put_aside(self, reason: str) -> DataFile:
        """Give the file its other name, with the reason beside it, and make an empty one.

        Raises:
            TierOpenError: If an empty one cannot be made.
        """
        with contextlib.suppress(OSError):
            os.rename(self.path, self.path.with_name(ASIDE))
            note = self.path.with_name(f"{ASIDE}.txt")
            # Somebody's link of that name is not written through.
            note.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(self._held.open(note.name, flags), "w") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {reason}\n")
        return DataFile(self._held)

    def start_anew(self) -> DataFile:
        """Delete the file, and make an empty one.

        Raises:
            TierOpenError: If that cannot be done.
        """
        self.path.unlink(missing_ok=True)
        return DataFile(self._held)


def remove(folder: Path, *names: str) -> None:
    """Delete files of ours, if they are there; never what a link points to."""
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _runs(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Join pieces that lie next to each other in the file."""
    runs: list[list[Piece]] = []
    for page, pages in pieces:
        last = runs[-1] if runs else []
        if last and last[-1][0] + last[-1][1] == page and len(last) < _MOST_IN_A_READ:
            last.append((page, pages))
        else:
            runs.append([(page, pages)])
    return runs
