"""The environment variables of NVIDIA's KVBM, and what each does here.

`VARIABLES` has every variable that the wheel of KVBM 1.6.1 reads, and those that its documentation
named and nothing read. Nothing is ignored in silence:

    STACK     makes the stack of tiers
    PLUGIN    is read by one of our plug-ins
    FIXED     only says what is so anyway; another value is refused
    NOTED     is for something else, which may be there; the log says what to write
    REFUSED   has no meaning here, whatever its value

The page `docs/how-to/from-kvbm.md` shows this table, and a test compares the two.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

__all__ = ["VARIABLES", "Use", "Variable"]


class Use(enum.Enum):
    """What becomes of a variable."""

    STACK = "makes the stack"
    PLUGIN = "honoured"
    FIXED = "only as it is"
    NOTED = "noted"
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
        "Capacity of the `cpu` tier: 10^9 bytes, for all ranks together. 0: no such tier."),
    Variable("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", Use.STACK,
        "The `cpu` tier holds so many blocks of the engine; wins over `DYN_KVBM_CPU_CACHE_GB`. 0: not set."),
    Variable("DYN_KVBM_DISK_CACHE_GB", Use.STACK,
        "Capacity of the `gds` tier: 10^9 bytes, for all ranks together. 0: no such tier."),
    Variable("DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS", Use.STACK,
        "The `gds` tier holds at least so many blocks of the engine; wins over `DYN_KVBM_DISK_CACHE_GB`. "
        "0: not set."),
    Variable("DYN_KVBM_DISK_CACHE_DIR", Use.STACK,
        "The `gds` tier lies in `kvbm-<uid>` in this directory (default `/tmp`), and is kept over restarts."),
    Variable("DYN_KVBM_MAX_CONCURRENT_TRANSFERS", Use.STACK,
        "Times `DYN_KVBM_MAX_TRANSFER_BATCH_SIZE`: the `gds` tier's `queue_depth`, at most 1024. Default 4."),
    Variable("DYN_KVBM_MAX_TRANSFER_BATCH_SIZE", Use.STACK,
        "Times `DYN_KVBM_MAX_CONCURRENT_TRANSFERS`: the `gds` tier's `queue_depth`. Default 16."),
    Variable("DYN_KVBM_METRICS", Use.PLUGIN,
        "By `kvbm_metrics`: metrics on a port of their own, for this machine alone unless "
        "`DYN_KVBM_METRICS_HOST` says otherwise."),
    Variable("DYN_KVBM_METRICS_PORT", Use.PLUGIN, "By `kvbm_metrics`: that port."),
    Variable("DYN_KVBM_METRICS_HOST", Use.PLUGIN,
        "By `kvbm_metrics`: the address of that port, `127.0.0.1` if not set. `0.0.0.0`: every address of "
        "this machine, as with KVBM, which does not know this variable."),
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
    Variable("DYN_SYSTEM_PORT", Use.NOTED,
        "The port of Dynamo's runtime for health and metrics; without Dynamo nothing opens it. vLLM has "
        "`/health` and `/metrics` on its own port; for metrics on another set `DYN_KVBM_METRICS=true` and "
        "`DYN_KVBM_METRICS_PORT`."),
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
