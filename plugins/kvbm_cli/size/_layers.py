"""What each layer of a model keeps, as its config.json says.

Every formula is one of vLLM's, by the file that has it, so that a test can hold it against vLLM:

    attention   2 planes * KV heads * head size * element          v1/kv_cache_interface.py
    MLA         (kv_lora_rank + qk_rope_head_dim) * element        v1/kv_cache_interface.py
    state       last inputs of the convolution, and the state      layers/mamba/mamba_utils.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvbm_core.errors import ConfigError
from kvbm_core.groups import Rule

__all__ = ["Layer", "Model", "State", "read_model"]

_FAMILIES: Final = frozenset({
    "llama", "mistral", "gemma3_text", "gemma4_text", "gpt_oss", "llama4_text", "qwen3_next",
    "granitemoehybrid", "nemotron_h", "mamba2",
})  # fmt: skip
"""Of docs/reference/models.md: those that were started, by `model_type`."""
_KINDS: Final[Mapping[str, str]] = {
    "full_attention": "full", "attention": "full", "*": "full",
    "sliding_attention": "window", "chunked_attention": "chunk",
    "linear_attention": "gdn", "mamba": "mamba2", "M": "mamba2",
    "moe": "", "mlp": "", "-": "", "E": "",
}  # fmt: skip
"""What model configurations call a layer; empty: it keeps nothing."""
_ELEMENT_BYTES: Final[Mapping[str, int]] = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_INDEXER_SCALE_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class State:
    """The recurrent state of a layer: elements, before ranks divide it."""

    conv_elements: int
    ssm_elements: int
    ssm_bytes: int | None
    """Of an element; None: as the model's."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps."""

    rule: Rule
    tokens: int = 0
    """Of a window or a chunk."""
    heads: int = 0
    """Of KV. Ranks divide them."""
    head_size: int = 0
    """Elements of all planes of one head and token."""
    extra_bytes: int = 0
    """Of a token, beside, whatever the element: an index."""
    latent: bool = False
    """Every rank keeps all of it."""
    state: State | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A model's layers, and what could not be told."""

    path: str
    family: str
    proved: bool
    """Its family is one of those that were started."""
    element_bytes: int
    layers: tuple[Layer, ...]
    """Those that keep something, in order."""
    notes: tuple[str, ...]


class _Facts:
    """A config.json, whose missing keys are named."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file = file
        self.values = values

    def get(self, *names: str, default: Any = None) -> Any:
        found = (self.values[name] for name in names if self.values.get(name) is not None)
        return next(found, default)

    def number(self, *names: str) -> int:
        value = self.get(*names)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{self.file}: {names[0]!r} is {value!r}; a whole number above 0 was expected: is it the "
                "config.json of a language model?"
            )
        return value


def read_model(place: str | Path) -> Model:
    """Read what a model's layers keep.

    Args:
        place: Its folder, or its config.json.

    Raises:
        ConfigError: The file cannot be read, or what the model keeps cannot be told from it.
    """
    file = Path(place).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        values = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"MODEL: {file} is not there; write a model's folder or its config.json (of a model on a hub, "
            "download that file)"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"MODEL: {file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"MODEL: {file}: a mapping was expected")
    if values.get("is_encoder_decoder"):
        raise ConfigError(f"{file}: an encoder-decoder model; vLLM takes no KV connector for these")
    inner = values.get("text_config")
    facts = _Facts(file, {**values, **inner} if isinstance(inner, dict) else values)
    return _model(facts)


def _model(facts: _Facts) -> Model:
    family = str(facts.get("model_type", default="unknown"))
    notes: list[str] = []
    if facts.get("compress_ratios") is not None:
        raise ConfigError(
            f"{facts.file}: model_type {family!r} compresses several tokens into one; what it keeps is not "
            "known here. Start vLLM: its log says how many tokens fit"
        )
    kinds = _kinds(facts, notes)
    layers = tuple(_layer(facts, kind) for kind in kinds if kind)
    if family not in _FAMILIES:
        notes.append(
            f"model_type {family!r} is none of those that were started, see docs/reference/models.md"
        )
    return Model(
        str(facts.file), family, family in _FAMILIES, _element_bytes(facts, notes), layers, tuple(notes)
    )


def _element_bytes(facts: _Facts, notes: list[str]) -> int:
    name = str(facts.get("dtype", "torch_dtype", default="bfloat16")).removeprefix("torch.")
    if name == "float32":
        notes.append(
            "the weights are float32; vLLM computes such models in bfloat16 unless --dtype says more"
        )
        return 2
    if name not in _ELEMENT_BYTES:
        notes.append(f"dtype {name!r} is not known; 2 bytes an element are assumed")
    return _ELEMENT_BYTES.get(name, 2)


def _kinds(facts: _Facts, notes: list[str]) -> list[str]:
    """Name what each layer is: full, window, chunk, gdn, kda, mamba2, or nothing."""
    count = facts.number("num_hidden_layers", "n_layer", "num_layers")
    if linear := facts.get("linear_attn_config"):
        full = {number - 1 for number in linear["full_attn_layers"]}
        return ["full" if at in full else "kda" for at in range(count)]
    words: Sequence[str] | None = facts.get("layer_types", "layers_block_type", "hybrid_override_pattern")
    if words is not None:
        unknown = sorted({word for word in words if word not in _KINDS})
        if unknown:
            raise ConfigError(
                f"{facts.file}: layers called {', '.join(unknown)}: what they keep is not known"
            )
        return [_KINDS[word] for word in words]
    if facts.get("model_type") == "mamba2":
        return ["mamba2"] * count
    if facts.get("ssm_cfg", "mamba_d_state", "state_size", "attn_layer_period") is not None:
        raise ConfigError(f"{facts.file}: some layers keep a state, and it does not say which")
    return _windows(facts, count)


def _windows(facts: _Facts, count: int) -> list[str]:
    """Tell windows from full attention where no list says so."""
    chunk, window = facts.get("attention_chunk_size"), facts.get("sliding_window")
    if chunk and (rope := facts.get("no_rope_layers")):
        return ["chunk" if each else "full" for each in rope]
    if not isinstance(window, int) or facts.get("use_sliding_window") is False:
        return ["full"] * count
    every = facts.get("sliding_window_pattern", "_sliding_window_pattern")
    return ["full" if every and (at + 1) % every == 0 else "window" for at in range(count)]


def _layer(facts: _Facts, kind: str) -> Layer:
    if kind in ("gdn", "kda", "mamba2"):
        return Layer(Rule.STATE, state=_STATES[kind](facts))
    if (rank := facts.get("kv_lora_rank")) is not None:
        index = facts.get("index_head_dim")
        return Layer(
            Rule.ALL, heads=1, head_size=rank + facts.number("qk_rope_head_dim"), latent=True,
            extra_bytes=index + _INDEXER_SCALE_BYTES if index else 0,
        )  # fmt: skip
    heads = facts.get("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
    if heads is None:
        heads = 1 if facts.get("multi_query") else facts.number("num_attention_heads", "n_head")
    size = facts.get("head_dim")
    if size is None:
        size = facts.number("hidden_size", "n_embd") // facts.number("num_attention_heads", "n_head")
    if kind == "full":
        heads = facts.get("num_global_key_value_heads", default=heads)
        size = facts.get("global_head_dim", default=size)
        return Layer(Rule.ALL, 0, heads, size + facts.get("v_head_dim", default=size))
    tokens = facts.number("sliding_window") - 1 if kind == "window" else facts.number("attention_chunk_size")
    return Layer(Rule.WINDOW if kind == "window" else Rule.CHUNK, tokens, heads, 2 * size)


def _gdn(facts: _Facts) -> State:
    """Gated delta net: Qwen3-Next, Qwen3.5."""
    key_size, value_size = facts.number("linear_key_head_dim"), facts.number("linear_value_head_dim")
    values = facts.number("linear_num_value_heads")
    wide = 2 * facts.number("linear_num_key_heads") * key_size + values * value_size
    conv = wide * (facts.number("linear_conv_kernel_dim") - 1)
    return State(conv, values * key_size * value_size, _ssm_bytes(facts))


def _kda(facts: _Facts) -> State:
    """Kimi's delta attention: three convolutions, and a state in float32."""
    linear = facts.get("linear_attn_config")
    heads, size = linear["num_heads"], linear["head_dim"]
    return State(3 * heads * size * (linear["short_conv_kernel_size"] - 1), heads * size * size, 4)


def _mamba2(facts: _Facts) -> State:
    """Mamba 2: Granite 4, Nemotron-H, Bamba."""
    heads = facts.number("mamba_n_heads", "mamba_num_heads", "num_heads")
    size, state = (
        facts.number("mamba_d_head", "mamba_head_dim", "head_dim"),
        facts.number("mamba_d_state", "ssm_state_size", "state_size"),
    )
    kernel = facts.number("mamba_d_conv", "conv_kernel")
    wide = heads * size + 2 * facts.number("mamba_n_groups", "n_groups") * state
    return State(wide * (kernel - 1), heads * size * state, _ssm_bytes(facts))


_STATES: Final = {"gdn": _gdn, "kda": _kda, "mamba2": _mamba2}


def _ssm_bytes(facts: _Facts) -> int | None:
    return _ELEMENT_BYTES.get(str(facts.get("mamba_ssm_dtype", "mamba_ssm_cache_dtype")))


def least_multiple(number: float, step: int) -> int:
    """Round up to a multiple."""
    return math.ceil(number / step) * step
