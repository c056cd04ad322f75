"""From vLLM's configuration to ours."""

from __future__ import annotations

import os
from fractions import Fraction
from typing import Any

from kvbm_core import ConfigError, KvbmError, StackConfig, check_stack
from kvbm_core.sharing import sharing_of
from kvbm_device import check_copy
from kvbm_engine import check_record
from kvbm_metrics import read_address
from kvbm_vllm._extra import FILE_KEY, read_stack
from kvbm_vllm._models import check_engine, has_unlike_layers, replicas
from kvbm_vllm._replicas import replicas_of

__all__ = ["check_settings", "read_settings", "replicas"]


def read_settings(vllm_config: Any) -> StackConfig:
    """Read the stack from ``kv_connector_extra_config`` or from the environment.

    The first has the mapping itself, or ``{"config": path}``; the second NVIDIA's variables for KVBM. Paths
    are those of this engine, see `kvbm_vllm._replicas`.

    Raises:
        ConfigError: If something in it is wrong, or both say what the stack is.
    """
    parallel, replicas_here = vllm_config.parallel_config, replicas_of(vllm_config.parallel_config)
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
    config = read_stack(
        extra, os.environ, lambda: _block_bytes(vllm_config), parallel.world_size, replicas_here.count
    )
    return replicas_here.apart(config)


def check_settings(vllm_config: Any) -> None:
    """Find mistakes before vLLM loads a model.

    Raises:
        ConfigError: For a setting that is wrong.
        TierOpenError: For a path that cannot be used.
    """
    role = vllm_config.kv_transfer_config.kv_role
    if role != "kv_both":
        raise ConfigError(f'kv_role: {role!r}; KvbmConnector stores and loads: write "kv_both"')
    parallel = vllm_config.parallel_config
    replicas_here = replicas_of(parallel)
    read_address(os.environ, replicas_here.first + replicas_here.count - 1)
    config = read_settings(vllm_config)
    check_copy(config.device_copy)
    check_engine(vllm_config)
    check_record(config)
    try:
        sharing_of(config)
        check_stack(
            config, block_bytes=_block_bytes(vllm_config), share=_host_share(parallel),
            engines=replicas_here.count,
        )  # fmt: skip
    except KvbmError as error:
        file = (vllm_config.kv_transfer_config.kv_connector_extra_config or {}).get(FILE_KEY)
        if file:
            error.args = (f"configuration file {file}: {error}",)
        raise
    replicas_here.tell(config, parallel.world_size)


def _host_share(parallel: Any) -> Fraction:
    """Give the part of an engine's ranks that are on each host. 1 where vLLM does not say."""
    # Of one replica, not of all.
    hosts = getattr(parallel, "nnodes_within_dp", getattr(parallel, "nnodes", 1))
    return Fraction(1, hosts) if isinstance(hosts, int) and hosts > 1 else Fraction(1)


def _block_bytes(vllm_config: Any) -> int | None:
    """Estimate the bytes of a block over all ranks, before vLLM knows. None if that is not possible."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    # Blocks of several KV groups have several lengths, which depend on how vLLM puts layers together.
    if model is None or not cache.block_size or has_unlike_layers(vllm_config):
        return None
    element_bytes = 1 if "fp8" in cache.cache_dtype else model.dtype.itemsize
    per_token = model.get_num_kv_heads(parallel) * model.get_head_size() * element_bytes
    # Not those of this rank alone: every rank must come to the same number.
    layers = -(-model.get_total_num_hidden_layers() // parallel.pipeline_parallel_size)
    planes = 1 if model.use_mla else 2
    return int(planes * layers * per_token * cache.block_size * parallel.world_size)
