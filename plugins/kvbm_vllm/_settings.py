"""From vLLM's configuration to ours."""

from __future__ import annotations

import logging
import os
from typing import Any

from kvbm_core import ConfigError, StackConfig, check_stack, load_config
from kvbm_device import check_copy
from kvbm_metrics import read_port
from kvbm_vllm._kvbm_env import check_environment, makes_stack, read_tiers

__all__ = ["block_tokens", "check_settings", "read_settings", "replicas"]

logger = logging.getLogger("kvbm_vllm")

_FILE_KEY = "config"

_PARTIAL_KINDS = ("Mamba", "SlidingWindow", "ChunkedLocal", "CrossAttention", "SinkFullAttention")
"""How the names of vLLM's specifications begin whose blocks do not hold every token's KV."""


def read_settings(vllm_config: Any) -> StackConfig:
    """Read the stack from ``kv_connector_extra_config`` or from the environment.

    The first has the mapping itself, or ``{"config": path}``; the second NVIDIA's variables for KVBM.

    Raises:
        ConfigError: If something in it is wrong, or both say what the stack is.
    """
    check_environment(os.environ)
    extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
    written, variables = [key for key in ("tiers", _FILE_KEY) if key in extra], makes_stack(os.environ)
    if written and variables:
        raise ConfigError(
            f"kv_connector_extra_config has {written[0]!r}, and the environment has {', '.join(variables)}: "
            "both say what the tiers are; take one of them away"
        )
    if variables:
        ranks = vllm_config.parallel_config.world_size
        tiers = read_tiers(os.environ, lambda: _block_bytes(vllm_config), ranks)
        return load_config({**extra, "tiers": tiers})
    if not extra:
        raise ConfigError(
            "kv_connector_extra_config is empty: write 'tiers' or 'config' there, or set "
            "DYN_KVBM_CPU_CACHE_GB, DYN_KVBM_DISK_CACHE_GB or both in the environment"
        )
    return _read_extra(extra)


def _read_extra(extra: dict[str, Any]) -> StackConfig:
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
    read_port(os.environ)
    config = read_settings(vllm_config)
    check_copy(config.device_copy)
    _require_prefixes(vllm_config)
    check_stack(config, block_bytes=_block_bytes(vllm_config))


def block_tokens(vllm_config: Any, kv_cache_config: Any) -> int:
    """Give the tokens of a block, of a model whose blocks can be stored.

    Raises:
        ConfigError: If the model's layers do not all keep the KV of every token, as models with
            Mamba layers or sliding windows do, if a block is divided over ranks by tokens, if vLLM
            clears blocks before they are read, or if it cannot go on after a prefix that was loaded.
    """
    _require_prefixes(vllm_config)
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if len(groups) != 1 or any(kind.startswith(_PARTIAL_KINDS) for kind in kinds):
        raise ConfigError(
            f"the layers of the model keep their KV in ways that KvbmConnector does not support: {kinds}; it "
            "supports full attention in all layers. Serve this model without it"
        )
    if getattr(kv_cache_config, "needs_kv_cache_zeroing", False) and getattr(
        vllm_config, "use_v2_model_runner", False
    ):
        # Before the step's plan is carried out: what the blocks held would be stored as zeros.
        raise ConfigError(
            "VLLM_USE_V2_MODEL_RUNNER: vLLM clears new blocks of this model's KV cache, and its second model "
            "runner does so before KvbmConnector has read what was in them. Set it to 0, or serve this model "
            "without KvbmConnector"
        )
    for key in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(vllm_config.parallel_config, key, 1) > 1:
            raise ConfigError(f"{key}: KvbmConnector does not support more than 1; leave it out")
    return int(groups[0].kv_cache_spec.block_size)


def _require_prefixes(vllm_config: Any) -> None:
    """Refuse MLA where vLLM computes prompts only as a whole.

    Its CPU build switches chunked prefill and prefix caching off for such models, and computes other
    tokens after a prefix that was loaded, although every byte of it is right.
    """
    model = vllm_config.model_config
    if model is not None and model.use_mla and not vllm_config.scheduler_config.enable_chunked_prefill:
        raise ConfigError(
            "enable_chunked_prefill: False; for a model with MLA vLLM cannot go on after a prefix that was "
            "loaded then. Leave it on; where vLLM switches it off itself, as on a CPU, serve this model "
            "without KvbmConnector"
        )


def replicas(vllm_config: Any, kv_cache_config: Any) -> int:
    """Say how many neighbouring ranks hold the same KV: of a model with MLA all that are tensor parallel.

    Models with fewer KV heads than ranks hold some heads several times, too. That is not used: nothing
    in vLLM's configuration proves it for every layer.
    """
    [group] = kv_cache_config.kv_cache_groups
    mla = type(group.kv_cache_spec).__name__ == "MLAAttentionSpec"
    return int(vllm_config.parallel_config.tensor_parallel_size) if mla else 1


def _block_bytes(vllm_config: Any) -> int | None:
    """Estimate the bytes of a block over all ranks, before vLLM knows. None if that is not possible."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    if model is None or not cache.block_size:
        return None
    element_bytes = 1 if "fp8" in cache.cache_dtype else model.dtype.itemsize
    per_token = model.get_num_kv_heads(parallel) * model.get_head_size() * element_bytes
    # Not those of this rank alone: every rank must come to the same number.
    layers = -(-model.get_total_num_hidden_layers() // parallel.pipeline_parallel_size)
    planes = 1 if model.use_mla else 2
    return int(planes * layers * per_token * cache.block_size * parallel.world_size)
