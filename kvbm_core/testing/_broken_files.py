"""Files that fail: what a test can do to a local medium without a privilege or a driver.

in use here      ─► every open file of the folder is replaced by a descriptor that can do nothing
opened later     ─► in the folder's place stands a link to itself
written by others ─► child processes may write no further than byte 0 of any file
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["broken_files", "children", "cut_files"]

_STUB: Final = "/proc/self/status"
_HERE: Final = -100
_EXCHANGE: Final = 2
"""Of linux/fcntl.h and linux/fs.h."""
_KIND: Final = resource.RLIMIT_FSIZE
"""The signal that comes with it is ignored by Python, and kills other programs."""


@contextlib.contextmanager
def broken_files(folder: Path) -> Iterator[None]:
    """Have every read and write below a folder fail as long as the context lasts, then all is as it was.

    Files that are mapped into memory can still be read. Nothing that is written is lost or changed.

    Args:
        folder: A folder on a local disk. It need not be used by anybody.
    """
    folder = folder.resolve()
    away = folder.with_name(f"{folder.name}.away")
    away.symlink_to(folder)
    kept: dict[int, int] = {}
    stub = os.open(_STUB, os.O_PATH | os.O_CLOEXEC)
    try:
        with _limited(children(), 0):
            for fd in _files_of(folder):
                kept[fd] = os.dup(fd)  # A lock on it is held by both.
                os.dup2(stub, fd, inheritable=False)
            _exchange(folder, away)
            try:
                yield
            finally:
                _exchange(folder, away)
                _give_back(kept, stub)
    finally:
        os.close(stub)
        away.unlink()


def _exchange(one: Path, other: Path) -> None:
    """Have two paths change places at once: a tier that looks meanwhile would make a folder of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(one))


@contextlib.contextmanager
def cut_files(nbytes: int) -> Iterator[None]:
    """Have no file written beyond so many bytes: a longer write is cut short, the next fails with EFBIG."""
    with _limited([os.getpid(), *children()], nbytes):
        yield


def children() -> list[int]:
    """List the processes that this one has started."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # The thread has ended.
            found += map(int, (task / "children").read_text().split())
    return found


def _files_of(folder: Path) -> list[int]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # It has been closed meanwhile.
            if os.readlink(link).startswith(f"{folder}/"):
                found.append(int(link.name))
    return found


def _give_back(kept: dict[int, int], stub: int) -> None:
    for fd, before in kept.items():
        with contextlib.suppress(OSError):
            # Whoever has closed it may have another file under its number by now.
            if os.path.sameopenfile(fd, stub):
                os.dup2(before, fd, inheritable=False)
        os.close(before)


@contextlib.contextmanager
def _limited(processes: list[int], nbytes: int) -> Iterator[None]:
    before = {}
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            before[pid] = resource.prlimit(pid, _KIND)
            resource.prlimit(pid, _KIND, (nbytes, before[pid][1]))
    try:
        yield
    finally:
        for pid, limits in before.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, _KIND, limits)
