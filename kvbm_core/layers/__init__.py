"""Layers: what cuts across all tiers, as wrappers with the same interface.

transfer engine ──► DeadlineTier ──► CheckedTier ──► ReplicaTier ──► the backend's tier
                    a thread a tier,    footer on store,   only where another rank
                    a bound on time     proof on load      writes the same bytes
"""

from kvbm_core.layers.deadline import DeadlineTier
from kvbm_core.layers.forward import ForwardTier
from kvbm_core.layers.replica import ReplicaTier
from kvbm_core.layers.seal import FOOTER_BYTES, CheckedTier

__all__ = ["FOOTER_BYTES", "CheckedTier", "DeadlineTier", "ForwardTier", "ReplicaTier"]
