"""The environment variables of NVIDIA's KVBM, and what each does here.

`VARIABLES` has every variable that the wheel of KVBM 1.6.1 reads, and those that its documentation
named and nothing read. Nothing is ignored in silence:

    STACK     makes the stack of tiers
    PLUGIN    is read by one of our plug-ins
    FIXED     only says what is so anyway; another value is refused
    REFUSED   has no meaning here, whatever its value

The page `docs/how-to/from-kvbm.md` shows this table, and a test compares the two.
"""

from __future__ import annotations

import difflib
import enum
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvbm_core import PAGE_BYTES, ConfigError
from kvbm_core.layers import FOOTER_BYTES

__all__ = ["VARIABLES", "Use", "Variable", "check_environment", "explain", "makes_stack", "read_tiers"]

_GB: Final = 10**9
"""KVBM counts so, whatever its documentation says of GiB."""
_MAX_QUEUE_DEPTH: Final = 1024
"""Of the `gds` tier."""


class Use(enum.Enum):
    """What becomes of a variable."""

    STACK = "makes the stack"
    PLUGIN = "honoured"
    FIXED = "only as it is"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable."""

    name: str
    use: Use
    text: str
    """What it does here, or what to do in its place. Shown in the log, in errors and in the documentation."""
    accepts: tuple[str, ...] = ()
    """For FIXED: the values that may stand there."""


_OBJECT = "No release of KVBM reads it. Write a `remote` tier into a configuration file."
_OBJECT_NAMES = (
    "ENABLED", "BUCKET", "ENDPOINT", "REGION", "ACCESS_KEY", "SECRET_KEY", "NUM_BLOCKS", "WRITE_THROUGH",
)  # fmt: skip
_CHANNEL = "Leave it out: leader and workers speak through vLLM, and no port is opened."

VARIABLES: Final = (
    Variable("DYN_KVBM_CPU_CACHE_GB", Use.STACK,
        "Capacity of the `cpu` tier: 10^9 bytes, for all ranks of the engine together. 0: no such tier."),
    Variable("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", Use.STACK,
        "The `cpu` tier holds so many blocks of the engine; wins over `DYN_KVBM_CPU_CACHE_GB`. 0: not set."),
    Variable("DYN_KVBM_DISK_CACHE_GB", Use.STACK,
        "Capacity of the `gds` tier: 10^9 bytes, for all ranks of the engine together. 0: no such tier."),
    Variable("DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS", Use.STACK,
        "The `gds` tier holds at least so many blocks of the engine; wins over `DYN_KVBM_DISK_CACHE_GB`. "
        "0: not set."),
    Variable("DYN_KVBM_DISK_CACHE_DIR", Use.STACK,
        "The `gds` tier lies in `kvbm-<uid>` in this directory (default `/tmp`), and is kept over restarts."),
    Variable("DYN_KVBM_MAX_CONCURRENT_TRANSFERS", Use.STACK,
        "Times `DYN_KVBM_MAX_TRANSFER_BATCH_SIZE`: the `gds` tier's `queue_depth`, at most 1024. Default 4."),
    Variable("DYN_KVBM_MAX_TRANSFER_BATCH_SIZE", Use.STACK,
        "Times `DYN_KVBM_MAX_CONCURRENT_TRANSFERS`: the `gds` tier's `queue_depth`. Default 16."),
    Variable("DYN_KVBM_METRICS", Use.PLUGIN, "By `kvbm_metrics`: metrics on a port of their own."),
    Variable("DYN_KVBM_METRICS_PORT", Use.PLUGIN, "By `kvbm_metrics`: that port."),
    Variable("DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS", Use.PLUGIN,
        "By `kvbm_etcd`, where it is configured: how long the leader waits for its workers."),
    Variable("DYN_KVBM_DISK_ALLOCATOR_TYPE", Use.FIXED,
        "Files are opened with O_DIRECT from the start, and without it where the file system refuses.",
        ("default", "open-direct")),
    Variable("DYN_KVBM_DISK_DISABLE_O_DIRECT", Use.FIXED,
        "O_DIRECT is used where the file system has it, and the page cache where not. For the page cache "
        "on purpose write an `lmdb` tier into a configuration file.", ("false",)),
    Variable("DYN_KVBM_DISK_ZEROFILL_FALLBACK", Use.FIXED,
        "A file system that cannot preallocate is filled, without being asked.", ("false", "true")),
    Variable("DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER", Use.FIXED,
        "Every complete block is written to the disk; there is no filter that waits for a second use.",
        ("true",)),
    Variable("DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY", Use.FIXED,
        "Requests of vLLM have no retention priority, so every block is stored. Leave it out.", ("0",)),
    Variable("DYN_KVBM_DISABLE_WRITE_COMBINED", Use.FIXED,
        "Host memory is never write-combined.", ("false", "true")),
    Variable("DYN_KVBM_ENABLE_NUMA", Use.FIXED,
        "Host memory is placed near the rank's GPU where the kernel knows the cores there.", ("true",)),
    Variable("DYN_MEMORY_DISABLE_NUMA", Use.FIXED,
        "Host memory is placed near the rank's GPU where the kernel knows the cores there.", ("false",)),
    Variable("DYN_KVBM_ENABLE_RECORD", Use.FIXED,
        "Nothing is recorded; read the metrics, or set `VLLM_LOGGING_LEVEL=DEBUG`.", ("false",)),
    Variable("DYN_KVBM_NCCL_MLA_MODE", Use.FIXED,
        "Each rank loads for itself, and nothing is broadcast (KVBM has it for TensorRT-LLM alone).",
        ("false",)),
    Variable("DYN_KVBM_NCCL_MAX_CTAS", Use.REFUSED, "Leave it out: nothing is broadcast."),
    Variable("DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR", Use.FIXED,
        "Events are not consolidated; a router reads those of vLLM, see its `--kv-events-config`.",
        ("false",)),
    Variable("DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE", Use.REFUSED,
        "Leave it out: events are not consolidated; a router reads those of vLLM, see its "
        "`--kv-events-config`."),
    Variable("DYN_RUNTIME_ENABLED_KVBM", Use.FIXED,
        "There is no Dynamo runtime to attach to; `kvbm_etcd` registers engines in etcd.", ("false",)),
    Variable("DYN_KVBM_LEADER_ZMQ_HOST", Use.REFUSED, _CHANNEL),
    Variable("DYN_KVBM_LEADER_ZMQ_PUB_PORT", Use.REFUSED, _CHANNEL),
    Variable("DYN_KVBM_LEADER_ZMQ_ACK_PORT", Use.REFUSED, _CHANNEL),
    Variable("DYN_KVBM_CACHE_STATS_MAX_REQUESTS", Use.REFUSED,
        "Leave it out: hits are counters, and Prometheus takes the rate over any time."),
    Variable("DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS", Use.REFUSED,
        "Set `VLLM_LOG_STATS_INTERVAL`: the counters stand in vLLM's own log line."),
    Variable("DYN_KVBM_TRTLLM_ZMQ_PORT", Use.REFUSED, "Leave it out: it is for TensorRT-LLM."),
    Variable("DYN_KVBM_BARRIER_ID_PREFIX", Use.REFUSED,
        "Leave it out: KVBM has dropped it, and `kvbm_etcd` registers engines by their ids."),
    Variable("DYN_KVBM_SLEEP", Use.REFUSED, "Leave it out: KVBM has dropped it."),
    *(Variable(f"DYN_KVBM_OBJECT_{name}", Use.REFUSED, _OBJECT) for name in _OBJECT_NAMES),
)  # fmt: skip

_BY_NAME: Final = {variable.name: variable for variable in VARIABLES}
_WORDS: Final = {
    "1": "true", "true": "true", "on": "true", "yes": "true",
    "0": "false", "false": "false", "off": "false", "no": "false",
}  # fmt: skip


def check_environment(environ: Mapping[str, str]) -> None:
    """Find what cannot be honoured.

    Raises:
        ConfigError: Names every variable at fault with its value and what to do; for an unknown one,
            the nearest that is known. A misspelt size would otherwise be a cache that is not there.
    """
    faults = [fault for name, value in _given(environ).items() if (fault := _fault(name, value))]
    if faults:
        raise ConfigError("\n".join(["settings of KVBM in the environment:", *faults]))


def explain(environ: Mapping[str, str]) -> list[str]:
    """Say in a line for each variable that is set what it does."""
    given = _given(environ)
    return [f"{name}={_shown(name, given[name])}: {_BY_NAME[name].text}" for name in given]


def makes_stack(environ: Mapping[str, str]) -> list[str]:
    """List the variables that are set and make the stack."""
    return [name for name in _given(environ) if _BY_NAME[name].use is Use.STACK]


def read_tiers(
    environ: Mapping[str, str], block_bytes: Callable[[], int | None], world_size: int
) -> list[dict[str, Any]]:
    """Make the tiers, as they would stand in a configuration file.

    Args:
        environ: The environment, as checked.
        block_bytes: Gives the bytes of a block over all ranks, or None where that is not known.
        world_size: Ranks of the engine.

    Raises:
        ConfigError: For a number that is none, a directory that is another user's, or no tier at all.
    """
    sizes = _Sizes(environ, block_bytes, world_size)
    tiers: list[dict[str, Any]] = []
    if cpu := sizes.capacity("CPU", lambda blocks, slot_bytes: blocks * slot_bytes):
        tiers.append({"backend": "cpu", "capacity": cpu})
    if disk := sizes.capacity("DISK", _gds_share):
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

    def capacity(self, medium: str, share_bytes: Callable[[int, int], int]) -> int:
        """Work out a tier's capacity; 0 for no tier.

        Args:
            medium: As in the variables' names.
            share_bytes: Gives what a rank needs for so many blocks of so many bytes.
        """
        name = f"DYN_KVBM_{medium}_CACHE_OVERRIDE_NUM_BLOCKS"
        if blocks := _count(self.environ, name, 0, least=0):
            return share_bytes(blocks, self._slot_bytes(name, blocks)) * self.world_size
        return _gigabytes(self.environ, f"DYN_KVBM_{medium}_CACHE_GB")

    def _slot_bytes(self, name: str, blocks: int) -> int:
        """Say what one block takes on one rank: whole pages."""
        total_bytes = self.block_bytes()
        if total_bytes is None:
            raise ConfigError(f"{name}={blocks}: the bytes of this model's blocks are not known before it is "
                              f"loaded; set {name.replace('OVERRIDE_NUM_BLOCKS', 'GB')}")  # fmt: skip
        payload_bytes = -(-total_bytes // self.world_size)
        return -(-(payload_bytes + FOOTER_BYTES) // PAGE_BYTES) * PAGE_BYTES


def _gds_share(blocks: int, slot_bytes: int) -> int:
    """Say what the `gds` tier needs on one rank: slots and their entries, the probe's file, other files."""
    slots_bytes = blocks * (slot_bytes + 80) + PAGE_BYTES
    probe_bytes = min(8 << 20, slots_bytes // 15 + PAGE_BYTES)
    return (slots_bytes + probe_bytes + PAGE_BYTES + (64 << 10)) * 1024 // 1023 + 1


def _given(environ: Mapping[str, str]) -> dict[str, str]:
    """Take what is KVBM's from an environment; what is empty is not set."""
    ours = {name: value.strip() for name, value in environ.items()
            if name.startswith("DYN_KVBM_") or name in _BY_NAME}  # fmt: skip
    return {name: value for name, value in sorted(ours.items()) if value}


def _fault(name: str, value: str) -> str | None:
    shown, variable = f"{name}={_shown(name, value)}", _BY_NAME.get(name)
    if variable is None:
        near = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0)
        return f"{shown}: there is no such variable; did you mean {near[0]}?"
    if variable.use is Use.REFUSED:
        return f"{shown}: {variable.text}"
    if variable.use is Use.FIXED and _WORDS.get(value.lower(), value) not in _spelt(variable.accepts):
        return f"{shown}: {variable.text} Only {' or '.join(variable.accepts)} is accepted."
    return None


def _spelt(accepts: tuple[str, ...]) -> set[str]:
    return {_WORDS.get(value, value) for value in accepts}


def _shown(name: str, value: str) -> str:
    return "(hidden)" if name.endswith(("_KEY", "_SECRET", "_TOKEN", "_PASSWORD")) else value


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
