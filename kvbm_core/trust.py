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
from pathlib import Path
from typing import Final

from kvbm_core.errors import TierOpenError

__all__ = ["DIRECTORY_MODE", "FILE_MODE", "open_file", "open_folder", "refuse_strange_links"]

FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700
"""A KV cache holds people's prompts."""


def open_file(folder: Path, folder_fd: int, name: str, flags: int, tier: str) -> int:
    """Open a file of a folder, or make it with `FILE_MODE`, unless somebody else put it there.

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
        if not (why := _why_strange(os.fstat(fd))):
            # io_uring answers EAGAIN for a file that does not wait.
            os.set_blocking(fd, True)
            return fd
        os.close(fd)
    raise _strange(
        f"{folder / name} {why}; backend {tier} uses only files of its own: look who made it and remove it, "
        "or write another path",
        tier,
    )


def open_folder(path: Path, tier: str, *, tighten: bool = True) -> int:
    """Open a rank's folder.

    Args:
        path: Of the folder.
        tier: The backend's name, for messages.
        tighten: Make it private, if it is this user's.

    Returns:
        The file descriptor.

    Raises:
        OSError: If the folder cannot be opened.
        TierOpenError: If it is a link, or neither this user's nor root's.
    """
    refuse_strange_links(path, tier)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(folder)
    if status.st_uid == os.geteuid():
        if tighten and stat.S_IMODE(status.st_mode) & 0o077:
            os.fchmod(folder, DIRECTORY_MODE)
        return folder
    everybody = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
    if status.st_uid == 0 and not everybody:
        return folder
    os.close(folder)
    why = "is root's and everybody may write to it" if everybody else f"belongs to uid {status.st_uid}"
    raise _strange(
        f"{path} {why}, so its files may be somebody else's; run `chown {os.geteuid()}` on it if you know "
        "them, or write another path",
        tier,
    )


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


def _strange(what: str, tier: str) -> TierOpenError:
    return TierOpenError(f"path: {what}", operation="open", tier=tier)
