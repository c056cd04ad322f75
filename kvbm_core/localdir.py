"""A tier's directory on a local disk: one folder for each rank, and a lock that keeps other engines out.

    <path>/rank0/          0700, of this user or root, and no link
        engine.lock        0600; flock held by the engine that uses the folder; holds its pid
        namespaces/        what its namespaces are made of, see `kvbm_core.namespace_facts`

A configuration names a `LocalDirectory`. A `HeldFolder` is one rank's folder in it while an engine has it.
A backend keeps its files beside the lock, and opens them with `HeldFolder.open`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from kvbm_core.config import size_text
from kvbm_core.errors import TierOpenError
from kvbm_core.folderlock import in_use, is_locked, lock, unlock, who_holds
from kvbm_core.log_limit import Log
from kvbm_core.remedies import try_writing, unusable
from kvbm_core.trust import DIRECTORY_MODE, FILE_MODE, open_file, open_folder, refuse_strange_links

__all__ = [
    "DIRECTORY_MODE",
    "FACTS_FOLDER",
    "FILE_MODE",
    "HeldFolder",
    "LocalDirectory",
    "free_bytes",
    "unusable",
]

_LOCK: Final = "engine.lock"
_LOCK_WAIT_S: Final = 2.0
"""An engine that is being restarted lets go within this time."""
FACTS_FOLDER: Final = "namespaces"
"""In a rank's folder, see `kvbm_core.namespace_facts`."""
_FACTS: Final = re.compile(r"[0-9a-f]{32}\.json(\.tmp)?", re.ASCII)
_RANK: Final = re.compile(r"rank(0|[1-9][0-9]{0,8})", re.ASCII)
_FILES: Final[Mapping[str, re.Pattern[str]]] = {
    "gds": re.compile(r"index|probe|slab\.[0-9]{3,}", re.ASCII),
    "lmdb": re.compile(r"(data|lock)\.mdb|data\.mdb\.damaged", re.ASCII),
}
"""By backend, the files it makes in a rank's folder: what may be deleted, and nothing else."""
_log = logging.getLogger("kvbm_core")


class HeldFolder:
    """A rank's folder, held by this engine alone from construction to `release`. Made if it is not there.

    A process that is forked from this one does not hold it.

    Args:
        path: The folder.
        tier: The backend's name, for messages.

    Raises:
        TierOpenError: If the folder cannot be used or trusted, or another engine uses it.
    """

    def __init__(self, path: Path, tier: str) -> None:
        self.path = path
        self.tier = tier
        """The backend's name, for messages."""
        self.lock_fd = self.folder_fd = -1
        """Of the lock file and of the folder; valid when somebody moves or deletes them. -1 once released."""
        try:
            _make_directories(path, tier)
            self.folder_fd = open_folder(path, tier)
            self.lock_fd = self.open(_LOCK, os.O_RDWR | os.O_CREAT)
            if not lock(self.lock_fd, _LOCK_WAIT_S):
                raise in_use(path, self.lock_fd, tier)  # noqa: TRY301 - after it all is let go, too
        except OSError as error:
            self.release()
            raise unusable(path, error, tier) from error
        except BaseException:
            self.release()
            raise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}, {'released' if self.lock_fd < 0 else 'held'}>"

    def open(self, name: str, flags: int) -> int:
        """Open a file of this folder, or make it, see `kvbm_core.trust.open_file`."""
        return open_file(self.path, self.folder_fd, name, flags, self.tier)

    def open_folder(self, name: str) -> int:
        """Open a folder in this one, or make it, see `kvbm_core.trust.open_folder`."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, DIRECTORY_MODE, dir_fd=self.folder_fd)
        return open_folder(self.path / name, self.tier, parent_fd=self.folder_fd)

    def retake(self) -> bool:
        """Take the folder that the path leads to now, and make it if there is none.

        Returns:
            False if it is the one that is held already.

        Raises:
            TierOpenError: As when the folder was taken first; then the old one is held still.
        """
        with contextlib.suppress(OSError):
            if os.path.samestat(self.path.stat(), os.fstat(self.folder_fd)):
                return False
        taken = HeldFolder(self.path, self.tier)
        self.release()
        self.folder_fd, self.lock_fd = taken.folder_fd, taken.lock_fd
        return True

    def release(self) -> None:
        """Let another engine have the folder. May be called twice."""
        if self.folder_fd >= 0:
            os.close(self.folder_fd)
        if self.lock_fd >= 0:
            unlock(self.lock_fd)
        self.lock_fd = self.folder_fd = -1

    def drop(self, is_meant: Callable[[str], object]) -> list[str]:
        """Delete the files whose names are meant, and give the names of those that were there."""
        return _drop(self.folder_fd, is_meant)

    def drop_facts(self) -> None:
        """Delete what is written about namespaces, and its folder if nothing else is in it."""
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            facts_fd = os.open(FACTS_FOLDER, flags, dir_fd=self.folder_fd)
            try:
                _drop(facts_fd, _FACTS.fullmatch)
            finally:
                os.close(facts_fd)
            os.rmdir(FACTS_FOLDER, dir_fd=self.folder_fd)

    def drop_others(self, log: Log) -> None:
        """Delete what another backend left: it would take this one's share of the capacity for ever."""
        for other, names in _FILES.items():
            if self.tier in _FILES and other != self.tier and (found := self.drop(names.fullmatch)):
                log.warning(
                    "%s: backend %s was here before %s; dropping its files (%s)",
                    self.path, other, self.tier, ", ".join(found),
                )  # fmt: skip


class LocalDirectory:
    """The directory that a tier's configuration names.

    Args:
        path: As configured; may start with ``~``.
        tier: The backend's name, for messages.

    Raises:
        TierOpenError: If the path has a variable, or a ``~`` of which nobody knows what it stands for.
    """

    def __init__(self, path: str, tier: str) -> None:
        self.root = _whole(path, tier)
        self._tier = tier

    def __repr__(self) -> str:
        return f"<LocalDirectory {self.root} of {self._tier}>"

    def rank_path(self, rank: int) -> Path:
        """Give the folder of a rank. It need not exist."""
        return self.root / f"rank{rank}"

    def hold(self, rank: int, log: Log = _log) -> HeldFolder:
        """Take a rank's folder for this engine; files that another backend left in it are deleted.

        Args:
            rank: Whose.
            log: Where it is said what is deleted.

        Raises:
            TierOpenError: If the folder cannot be used or trusted, or another engine uses it.
        """
        held = HeldFolder(self.rank_path(rank), self._tier)
        try:
            held.drop_others(log)
        except OSError as error:
            held.release()
            raise unusable(held.path, error, self._tier) from error
        return held

    def drop_other_ranks(self, rank: int, world_size: int, log: Log) -> None:
        """Delete what more ranks left than there are: nobody uses it, and the capacity is for all together.

        Each rank deletes as much as its own share grows by, so the room is there before it is taken. Files
        that no backend makes stay, and their folder with them.

        Raises:
            TierOpenError: If another engine uses it.
        """
        for other, folder in self.ranks():
            if other >= world_size and other % world_size == rank:
                log.warning("%s: more ranks or replicas than there are now left it; dropping it", folder)
                left = HeldFolder(folder, self._tier)
                for names in _FILES.values():
                    left.drop(names.fullmatch)
                left.drop_facts()
                left.drop(_LOCK.__eq__)
                left.release()
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def check(self, capacity_bytes: int, verb: str) -> None:
        """Find what would keep an engine from opening its folders. Changes nothing.

        Args:
            capacity_bytes: What the tier may take, over all ranks.
            verb: Says in the message what the bytes are that are there already: ``stored`` or ``taken``.

        Raises:
            TierOpenError: If the path is no directory, cannot be written or trusted, is in use by another
                engine, or lies on a file system with too little room.
        """
        rank0 = self.rank_path(0)
        refuse_strange_links(rank0, self._tier)
        existing = try_writing(rank0, self._tier)
        try:
            if existing == rank0:
                self._check_folder(rank0)
        except OSError as error:
            raise unusable(existing, error, self._tier) from error
        used_bytes = sum(_du_bytes(folder) for _, folder in self.ranks())
        room_bytes = free_bytes(existing)
        if capacity_bytes - used_bytes > room_bytes:
            most_bytes = used_bytes + room_bytes
            smaller = f", write at most {size_text(most_bytes)}" if most_bytes else ""
            raise TierOpenError(
                f"capacity: {size_text(capacity_bytes)}, of which {size_text(used_bytes)} are {verb} in "
                f"{self.root} already, but its file system has only {size_text(room_bytes)} free; "
                f"free some room{smaller} or choose another path",
                operation="check", tier=self._tier,
            )  # fmt: skip

    def owner(self, rank: int) -> str:
        """Say which process holds a rank's folder, by its id; empty if nobody does. Changes nothing."""
        try:
            fd = os.open(self.rank_path(rank) / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            return who_holds(fd)[0] if is_locked(fd) else ""
        finally:
            os.close(fd)

    def ranks(self) -> list[tuple[int, Path]]:
        """Give numbers and folders of the ranks that are there. Links are nobody's."""
        if not self.root.is_dir():
            return []
        matches = [match for each in os.listdir(self.root) if (match := _RANK.fullmatch(each))]
        found = sorted((int(match[1]), self.root / match[0]) for match in matches)
        return [(rank, path) for rank, path in found if path.is_dir() and not path.is_symlink()]

    def _check_folder(self, path: Path) -> None:
        folder_fd, lock_fd = open_folder(path, self._tier, tighten=False), -1
        try:
            lock_fd = open_file(path, folder_fd, _LOCK, os.O_RDONLY, self._tier)
            if is_locked(lock_fd):
                raise in_use(path, lock_fd, self._tier)
        except FileNotFoundError:
            return
        finally:
            for fd in (folder_fd, lock_fd):
                if fd >= 0:
                    os.close(fd)


def free_bytes(place: Path | int) -> int:
    """Say how much the file system still takes.

    Args:
        place: A path, or the descriptor of an open file, which serves when the path is gone.
    """
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


def _whole(path: str, tier: str) -> Path:
    if "$" in path or "\0" in path:
        raise TierOpenError(
            f"path: {path!r} has a {'variable' if '$' in path else 'zero byte'}, and none is replaced here; "
            "write the whole path, like /nvme/kvbm, or ~/kvbm for one in your home",
            operation="check", tier=tier,
        )  # fmt: skip
    try:
        return Path(path).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        # No HOME and no entry in the list of users; or no directory to start from.
        raise TierOpenError(
            f"path: {path!r} cannot be completed for uid {os.geteuid()} ({error}); write the whole path, "
            "like /nvme/kvbm, or set HOME",
            operation="check", tier=tier,
        ) from error  # fmt: skip


def _make_directories(path: Path, tier: str) -> None:
    # Path.mkdir(parents=True) makes the parents with the default mode.
    refuse_strange_links(path, tier)
    for folder in reversed((path, *path.parents)):
        if not folder.is_dir():
            # Raises for a file and for a dangling link; another rank may have made it just now.
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=DIRECTORY_MODE)
            os.stat(folder)


def _drop(folder_fd: int, is_meant: Callable[[str], object]) -> list[str]:
    found = sorted(name for name in os.listdir(folder_fd) if is_meant(name))
    for name in found:
        # What is no file has not been made by a backend.
        with contextlib.suppress(IsADirectoryError, PermissionError, FileNotFoundError):
            os.unlink(name, dir_fd=folder_fd)
    return found


def _du_bytes(folder: Path) -> int:
    facts, used_bytes = folder / FACTS_FOLDER, 0
    for file in (*folder.iterdir(), *(() if facts.is_symlink() else facts.glob("*"))):
        with contextlib.suppress(FileNotFoundError):
            used_bytes += file.lstat().st_blocks * 512
    return used_bytes
