"""Opens folders and files only if nobody else can have put something in their place.

A directory that a stranger made first may hold links, pipes, or files of his own under the names that a
backend uses. They are refused, never followed, read or written.

Who owns a directory above a rank's folder does not matter: he can take the folder away, but what is opened
in it is looked at by itself. So a volume that everybody may write to, as containers get them, will do.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvbm_core.errors import TierOpenError

__all__ = [
    "DIRECTORY_MODE",
    "FILE_MODE",
    "open_direct",
    "open_file",
    "open_folder",
    "refuse_strange_links",
    "why_strange_folder",
]

FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700
"""A KV cache holds people's prompts."""


def open_file(folder: Path, folder_fd: int, name: str, flags: int, tier: str) -> int:
    """Open a file of a folder, or make it, unless somebody else put it there.

    One that is opened for writing has `FILE_MODE` from then on, if it is this user's.

    Args:
        folder: Its path, for messages.
        folder_fd: Its descriptor.
        name: Of the file.
        flags: As of `os.open`; never through a link, and closed in a program that is started.
        tier: The backend's name, for messages.

    Returns:
        The file descriptor.

    Raises:
        OSError: If the file cannot be opened.
        TierOpenError: If it is a link, no regular file, or another user's.
    """
    # O_NONBLOCK: a pipe would wait for somebody at its other end.
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(name, flags, FILE_MODE, dir_fd=folder_fd)
    except OSError:
        why = ""
        with contextlib.suppress(OSError):
            why = _why_strange(os.lstat(name, dir_fd=folder_fd))
        if not why:
            raise
    else:
        status = os.fstat(fd)
        if not (why := _why_strange(status)):
            if flags & (os.O_WRONLY | os.O_RDWR):
                _tighten(fd, status, FILE_MODE)
            # io_uring answers EAGAIN for a file that does not wait.
            os.set_blocking(fd, True)
            return fd
        os.close(fd)
    raise _strange(
        f"{folder / name} {why}; backend {tier} uses only files of its own: look who made it and remove it, "
        "or write another path",
        tier,
    )


def open_direct(open_named: Callable[[str, int], int], name: str, flags: int) -> tuple[int, bool]:
    """Open a file past the page cache where the file system can.

    Args:
        open_named: Opens it, given the name and the flags, as `HeldFolder.open` does.
        name: Of the file.
        flags: As of `os.open`, but for the page cache.

    Returns:
        The file descriptor, and whether it is past the page cache.
    """
    try:
        return open_named(name, flags | os.O_DIRECT), True
    except OSError:
        return open_named(name, flags), False


def open_folder(path: Path, tier: str, *, tighten: bool = True, parent_fd: int | None = None) -> int:
    """Open a rank's folder, or one in it.

    Args:
        path: Of the folder.
        tier: The backend's name, for messages.
        tighten: Make it private, if it is this user's.
        parent_fd: Of the folder that it is in, if that is open: no other is looked into then.

    Returns:
        The file descriptor.

    Raises:
        OSError: If the folder cannot be opened.
        TierOpenError: If it is a link, or strange, see `why_strange_folder`.
    """
    refuse_strange_links(path, tier)
    name = path if parent_fd is None else path.name
    folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
    status = os.fstat(folder)
    why = why_strange_folder(status)
    if not why:
        if tighten:
            _tighten(folder, status, DIRECTORY_MODE)
        return folder
    os.close(folder)
    raise _strange(
        f"{path} {why}, so its files may be somebody else's; run `chown {os.geteuid()}` on it if you know "
        "them, or write another path",
        tier,
    )


def why_strange_folder(status: os.stat_result, *, may_share: bool = False) -> str:
    """Say why a folder is not to be used; empty if it may be.

    It may be if it is this user's; or if not everybody may put files there, and it is root's.

    Args:
        status: Of the folder.
        may_share: It may also be one that was made for a group of this user, which may write there: where
            engines of several users share a place, and each file is proved by itself.
    """
    if status.st_uid == os.geteuid():
        return ""
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        whose = "is root's" if status.st_uid == 0 else f"belongs to uid {status.st_uid}"
        return f"{whose} and everybody may write to it"
    groups = (os.getegid(), *os.getgroups())
    shares = may_share and status.st_mode & stat.S_IWGRP and status.st_gid in groups
    return "" if status.st_uid == 0 or shares else f"belongs to uid {status.st_uid}"


def refuse_strange_links(path: Path, tier: str) -> None:
    """Raise for a link on the way to a rank's folder that neither this user nor root made, or in its place.

    Raises:
        TierOpenError: Names the link, its owner, and where it leads.
    """
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if stat.S_ISLNK(status.st_mode) and (folder == path or status.st_uid not in (0, os.geteuid())):
                raise _strange(
                    f"{folder} is a link of uid {status.st_uid} to {os.readlink(folder)}; write the "
                    "directory itself, or remove the link",
                    tier,
                )


def _why_strange(status: os.stat_result) -> str:
    """Say why a file is not to be touched; empty if it may be."""
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to uid {status.st_uid}"
    # Else it could be any file of this user, under a name that somebody else gave it.
    return "has another name as well (a hard link)" if status.st_nlink > 1 else ""


def _tighten(fd: int, status: os.stat_result, mode: int) -> None:
    """Let nobody else read or write what is this user's."""
    if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077:
        os.fchmod(fd, mode)


def _strange(what: str, tier: str) -> TierOpenError:
    return TierOpenError(f"path: {what}", operation="open", tier=tier)
