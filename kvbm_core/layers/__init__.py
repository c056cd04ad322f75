"""Layers: what cuts across all tiers, as wrappers with the same interface.

transfer engine ──► DeadlineTier ──► ReplicaTier ──► SealTier ──► CodecTier ──► the backend's tier
                    a thread a tier,  only where       seal on      compression,
                    a bound on time   another rank     store, proof encryption
                                      writes the same  on load
"""

from kvbm_core.layers.codec_tier import CodecChain, CodecTier
from kvbm_core.layers.deadline import DeadlineTier
from kvbm_core.layers.forward import ForwardTier
from kvbm_core.layers.replica import ReplicaTier
from kvbm_core.layers.seal import NO_SEAL, SEAL_BYTES, SealTier, make_seal, why_damaged

__all__ = [
    "NO_SEAL",
    "SEAL_BYTES",
    "CodecChain",
    "CodecTier",
    "DeadlineTier",
    "ForwardTier",
    "ReplicaTier",
    "SealTier",
    "make_seal",
    "why_damaged",
]
