"""Tiny models of several kinds, with random weights whose greedy tokens depend on what is far back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 512
WINDOW = 64
"""Tokens of a sliding window, and of a chunk of local attention."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 8192,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
    "initializer_range": 0.15,
}  # fmt: skip
_NARROW: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_WIDE: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128}
"""Heads for models with large states. vLLM makes a block of attention as large as a state: with wide heads it
has few tokens."""
_DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip
"""Gated delta nets. vLLM's kernels for CPUs refuse narrower heads."""
_MLA: dict[str, Any] = {
    "kv_lora_rank": 512, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 64, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 3,
}  # fmt: skip


def _one_in_three(others: str, full: str = "full_attention") -> list[str]:
    return [others, others, full] * 2


@dataclass(frozen=True)
class Family:
    """How a small model of one family is made, and started."""

    architecture: str
    config: str
    """The class of its configuration in transformers."""
    settings: dict[str, Any]
    seed: int = 0
    """Of the weights. With some seeds the answer depends on the last tokens only."""
    options: tuple[tuple[str, Any], ...] = ()
    """What vLLM must be told to start it, beside what all are told."""
    has_state: bool = False
    """Whether layers keep a recurrent state."""
    mended: bool = False
    """Whether vLLM's CPU build needs `mend_mamba2`."""
    serves: bool = True
    """Whether it generates text, from the tokens so far alone."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", {**_SHAPE, **_NARROW, "num_hidden_layers": 3}),
    "mistral": Family(
        "MistralForCausalLM", "MistralConfig",
        {**_SHAPE, **_NARROW, "num_hidden_layers": 3, "sliding_window": WINDOW},
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**_SHAPE, **_NARROW, "num_hidden_layers": 6, "sliding_window": WINDOW, "query_pre_attn_scalar": 32,
         "layer_types": _one_in_three("sliding_attention")},
    ),
    "gemma4": Family(
        "Gemma4ForCausalLM", "Gemma4TextConfig",
        {**_SHAPE, **_NARROW, "num_hidden_layers": 6, "sliding_window": WINDOW,
         "layer_types": _one_in_three("sliding_attention"), "global_head_dim": 64,
         "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
         "vocab_size_per_layer_input": VOCABULARY},
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM", "GptOssConfig",
        {**_SHAPE, **_NARROW, "num_hidden_layers": 4, "sliding_window": WINDOW, "num_local_experts": 4,
         "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "llama4": Family(
        "Llama4ForCausalLM", "Llama4TextConfig",
        {**_SHAPE, **_NARROW, "num_hidden_layers": 6, "attention_chunk_size": WINDOW,
         "layer_types": ["chunked_attention", "full_attention"] * 3, "no_rope_layers": [1, 0] * 3,
         "num_local_experts": 2, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1,
         "intermediate_size_mlp": 256},
        seed=2,
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        {**_SHAPE, **_WIDE, **_DELTA_NET, "num_hidden_layers": 6,
         "layer_types": _one_in_three("linear_attention"), "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
        options=(("dtype", "bfloat16"),), has_state=True,
    ),
    "qwen3_5": Family(
        "Qwen3_5ForCausalLM", "Qwen3_5TextConfig",
        {**_SHAPE, **_WIDE, **_DELTA_NET, "num_hidden_layers": 6,
         "layer_types": _one_in_three("linear_attention")},
        options=(("dtype", "bfloat16"),), has_state=True,
    ),
    "granite4": Family(
        "GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig",
        {**_SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6,
         "layer_types": _one_in_three("mamba", "attention"), "mamba_n_heads": 8, "mamba_d_head": 32,
         "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2,
         "mamba_chunk_size": 64, "num_local_experts": 0, "num_experts_per_tok": 0,
         "shared_intermediate_size": 256, "position_embedding_type": "nope"},
        has_state=True, mended=True,
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM", "NemotronHConfig",
        {**_SHAPE, **_NARROW, "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16,
         "n_groups": 2, "conv_kernel": 4, "chunk_size": 64,
         "layers_block_type": ["mamba", "mamba", "attention", "mlp", "mamba", "mamba", "attention"]},
        seed=1, has_state=True, mended=True,
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM", "Mamba2Config",
        {"vocab_size": VOCABULARY, "hidden_size": 128, "initializer_range": 0.15, "num_hidden_layers": 3,
         "num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 1, "expand": 2, "chunk_size": 64,
         "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
        options=(("enable_prefix_caching", True),), has_state=True, mended=True,
    ),
    "mamba": Family(
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 128, "initializer_range": 0.15, "num_hidden_layers": 3,
         "state_size": 16, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
         "pad_token_id": None},
        options=(("enable_prefix_caching", True),), has_state=True,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", {**_SHAPE, **_MLA, "num_hidden_layers": 3},
        options=(("block_size", 16),),
    ),
    "deepseek_v3_2": Family(
        "DeepseekV32ForCausalLM", "DeepseekV32Config",
        {**_SHAPE, **_MLA, "num_hidden_layers": 3, "index_n_heads": 4, "index_head_dim": 128,
         "index_topk": 64},
        options=(("block_size", 64),),
    ),
    "bert": Family(
        "BertModel", "BertConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 128},
        serves=False,
    ),
}  # fmt: skip
"""Some do not start on a CPU; that is said by who tries."""


def write_config(folder: Path, kind: str) -> Path:
    """Write what says how a model is built, and no weights: enough for what is found before they are read."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _make_config(FAMILIES[kind])
    config.architectures = [FAMILIES[kind].architecture]
    config.save_pretrained(folder)
    return folder


def write_model(folder: Path, kind: str, seed: int | None = None, **settings: Any) -> Path:
    """Write a model with weights. `settings` take the place of some of its family's; so does `seed`."""
    import torch
    import transformers

    family = FAMILIES[kind]
    torch.manual_seed(family.seed if seed is None else seed)
    model = getattr(transformers, family.architecture)(_make_config(family, **settings))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            _adjust(kind, name, weights)
    model.to(torch.bfloat16).save_pretrained(folder)
    written = folder / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"architectures": [family.architecture]}))
    return folder


def _make_config(family: Family, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, family.config)(**{**family.settings, **settings})


def _adjust(kind: str, name: str, weights: Any) -> None:
    """Make a parameter such that the answer depends on what is far back."""
    import torch

    if any(part in name for part in ("q_proj", "k_proj", "q_b_proj")):
        weights.mul_(0.3)  # Attention that is spread over many tokens, not stuck to one.
    elif kind.startswith("gemma") and "layernorm" in name and ".post_" in name:
        weights.fill_(4.0)  # Else the token's own embedding, which Gemma scales, decides alone.
    elif name.endswith(("sinks", "router.bias")):
        torch.nn.init.normal_(weights, std=0.15)
    elif name.endswith("A_log"):
        weights.fill_(-5.0)  # A state that decays slowly, as those of trained models do.
    elif name.endswith(("dt_bias", "dt_proj.bias")):
        weights.fill_(-3.0)


def write_adapter(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a LoRA adapter of a model's attention, large enough that it changes every answer."""
    import torch
    from safetensors.torch import save_file

    config = _make_config(FAMILIES[kind])
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    torch.manual_seed(seed)
    weights = {}
    for layer in range(config.num_hidden_layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(8, width) * 0.3
        weights[f"{name}.lora_B.weight"] = torch.randn(heads, 8) * 0.3
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def mend_mamba2() -> Any:
    """Let vLLM's CPU build run Mamba 2 with a prefix cache, in the engines that start from now on.

    vLLM takes the state at a block's end out of the middle of a step there, which its kernels for CPUs
    cannot do: the step raises an IndexError. Without what says that they can, vLLM ends a step at the block's
    end, as it does for other recurrent layers.

    Returns:
        What undoes it.
    """
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    said = vars(MambaMixer2).get("get_kv_cache_spec")
    if said is None:
        return lambda: None
    del MambaMixer2.get_kv_cache_spec
    return lambda: setattr(MambaMixer2, "get_kv_cache_spec", said)


def write_words(folder: Path, count: int) -> Path:
    """Write a tokenizer of `count` words beside a model: pooling cannot start without one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(count)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder
