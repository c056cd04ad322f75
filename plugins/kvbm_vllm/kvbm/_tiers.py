"""Makes of KVBM's variables the tiers that would stand in a configuration file."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvbm_core import ConfigError, Registry
from kvbm_core.layers import SEAL_BYTES
from kvbm_vllm.kvbm._environment import makes_stack

__all__ = ["read_tiers"]

_GB: Final = 10**9
"""KVBM counts so, whatever its documentation says of GiB."""
_MAX_QUEUE_DEPTH: Final = 1024
"""Of the `gds` tier."""


def read_tiers(
    environ: Mapping[str, str], block_bytes: Callable[[], int | None], world_size: int, engines: int = 1
) -> list[dict[str, Any]]:
    """Make the tiers, as they would stand in a configuration file.

    Args:
        environ: The environment, as checked.
        block_bytes: Gives the bytes of a block over all ranks, or None where that is not known.
        world_size: Ranks of the engine.
        engines: That divide each tier.

    Raises:
        ConfigError: For a number that is none, a directory that is another user's, or no tier at all.
    """
    sizes = _Sizes(environ, block_bytes, world_size, engines)
    tiers: list[dict[str, Any]] = []
    if cpu := sizes.capacity("CPU", "cpu"):
        tiers.append({"backend": "cpu", "capacity": cpu})
    if disk := sizes.capacity("DISK", "gds"):
        depth = _queue_depth(environ)
        tiers.append({"backend": "gds", "capacity": disk, "path": _disk_path(environ), "queue_depth": depth})
    if not tiers:
        raise ConfigError(
            f"{', '.join(makes_stack(environ))}: no tier has a size; set DYN_KVBM_CPU_CACHE_GB, "
            "DYN_KVBM_DISK_CACHE_GB or both to a number above 0"
        )
    return tiers


@dataclass(frozen=True, slots=True)
class _Sizes:
    environ: Mapping[str, str]
    block_bytes: Callable[[], int | None]
    world_size: int
    engines: int

    def capacity(self, medium: str, backend: str) -> int:
        """Work out a tier's capacity; 0 for no tier.

        Args:
            medium: As in the variables' names.
            backend: Knows what a rank needs for so many blocks.
        """
        name = f"DYN_KVBM_{medium}_CACHE_OVERRIDE_NUM_BLOCKS"
        if blocks := _count(self.environ, name, 0, least=0):
            region_bytes = self._region_bytes(name, blocks)
            share_bytes = Registry().backend(backend).share_bytes(-(-blocks // self.engines), region_bytes)
            return share_bytes * self.world_size * self.engines
        return _gigabytes(self.environ, f"DYN_KVBM_{medium}_CACHE_GB")

    def _region_bytes(self, name: str, blocks: int) -> int:
        """Say how long one block is on one rank: its payload and the footer."""
        total_bytes = self.block_bytes()
        if total_bytes is None:
            raise ConfigError(f"{name}={blocks}: the bytes of this model's blocks are not known before it is "
                              f"loaded; set {name.replace('OVERRIDE_NUM_BLOCKS', 'GB')}")  # fmt: skip
        return -(-total_bytes // self.world_size) + SEAL_BYTES


def _gigabytes(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "").strip() or "0"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name}={text}: write a number of gigabytes (10^9 bytes), like 4 or 0.5")
    return int(value * _GB)


def _count(environ: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = environ.get(name, "").strip() or str(default)
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}={text}: write a whole number of at least {least}")
    return int(text)


def _queue_depth(environ: Mapping[str, str]) -> int:
    many, each = "DYN_KVBM_MAX_CONCURRENT_TRANSFERS", "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE"
    transfers, blocks = _count(environ, many, 4, least=1), _count(environ, each, 16, least=1)
    if transfers * blocks > _MAX_QUEUE_DEPTH:
        raise ConfigError(
            f"{many}={transfers}, {each}={blocks}: {transfers * blocks} blocks at once are too many; "
            f"their product may be at most {_MAX_QUEUE_DEPTH}"
        )
    return transfers * blocks


def _disk_path(environ: Mapping[str, str]) -> str:
    """Give the disk tier's directory: one of this user's alone, because `/tmp` is everybody's."""
    name = "DYN_KVBM_DISK_CACHE_DIR"
    path = Path(environ.get(name, "").strip() or "/tmp").expanduser() / f"kvbm-{os.geteuid()}"
    try:
        found = path.lstat()
    except OSError:
        return str(path)  # It is made later, or that fails with a message of its own.
    if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{name}: {path} is not a directory of uid {os.geteuid()}; remove it, or set "
                          f"{name} to a directory on a local disk that only this user may write")  # fmt: skip
    return str(path)
