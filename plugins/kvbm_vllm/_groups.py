"""From vLLM's KV cache configuration to the KV groups that are stored and loaded.

vLLM puts layers that share a block table into one group and numbers the groups. The scheduler is told one
layer's specification of each group, a worker those of all its layers where they differ; both find the same
groups here, with the same tags. What is not known to be right is refused, by name.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvbm_core import ConfigError
from kvbm_core.groups import Coverage, KvGroup, Rule, alignment, group_tag, is_plain
from kvbm_vllm._models import (
    GROUPS_FROM,
    STATES_FROM,
    check_engine,
    check_layers,
    layer_specs,
    require_states,
    vllm_version,
)

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MambaSpec, SlidingWindowSpec

__all__ = ["EngineGroups", "engine_groups", "group_facts", "tell_groups"]

logger = logging.getLogger("kvbm_vllm")

_WHOLE: Final = ("FullAttentionSpec", "MLAAttentionSpec")
"""How vLLM names the layouts whose blocks hold every token's KV and nothing else. No subclass is meant."""
_WINDOWS: Final = ("SlidingWindowSpec", "SlidingWindowMLASpec")
_REASONS: Final = {
    "CircularBufferSpec": "it keeps the last tokens only, in one block",
    "RSWASpec": "it forgets tokens that were generated",
    "CrossAttentionSpec": "it keeps what an encoder made of another input",
    "EncoderOnlyAttentionSpec": "it keeps no KV",
    "SinkFullAttentionSpec": "it keeps its sinks in blocks of their own",
    "HiddenStateCacheSpec": "it keeps hidden states",
}
_UNKNOWN: Final = "nobody has compared its answers"


@dataclass(frozen=True, slots=True)
class EngineGroups:
    """The KV groups of an engine that are stored and loaded."""

    groups: tuple[KvGroup, ...]
    """In the order of vLLM's numbers."""
    numbers: tuple[int, ...]
    """vLLM's number of each. It rebuilds those of the others itself."""
    drafts: frozenset[int] = frozenset()
    """Places in `groups` of those whose last block a drafting model may write anew."""
    total: int = 1
    """KV groups that vLLM has."""

    @property
    def sparse(self) -> bool:
        """True if a prefix needs less than all blocks of a group."""
        return any(group.coverage.rule is not Rule.ALL for group in self.groups)


def engine_groups(vllm_config: Any, kv_cache_config: Any) -> EngineGroups:
    """Give the KV groups of a model whose blocks can be stored.

    Behaviour:
        - A group that vLLM does not cache, or rebuilds after a load, is left alone.
        - Groups have the same tags in the scheduler, in every worker, and after a restart with other
          settings: a tag names the rule, the tokens of a block, and which of the groups so alike it is.
          Which layers those are is in the namespace, see `group_facts`.
        - A group that is alone has the tag of zeros: nothing is there that it could be taken for.

    Raises:
        ConfigError: If a layer keeps its KV in a way that is not known to be right, if this version of vLLM
            does not tell or do what that needs, or for what `check_engine` says: nobody else asks it where
            plug-ins are switched off.
    """
    check_engine(vllm_config)
    found, numbers = kv_cache_config.kv_cache_groups, _stored(kv_cache_config)
    coverages = _coverages([found[number].kv_cache_spec for number in numbers])
    _require_versions(vllm_config, kv_cache_config, coverages)
    _require_no_zeros(vllm_config, kv_cache_config)
    specs = [spec for number in numbers for spec in layer_specs(found[number].kv_cache_spec)]
    check_layers(vllm_config, [spec for spec in specs if type(spec).__name__ in _WHOLE])
    sizes = [int(found[number].kv_cache_spec.block_size) for number in numbers]
    groups = _tagged(sizes, coverages)
    _require_alignment(kv_cache_config, numbers, alignment(groups))
    return EngineGroups(groups, numbers, _drafts(vllm_config, kv_cache_config, numbers), len(found))


def group_facts(kv_cache_config: Any, engine: EngineGroups) -> list[dict[str, Any]]:
    """List what makes the groups of this rank's namespace: of one with all tokens nothing.

    A tag does not name layers, since ranks of a pipeline have different ones. So the namespace says which
    layers each tag stands for, and of what a state consists, which no tensor tells.
    """
    if is_plain(engine.groups):
        return []
    return [
        {
            "tag": group.tag.hex(),
            "rule": group.coverage.rule.value,
            "tokens": group.coverage.tokens,
            "block_tokens": group.block_tokens,
            "layers": list(kv_cache_config.kv_cache_groups[number].layer_names),
            "states": _state_facts(kv_cache_config, number),
        }
        for group, number in zip(engine.groups, engine.numbers, strict=True)
    ]


def tell_groups(kv_cache_config: Any, engine: EngineGroups) -> None:
    """Log which groups there are, and which states vLLM keeps, if a prefix needs less than all blocks."""
    if not engine.sparse:
        return
    layers: Counter[tuple[Coverage, int]] = Counter()
    groups: Counter[tuple[Coverage, int]] = Counter()
    for group, number in zip(engine.groups, engine.numbers, strict=True):
        alike = (group.coverage, group.block_tokens)
        layers[alike] += len(kv_cache_config.kv_cache_groups[number].layer_names)
        groups[alike] += 1
    said = [
        f"{layers[coverage, tokens]} layers in {count} group{'s' * (count > 1)} keep {_kept(coverage)}, "
        f"{tokens:,} tokens a block"
        for (coverage, tokens), count in groups.items()
    ]
    states = any(group.coverage.rule is Rule.STATE for group in engine.groups)
    retained = f". {_retained(kv_cache_config)}" if states else ""
    logger.info("KV groups: %s%s", "; ".join(said), retained)


def _stored(kv_cache_config: Any) -> tuple[int, ...]:
    """Give the numbers of the groups to be stored: all, up to vLLM 0.29, which has no others.

    Raises:
        ConfigError: For a group that lies elsewhere, or one that vLLM computes anew after each load.
    """
    found = kv_cache_config.kv_cache_groups
    numbers = tuple(getattr(kv_cache_config, "prefix_cacheable_group_ids", range(len(found))))
    if any(getattr(found[number], "host_resident", False) for number in numbers):
        raise ConfigError(
            "hisparse_config: vLLM then keeps KV in host memory, in a pool of its own, which KvbmConnector "
            "does not know. Leave it out, or serve this model without KvbmConnector"
        )
    if any(getattr(group.kv_cache_spec, "prefix_replay_tokens", 0) for group in found):
        raise ConfigError(
            "swa_bounded_replay: vLLM then computes the last tokens of a prefix that was loaded once more, "
            "and nobody has compared its answers. Leave it out, or serve this model without KvbmConnector"
        )
    return numbers


def _coverages(specs: Sequence[Any]) -> list[Coverage]:
    """Say what a prefix needs of each group.

    Raises:
        ConfigError: Names each kind of layer that is refused, with the reason.
    """
    refused: dict[str, str] = {}
    coverages = []
    for group in specs:
        needs = []
        for spec in layer_specs(group):
            try:
                needs.append(_coverage(spec))
            except ConfigError as error:
                refused[type(spec).__name__] = str(error)
        if len(set(needs)) > 1:
            refused[type(group).__name__] = "a prefix needs other blocks of one layer than of another"
        coverages += needs[:1]
    if refused or not coverages:
        kinds = "; ".join(f"{kind}: {reason}" for kind, reason in refused.items())
        raise ConfigError(
            "the layers of the model keep their KV in ways that KvbmConnector does not support: "
            f"{kinds or 'no layer keeps any'}. Serve this model without it"
        )
    return coverages


def _coverage(spec: Any) -> Coverage:
    """Say what a prefix needs of a layer: what vLLM's own manager of its kind keeps at the same boundary.

    Raises:
        ConfigError: With the reason alone.
    """
    kind = type(spec).__name__
    if kind in _WHOLE and getattr(spec, "non_causal", False):
        raise ConfigError("its attention is not causal: the KV of a token depends on those behind it")
    if kind in (*_WHOLE, *_WINDOWS):
        _require_whole_states(spec)
    if kind in _WHOLE:
        return Coverage()
    if kind in _WINDOWS:
        window: SlidingWindowSpec = spec
        beside = getattr(window, "extra_retained_tokens", 0)
        return Coverage(Rule.WINDOW, window.sliding_window - 1 + beside)
    if kind == "ChunkedLocalAttentionSpec":
        chunk: ChunkedLocalAttentionSpec = spec
        return Coverage(Rule.CHUNK, chunk.attention_chunk_size)
    if kind == "MambaSpec":
        state: MambaSpec = spec
        if state.mamba_cache_mode != "align":
            raise ConfigError(f"mamba_cache_mode: {state.mamba_cache_mode!r}; it must be 'align'")
        return Coverage(Rule.STATE)
    raise ConfigError(_REASONS.get(kind, _UNKNOWN))


def _require_whole_states(spec: Any) -> None:
    """Refuse states for several tokens that may belong to two blocks.

    vLLM writes such a state with the last of its tokens, so a block that ends with one is complete when its
    tokens are computed; its own manager keeps and finds such blocks like any others.

    Raises:
        ConfigError: With the reason alone.
    """
    per_state = getattr(spec, "tokens_per_state", 1)
    if getattr(spec, "compress_ratio", 1) != 1 or (per_state != 1 and vllm_version() < STATES_FROM):
        raise ConfigError("it keeps one state for several tokens; vLLM 0.32 or newer tells enough of them")
    if per_state < 1 or spec.block_size % per_state:
        raise ConfigError(f"it keeps one state for {per_state} tokens, and {spec.block_size} are a block")


def _require_versions(vllm_config: Any, kv_cache_config: Any, coverages: Sequence[Coverage]) -> None:
    """Refuse several groups, and sparse ones, where vLLM does not tell enough of them."""
    rules = {coverage.rule for coverage in coverages}
    if Rule.STATE in rules:
        require_states(vllm_config)
    several = len(kv_cache_config.kv_cache_groups) > 1
    if vllm_version() < GROUPS_FROM and (several or rules != {Rule.ALL}):
        kinds = [type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups]
        raise ConfigError(
            f"the layers of the model keep their KV in {len(kinds)} groups ({', '.join(kinds)}), each with "
            "blocks of its own; with vLLM before 0.30 KvbmConnector supports one that keeps all tokens. "
            "Install vLLM 0.30 or newer, or serve this model without KvbmConnector"
        )
    zeroes = getattr(kv_cache_config, "needs_kv_cache_zeroing", False)
    if several and zeroes and vllm_version() < STATES_FROM:
        raise ConfigError(
            "vLLM before 0.32 clears new blocks of this model's KV cache after KvbmConnector loaded them. "
            "Install vLLM 0.32 or newer, or serve this model without KvbmConnector"
        )


def _require_no_zeros(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse a runner that clears blocks before the step's plan is carried out.

    What they held would be stored as zeros.
    """
    if getattr(kv_cache_config, "needs_kv_cache_zeroing", False) and getattr(
        vllm_config, "use_v2_model_runner", False
    ):
        raise ConfigError(
            "VLLM_USE_V2_MODEL_RUNNER: vLLM clears new blocks of this model's KV cache, and its second model "
            "runner does so before KvbmConnector has read what was in them. Set it to 0, or serve this model "
            "without KvbmConnector"
        )


def _require_alignment(kv_cache_config: Any, numbers: Sequence[int], tokens: int) -> None:
    """Refuse groups that are left alone and whose blocks end elsewhere: vLLM aligns hits to all groups'."""
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        size = int(group.kv_cache_spec.block_size)
        if number not in numbers and tokens % size:
            raise ConfigError(
                f"{type(group.kv_cache_spec).__name__}: {size} tokens a block in a KV group that is not "
                f"stored, and the stored ones' blocks end together every {tokens} tokens, which is no "
                "multiple. Serve this model without KvbmConnector"
            )


def _tagged(sizes: Sequence[int], coverages: Sequence[Coverage]) -> tuple[KvGroup, ...]:
    """Give each group a tag of its own, unless it is alone."""
    if len(sizes) == 1:
        return (KvGroup(sizes[0], coverages[0]),)
    groups: list[KvGroup] = []
    seen: Counter[tuple[int, Coverage]] = Counter()
    for size, coverage in zip(sizes, coverages, strict=True):
        facts = {
            "rule": coverage.rule.value,
            "tokens": coverage.tokens,
            "block_tokens": size,
            "which": seen[size, coverage],
        }
        seen[size, coverage] += 1
        groups.append(KvGroup(size, coverage, group_tag(facts)))
    return tuple(groups)


def _drafts(vllm_config: Any, kv_cache_config: Any, numbers: Sequence[int]) -> frozenset[int]:
    """Say in which groups a drafting model writes: as vLLM does, in all if it has marked none.

    What a draft writes for the last token of a step depends on the token behind it.
    """
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is None or not speculative.use_eagle():
        return frozenset()
    marked = [getattr(group, "is_eagle_group", False) for group in kv_cache_config.kv_cache_groups]
    return frozenset(place for place, number in enumerate(numbers) if marked[number] or not any(marked))


def _state_facts(kv_cache_config: Any, number: int) -> list[list[Any]]:
    """Give shapes and types of the parts of a state, by layer where they differ."""
    specs: list[MambaSpec] = layer_specs(kv_cache_config.kv_cache_groups[number].kv_cache_spec)
    return [
        [[list(shape), str(dtype)] for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)]
        for spec in specs
        if type(spec).__name__ == "MambaSpec"
    ]


def _kept(coverage: Coverage) -> str:
    match coverage.rule:
        case Rule.ALL:
            return "all tokens"
        case Rule.WINDOW:
            return f"the last {coverage.tokens:,} tokens"
        case Rule.CHUNK:
            return f"a chunk of {coverage.tokens:,} tokens"
        case Rule.STATE:
            return "a state"


def _retained(kv_cache_config: Any) -> str:
    """Say after which tokens vLLM keeps states, so that they can be stored."""
    interval = getattr(kv_cache_config, "prefix_cache_retention_interval", None)
    if interval is None:
        return "vLLM keeps a state wherever a step ends with a block"
    every = f", and every {interval:,} tokens where a step ends there" if interval else ""
    return (
        f"vLLM keeps states at the end of a prompt and where two prompts part{every} "
        f"(--prefix-cache-retention-interval {interval}): a prompt can go on from nowhere else"
    )
