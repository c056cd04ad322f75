"""What an operator can do about an error of the operating system."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

__all__ = ["remedy"]

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
