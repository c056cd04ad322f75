"""What keeps a directory from being used, found before an engine needs it, and what an operator can do."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import tempfile
from pathlib import Path
from typing import Final

from kvbm_core.errors import TierOpenError

__all__ = ["existing_folder", "remedy", "try_writing", "unusable"]

_TRIAL: Final = ".kvbm-check-"
"""How folders begin that are made for a try."""
_ELSEWHERE = "write a directory on a local disk that this user may write"


def remedy(error: Exception, path: Path) -> str:
    """Say in an imperative what to do about an error at a path.

    Args:
        error: An `OSError`; of any other error nothing is known.
        path: Where it happened, for what depends on the place.
    """
    code = getattr(error, "errno", None)
    if code in (errno.ENOENT, errno.EEXIST, errno.ELOOP) and (link := _dangling(path)):
        return (
            f"the link {link} leads to {os.readlink(link)}, which is not there: make it, or remove the link"
        )
    if code == errno.EMFILE:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"this process has as many files open as it may ({most}): raise the limit with `ulimit -n`"
    return _REMEDIES.get(code or 0, _ELSEWHERE)


def existing_folder(path: Path) -> Path:
    """Give a path, or the nearest above it that is there. A dangling link is, and so is a file.

    Raises:
        OSError: That cannot be told, or a part that is not there has a name too long to be made.
    """
    missing = ""
    for folder in (path, *path.parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()
            if missing and folder.is_dir() and len(os.fsencode(missing)) > os.pathconf(folder, "PC_NAME_MAX"):
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), missing)
            return folder
        missing = max(missing, folder.name, key=len)
    return path


def try_writing(path: Path, tier: str, key: str = "path") -> Path:
    """Make a folder where a directory is or will be, remove it, and give the nearest path that is there.

    Permission bits do not tell everything: there are read-only mounts, and /proc.

    Args:
        path: As configured. It need not exist.
        tier: The backend's name, for messages.
        key: The configuration's, for messages.

    Raises:
        TierOpenError: Nothing can be made there; names what is in the way, and what to do.
    """
    existing = path
    try:
        existing = existing_folder(path)
        os.rmdir(tempfile.mkdtemp(prefix=_TRIAL, dir=existing))
    except OSError as error:
        raise unusable(existing, error, tier, key, path) from error
    return existing


def unusable(
    path: Path, error: Exception, tier: str, key: str = "path", meant: Path | None = None
) -> TierOpenError:
    """Make the error that says that a directory cannot be used, why, and what to do.

    Args:
        path: What cannot be used.
        error: Why.
        tier: The backend's name.
        key: The configuration's.
        meant: What should be made there.
    """
    why = str(error)
    if isinstance(error, OSError) and _TRIAL in str(error.filename):
        # Nobody knows the name of the folder that was tried.
        why = f"[Errno {error.errno}] {error.strerror}"
    so = "" if meant in (None, path) else f", so {meant} cannot be made"
    return TierOpenError(
        f"{key}: {path} cannot be used by uid {os.geteuid()} ({why}){so}; {remedy(error, path)}",
        operation="open", tier=tier,
    )  # fmt: skip


_REMEDIES = {
    errno.EACCES: f"let that user write there (`chown` it), or {_ELSEWHERE}",
    errno.EPERM: f"let that user write there (`chown` it), or {_ELSEWHERE}",
    errno.EROFS: "it is mounted read-only: mount it for writing (`dmesg` says if a disk failed), or write "
    "another path",
    errno.ENOSPC: "the file system is full (`df -h`, `df -i`): free room there, or write another path",
    errno.EDQUOT: "this user's quota is used up (`quota -s`): free room, have it raised, or another path",
    errno.EIO: "the disk or its driver failed: look at `dmesg` and replace the disk, or write another path",
    errno.ENOMEM: "the kernel had no memory for it: free some, or give the container more",
    errno.ENFILE: "the machine has as many files open as it may: raise `sysctl fs.file-max`",
    errno.ENAMETOOLONG: "write a shorter path (255 bytes for a name, 4095 for all)",
    errno.ENOTDIR: "a part of it is a file: write a directory on a local disk",
    errno.ELOOP: "its links lead in a circle: write the directory itself",
    errno.ESTALE: "its file system was taken away: mount it again, or write another path",
}


def _dangling(path: Path) -> Path | None:
    """Find the link on the way to a path that leads nowhere."""
    return next((each for each in (path, *path.parents) if each.is_symlink() and not each.exists()), None)
