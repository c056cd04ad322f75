"""Keeps objects in host memory, page-locked where there is an accelerator.

    tiers:
      - {backend: cpu, capacity: 8GiB}

`CpuTier` is the tier, `CpuConfig` its settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_core.hookspecs import hookimpl
from kvbm_core.tier import Backend
from kvbm_cpu._bare import BareMemory
from kvbm_cpu._config import CpuConfig
from kvbm_cpu._memory import check
from kvbm_cpu._tier import CpuTier

__all__ = ["CpuConfig", "CpuTier", "kvbm_backends"]


@hookimpl
def kvbm_backends() -> Sequence[Backend]:
    """Offer the backend ``cpu``."""
    return [Backend("cpu", CpuConfig, CpuTier, check, bare=BareMemory)]
