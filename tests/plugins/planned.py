"""KV cache configurations as vLLM's own planner makes them, of layers that a test describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import write_config

PAGE = {"num_kv_heads": 2, "head_size": 32}
"""Bytes of a token in a layer: 2 * 2 * 32 * 2 = 256."""
STATE = ((3, 40), (2, 8, 16))
"""The parts of a state: 240 and 1,024 bytes, in bfloat16 and float32."""


def full(**fields: Any) -> Any:
    return _spec("FullAttentionSpec", **{**PAGE, **fields})


def window(tokens: int = 64, **fields: Any) -> Any:
    return _spec("SlidingWindowSpec", sliding_window=tokens, **{**PAGE, **fields})


def chunk(tokens: int = 64, **fields: Any) -> Any:
    return _spec("ChunkedLocalAttentionSpec", attention_chunk_size=tokens, **{**PAGE, **fields})


def latent(**fields: Any) -> Any:
    return _spec("MLAAttentionSpec", **{"num_kv_heads": 1, "head_size": 80, "max_tp_shards": 1, **fields})


def latent_window(tokens: int = 64, **fields: Any) -> Any:
    shape = {"num_kv_heads": 1, "head_size": 80, "max_tp_shards": 1}
    return _spec("SlidingWindowMLASpec", sliding_window=tokens, **{**shape, **fields})


def state(block_size: int = 16, **fields: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec

    made = {"shapes": STATE, "dtypes": (torch.bfloat16, torch.float32), "mamba_cache_mode": "align"}
    return MambaSpec(block_size=block_size, **{**made, **fields})


def _spec(kind: str, **fields: Any) -> Any:
    import torch
    from vllm.v1 import kv_cache_interface as interface

    return getattr(interface, kind)(**{"block_size": 16, "dtype": torch.bfloat16, **fields})


def layers(**counts: tuple[int, Any]) -> dict[str, Any]:
    """Name so many layers of each kind, in turn, as a model has them: ``full=(2, full())``."""
    named: dict[str, Any] = {}
    for at in range(max(count for count, _ in counts.values())):
        named |= {f"layers.{at}.{kind}": spec for kind, (count, spec) in counts.items() if at < count}
    return named


def engine_config(folder: Path, **options: Any) -> Any:
    """vLLM's configuration of an engine, of a model without weights."""
    from vllm.engine.arg_utils import EngineArgs

    write_config(folder, "gemma3")
    made = {"dtype": "bfloat16", "block_size": 16, "max_model_len": 256, "enforce_eager": True, **options}
    config = EngineArgs(model=str(folder), skip_tokenizer_init=True, **made).create_engine_config()
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    return config


def plan(
    config: Any, *stages: dict[str, Any], layout: str = "LBHNC", blocks: int = 256
) -> tuple[Any, list[Any]]:
    """Plan the KV cache of the layers of each pipeline stage.

    Returns:
        What the scheduler is told, and what each worker is.
    """
    from vllm.v1.core import kv_cache_utils as planner

    config.cache_config.kv_cache_layout = layout
    config.cache_config.num_gpu_blocks_override = blocks
    workers = planner.get_kv_cache_configs(config, [dict(stage) for stage in stages], [1 << 30] * len(stages))
    for worker in workers:
        worker.kv_cache_layout = layout
    return planner.generate_scheduler_kv_cache_config(workers), workers


def allocate(config: Any, worker: Any, kernel_blocks: list[int] | None = None) -> dict[str, Any]:
    """Allocate the tensors of one worker, as it gives them to a connector."""
    import torch
    from vllm.v1.worker.utils import allocate_kv_cache

    layout = config.cache_config.get_resolved_kv_cache_layout()
    sizes = kernel_blocks or [group.kv_cache_spec.block_size for group in worker.kv_cache_groups]
    return allocate_kv_cache(worker, torch.device("cpu"), layout, sizes)
