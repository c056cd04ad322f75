"""The lock that one engine holds on a folder: `flock` on an open file, which a forked child does not keep."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from kvbm_core.errors import TierOpenError

__all__ = ["in_use", "is_locked", "lock", "unlock", "who_holds"]

_held: dict[int, tuple[int, int]] = {}
"""Descriptors of the locks of this process, with device and inode."""


def lock(fd: int, wait_s: float) -> bool:
    """Take the lock of an open file and write this process's id into it. False if it did not come free."""
    status = os.fstat(fd)
    _held[fd] = (status.st_dev, status.st_ino)
    give_up_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > give_up_s:
                return False
        time.sleep(0.05)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return True


def unlock(fd: int) -> None:
    """Close the file, and give the lock up if it was taken."""
    os.close(fd)
    _held.pop(fd, None)


def is_locked(fd: int) -> bool:
    """Say whether somebody holds the lock of an open file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def who_holds(fd: int) -> tuple[str, list[tuple[str, str]]]:
    """Say who has the lock of an open file.

    Returns:
        The id of the process that took it, as it wrote it, or ``unknown``. If that process is dead: ids and
        names of those that have the file open and can be seen from here.
    """
    try:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
    except OSError:
        owner = "unknown"
    return owner, [] if _is_alive(owner) else _openers(fd)


def _is_alive(pid: str) -> bool:
    try:
        # The state follows the name, which is in brackets and may hold anything.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")


def _openers(fd: int) -> list[tuple[str, str]]:
    file, found = os.fstat(fd), []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # It has ended, or is another user's.
            files = [os.stat(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
            if int(pid) != os.getpid() and any(os.path.samestat(file, each) for each in files):
                found.append((pid, Path(f"/proc/{pid}/comm").read_text().strip()))
    return found


def _forget_locks() -> None:
    # A child would hold the lock for as long as it lives, also when its parent was killed.
    for fd, file in _held.items():
        with contextlib.suppress(OSError):
            status = os.fstat(fd)
            # Another thread may have been closing it when this one forked: the number may be another file's.
            if (status.st_dev, status.st_ino) == file:
                os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


def in_use(path: Path, lock_fd: int, tier: str) -> TierOpenError:
    """Make the error for a directory of which another engine, or a child that it left, has the lock."""
    owner, left = who_holds(lock_fd)
    said = f"path: {path} is in use by another engine (pid {owner}); give each engine its own 'path'"
    if left:
        names, pids = ", ".join(f"pid {pid} ({name})" for pid, name in left), " ".join(pid for pid, _ in left)
        said = (
            f"path: {path} is locked: its engine (pid {owner}) is dead, but what it left holds the lock: "
            f"{names}; run `kill {pids}`"
        )
    return TierOpenError(said, operation="open", tier=tier)
