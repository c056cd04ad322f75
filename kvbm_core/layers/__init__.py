"""Layers: what cuts across all tiers, as wrappers with the same interface.

transfer engine ──► DeadlineTier ──► ReplicaTier ──► OrderTier ──► SealTier ──► CodecTier ──► the backend's
                    a thread a tier,  only where       of durable   seal on      compression,   tier
                    a bound on time   another rank     tiers: the   store, proof encryption
                                      writes the same  order of use on load
"""

from kvbm_core.layers.codec_tier import CodecChain, CodecTier
from kvbm_core.layers.deadline import DeadlineTier
from kvbm_core.layers.forward import ForwardTier
from kvbm_core.layers.order_parts import OrderShape
from kvbm_core.layers.order_tier import OrderTier
from kvbm_core.layers.replica import ReplicaTier
from kvbm_core.layers.seal import NO_SEAL, SEAL_BYTES, SealTier, make_seal, why_damaged

__all__ = [
    "NO_SEAL",
    "SEAL_BYTES",
    "CodecChain",
    "CodecTier",
    "DeadlineTier",
    "ForwardTier",
    "OrderShape",
    "OrderTier",
    "ReplicaTier",
    "SealTier",
    "make_seal",
    "why_damaged",
]
