"""From vLLM's configuration to ours."""

from __future__ import annotations

import os
from fractions import Fraction
from typing import Any

from kvbm_core import ConfigError, KvbmError, StackConfig, check_stack, load_config
from kvbm_core.config import refuse_unknown
from kvbm_core.sharing import sharing_of
from kvbm_device import check_copy
from kvbm_engine import check_record
from kvbm_metrics import read_address
from kvbm_vllm._models import check_engine, has_unlike_layers, replicas
from kvbm_vllm._replicas import replicas_of
from kvbm_vllm.kvbm import check_environment, makes_stack, read_tiers

__all__ = ["check_settings", "read_settings", "replicas"]

_FILE_KEY = "config"


def read_settings(vllm_config: Any) -> StackConfig:
    """Read the stack from ``kv_connector_extra_config`` or from the environment.

    The first has the mapping itself, or ``{"config": path}``; the second NVIDIA's variables for KVBM. Paths
    are those of this engine, see `kvbm_vllm._replicas`.

    Raises:
        ConfigError: If something in it is wrong, or both say what the stack is.
    """
    return replicas_of(vllm_config.parallel_config).apart(_read(vllm_config))


def _read(vllm_config: Any) -> StackConfig:
    check_environment(os.environ)
    extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
    written, variables = [key for key in ("tiers", _FILE_KEY) if key in extra], makes_stack(os.environ)
    if written and variables:
        raise ConfigError(
            f"kv_connector_extra_config has {written[0]!r}, and the environment has {', '.join(variables)}: "
            "both say what the tiers are; take one of them away"
        )
    if variables:
        parallel = vllm_config.parallel_config
        engines = replicas_of(parallel).count
        tiers = read_tiers(os.environ, lambda: _block_bytes(vllm_config), parallel.world_size, engines)
        return load_config({**extra, "tiers": tiers})
    if not extra:
        raise ConfigError(
            "kv_connector_extra_config is empty: write 'tiers' or 'config' there, or set "
            "DYN_KVBM_CPU_CACHE_GB, DYN_KVBM_DISK_CACHE_GB or both in the environment"
        )
    return _read_extra(extra)


def _read_extra(extra: dict[str, Any]) -> StackConfig:
    refuse_unknown(extra, [*StackConfig.__struct_fields__, _FILE_KEY], "kv_connector_extra_config")
    if _FILE_KEY not in extra:
        return load_config(extra)
    path = extra.pop(_FILE_KEY)
    if not isinstance(path, str):  # Not shown: it may be the whole stack, with its passwords.
        raise ConfigError(
            f"kv_connector_extra_config: 'config': a {type(path).__name__}; write the path of a YAML file, "
            "or the keys themselves, beginning with 'tiers', in place of 'config'"
        )
    if extra:
        raise ConfigError(
            f"kv_connector_extra_config: 'config': {path!r} names a file, so {sorted(map(str, extra))} must "
            "be written there"
        )
    return load_config(path)


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
        file = (vllm_config.kv_transfer_config.kv_connector_extra_config or {}).get(_FILE_KEY)
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
