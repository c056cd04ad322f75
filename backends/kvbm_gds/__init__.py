"""Keeps blocks on NVMe, over restarts, through NIXL: GPUDirect Storage, io_uring or libaio.

    tiers:
      - {backend: gds, capacity: 200GiB, path: /nvme/kvbm}

`GdsTier` is the tier, `GdsConfig` its settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_core.hookspecs import hookimpl
from kvbm_core.tier import Backend
from kvbm_gds._bare import BareFile
from kvbm_gds._check import check
from kvbm_gds._config import GdsConfig
from kvbm_gds._contents import contents
from kvbm_gds._layout import share_bytes
from kvbm_gds._stored import stored
from kvbm_gds._tier import GdsTier

__all__ = ["GdsConfig", "GdsTier", "kvbm_backends"]


@hookimpl
def kvbm_backends() -> Sequence[Backend]:
    """Offer the backend ``gds``."""
    return [
        Backend(
            "gds",
            GdsConfig,
            GdsTier,
            check,
            share_bytes=share_bytes,
            stored=stored,
            contents=contents,
            bare=BareFile,
        )
    ]
