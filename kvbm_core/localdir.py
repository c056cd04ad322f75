"""A tier's directory on a local disk: one folder for each rank, and a lock that keeps other engines out.

    <path>/rank0/          0700
        engine.lock        0600; flock held by the engine that uses the folder; holds its pid

A configuration names a `LocalDirectory`. A `HeldFolder` is one rank's folder in it while an engine has it.
A backend keeps its files beside the lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

from kvbm_core.errors import TierOpenError

__all__ = ["DIRECTORY_MODE", "FILE_MODE", "HeldFolder", "LocalDirectory", "free_bytes", "unusable"]

FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700
"""A KV cache holds people's prompts."""
_LOCK: Final = "engine.lock"
_LOCK_WAIT_S: Final = 2.0
"""An engine that is being restarted lets go within this time."""


class HeldFolder:
    """A rank's folder, held by this engine alone from construction to `release`. Made if it is not there.

    Args:
        path: The folder.
        tier: The backend's name, for messages.

    Raises:
        TierOpenError: If the folder cannot be used, or another engine uses it.
    """

    def __init__(self, path: Path, tier: str) -> None:
        self.path = path
        self.lock_fd = -1
        """Of the lock file; stays valid when somebody deletes the folder. -1 once released."""
        try:
            _make_directories(path)
            self.lock_fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
            self._acquire(tier)
        except OSError as error:
            self.release()
            raise unusable(path, error, tier) from error
        except BaseException:
            self.release()
            raise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}, {'released' if self.lock_fd < 0 else 'held'}>"

    def release(self) -> None:
        """Let another engine have the folder. May be called twice."""
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
        self.lock_fd = -1

    def _acquire(self, tier: str) -> None:
        give_up_s = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > give_up_s:
                    raise _in_use(self.path, tier) from error
            time.sleep(0.05)
        os.ftruncate(self.lock_fd, 0)
        os.pwrite(self.lock_fd, f"{os.getpid()}\n".encode(), 0)


class LocalDirectory:
    """The directory that a tier's configuration names.

    Args:
        path: As configured; may start with ``~``.
        tier: The backend's name, for messages.
    """

    def __init__(self, path: str, tier: str) -> None:
        self.root = Path(path).expanduser().absolute()
        self._tier = tier

    def __repr__(self) -> str:
        return f"<LocalDirectory {self.root} of {self._tier}>"

    def rank_path(self, rank: int) -> Path:
        """Give the folder of a rank. It need not exist."""
        return self.root / f"rank{rank}"

    def hold(self, rank: int) -> HeldFolder:
        """Take a rank's folder for this engine.

        Raises:
            TierOpenError: If the folder cannot be used, or another engine uses it.
        """
        return HeldFolder(self.rank_path(rank), self._tier)

    def drop_other_ranks(self, rank: int, world_size: int, log: logging.Logger) -> None:
        """Delete what an engine of more ranks left: nobody uses it, and the capacity is for all together.

        Each rank deletes as much as its own share grows by, so the room is there before it is taken.

        Raises:
            TierOpenError: If another engine uses it.
        """
        for folder in self.root.glob("rank*"):
            name = folder.name.removeprefix("rank")
            if name.isdigit() and int(name) >= world_size and int(name) % world_size == rank:
                log.warning("%s: an engine of more ranks left it; dropping it", folder)
                left = self.hold(int(name))
                shutil.rmtree(folder, ignore_errors=True)
                left.release()

    def check(self, capacity_bytes: int, verb: str) -> None:
        """Find what would keep an engine from opening its folders. Changes nothing.

        Args:
            capacity_bytes: What the tier may take, over all ranks.
            verb: Says in the message what the bytes are that are there already: ``stored`` or ``taken``.

        Raises:
            TierOpenError: If the path is no directory, cannot be written, is in use by another engine,
                or lies on a file system with too little room.
        """
        rank0 = self.rank_path(0)
        existing = next(folder for folder in (rank0, *rank0.parents) if os.path.lexists(folder))
        try:
            # Permission bits do not tell everything (read-only mounts, /proc): try it, and clean up.
            os.rmdir(tempfile.mkdtemp(prefix=".kvbm-check-", dir=existing))
        except OSError as error:
            raise unusable(existing, error, self._tier) from error
        self._check_unlocked(rank0)
        used_bytes = sum(_du_bytes(folder) for folder in self.root.glob("rank*"))
        room_bytes = free_bytes(existing)
        if capacity_bytes - used_bytes > room_bytes:
            raise TierOpenError(
                f"capacity: {int(capacity_bytes)} bytes, of which {used_bytes} are {verb} in {self.root} "
                f"already, but its file system has only {room_bytes} bytes free; write at most "
                f"{used_bytes + room_bytes} or choose another path",
                operation="check", tier=self._tier,
            )  # fmt: skip

    def _check_unlocked(self, folder: Path) -> None:
        try:
            lock = os.open(folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise unusable(folder, error, self._tier) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(folder, self._tier) from error
        finally:
            os.close(lock)


def free_bytes(place: Path | int) -> int:
    """Say how much the file system still takes.

    Args:
        place: A path, or the descriptor of an open file, which serves when the path is gone.
    """
    return shutil.disk_usage(place).free


def unusable(path: Path, error: Exception, tier: str) -> TierOpenError:
    """Make the error that says that a directory cannot be used."""
    return TierOpenError(
        f"path: {path} cannot be used by uid {os.getuid()} ({error}); write a directory on a local disk "
        "that this user may write",
        operation="open", tier=tier,
    )  # fmt: skip


def _in_use(path: Path, tier: str) -> TierOpenError:
    try:
        owner = (path / _LOCK).read_text().strip() or "unknown"
    except OSError:
        owner = "unknown"
    return TierOpenError(
        f"path: {path} is in use by another engine (pid {owner}); give each engine its own 'path'",
        operation="open", tier=tier,
    )  # fmt: skip


def _make_directories(path: Path) -> None:
    # Path.mkdir(parents=True) makes the parents with the default mode.
    for folder in reversed((path, *path.parents)):
        if not folder.exists():
            folder.mkdir(mode=DIRECTORY_MODE, exist_ok=True)


def _du_bytes(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir()) if folder.is_dir() else 0
