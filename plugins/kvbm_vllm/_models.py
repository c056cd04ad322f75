"""What can be served: models with which vLLM goes on after a prefix, and says where what that needs is.

There are two looks. `check_engine` is before the weights are read, and sees what vLLM's configuration says.
`engine_groups` is when the layers are built, and sees how each of them keeps its KV: what is not known to be
right is refused.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any, Final

from kvbm_core import ConfigError

__all__ = [
    "GROUPS_FROM",
    "STATES_FROM",
    "check_engine",
    "check_layers",
    "has_unlike_layers",
    "layer_specs",
    "release",
    "replicas",
    "require_states",
    "vllm_version",
]

logger = logging.getLogger("kvbm_vllm")

_FEATURES: Final[tuple[tuple[str, str, object, str], ...]] = (
    (
        "model_config", "enable_sleep_mode", False,
        "sleep mode gives the KV cache's memory back, and KvbmConnector's workers keep its addresses",
    ),
    (
        "model_config", "enable_cumem_allocator", False,
        "the KV cache then lies in memory that /sleep and /release_kv_cache_memory give back, and "
        "KvbmConnector's workers keep its addresses",
    ),
    (
        "model_config", "sleep_mode_backend", "cumem",
        "it may give the KV cache's memory back, and KvbmConnector's workers keep its addresses",
    ),
    (
        "parallel_config", "enable_fault_tolerance", False,
        "vLLM then goes on after a step that failed, and it is not proved on several GPUs that KvbmConnector "
        "stores nothing of that step",
    ),
    (
        "parallel_config", "enable_elastic_ep", False,
        "an engine that is added later has no share of a tier's capacity: those that began have divided it",
    ),
)  # fmt: skip
"""Settings of vLLM under which KV is lost without our knowing: where they are, the value that is harmless,
and why another is not. Some releases lack some."""
GROUPS_FROM: Final = (0, 30)
"""The release of vLLM that lets one request's load fail, and says which groups are to be stored."""
STATES_FROM: Final = (0, 32)
"""The release that does not clear blocks after they were loaded, and says how many tokens a state is for."""
_LATENT: Final = ("MLAAttentionSpec", "SlidingWindowMLASpec")
"""How vLLM names the layouts that have no heads to divide over ranks."""
_ONE_WINDOW: Final = ((0, 26), (0, 27))
"""Releases of vLLM that compute all layers of a group with the window of some."""
_SINKS: Final = ("GptOss", "MiMoV2", "Laguna")
"""How architectures begin whose attention has sinks beside windows."""
_VARIANT: Final = ("FLASHINFER", "TRITON_MLA")
"""Attention whose bits vLLM does not hold alike after a prefix, where it shall."""


def vllm_version() -> tuple[int, ...]:
    """Give the release of vLLM that is installed, see `release`."""
    import vllm

    return release(vllm.__version__)


def release(version: str) -> tuple[int, ...]:
    """Give the release that a version of vLLM is of, as two numbers; less for one that has none."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def check_engine(vllm_config: Any) -> None:
    """Refuse a model or a feature with which, as vLLM's configuration tells, no prefix can be kept or used.

    Raises:
        ConfigError: Names what the model does, or the setting, and says what to write.
    """
    model = vllm_config.model_config
    for part, key, harmless, reason in _FEATURES:
        value = getattr(getattr(vllm_config, part), key, harmless)
        if value != harmless:
            raise ConfigError(
                f"{key}: {value!r}; {reason}. Leave it out, or serve this model without KvbmConnector"
            )
    for key in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(vllm_config.parallel_config, key, 1) > 1:
            raise ConfigError(f"{key}: KvbmConnector does not support more than 1; leave it out")
    if model is None:
        return
    distrusted = _distrusted(vllm_config)
    if distrusted:
        raise ConfigError(f"{distrusted}. Serve this model without KvbmConnector")
    if model.is_hybrid or model.is_attention_free:
        require_states(vllm_config)
    _require_prefixes(vllm_config)
    if vllm_version() < GROUPS_FROM:
        _require_one_window(vllm_config)
    kinds = set(_layer_types(model))
    if "sliding_attention" in kinds and len(kinds) > 1 and _unified(vllm_config):
        names = getattr(model, "architectures", None) or ()
        _require_right_windows(any(name.startswith(_SINKS) for name in names))


def check_layers(vllm_config: Any, whole: list[Any]) -> None:
    """Refuse layers that vLLM computes wrongly, or otherwise than it promises.

    Args:
        vllm_config: vLLM's configuration.
        whole: The specifications of layers that keep all tokens.
    """
    _require_like_bits(vllm_config)
    if any(getattr(spec, "sliding_window", None) for spec in whole):
        impls = (getattr(layer, "impl", None) for layer in _layers(vllm_config))
        _require_right_windows(any(getattr(impl, "sinks", None) is not None for impl in impls))
    if any(map(_window, whole)):
        _tell_cost(vllm_config)


def require_states(vllm_config: Any) -> None:
    """Refuse recurrent states where vLLM does not keep them at the ends of blocks, or hand them over."""
    kept = "the model keep a state in place of every token's KV, as Mamba layers do"
    cache, serve = vllm_config.cache_config, "or serve this model without KvbmConnector"
    if vllm_version() < STATES_FROM:
        raise ConfigError(
            f"layers of {kept}; vLLM before 0.32 does not hand it over. Install vLLM 0.32 or newer, {serve}"
        )
    if not cache.enable_prefix_caching:
        raise ConfigError(
            f"enable_prefix_caching: False; layers of {kept}, of which vLLM then has the last only. Write "
            f"enable_prefix_caching: True, {serve}"
        )
    if vllm_config.speculative_config is not None:
        raise ConfigError(
            f"speculative_config: layers of {kept}, which vLLM moves about while it speculates; nobody has "
            f"compared its answers after a load. Leave it out, {serve}"
        )
    if getattr(cache, "use_replayssm", False):
        raise ConfigError(
            f"use_replayssm: True; layers of {kept}, and what they have read since is then beside it; nobody "
            f"has compared its answers after a load. Leave it out, {serve}"
        )
    if vllm_config.model_config.is_hybrid and _unified(vllm_config):
        raise ConfigError(
            f"disable_hybrid_kv_cache_manager: layers of {kept}, which needs vLLM's hybrid KV cache manager, "
            f"and that is off, by this setting or because of another connector. Leave those out, {serve}"
        )


def has_unlike_layers(vllm_config: Any) -> bool:
    """Return True if vLLM may put the layers of the model into several KV groups, as far as is known yet."""
    model = vllm_config.model_config
    if model.is_hybrid or model.is_attention_free:
        return True
    chunks = getattr(model.hf_text_config, "attention_chunk_size", None)
    unlike = len(set(_layer_types(model))) > 1 or bool(chunks) or _names_layers(model)
    return unlike and not _unified(vllm_config)


def replicas(vllm_config: Any, kv_cache_config: Any) -> int:
    """Say how many neighbouring ranks hold the same KV: of a model with MLA all that are tensor parallel.

    Models with fewer KV heads than ranks hold some heads several times, too. That is not used: nothing
    in vLLM's configuration proves it for every layer of every release.
    """
    groups = kv_cache_config.kv_cache_groups
    specs = [spec for group in groups for spec in layer_specs(group.kv_cache_spec)]
    ranks = int(vllm_config.parallel_config.tensor_parallel_size)
    # Of several groups, or of layers that differ, newer releases say whether it holds for all.
    told = getattr(kv_cache_config, "kv_tp_replicas", ranks if len(groups) == len(specs) == 1 else 1)
    return ranks if told == ranks and all(type(spec).__name__ in _LATENT for spec in specs) else 1


def _distrusted(vllm_config: Any) -> str | None:
    """Say why a prefix of this model cannot stand for its tokens. None if it can, as far as is known."""
    model = vllm_config.model_config
    if getattr(model, "rswa_window", None):
        return f"rswa_window: {model.rswa_window}; the model forgets tokens that were generated"
    if getattr(vllm_config, "is_mm_encoder_only", False):
        return "mm_encoder_only: True; no layer keeps KV then"
    # Of models without attention vLLM calls it an experiment, and keeps their states all the same.
    if model.is_prefix_caching_supported or model.is_attention_free:
        return None
    # Not whether it is switched on: that may be the user's wish, and says nothing about the model.
    if model.attn_type == "encoder_only":
        return "the model's attention is not causal: the KV of a token depends on those behind it"
    if model.attn_type == "encoder_decoder":
        return "the model has an encoder, and the KV of a token depends on what it read"
    for key in ("seq_pooling_type", "tok_pooling_type"):
        kind = getattr(model.pooler_config, key, None)
        if kind in ("MEAN", "CLS", "STEP"):
            return f"{key}: {kind}; that needs all tokens in one step, and a prefix is not computed again"
    return f"vLLM supports no prefix cache for a model with {model.attn_type} attention"


def _require_prefixes(vllm_config: Any) -> None:
    """Refuse MLA where vLLM computes prompts only as a whole.

    Its CPU build switches chunked prefill and prefix caching off for such models, and computes other
    tokens after a prefix that was loaded, although every byte of it is right.
    """
    if vllm_config.model_config.use_mla and not vllm_config.scheduler_config.enable_chunked_prefill:
        raise ConfigError(
            "enable_chunked_prefill: False; for a model with MLA vLLM cannot go on after a prefix that was "
            "loaded then. Leave it on; where vLLM switches it off itself, as on a CPU, serve this model "
            "without KvbmConnector"
        )


def _require_one_window(vllm_config: Any) -> None:
    """Refuse a model whose layers all have a window: vLLM frees what is behind it."""
    model, window = vllm_config.model_config, getattr(vllm_config.cache_config, "sliding_window", None)
    # vLLM sets it unless the layers are named one by one. Models that name them in words of their own are
    # looked at when their layers are built.
    if window and not _names_layers(model):
        raise ConfigError(
            f"sliding_window: {window}, in all layers; vLLM keeps the KV of the last tokens only. Write "
            f"disable_sliding_window: True, which allows prompts of up to {window} tokens, or serve this "
            "model without KvbmConnector"
        )


def _require_right_windows(sinks: bool) -> None:
    """Refuse windows beside full attention where vLLM computes them wrongly, all in one group of blocks."""
    import vllm
    from vllm import envs
    from vllm.platforms import current_platform

    if vllm_version() in _ONE_WINDOW:
        raise ConfigError(
            f"vLLM {vllm.__version__} computes all layers of this model with the sliding window of some when "
            "its hybrid KV cache manager is off, as it must be with KvbmConnector. Install vLLM 0.28 or "
            "newer, or serve this model without KvbmConnector"
        )
    if sinks and current_platform.is_cpu() and envs.VLLM_CPU_ATTN_SPLIT_KV:
        raise ConfigError(
            "VLLM_CPU_ATTN_SPLIT_KV: 1; on a CPU vLLM then computes other tokens for a model with attention "
            "sinks and sliding windows when its hybrid KV cache manager is off. Set VLLM_CPU_ATTN_SPLIT_KV=0 "
            "or leave disable_hybrid_kv_cache_manager out, with vLLM 0.30 or newer"
        )


def _require_like_bits(vllm_config: Any) -> None:
    """Refuse what vLLM refuses its own prefix cache for: it promises the same bits in every batch."""
    from vllm import envs

    if not getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return
    for layer in _layers(vllm_config):
        name = layer.attn_backend.get_name()
        if name in _VARIANT:
            raise ConfigError(
                f"VLLM_BATCH_INVARIANT: 1; with the attention backend {name} vLLM does not compute the same "
                "bits after a prefix that was loaded. Choose another attention_backend, unset the variable, "
                "or serve this model without KvbmConnector"
            )


def layer_specs(spec: Any) -> list[Any]:
    """Give the specification of each layer of a group, where they differ, or the one for all."""
    each = getattr(spec, "kv_cache_specs", None)
    return [spec] if each is None else list(each.values())


def _unified(vllm_config: Any) -> bool:
    """Return True if vLLM keeps all tokens for layers with windows, in one group with the others."""
    return vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is not False


def _names_layers(model: Any) -> bool:
    """Return True if the model's configuration says in words of its own which layers have windows."""
    return any(word in name for name in vars(model.hf_text_config) for word in ("pattern", "interleaved"))


def _layer_types(model: Any) -> list[str]:
    return list(getattr(model.hf_text_config, "layer_types", None) or ())


def _layers(vllm_config: Any) -> Iterator[Any]:
    """Give the layers with KV of their own: in a worker, once the model is built."""
    compilation = getattr(vllm_config, "compilation_config", None)
    for layer in (getattr(compilation, "static_forward_context", None) or {}).values():
        if hasattr(layer, "attn_backend") and getattr(layer, "kv_sharing_target_layer_name", None) is None:
            yield layer


def _window(spec: Any) -> int:
    return getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None) or 0


def _tell_cost(vllm_config: Any) -> None:
    """Say once what it costs that layers with windows keep all tokens."""
    specs = [spec for layer in _layers(vllm_config) if (spec := layer.get_kv_cache_spec(vllm_config))]
    if not specs or vllm_config.parallel_config.rank:
        return
    length = int(vllm_config.model_config.max_model_len)
    local = [spec for spec in specs if _window(spec)]
    # Bytes of a token in each layer, times the tokens that it would keep.
    kept = sum(
        spec.page_size_bytes / spec.block_size * min(_window(spec) or length, length) for spec in specs
    )
    whole = sum(spec.page_size_bytes / spec.block_size for spec in specs) * length
    _say(
        vllm_config.kv_transfer_config.engine_id,
        f"{len(local)} of {len(specs)} layers attend to {max(map(_window, local)):,} tokens at most. With "
        "its hybrid KV cache manager off vLLM keeps the KV of all tokens for them, too: a request of "
        f"max_model_len tokens ({length:,}) takes {whole / kept:.1f} times as much of its KV cache as with",
    )


@functools.lru_cache(maxsize=16)
def _say(engine: str, line: str) -> None:
    """Log a line once for an engine, though its halves are made one after the other in one process."""
    del engine
    logger.info(line)
