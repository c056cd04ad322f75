"""The KV groups that vLLM makes of a model's layers, as its v1/core/kv_cache_planning.py does.

layers of one kind                        one group
kinds of unlike pages                     those with a smaller page get more tokens a block
states                                    attention gets so many tokens a block that its page holds a state
then                                      groups of equally many layers, each of one kind
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from kvbm_cli.size._layers import Layer, Model, least_multiple
from kvbm_core.errors import ConfigError
from kvbm_core.groups import Coverage, KvGroup

__all__ = ["Group", "Ranks", "make_groups"]

_BLOCK_TOKENS: Final = 16
_LATENT_BLOCK_TOKENS: Final = 64
"""Of MLA on a GPU."""
_STATE_STEP: Final = 16
_LATENT_STATE_STEP: Final = 128
_WIDE: Final = 1.5
"""If the largest kind has less than so many times the layers of the smallest, a group is as large as it."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """How an engine divides a model."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def count(self) -> int:
        """Of all."""
        return self.tensor * self.pipeline


@dataclass(frozen=True, slots=True)
class Group:
    """One KV group."""

    group: KvGroup
    layers: int
    """Of the rank that has most of them."""
    page_bytes: int
    """Of a block in one layer, on a rank."""

    @property
    def block_bytes(self) -> int:
        """Of a block on a rank."""
        return self.layers * self.page_bytes


def make_groups(
    model: Model, ranks: Ranks, element_bytes: int | None = None, block_tokens: int | None = None
) -> list[Group]:
    """Make the groups.

    Args:
        model: Its layers.
        ranks: That divide it.
        element_bytes: Of the KV cache; None: as the model's.
        block_tokens: As vLLM is told by ``--block-size``; None: as it chooses on a GPU.

    Raises:
        ConfigError: How vLLM divides them cannot be told.
    """
    stages = _stages(model.layers, ranks.pipeline)
    kinds = Counter[Layer]()
    for stage in stages:
        for layer, count in Counter(stage).items():
            kinds[layer] = max(kinds[layer], count)
    element = element_bytes or model.element_bytes
    sizes = {layer: _token_bytes(layer, ranks.tensor, element) for layer in kinds if layer.state is None}
    latent = any(layer.latent for layer in kinds)
    size = block_tokens or (_LATENT_BLOCK_TOKENS if latent else _BLOCK_TOKENS)
    states = [_state_bytes(layer, ranks.tensor, model.element_bytes) for layer in kinds if layer.state]
    if states and not sizes:
        raise ConfigError(
            f"{model.path}: every layer keeps a state; how many tokens vLLM puts between two of them "
            "depends on its settings, and is not known here"
        )
    if states:
        step = _LATENT_STATE_STEP if latent else _STATE_STEP
        size = max(size, least_multiple(max(states) / min(sizes.values()), step))
    page = max(nbytes * size for nbytes in sizes.values())
    tokens = {layer: _tokens(layer, page, sizes.get(layer), size) for layer in kinds}
    return [
        Group(KvGroup(tokens[layer], Coverage(layer.rule, layer.tokens), tag=at.to_bytes(4)), count, page)
        for at, (layer, count) in enumerate(_split(kinds))
    ]


def _stages(layers: tuple[Layer, ...], pipeline: int) -> list[tuple[Layer, ...]]:
    each = -(-len(layers) // pipeline)
    return [layers[at : at + each] for at in range(0, len(layers), each)]


def _split(kinds: Counter[Layer]) -> list[tuple[Layer, int]]:
    """Divide the layers of each kind into groups of equally many layers."""
    least, most = min(kinds.values()), max(kinds.values())
    size = most if most < _WIDE * least else least
    groups = []
    for layer, count in kinds.items():
        parts = -(-count // size)
        groups += [(layer, len(range(part, count, parts))) for part in range(parts)]
    return groups


def _tokens(layer: Layer, page: int, token_bytes: int | None, size: int) -> int:
    """Give the tokens of a block whose page is as long as all others."""
    if token_bytes is None:
        return size
    if page % (token_bytes * size):
        raise ConfigError(
            f"layers with {token_bytes} bytes a token beside pages of {page} bytes, which is no multiple: "
            "how vLLM puts them together is not known here"
        )
    return page // token_bytes


def _token_bytes(layer: Layer, tensor: int, element_bytes: int) -> int:
    heads = 1 if layer.latent else max(1, layer.heads // tensor)
    return heads * layer.head_size * element_bytes + layer.extra_bytes


def _state_bytes(layer: Layer, tensor: int, element_bytes: int) -> int:
    state = layer.state
    assert state is not None, "asked of layers with a state alone"
    conv, ssm = state.conv_elements // tensor, state.ssm_elements // tensor
    return conv * element_bytes + ssm * (state.ssm_bytes or element_bytes)
