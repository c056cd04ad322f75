"""Blocks in a directory, by the operating system's own calls: a mount that several engines share.

Whoever may write into a shared directory can put links, pipes and folders of his own under any name. So what
is written and deleted lies in folders that are opened one below the other and through no link, and what is
deleted unasked has a name that nobody else gives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

from kvbm_core.log_limit import Log, LogLimit
from kvbm_core.tier import whole_pages
from kvbm_core.trust import DIRECTORY_MODE, FILE_MODE, open_direct, why_strange_folder
from kvbm_remote._faults import StrangeFolderError, WrongLengthError
from kvbm_remote._stores import LITTER_S, UNFINISHED, Buffer, Entry, Store

__all__ = ["LocalStore"]

_PLAIN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_UNFINISHED: Final = re.compile(UNFINISHED, re.ASCII)


class LocalStore(Store):
    """A directory that several engines may share."""

    client = "files"
    abandonable = False

    def __init__(self, root: Path, log: Log, *, direct: bool = False) -> None:
        """Take a directory.

        Args:
            root: It need not exist.
            log: Where its lines go.
            direct: Read past the page cache. Then targets start on a page and are whole pages.
        """
        self._root = str(root)
        self._direct = direct
        self._tidied: set[str] = set()
        self._lines = LogLimit(log)
        self._place: tuple[int, int] | None = None
        """Device and inode of the root, when something was written last."""
        self._noting = threading.Lock()
        """Who makes the root notes it before others that write see it."""

    async def get(self, path: str, target: memoryview) -> Buffer:
        """See `Store.get`. Reads straight into the target."""
        file = self._open(path)
        try:
            nbytes = _plain_bytes(os.fstat(file))
            if not 0 < nbytes <= len(target):
                raise WrongLengthError
            room = target[: whole_pages(1, nbytes) if self._direct else nbytes]
            done = 0
            while done < nbytes:
                count = os.preadv(file, [room[done:]], done)
                if not count:
                    raise WrongLengthError
                done += count
        finally:
            os.close(file)
        return target[:nbytes]

    async def put(self, path: str, content: Buffer, *, overwrite: bool) -> None:
        """See `Store.put`. Written under a temporary name, then renamed."""
        place, _, name = path.rpartition("/")
        with self._folder(place, make=True) as folder:
            if not overwrite and _is_file(name, folder):
                return
            # In the same directory: a rename between two takes a lock of the whole file system, which
            # costs a fifth of the speed at 256 KiB.
            temporary = f".kvbm-{secrets.token_hex(16)}.tmp"
            if place not in self._tidied:
                _tidy(folder)
                self._tidied.add(place)
            try:
                _write(temporary, content, folder)
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise

    async def nbytes(self, path: str) -> int:
        """See `Store.nbytes`."""
        return _plain_bytes(os.lstat(self._at(path)))

    async def delete(self, path: str) -> None:
        """See `Store.delete`."""
        place, _, name = path.rpartition("/")
        with self._folder(place) as folder:
            os.unlink(name, dir_fd=folder)

    async def entries(self, folder: str) -> AsyncIterator[Entry]:
        """See `Store.entries`."""
        for entry in self._walk(self._at(folder)):
            yield entry

    async def close(self) -> None:
        """See `Store.close`."""
        self._lines.close()

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _open(self, path: str) -> int:
        # O_NONBLOCK: a pipe would wait for somebody at its other end.
        file = self._at(path)
        try:
            return open_direct(os.open, file, _PLAIN)[0] if self._direct else os.open(file, _PLAIN)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise WrongLengthError from error
            raise

    @contextlib.contextmanager
    def _folder(self, place: str, *, make: bool = False) -> Iterator[int]:
        """Open a folder below the root, through no link and no stranger's folder.

        Raises:
            FileNotFoundError: If it is not there, and is not to be made.
            StrangeFolderError: If a part of it is no directory, or somebody else's.
        """
        with self._noting:
            made = make and _make_root(Path(self._root))
            folder = os.open(self._root, _FOLDER)
            self._note_place(os.fstat(folder), made=made)
        try:
            for name in place.split("/"):
                inner = _inner(name, folder, make=make)
                os.close(folder)
                folder = inner
                if why_strange_folder(os.fstat(folder), may_share=True):
                    raise StrangeFolderError
            yield folder
        finally:
            os.close(folder)

    def _note_place(self, facts: os.stat_result, *, made: bool) -> None:
        """Say it if the root is another directory than before: all that was stored is not there."""
        before, self._place = self._place, (facts.st_dev, facts.st_ino)
        # A directory that was deleted and made again may have its old number.
        if before is not None and (made or before != self._place):
            self._tidied.clear()
            self._lines.warning(
                "place",
                "file://%s is another directory than before: it was deleted, unmounted or mounted, and "
                "blocks stored before are missing. New ones go where it leads now: see if a mount is away",
                self._root,
            )  # fmt: skip

    def _walk(self, folder: str) -> Iterator[Entry]:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
            for each in found:
                if each.is_dir(follow_symlinks=False):
                    yield from self._walk(each.path)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    facts = each.stat(follow_symlinks=False)
                    if stat.S_ISREG(facts.st_mode):
                        yield Entry(each.path[len(self._root) + 1 :], facts.st_size, facts.st_mtime)


def _make_root(root: Path) -> bool:
    """Make the root if it is not there, and say whether it was made."""
    if root.exists():
        return False
    # Path.mkdir(parents=True) makes the parents with the default mode.
    for each in reversed((root, *root.parents)):
        if not each.exists():
            each.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    return True


def _inner(name: str, folder: int, *, make: bool) -> int:
    """Open a folder in a folder, or make it."""
    try:
        try:
            return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
        except FileNotFoundError:
            if not make:
                raise
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, DIRECTORY_MODE, dir_fd=folder)
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise StrangeFolderError from error
        raise


def _plain_bytes(facts: os.stat_result) -> int:
    if not stat.S_ISREG(facts.st_mode):
        raise WrongLengthError
    return facts.st_size


def _is_file(name: str, folder: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    return False


def _tidy(folder: int) -> None:
    """Delete what writers of this user that died left here. Once for each folder, when it is first used."""
    with contextlib.suppress(OSError):
        for name in filter(_UNFINISHED.fullmatch, os.listdir(folder)):
            with contextlib.suppress(OSError):
                facts = os.stat(name, dir_fd=folder, follow_symlinks=False)
                old = facts.st_mtime < time.time() - LITTER_S
                if old and stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid():
                    os.unlink(name, dir_fd=folder)


def _write(name: str, content: Buffer, folder: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(name, flags, FILE_MODE, dir_fd=folder)
    try:
        done = 0
        while done < len(content):
            done += os.write(file, content[done:])
    finally:
        os.close(file)
