"""Keeps blocks in LMDB on a local disk, over restarts.

    tiers:
      - {backend: lmdb, capacity: 200GiB, path: /nvme/kvbm}

`LmdbTier` is the tier, `LmdbConfig` its settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_core.hookspecs import hookimpl
from kvbm_core.tier import Backend
from kvbm_lmdb._bare import BareLmdb
from kvbm_lmdb._config import LmdbConfig
from kvbm_lmdb._contents import contents
from kvbm_lmdb._directory import check, share_bytes
from kvbm_lmdb._stored import stored
from kvbm_lmdb._tier import LmdbTier

__all__ = ["LmdbConfig", "LmdbTier", "kvbm_backends"]


@hookimpl
def kvbm_backends() -> Sequence[Backend]:
    """Offer the backend ``lmdb``."""
    return [
        Backend(
            "lmdb",
            LmdbConfig,
            LmdbTier,
            check,
            share_bytes=share_bytes,
            stored=stored,
            contents=contents,
            bare=BareLmdb,
        )
    ]
