"""Finds what would keep a GDS tier from opening, before an engine loads its model."""

from __future__ import annotations

from kvbm_core.errors import TierOpenError
from kvbm_gds._config import GdsConfig
from kvbm_gds._io import load_nixl
from kvbm_gds._machine import why_gds_is_unavailable
from kvbm_gds._slab import directory_of

__all__ = ["check"]


def check(config: GdsConfig) -> None:
    """Find what would keep an engine from opening its directories. Changes nothing.

    Raises:
        TierOpenError: If the path is no directory, cannot be written, is in use by another engine,
            or lies on a file system with too little room; or if an engine is asked for that cannot work.
    """
    if config.engine in ("gds", "posix"):
        load_nixl()
    if config.engine == "gds" and (why := why_gds_is_unavailable()):
        raise TierOpenError(
            f"engine: 'gds' cannot work here: {why}; write auto", operation="check", tier="gds"
        )
    directory_of(config).check(config.capacity, "taken")
