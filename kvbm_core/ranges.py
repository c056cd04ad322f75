"""The ranges of the numbers in a stack's configuration."""

from __future__ import annotations

import math
from typing import Any

from kvbm_core.errors import ConfigError

__all__ = ["check_ranges"]


def check_ranges(config: Any, where: str) -> None:
    """Look at the numbers of a `kvbm_core.config.StackConfig`.

    Raises:
        ConfigError: For one that is out of its range; names key, value and what to write.
    """
    for key in ("load_deadline_s", "store_deadline_s", "lookup_deadline_s", "max_keep_s"):
        if not 0 < getattr(config, key) < math.inf:
            raise ConfigError(f"{where}: {key}: {getattr(config, key)!r}; write seconds above 0")
    if not 0 < config.max_load_fraction <= 1:
        raise ConfigError(
            f"{where}: max_load_fraction: {config.max_load_fraction!r}; write a number above 0, at most 1"
        )
    if config.max_store_blocks < 1:
        raise ConfigError(f"{where}: max_store_blocks: {config.max_store_blocks!r}; write at least 1")
    every = config.sparse_stores_every_tokens
    if every is not None and every < 0:
        raise ConfigError(
            f"{where}: sparse_stores_every_tokens: {every!r}; write tokens, like 2048, or 0 for none"
        )
    if not 0 <= config.prefetch_fraction <= 1:
        raise ConfigError(
            f"{where}: prefetch_fraction: {config.prefetch_fraction!r}; write a number from 0 to 1"
        )
    if not 0 <= config.keep_fraction < 1:
        raise ConfigError(
            f"{where}: keep_fraction: {config.keep_fraction!r}; write a number of at least 0, below 1"
        )
