"""KV groups of models that people serve, as vLLM's own planner makes them, and what is stored and loaded.

    python tests/plugins/real_shapes.py

One rank, KV in bfloat16 (DeepSeek-V4's in its own format of 584 bytes). The specifications of the layers are
written by hand after the models' public configurations and vLLM's code for them; no model is built. The mix
of DeepSeek-V4's layers is an assumption.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planned
from planned import chunk, full, latent, latent_window, layers, state, window

from kvbm_core import Capabilities, load_config
from kvbm_core.groups import KvGroup, Rule, alignment
from kvbm_engine._sparse import prompt_ends, sparse_stores
from kvbm_vllm._groups import EngineGroups, engine_groups

MEMORY = 80 << 30
"""Bytes for the KV cache."""
MAX_TOKENS = 131_072


def _gpt_oss() -> dict[str, Any]:
    shape = {"num_kv_heads": 8, "head_size": 64}
    return layers(window=(18, window(128, **shape)), full=(18, full(**shape)))


def _gemma() -> dict[str, Any]:
    shape = {"num_kv_heads": 16, "head_size": 128}
    return layers(window=(52, window(1024, **shape)), full=(10, full(**shape)))


def _llama() -> dict[str, Any]:
    shape = {"num_kv_heads": 8, "head_size": 128}
    return layers(chunk=(36, chunk(8192, **shape)), full=(12, full(**shape)))


def _qwen() -> dict[str, Any]:
    """Of 16 and 48 heads, 128 wide; the last three inputs of the convolution beside the state."""
    import torch

    attention = full(num_kv_heads=4, head_size=256, block_size=784)
    made = state(
        784, shapes=((3, 10_240), (48, 128, 128)), dtypes=(torch.bfloat16, torch.float32),
        page_size_padded=attention.page_size_bytes,
    )  # fmt: skip
    return layers(state=(48, made), full=(16, attention))


def _deepseek() -> dict[str, Any]:
    """31 layers that compress 4 tokens, with an indexer, and 30 that compress 128; windows in all of them."""
    import torch

    packed = {"dtype": torch.uint8, "alignment": 576, "model_version": "deepseek_v4"}
    wide = {**packed, "head_size": 512, "state_content_bytes": 584}
    index = {"dtype": torch.uint8, "alignment": 576}
    partial = {"dtype": torch.float32, "alignment": 576}
    return layers(
        window=(61, latent_window(128, block_size=64, cache_dtype_str="fp8_ds_mla", **wide)),
        c4=(31, latent(block_size=256, tokens_per_state=4, cache_dtype_str="fp8_ds_mla", **wide)),
        c128=(30, latent(block_size=256, tokens_per_state=128, cache_dtype_str="fp8_ds_mla", **wide)),
        index=(31, latent(block_size=256, tokens_per_state=4, head_size=132, **index)),
        partial4=(31, latent_window(8, block_size=4, head_size=2048, **partial)),
        partial_index=(31, latent_window(8, block_size=4, head_size=512, **partial)),
        partial128=(30, latent_window(128, block_size=8, head_size=1024, **partial)),
    )


MODELS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "gpt-oss-120b": (_gpt_oss, "LBHNC"),
    "Gemma-3-27B": (_gemma, "LBHNC"),
    "Llama-4-Scout": (_llama, "LBHNC"),
    "Qwen3.6-27B": (_qwen, "LBHNC"),
    "DeepSeek-V4": (_deepseek, "BLHNC"),
}
"""What makes the layers of a model, and the layout of its KV."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model as it is planned."""

    engine: EngineGroups
    layers: tuple[int, ...]
    """In each group."""
    nbytes: tuple[int, ...]
    """Of a block of each group, all layers."""
    tokens: int
    """That fit in the memory of the KV cache, of prompts of the longest length."""

    @property
    def groups(self) -> tuple[KvGroup, ...]:
        return self.engine.groups


def long_config(folder: Path) -> Any:
    """An engine's configuration for long prompts."""
    config = planned.engine_config(folder, enable_prefix_caching=True)
    config.model_config.max_model_len = MAX_TOKENS
    config.scheduler_config.max_num_batched_tokens = 8192
    return config


def shape_of(model: str, config: Any, *, hybrid: bool = True) -> Shape:
    """Plan a model.

    Args:
        model: Its name.
        config: The engine's configuration; it is changed.
        hybrid: vLLM keeps of each group what it needs. False: all tokens, as with a connector without groups.

    Raises:
        ValueError: If vLLM cannot plan it so.
    """
    from vllm.v1.core import kv_cache_utils as planner

    make, layout = MODELS[model]
    config.cache_config.kv_cache_layout = layout
    config.cache_config.num_gpu_blocks_override = None
    config.scheduler_config.disable_hybrid_kv_cache_manager = not hybrid
    [worker] = planner.get_kv_cache_configs(config, [make()], [MEMORY])
    worker.kv_cache_layout = layout
    engine = engine_groups(config, worker)
    held = [worker.kv_cache_groups[number] for number in engine.numbers]
    nbytes = [sum(spec.page_size_bytes for spec in _specs(group)) for group in held]
    tokens, _ = planner.get_kv_cache_capacity(config, worker)
    return Shape(engine, tuple(len(group.layer_names) for group in held), tuple(nbytes), tokens)


def _specs(group: Any) -> list[Any]:
    found = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return list(found.values()) if found else [group.kv_cache_spec] * len(group.layer_names)


def blocks_needed(group: KvGroup, boundary: int) -> int:
    """Count the blocks that a prefix needs, by the rule as one would write it down."""
    size, tokens = group.block_tokens, group.coverage.tokens
    match group.coverage.rule:
        case Rule.ALL:
            return boundary // size
        case Rule.WINDOW:
            return -(-min(tokens, boundary) // size)
        case Rule.CHUNK:
            return -(-(boundary % tokens) // size)
        case Rule.STATE:
            return 1


def stored_blocks(shape: Shape, prompt_tokens: int, **settings: Any) -> list[list[int]]:
    """List for each group the blocks of a prompt that a policy stores; of states the last."""
    config = load_config({"tiers": [{"backend": "cpu", "capacity": "1GiB"}], **settings})
    stores, step = sparse_stores(config, shape.groups), alignment(shape.groups)
    marks = prompt_ends(prompt_tokens, step)
    blocks = []
    for group in shape.groups:
        count = prompt_tokens // group.block_tokens
        match group.coverage.rule:
            case Rule.ALL:
                blocks.append(list(range(count)))
            case Rule.STATE:
                blocks.append([marks[0] // step * step // group.block_tokens - 1])
            case _:
                blocks.append(stores.wanted(group, 0, count, marks, step))
    return blocks


def stored_bytes(shape: Shape, blocks: list[list[int]], tier: Capabilities | None = None) -> int:
    """Add up what a tier keeps; None: the bytes themselves."""
    each = [tier.charge(nbytes) if tier else nbytes for nbytes in shape.nbytes]
    return sum(len(held) * nbytes for held, nbytes in zip(blocks, each, strict=True))


def show(model: str, config: Any) -> None:
    """Print a model's groups, what a hit loads and what policies store of the longest prompt."""
    shape = shape_of(model, config)
    step = alignment(shape.groups)
    try:
        other = f"{shape_of(model, config, hybrid=False).tokens:,}"
    except (ValueError, TypeError) as error:
        other = f"none: {error}"
    print(
        f"\n{model}, boundaries each {step} tokens; room for {shape.tokens:,} tokens, without groups {other}"
    )
    for group, count, nbytes in zip(shape.groups, shape.layers, shape.nbytes, strict=True):
        rule = f"{group.coverage.rule.value} {group.coverage.tokens or ''}"
        print(f"  {rule:<12} {count:>3} layers, {group.block_tokens:>4} tokens a block, {nbytes:>12,} bytes; "
              f"{nbytes / group.block_tokens:>10,.0f} a token")  # fmt: skip
    boundary = (MAX_TOKENS - 1) // step * step
    loaded = [
        blocks_needed(group, boundary) * nbytes
        for group, nbytes in zip(shape.groups, shape.nbytes, strict=True)
    ]
    print(f"  a hit of {boundary:,} tokens loads {sum(loaded) / 1e9:.2f} GB")
    slots = Capabilities(capacity_bytes=None, unit_bytes=max(shape.nbytes))
    for policy in ("dense", "boundaries"):
        blocks = stored_blocks(shape, MAX_TOKENS, sparse_stores=policy)
        plain, slotted = stored_bytes(shape, blocks), stored_bytes(shape, blocks, slots)
        print(f"  {policy:<10} stores {plain / 1e9:>6.2f} GB, {plain / MAX_TOKENS:>8,.0f} bytes a token; in "
              f"equal slots {slotted / 1e9:>6.2f} GB, {1 - plain / slotted:.1%} of it empty")  # fmt: skip


def main() -> None:
    print(f"command: python {' '.join(sys.argv)}")
    print(f"{MEMORY >> 30} GiB of KV, prompts of {MAX_TOKENS:,} tokens")
    with tempfile.TemporaryDirectory() as folder:
        config = long_config(Path(folder))
        for model in MODELS:
            show(model, config)


if __name__ == "__main__":
    main()
