"""Tiny models of several kinds, with random weights whose greedy tokens depend on what is far back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 512
WINDOW = 64
"""Tokens of a sliding window, and of a chunk of local attention."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 8192,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "tie_word_embeddings": False, "initializer_range": 0.15,
}  # fmt: skip
_TWO_TO_ONE = ["sliding_attention", "sliding_attention", "full_attention"] * 2


def _gemma3() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        **_SHAPE, num_hidden_layers=6, sliding_window=WINDOW, query_pre_attn_scalar=32,
        layer_types=_TWO_TO_ONE,
    )  # fmt: skip


def _llama4() -> Any:
    from transformers import Llama4TextConfig

    return Llama4TextConfig(
        **_SHAPE, num_hidden_layers=6, attention_chunk_size=WINDOW, intermediate_size_mlp=256,
        layer_types=["chunked_attention", "full_attention"] * 3, no_rope_layers=[1, 0] * 3,
        num_local_experts=2, interleave_moe_layer_step=1, num_experts_per_tok=1,
    )  # fmt: skip


def _gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        **_SHAPE, num_hidden_layers=4, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**_SHAPE, num_hidden_layers=3, sliding_window=WINDOW)


def _mamba2() -> Any:
    from transformers import Mamba2Config

    return Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_heads=8, head_dim=32, state_size=16,
        n_groups=1, expand=2, chunk_size=64,
    )  # fmt: skip


def _bert() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128,
    )  # fmt: skip


_MAKERS = {
    "gemma3": ("Gemma3ForCausalLM", _gemma3),
    "llama4": ("Llama4ForCausalLM", _llama4),
    "gpt_oss": ("GptOssForCausalLM", _gpt_oss),
    "mistral": ("MistralForCausalLM", _mistral),
    "mamba2": ("Mamba2ForCausalLM", _mamba2),
    "bert": ("BertModel", _bert),
}


def write_config(folder: Path, kind: str) -> Path:
    """Write what says how a model is built, and no weights: enough for what is found before they are read."""
    architecture, make = _MAKERS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    config = make()
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


def write_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a model with weights."""
    import torch
    import transformers

    architecture, make = _MAKERS[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(make())
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weights.mul_(0.3)  # Attention that is spread over many tokens, not stuck to one.
            elif kind == "gemma3" and "layernorm" in name and ".post_" in name:
                weights.fill_(4.0)  # Else the token's own embedding, which Gemma scales, decides alone.
            elif name.endswith(("sinks", "router.bias")):
                torch.nn.init.normal_(weights, std=0.15)
    model.to(torch.bfloat16).save_pretrained(folder)
    written = folder / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"architectures": [architecture]}))
    return folder


def write_words(folder: Path, count: int) -> Path:
    """Write a tokenizer of `count` words beside a model: pooling cannot start without one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(count)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder
