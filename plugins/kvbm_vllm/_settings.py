"""From vLLM's configuration to ours."""

from __future__ import annotations

import logging
from typing import Any

from kvbm_core import ConfigError, StackConfig, check_stack, load_config

__all__ = ["check_settings", "read_settings", "single_group"]

logger = logging.getLogger("kvbm_vllm")

_FILE_KEY = "config"


def read_settings(vllm_config: Any) -> StackConfig:
    """Read the stack from ``kv_connector_extra_config``: the mapping itself, or ``{"config": path}``.

    Raises:
        ConfigError: If something in it is wrong.
    """
    extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
    if _FILE_KEY not in extra:
        return load_config(extra)
    path = extra.pop(_FILE_KEY)
    if extra:
        raise ConfigError(
            f"kv_connector_extra_config: 'config': {path!r} names a file, so {sorted(extra)} must be "
            "written there"
        )
    return load_config(str(path))


def check_settings(vllm_config: Any) -> None:
    """Find mistakes before vLLM loads a model.

    Raises:
        ConfigError: For a setting that is wrong.
        TierOpenError: For a path that cannot be used.
    """
    role = vllm_config.kv_transfer_config.kv_role
    if role != "kv_both":
        raise ConfigError(f'kv_role: {role!r}; KvbmConnector stores and loads: write "kv_both"')
    check_stack(read_settings(vllm_config), block_bytes=_block_bytes(vllm_config))


def single_group(kv_cache_config: Any) -> Any:
    """Give the KV cache's one group of layers.

    Raises:
        ConfigError: If the model has several, as models with Mamba layers do.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ConfigError(
            f"the model's KV cache has {len(groups)} groups of layers; KvbmConnector supports models "
            "with one. Serve this model without it"
        )
    return groups[0]


def _block_bytes(vllm_config: Any) -> int | None:
    """Estimate the bytes of a block over all ranks, before vLLM knows. None if that is not possible."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    if model is None or not cache.block_size:
        return None
    element_bytes = 1 if "fp8" in cache.cache_dtype else model.dtype.itemsize
    per_token = model.get_num_kv_heads(parallel) * model.get_head_size() * element_bytes
    layers = model.get_num_layers(parallel)
    planes = 1 if model.use_mla else 2
    return int(planes * layers * per_token * cache.block_size * parallel.world_size)
