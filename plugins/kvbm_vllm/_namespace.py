"""Everything that makes one engine's stored bytes comparable with another's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import vllm

from kvbm_vllm._weights import UNKNOWN, weights_digest

__all__ = ["namespace_facts", "shared_facts", "told_facts"]

_FORMAT: Final = 2
"""Raise it when the order of bytes in a block changes, or how these facts are digested."""

_NOT_CONTENT: Final = ("_name_or_path", "transformers_version", "name_or_path")


def namespace_facts(
    vllm_config: Any,
    kv_caches: Mapping[str, Any],
    num_blocks: int,
    weights_id: str | None,
    replicas: int = 1,
    groups: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """List what one rank's namespace is made of.

    Args:
        vllm_config: vLLM's configuration in the worker.
        kv_caches: Layer name to KV tensor (or tensors), as registered.
        num_blocks: KV blocks the engine has; not part of the namespace.
        weights_id: As in the configuration.
        replicas: Neighbouring ranks that hold the same KV: they share a namespace.
        groups: What `group_facts` says: nothing of one group that keeps all tokens.

    Returns:
        For `kvbm_core.make_namespace`.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if groups:  # What is not stored may change.
        stored = {name for group in groups for name in group["layers"]}
        kv_caches = {name: tensors for name, tensors in kv_caches.items() if name in stored}
    told = {"groups": list(groups)} if groups else {}
    return {
        "format": _FORMAT,
        # Releases have laid out the same shapes differently.
        "vllm": ".".join(vllm.__version__.split(".")[:2]),
        "models": [_model_facts(vllm_config, model, weights_id) for model in _models(vllm_config)],
        "cache_dtype": str(cache.cache_dtype),
        # With several groups vLLM names the smallest of all.
        "block_tokens": [group["block_tokens"] for group in groups] or cache.block_size,
        "layers": [_layer_facts(name, tensors, num_blocks) for name, tensors in kv_caches.items()],
        "ranks": [
            parallel.tensor_parallel_size // replicas,
            parallel.pipeline_parallel_size,
            parallel.rank // replicas,
        ],
        **told,
    }


def shared_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a rank's facts what is its own: the rest names what all ranks of an engine share."""
    # Ranks of a pipeline have different layers, and each gives weights it cannot read a name of its own.
    models = [
        {**model, "weights": UNKNOWN} if model["weights"].startswith(UNKNOWN) else model
        for model in facts["models"]
    ]
    groups = {"groups": [{**each, "layers": None} for each in facts["groups"]]} if "groups" in facts else {}
    return {**facts, "models": models, "layers": None, "ranks": facts["ranks"][:2], **groups}


def told_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Give a rank's facts so that people and tools can compare each: models' configurations as mappings."""
    return {**facts, "models": [{**each, "config": json.loads(each["config"])} for each in facts["models"]]}


def _models(vllm_config: Any) -> list[Any]:
    """List the models that write into the KV cache: a drafting model does, beside the main one."""
    drafting = getattr(vllm_config.speculative_config, "draft_model_config", None)
    return [model for model in (vllm_config.model_config, drafting) if model is not None]


def _model_facts(vllm_config: Any, model: Any, weights_id: str | None) -> dict[str, Any]:
    config = {k: v for k, v in model.hf_config.to_dict().items() if k not in _NOT_CONTENT}
    load_format = str(vllm_config.load_config.load_format)
    return {
        "config": json.dumps(config, sort_keys=True, default=str),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        # Some ways to scale positions depend on it.
        "max_model_len": model.max_model_len if _scales_positions(config) else None,
        # Random weights come from the seed, not from files.
        "weights": f"random:{model.seed}"
        if load_format == "dummy"
        else weights_digest(model.model, model.revision, weights_id),
    }


def _scales_positions(config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return isinstance(rope, Mapping) and (rope.get("rope_type") or rope.get("type") or "default") != "default"


def _layer_facts(name: str, tensors: Any, num_blocks: int) -> list[Any]:
    """Describe a layer's geometry, without the number of blocks and without addresses.

    Pages of other layers may lie between the parts of one, as with heads outside of layers: then the strides
    belong to it, which say how many, because a stored block has them in that order.
    """
    parts: Sequence[Any] = tensors if isinstance(tensors, list | tuple) else [tensors]
    facts: list[Any] = [name]
    for part in parts:
        blocks = 0 if part.shape[0] % num_blocks == 0 else 1
        shape = [size for dim, size in enumerate(part.shape) if dim != blocks]
        order = sorted(range(part.dim()), key=part.stride, reverse=True)
        strides = _strides_within(part.stride(), part.shape, blocks)
        facts.append([str(part.dtype), shape, order, *([strides] if strides else [])])
    return facts


def _strides_within(strides: Sequence[int], shape: Sequence[int], blocks: int) -> list[int]:
    """Give the strides of the dimensions inside a block. None if its elements lie one behind the other."""
    inside = sorted(
        (stride, size)
        for dim, (stride, size) in enumerate(zip(strides, shape, strict=True))
        if dim != blocks and size > 1 and stride < strides[blocks]
    )
    run = 1
    for stride, size in inside:
        if stride != run:
            return [stride for stride, _ in inside]
        run *= size
    return []
