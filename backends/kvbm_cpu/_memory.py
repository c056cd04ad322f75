"""How much memory can be taken before the kernel starts to kill: of the machine, and of its cgroups."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvbm_core.config import size_text
from kvbm_core.errors import TierOpenError
from kvbm_core.log_limit import TierLog
from kvbm_cpu._config import CpuConfig

__all__ = ["available_memory", "check", "in_turn", "require_memory"]

_TURN: Final = "\0kvbm-cpu-memory"
"""Name of a socket without a file: whoever has bound it takes memory now. It ends with the process."""
_TURN_WAIT_S: Final = 300.0
"""Then the name is held by somebody who does not end: hundreds of GiB take a minute or two."""
_LOOK_S: Final = 0.05

_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
"""Files of a cgroup: its limit, what is used, and what of that is page cache."""


def check(config: CpuConfig) -> None:
    """Refuse what this machine cannot give, before an engine loads its model.

    Raises:
        TierOpenError: If the capacity of all ranks together is more than is available.
    """
    require_memory(config.capacity, "all ranks together take", "check")


def require_memory(nbytes: int, whose: str, operation: str, name: str = "cpu") -> None:
    """Raise unless so much memory is available; says which limit it is."""
    available_bytes, limit = available_memory()
    if nbytes > available_bytes:
        raise TierOpenError(
            f"capacity: {whose} {size_text(nbytes, up=True)}, but only {size_text(available_bytes)} of "
            f"memory are available ({limit}); write a smaller capacity (it is for all ranks together) or "
            "give the machine or container more memory",
            operation=operation, tier=name,
        )  # fmt: skip


@contextlib.contextmanager
def in_turn(log: TierLog, name: str = _TURN) -> Iterator[None]:
    """Let the ranks of this machine take memory one after the other, so that each sees what is left.

    Side by side each would find all of it free, and the kernel would end one when they have taken it.

    Args:
        log: Where it is said that one waits.
        name: Of the socket, for tests.
    """
    with socket.socket(socket.AF_UNIX) as turn:
        began_s, said = time.monotonic(), False
        while not _bind(turn, name):
            if time.monotonic() > began_s + _TURN_WAIT_S:
                log.warning(
                    "another process has been taking memory for %g s; its share may be counted as free here",
                    _TURN_WAIT_S,
                )
                break
            if not said:
                log.info("waiting until another rank or engine of this machine has taken its memory")
            said = True
            time.sleep(_LOOK_S)
        yield


def _bind(turn: socket.socket, name: str) -> bool:
    try:
        turn.bind(name)
    except OSError:
        return False
    return True


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, str]:
    """Say how many bytes can be taken before the kernel starts to kill, and what sets the limit.

    Args:
        proc: Where MemAvailable and this process's cgroups are read.
        cgroups: Where cgroup v2 is mounted, and the memory controller of v1 below it.

    Returns:
        The least of MemAvailable and what each enclosing cgroup leaves.
    """
    limits = [(_meminfo_bytes(proc / "meminfo", "MemAvailable:"), "MemAvailable")]
    for controller, top, names in (("", cgroups, _V2), ("memory", cgroups / "memory", _V1)):
        group = top / _own_cgroup(proc, controller)
        # In a container the name may be the host's: then only the top of what is mounted is there.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            if (room := _cgroup_room(folder, *names)) is not None:
                limits.append((room, f"the memory limit of the cgroup {folder}"))
    return min(limits)


def _meminfo_bytes(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    # A kernel without MemAvailable (before 3.14) gives no ground to refuse.
    return 1 << 62


def _own_cgroup(proc: Path, controller: str) -> str:
    try:
        lines = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return ""
    return next((path.lstrip("/") for _, names, path in lines if controller in names.split(",")), "")


def _cgroup_room(folder: Path, limit_name: str, used_name: str, cache: tuple[str, ...]) -> int | None:
    try:
        limit = (folder / limit_name).read_text().strip()
        used_bytes = int((folder / used_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        # No such file: the other version, no memory controller here, or the root group.
        return None
    if limit == "max":
        return None
    # Page cache counts as used, but is given back before anything is killed.
    return max(0, int(limit) - used_bytes + sum(int(stat.get(name, 0)) for name in cache))
