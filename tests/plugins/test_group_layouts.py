"""The tensors that vLLM allocates for several KV groups, and the bytes of a block of each that are copied."""

import ctypes
from types import SimpleNamespace

import planned
import pytest
import torch
from planned import chunk, full, latent, layers, state, window
from test_groups import LAYOUTS, MODELS, PLANS, ring

pytest.importorskip("vllm")
from kvbm_core import ConfigError, make_namespace
from kvbm_core.tier import Region
from kvbm_device import open_device
from kvbm_vllm._groups import engine_groups, group_facts
from kvbm_vllm._namespace import namespace_facts, shared_facts
from kvbm_vllm._ranks import rank_facts
from kvbm_vllm._worker import layers_by_group

pytestmark = pytest.mark.vllm

BLOCKS = 96


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return planned.engine_config(tmp_path_factory.mktemp("model"), enable_prefix_caching=True)


def fill(kv_caches, seed):
    """Write other bytes everywhere, padding and all."""
    made = torch.Generator().manual_seed(seed)
    for tensor in {each.untyped_storage().data_ptr(): each for each in kv_caches.values()}.values():
        memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        memory.copy_(torch.randint(256, memory.shape, generator=made, dtype=torch.uint8))
    return kv_caches


def made(config, stage, *, layout="LBHNC", blocks=BLOCKS, kernel=None, seed=1):
    """Plan and allocate what a worker has.

    Returns:
        The worker's configuration, its tensors, our groups, and a device over those.
    """
    told, [worker] = planned.plan(config, stage, layout=layout, blocks=blocks)
    kv_caches = fill(planned.allocate(config, worker, kernel), seed)
    engine = engine_groups(config, told)
    device = open_device(layers_by_group(kv_caches, worker, engine.numbers), blocks)
    return SimpleNamespace(worker=worker, tensors=kv_caches, engine=engine, device=device, blocks=blocks)


def rows(it, number, block):
    """The bytes of each layer's view of a block, as vLLM indexes it."""
    found = []
    for name in it.worker.kv_cache_groups[number].layer_names:
        tensor = it.tensors[name]
        parts = tensor.shape[0] // it.blocks
        view = tensor[block * parts : (block + 1) * parts]
        found.append(view.contiguous().view(torch.uint8).numpy().tobytes())
    return found


def region_of(it, place):
    nbytes = it.device.traits.block_bytes[place]
    memory = (ctypes.c_ubyte * nbytes)()
    return Region(ctypes.addressof(memory), nbytes, owner=memory)


def gathered(it, place, block):
    region = region_of(it, place)
    assert it.device.gather([block], [region], group=place).done()
    return region


def stored(it):
    regions = [gathered(it, place, 5) for place in range(len(it.engine.groups))]
    return [bytes(region.view()) for region in regions]


def move(source, target):
    """Move a block of each group from one engine to another, each from and to a place of its own."""
    for place in range(len(source.engine.groups)):
        region = gathered(source, place, place + 1)
        assert target.device.scatter([region], [place + 21], group=place).done()
    for place, number in enumerate(source.engine.numbers):
        assert sum(map(len, rows(source, number, place + 1))) == source.device.traits.block_bytes[place]
        assert rows(target, number, place + 21) == rows(source, number, place + 1)


def namespace(config, it, replicas=1):
    facts = namespace_facts(
        config, it.tensors, it.blocks, "weights", replicas, group_facts(it.worker, it.engine)
    )
    return make_namespace(facts), facts


@pytest.mark.parametrize(("name", "layout"), PLANS)
def test_a_block_of_each_group_moves_between_engines_as_vllm_indexes_it(config, name, layout):
    move(*(made(config, MODELS[name](), layout=layout, seed=seed) for seed in (1, 2)))


@pytest.mark.parametrize("name", [name for name, layout in PLANS if layout == "LBHNC"])
def test_of_a_group_nothing_is_written_but_its_block(config, name):
    it = made(config, MODELS[name]())
    before = {name: tensor.clone() for name, tensor in it.tensors.items()}
    for place in range(len(it.engine.groups)):
        it.device.scatter([region_of(it, place)], [7], group=place)
    for layer, tensor in it.tensors.items():
        was = before[layer]
        others = [at for at in range(it.blocks) if at != 7]
        assert torch.equal(tensor[others].view(torch.uint8), was[others].view(torch.uint8))
        assert not tensor[7].view(torch.uint8).any()


def test_the_padding_of_a_state_is_not_stored(config):
    it = made(config, MODELS["states"]())
    content = 240 + 1024
    held = [len(it.worker.kv_cache_groups[number].layer_names) for number in it.engine.numbers[1:]]
    assert it.device.traits.block_bytes[1:] == tuple(count * content for count in held)


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_a_kernel_may_divide_blocks(config, layout):
    sides = [
        made(config, MODELS["two sizes"](), layout=layout, kernel=[8, 16, 4], seed=seed) for seed in (1, 2)
    ]
    assert {tensor.shape[0] // BLOCKS for tensor in sides[0].tensors.values()} == {4, 1}
    move(*sides)


def test_groups_that_are_left_alone_are_not_copied(config):
    it = made(config, layers(full=(2, full()), window=(2, window()), ring=(2, ring())))
    held = layers_by_group(it.tensors, it.worker, it.engine.numbers)
    assert [sorted(each) for each in held] == [
        ["layers.0.full", "layers.1.full"],
        ["layers.0.window", "layers.1.window"],
    ]
    _, facts = namespace(config, it)
    assert not any("ring" in layer[0] for layer in facts["layers"])
    assert len(facts["layers"]) == 4


# Which bytes are comparable.


def test_the_same_layers_have_one_namespace_however_many_blocks_there_are(config):
    # 64 is a size of each layer, too.
    for name, counts in (("full", (64, 96)), ("windows", (96, 97)), ("states", (96, 97))):
        assert len({namespace(config, made(config, MODELS[name](), blocks=each))[0] for each in counts}) == 1


def test_other_flags_of_the_engine_find_what_is_the_same(config, tmp_path):
    other = planned.engine_config(
        tmp_path, enable_prefix_caching=True, max_model_len=128, max_num_seqs=3, max_num_batched_tokens=64,
        prefix_cache_retention_interval=64,
    )  # fmt: skip
    other.model_config.model = config.model_config.model
    for name in ("full", "windows", "chunks", "states"):
        sides = [namespace(each, made(each, MODELS[name]())) for each in (config, other)]
        assert sides[0] == sides[1]


def number(it):
    """Give each element of block 5 of each layer a value of its own, alike in every layout."""
    for at, name in enumerate(sorted(it.tensors)):
        view = it.tensors[name]
        values = torch.arange(view[5].numel()).remainder(113).add(at)
        view[5].copy_(values.view(view[5].shape).to(view.dtype))
    return it


@pytest.mark.parametrize("name", ["full", "windows", "chunks", "states"])
def test_layouts_with_one_namespace_have_the_same_bytes(config, name):
    """Those in which only the places of whole pages differ."""
    seen = {}
    every = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
    for layout in every if name == "full" else LAYOUTS:
        it = number(made(config, MODELS[name](), layout=layout))
        found = stored(it) if name == "full" else [stored(it)[0]]
        assert seen.setdefault(namespace(config, it)[0], found) == found
    assert len({b"".join(found) for found in seen.values()}) == (3 if name == "full" else 2)


@pytest.mark.parametrize(
    "changed",
    [
        lambda: layers(full=(2, full()), window=(5, window(40))),
        lambda: layers(full=(2, full()), window=(6, window(48))),
        lambda: layers(full=(2, full(dtype=torch.float16)), window=(5, window(48, dtype=torch.float16))),
        lambda: layers(full=(2, full(block_size=32)), window=(5, window(48, block_size=32))),
        lambda: layers(full=(2, full()), chunk=(5, chunk(48))),
        lambda: layers(full=(2, full()), full_too=(5, full())),
    ],
    ids=["window", "layers", "dtype", "block", "rule", "all"],
)
def test_other_groups_have_another_namespace(config, changed):
    before = namespace(config, made(config, MODELS["windows"]()))[0]
    assert namespace(config, made(config, changed()))[0] != before


def test_states_of_other_parts_have_another_namespace_though_they_are_as_long(config):
    found = set()
    for shapes in (planned.STATE, ((40, 3), (2, 8, 16)), ((3, 40), (2, 16, 8))):
        spec = state(page_size_padded=4096, shapes=shapes)
        found.add(namespace(config, made(config, layers(full=(2, full()), state=(5, spec))))[0])
    assert len(found) == 3


def test_one_group_that_keeps_all_tokens_says_nothing_of_groups(config):
    _, facts = namespace(config, made(config, MODELS["full"]()))
    assert "groups" not in facts
    assert facts["block_tokens"] == config.cache_config.block_size
    _, facts = namespace(config, made(config, MODELS["windows alone"]()))
    assert [group["tag"] for group in facts["groups"]] == ["00000000"]


def test_ranks_of_a_pipeline_are_alike_but_for_their_layers(config, monkeypatch):
    from kvbm_core import load_config

    monkeypatch.setattr(config.parallel_config, "pipeline_parallel_size", 2)
    stages = [layers(full=(2, full()), window=(4, window())), {"layers.9.full": full()}]
    told, workers = planned.plan(config, *stages)
    engine, stack = (
        engine_groups(config, told),
        load_config({"tiers": [{"backend": "cpu", "capacity": "1MiB"}]}),
    )
    facts = [
        namespace_facts(config, planned.allocate(config, worker), 256, "w", 1, group_facts(worker, engine))
        for worker in workers
    ]
    assert make_namespace(facts[0]) != make_namespace(facts[1])
    assert shared_facts(facts[0]) == shared_facts(facts[1])
    assert rank_facts(stack, facts[0]) == rank_facts(stack, facts[1])
    held = layers_by_group(planned.allocate(config, workers[1]), workers[1], engine.numbers)
    assert [len(each) for each in held] == [len(group.layer_names) for group in workers[1].kv_cache_groups]


def test_a_layer_with_memory_of_its_own_in_no_group_is_refused(config):
    it = made(config, MODELS["windows"]())
    it.worker.kv_cache_groups[1].layer_names.pop()
    for group in it.worker.kv_cache_groups[2:]:
        group.layer_names.clear()
    with pytest.raises(ConfigError, match="in none of the 4 KV groups"):
        layers_by_group(it.tensors | {"new": torch.zeros(96, 2)}, it.worker, it.engine.numbers)


def test_mla_of_two_sizes_is_one_group(config):
    """A model with an indexer: the worker is told each layer's specification."""
    stage = layers(latent=(3, latent()), index=(3, latent(head_size=16)))
    it = made(config, stage, layout="LBHNC")
    assert len(it.engine.groups) == 1
    assert sorted(map(len, rows(it, 0, 5))) == [512] * 3 + [2560] * 3
    assert len(stored(it)[0]) == 3 * (512 + 2560)
