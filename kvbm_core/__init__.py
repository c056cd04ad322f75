"""Keeps the KV cache of a language model in an ordered stack of tiers.

Backend authors start from `Tier` and `Backend`, engine authors from `Planner`, `Worker` and
`Device`, or from `Stack`, which joins them in one process.
"""

from kvbm_core.admission import Admission, AdmissionPolicy
from kvbm_core.block import BlockKey, BlockState, Namespace, chain_keys, make_namespace, root_key
from kvbm_core.codec import Codec, CodecConfig, CodecContext, CodecKind
from kvbm_core.config import ByteSize, Settings, StackConfig, load_config
from kvbm_core.coordinator import Coordinator, Member, Probeable
from kvbm_core.device import Device, DeviceTraits, Pinnable, Stageable, Work
from kvbm_core.errors import (
    BackendError,
    ConfigError,
    CoordinatorError,
    CorruptError,
    KvbmError,
    QueueFullError,
    TierError,
    TierOpenError,
    TransitionError,
    UnverifiableError,
)
from kvbm_core.field_docs import show_fields
from kvbm_core.hookspecs import hookimpl
from kvbm_core.leader.finding.matches import Match
from kvbm_core.leader.ground.counts import TierCounts
from kvbm_core.leader.planner import Planner
from kvbm_core.movement import Movement
from kvbm_core.plan import Load, Plan, Report, Store, TierStatus
from kvbm_core.policies import Fifo, Lru
from kvbm_core.policy import EvictionPolicy, Origin, Policy, PolicyConfig, PolicyContext
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
from kvbm_core.worker.opening import check_stack
from kvbm_core.worker.peers import Peers
from kvbm_core.worker.worker import Worker

__version__ = "0.1.0"
"""Of the distribution kvbm-core, which is built from this line."""

__all__ = [
    "CONTRACT_VERSION",
    "PAGE_BYTES",
    "Addressable",
    "Admission",
    "AdmissionPolicy",
    "Backend",
    "BackendError",
    "BlockKey",
    "BlockState",
    "ByteSize",
    "Capabilities",
    "Codec",
    "CodecConfig",
    "CodecContext",
    "CodecKind",
    "Completion",
    "ConfigError",
    "Coordinator",
    "CoordinatorError",
    "CorruptError",
    "Device",
    "DeviceTraits",
    "EvictionPolicy",
    "Fifo",
    "KvbmError",
    "Load",
    "Lru",
    "Match",
    "Member",
    "Movement",
    "Namespace",
    "Op",
    "Origin",
    "Outcome",
    "Peers",
    "Pinnable",
    "Plan",
    "Planner",
    "Policy",
    "PolicyConfig",
    "PolicyContext",
    "Probeable",
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
    "UnverifiableError",
    "Work",
    "Worker",
    "__version__",
    "chain_keys",
    "check_stack",
    "hookimpl",
    "load_config",
    "make_namespace",
    "root_key",
]

# Configurations do it themselves, those of others too.
show_fields(
    each
    for each in map(globals().__getitem__, __all__)
    if isinstance(each, type) and each.__module__.startswith(__name__) and not issubclass(each, Settings)
)
