"""Of models that people serve our groups, and the bytes that are loaded of each, are those of the rules."""

import json
from collections import Counter

import pytest

pytest.importorskip("vllm")
import planned
import real_shapes
from model_configs import CONFIGS
from real_shapes import MODELS, blocks_needed, shape_of, stored_blocks, stored_bytes

from kvbm_cli.size._groups import Ranks, make_groups
from kvbm_cli.size._layers import read_model
from kvbm_core import Capabilities, Planner, TierStatus
from kvbm_core.groups import Rule, alignment, group_keys

pytestmark = pytest.mark.vllm

PROMPTS = (1500, 20_000, 33_333)
KINDS = {
    "gpt-oss-120b": ["window 127: 18 of 16", "all 0: 18 of 16"],
    "Gemma-3-27B": [
        *["window 1023: 9 of 16"] * 4, *["window 1023: 8 of 16"] * 2, "all 0: 10 of 16"
    ],
    "Llama-4-Scout": [*["chunk 8192: 12 of 16"] * 3, "all 0: 12 of 16"],
    "Qwen3.6-27B": [*["state 0: 16 of 784"] * 3, "all 0: 16 of 784"],
    "DeepSeek-V4": [
        "window 127: 31 of 64", "window 127: 30 of 64", "all 0: 92 of 256", "window 7: 62 of 4",
        "window 127: 30 of 8",
    ],
}  # fmt: skip
"""The rule of each group, its layers, and the tokens of its blocks."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return real_shapes.long_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=MODELS)
def planned_model(request, config):
    return request.param, shape_of(request.param, config)


class Prompt:
    """The keys of a prompt in each group, made when they are asked for."""

    def __init__(self, groups):
        self.groups = groups

    def __contains__(self, key):
        return True

    def slice(self, start, stop, group=0):
        size = self.groups[group].block_tokens
        digests = [(block * size + size).to_bytes(32, "little") for block in range(start, stop)]
        return group_keys(digests, self.groups[group].tag)


def planner_of(shape, prompt, blocks):
    """One tier that has those blocks of a prompt."""
    inventory = [
        (prompt.slice(block, block + 1, number)[0], nbytes)
        for number, (nbytes, held) in enumerate(zip(shape.nbytes, blocks, strict=True))
        for block in held
    ]
    tier = TierStatus("host", Capabilities(1 << 50, addressable=True), inventory, shape.nbytes, shape.nbytes)
    return Planner([[tier]], groups=shape.groups)


def load(shape, planner, prompt, prompt_tokens):
    """Load the boundary that is chosen for a prompt; give it, and for each group the bytes of the plan."""
    match = planner.find_boundaries(prompt, 0, prompt_tokens - 1, 0.0)
    boundary, parts = planner.choose_boundary(match, 0.0)
    for number, first, tiers in parts:
        keys = prompt.slice(first, first + len(tiers), number)
        blocks = range(1, len(tiers) + 1)
        planner.load("request", keys, blocks, tiers, group=number, prefix=prompt)
    nbytes = [0] * len(shape.groups)
    for op in planner.take(0.0).loads:
        nbytes[op.group] += len(op.keys) * shape.nbytes[op.group]
    return boundary, nbytes


def test_groups_are_those_of_the_model(planned_model):
    model, shape = planned_model
    kinds = [
        f"{group.coverage.rule.value} {group.coverage.tokens}: {count} of {group.block_tokens}"
        for group, count in zip(shape.groups, shape.layers, strict=True)
    ]
    assert kinds == KINDS[model]


@pytest.mark.parametrize("tokens", PROMPTS)
@pytest.mark.parametrize("settings", [{}, {"sparse_stores": "dense"}], ids=["boundaries", "dense"])
def test_bytes_loaded_for_a_hit_are_those_of_each_groups_rule(planned_model, tokens, settings):
    _, shape = planned_model
    prompt = Prompt(shape.groups)
    planner = planner_of(shape, prompt, stored_blocks(shape, tokens, **settings))

    boundary, nbytes = load(shape, planner, prompt, tokens)

    assert boundary == (tokens - 1) // alignment(shape.groups) * alignment(shape.groups)
    needed = [blocks_needed(group, boundary) for group in shape.groups]
    assert nbytes == [count * each for count, each in zip(needed, shape.nbytes, strict=True)]


def test_a_prefix_that_ends_earlier_is_restored_to_a_regular_boundary(planned_model):
    """Who shares 20,000 tokens of 33,333 finds what was kept between, if the model has no states."""
    _, shape = planned_model
    prompt = Prompt(shape.groups)
    planner = planner_of(shape, prompt, stored_blocks(shape, 33_333))

    boundary, nbytes = load(shape, planner, prompt, 20_000)

    if any(group.coverage.rule is Rule.STATE for group in shape.groups):
        assert boundary == 0
        return
    longest = max(group.coverage.tokens for group in shape.groups)
    assert 20_000 - max(2048, 4 * longest) - alignment(shape.groups) <= boundary
    assert boundary > 0
    needed = [blocks_needed(group, boundary) for group in shape.groups]
    assert nbytes == [count * each for count, each in zip(needed, shape.nbytes, strict=True)]


def test_boundaries_store_less_than_dense_and_never_more_than_half_of_equal_slots_is_empty(planned_model):
    _, shape = planned_model
    slots = Capabilities(capacity_bytes=None, unit_bytes=max(shape.nbytes))
    chosen, dense = (stored_blocks(shape, 131_072, sparse_stores=name) for name in ("boundaries", "dense"))
    sparse = {group.coverage.rule for group in shape.groups} - {Rule.ALL, Rule.STATE}
    less = stored_bytes(shape, chosen) < 0.6 * stored_bytes(shape, dense)
    assert less == bool(sparse)
    assert stored_bytes(shape, chosen) <= stored_bytes(shape, chosen, slots) < 2 * stored_bytes(shape, chosen)


def test_room_for_kv_is_that_of_the_groups(planned_model, config):
    """Without groups fewer tokens fit, or the model does not start."""
    model, shape = planned_model
    if model in ("Qwen3.6-27B", "DeepSeek-V4"):
        with pytest.raises((ValueError, TypeError)):
            shape_of(model, config, hybrid=False)
    else:
        assert shape_of(model, config, hybrid=False).tokens < 0.6 * shape.tokens


def test_the_connector_leaves_vllms_groups_on(tmp_path):
    """So the room for KV is that without a connector: vLLM plans both alike."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.engine.arg_utils import EngineArgs

    from kvbm_vllm import KvbmConnector

    if not issubclass(KvbmConnector, base.SupportsHMA):
        pytest.skip("the connector takes one group")
    settings = {"tiers": [{"backend": "cpu", "capacity": "1GiB"}]}
    transfer = {"kv_connector": "KvbmConnector", "kv_role": "kv_both", "kv_connector_extra_config": settings}
    folder = planned.write_config(tmp_path, "gemma3")
    made = {"model": str(folder), "skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 256}
    alone, ours = (
        EngineArgs(**made, **options).create_engine_config()
        for options in ({}, {"kv_transfer_config": transfer})
    )
    assert not ours.scheduler_config.disable_hybrid_kv_cache_manager
    for field in ("block_size", "kv_cache_layout", "cache_dtype", "prefix_cache_retention_interval"):
        assert getattr(ours.cache_config, field) == getattr(alone.cache_config, field)


def test_the_command_comes_to_the_same_from_the_config_alone(planned_model, tmp_path):
    name, shape = planned_model
    if name not in CONFIGS:
        pytest.skip("the command says that it does not know such a model")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS[name]))
    made = make_groups(read_model(file), Ranks())

    def told(group, layers, nbytes):
        return group.block_tokens, group.coverage, layers, nbytes

    planned_groups = map(told, shape.groups, shape.layers, shape.nbytes)
    assert Counter(told(each.group, each.layers, each.block_bytes) for each in made) == Counter(
        planned_groups
    )
