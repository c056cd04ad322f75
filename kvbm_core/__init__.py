"""Keeps the KV cache of a language model in an ordered stack of tiers.

Backend authors start from `Tier` and `Backend`, engine authors from `Planner`, `Worker` and
`Device`, or from `Stack`, which joins them in one process.
"""

from kvbm_core.block import BlockKey, BlockState, Namespace, chain_keys, make_namespace, root_key
from kvbm_core.config import ByteSize, StackConfig, load_config
from kvbm_core.coordinator import Coordinator, Member
from kvbm_core.device import Device, DeviceTraits, Pinnable, Stageable, Work
from kvbm_core.errors import (
    BackendError,
    ConfigError,
    CoordinatorError,
    KvbmError,
    QueueFullError,
    TierError,
    TierOpenError,
    TransitionError,
)
from kvbm_core.hookspecs import hookimpl
from kvbm_core.leader.counts import TierCounts
from kvbm_core.leader.matches import Match
from kvbm_core.leader.planner import Planner
from kvbm_core.plan import Load, Plan, Report, Store, TierStatus
from kvbm_core.registry import Registry
from kvbm_core.stack import Stack
from kvbm_core.tier import (
    CONTRACT_VERSION,
    PAGE_BYTES,
    Addressable,
    Backend,
    Capabilities,
    Completion,
    Op,
    Outcome,
    Reason,
    Region,
    Tier,
    TierConfig,
    TierContext,
    Transfer,
)
from kvbm_core.worker.worker import Worker, check_stack

__all__ = [
    "CONTRACT_VERSION",
    "PAGE_BYTES",
    "Addressable",
    "Backend",
    "BackendError",
    "BlockKey",
    "BlockState",
    "ByteSize",
    "Capabilities",
    "Completion",
    "ConfigError",
    "Coordinator",
    "CoordinatorError",
    "Device",
    "DeviceTraits",
    "KvbmError",
    "Load",
    "Match",
    "Member",
    "Namespace",
    "Op",
    "Outcome",
    "Pinnable",
    "Plan",
    "Planner",
    "QueueFullError",
    "Reason",
    "Region",
    "Registry",
    "Report",
    "Stack",
    "StackConfig",
    "Stageable",
    "Store",
    "Tier",
    "TierConfig",
    "TierContext",
    "TierCounts",
    "TierError",
    "TierOpenError",
    "TierStatus",
    "Transfer",
    "TransitionError",
    "Work",
    "Worker",
    "chain_keys",
    "check_stack",
    "hookimpl",
    "load_config",
    "make_namespace",
    "root_key",
]
