"""The file ``data.mdb`` as the engine has it: opened with care, read by offset, never mapped.

A read of a file that was cut short, or of a page that the disk cannot give, is an error here and not a
signal, as it would be in mapped memory.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time
from mmap import PAGESIZE
from pathlib import Path
from typing import Final

from kvbm_core.errors import TierOpenError
from kvbm_core.localdir import FILE_MODE, unusable
from kvbm_core.tier import Region

__all__ = ["ASIDE", "DataFile", "remove"]

_NAME: Final = "data.mdb"
ASIDE: Final = "data.mdb.damaged"
"""What a damaged file is called from then on; beside it a text says why. There is one at most."""
HEADER: Final = struct.Struct("<QxxHI")
"""LMDB's, ahead of a block's bytes at the start of its first page: its number, its kind, how many pages."""
_PAGES_OF_A_VALUE: Final = 4
"""LMDB's flag for such a page."""


class DataFile:
    """An open ``data.mdb``. Closed when nobody refers to it any more, so that a reader may hold on to it.

    Raises:
        TierOpenError: If it is a link, no regular file or somebody else's, or cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / _NAME
        self.fd = -1
        try:
            # A link or a pipe that somebody put here is neither followed nor waited for.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self.fd = os.open(self.path, flags, FILE_MODE)
        except OSError as error:
            if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
                raise _refused(self.path, "is not a regular file") from error
            raise unusable(folder, error, "lmdb") from error
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode):
            raise _refused(self.path, "is not a regular file")
        if found.st_uid != os.geteuid():
            raise _refused(self.path, f"belongs to uid {found.st_uid}, and this is uid {os.geteuid()}")
        os.fchmod(self.fd, FILE_MODE)

    def __repr__(self) -> str:
        return f"<DataFile {self.path}, {self.nbytes} bytes>"

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    @property
    def nbytes(self) -> int:
        """How long the file is."""
        return os.fstat(self.fd).st_size

    def read(self, offset: int, region: Region) -> bool:
        """Fill a region with the block that begins at an offset.

        Returns:
            False if the file does not hold a block there: it was cut short, or overwritten.

        Raises:
            OSError: If the medium fails.
        """
        header = bytearray(HEADER.size)
        # One call, which releases the interpreter lock: the header costs no second.
        got = os.preadv(self.fd, [header, region.view()], offset - HEADER.size)
        page, kind, pages = HEADER.unpack(header)
        return (
            got == HEADER.size + region.nbytes
            and page * PAGESIZE == offset - HEADER.size
            and kind == _PAGES_OF_A_VALUE
            and pages == -(-got // PAGESIZE)
        )

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
            fd = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            with os.fdopen(fd, "w") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {reason}\n")
        return DataFile(self.path.parent)

    def start_anew(self) -> DataFile:
        """Delete the file, and make an empty one.

        Raises:
            TierOpenError: If that cannot be done.
        """
        self.path.unlink(missing_ok=True)
        return DataFile(self.path.parent)


def remove(folder: Path, *names: str) -> None:
    """Delete files of ours, if they are there; never what a link points to."""
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _refused(path: Path, why: str) -> TierOpenError:
    return TierOpenError(
        f"path: {path} {why}; somebody else made it. Delete it, or write a directory that only this user "
        "may write",
        operation="open", tier="lmdb",
    )  # fmt: skip
