"""vLLM's KV groups, as its own planner makes them, and what we store of them."""

import dataclasses
import itertools
import logging
from types import SimpleNamespace

import planned
import pytest
from planned import chunk, full, latent, latent_window, layers, state, window

pytest.importorskip("vllm")
from kvbm_core import ConfigError
from kvbm_core.groups import Coverage, KvGroup, Rule, alignment
from kvbm_vllm._groups import EngineGroups, engine_groups, group_facts, tell_groups
from kvbm_vllm._models import replicas

pytestmark = pytest.mark.vllm

MODELS = {
    "full": lambda: layers(full=(4, full())),
    "windows alone": lambda: layers(window=(4, window())),
    "states alone": lambda: layers(state=(4, state())),
    "windows": lambda: layers(full=(2, full()), window=(5, window(48))),
    "chunks": lambda: layers(full=(3, full()), chunk=(3, chunk())),
    "states": lambda: layers(full=(2, full()), state=(5, state(page_size_padded=4096))),
    "two sizes": lambda: layers(full=(2, full(num_kv_heads=1)), window=(4, window())),
    "two sizes in one group": lambda: layers(full=(3, full()), wide=(3, full(head_size=64))),
    "latent": lambda: layers(
        latent=(4, latent(block_size=64, tokens_per_state=4)),
        index=(4, latent(block_size=64, tokens_per_state=4, head_size=16)),
        window=(5, latent_window(48, block_size=64)),
        partial=(4, latent_window(8, block_size=4)),
    ),
}
"""By name: layers as models have them."""
LAYOUTS = ("LBHNC", "LBNHC", "BLHNC")
ONE_SIZE = ("full", "windows alone", "states alone", "windows", "chunks", "states", "two sizes")
PLANS = [(name, layout) for name in MODELS for layout in LAYOUTS if name in ONE_SIZE or layout == "BLHNC"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return planned.engine_config(tmp_path_factory.mktemp("model"), enable_prefix_caching=True)


@pytest.fixture
def version(monkeypatch):
    return lambda number: monkeypatch.setattr("vllm.__version__", number)


def several(*specs, **changes):
    """A configuration of one group for each specification, all to be stored unless a test changes that."""
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=[f"l{at}"]) for at, spec in enumerate(specs)]
    return SimpleNamespace(kv_cache_groups=groups, **changes)


@pytest.mark.parametrize(("name", "layout"), PLANS)
def test_scheduler_and_workers_find_the_same_groups(config, name, layout):
    told, [worker] = planned.plan(config, MODELS[name](), layout=layout)
    engine = engine_groups(config, told)
    assert engine == engine_groups(config, worker)
    assert engine.total == len(engine.groups) == len(told.kv_cache_groups)
    assert alignment(engine.groups) % told.kv_cache_groups[0].kv_cache_spec.block_size == 0
    assert [len(group_facts(told, engine))] == [
        0 if name.startswith(("full", "two sizes in")) else engine.total
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_needs_what_vllms_own_managers_keep(config, name):
    """Of N tokens that are computed a manager skips so many, and frees the blocks that lie before."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.single_type_kv_cache_manager import get_manager_for_kv_cache_spec

    told, _ = planned.plan(config, MODELS[name](), layout="BLHNC")
    pool = BlockPool(num_gpu_blocks=64, enable_caching=True, hash_block_size=4)
    engine = engine_groups(config, told)
    for group, theirs in zip(engine.groups, told.kv_cache_groups, strict=True):
        spec = dataclasses.replace(theirs.kv_cache_spec)
        manager = get_manager_for_kv_cache_spec(
            spec, max_in_flight_tokens=256, max_model_len=256, block_pool=pool, enable_caching=True,
            kv_cache_group_id=0, scheduler_block_size=64,
        )  # fmt: skip
        assert manager.block_size == group.block_tokens
        for boundary in range(1, 400):
            skipped = manager.get_num_skipped_tokens(boundary)
            assert group.coverage.first_token(boundary) == skipped
            assert group.first_block(boundary) == skipped // manager.block_size


def test_windows_may_be_longer_at_their_beginning(config):
    """vLLM keeps more for drafting models of several modules."""
    made = engine_groups(config, several(window(64, extra_retained_tokens=2)))
    assert made.groups == (KvGroup(16, Coverage(Rule.WINDOW, 65)),)


def test_tags_tell_groups_apart_and_do_not_depend_on_numbers(config):
    first = engine_groups(config, several(full(), window(), window(), window(32), full(block_size=32)))
    other = engine_groups(config, several(window(32), window(), full(block_size=32), full(), window()))
    assert len({group.tag for group in first.groups}) == 5
    assert {*first.groups} == {*other.groups}
    assert bytes(4) not in {group.tag for group in first.groups}


@pytest.mark.parametrize("spec", [full(), window(), chunk(), state(), latent()])
def test_a_group_that_is_alone_has_the_tag_of_zeros(config, spec):
    [group] = engine_groups(config, several(spec)).groups
    assert group.tag == bytes(4)


def test_ranks_of_a_pipeline_have_the_same_tags_and_each_names_its_layers(config):
    stages = [layers(full=(2, full()), window=(4, window())), {"layers.9.full": full()}]
    told, workers = planned.plan(config, *stages)
    engine = engine_groups(config, told)
    assert [engine_groups(config, worker) for worker in workers] == [engine] * 2
    held = [[each["layers"] for each in group_facts(worker, engine)] for worker in workers]
    assert [sorted(itertools.chain(*each)) for each in held] == [sorted(stage) for stage in stages]
    assert [] in held[1]


def test_a_namespace_names_the_parts_of_states(config):
    told, [worker] = planned.plan(config, MODELS["states"]())
    facts = group_facts(worker, engine_groups(config, told))
    parts = [[[3, 40], "torch.bfloat16"], [[2, 8, 16], "torch.float32"]]
    assert [each["states"] for each in facts] == [[]] + [[parts]] * (len(facts) - 1)


def ring():
    return planned._spec("CircularBufferSpec", **{**planned.PAGE, "block_size": 8})


def test_groups_that_vllm_does_not_cache_or_rebuilds_are_left_alone(config):
    told, _ = planned.plan(config, layers(full=(2, full()), window=(2, window()), ring=(2, ring())))
    kinds = [type(group.kv_cache_spec).__name__ for group in told.kv_cache_groups]
    engine = engine_groups(config, told)
    assert [kinds[number] for number in engine.numbers] == ["FullAttentionSpec", "SlidingWindowSpec"]
    assert engine.total == 3
    copy = next(number for number, kind in enumerate(kinds) if kind == "SlidingWindowSpec")
    told.kv_cache_groups[copy].enable_kv_transfer = False
    del told.transfer_group_ids, told.prefix_cacheable_group_ids
    assert engine_groups(config, told).groups == (KvGroup(16),)


def test_what_is_left_alone_must_end_where_ours_do(config):
    odd = planned._spec("CircularBufferSpec", **{**planned.PAGE, "block_size": 24})
    with pytest.raises(ConfigError, match=r"CircularBufferSpec: 24 tokens .* every 16 tokens"):
        engine_groups(config, several(full(), odd, prefix_cacheable_group_ids=(0,)))


def test_groups_that_lie_elsewhere_or_are_computed_anew_are_refused(config):
    told = several(full(), full())
    told.kv_cache_groups[1].host_resident = True
    with pytest.raises(ConfigError, match=r"hisparse_config: .*Leave it out"):
        engine_groups(config, told)
    replayed = latent_window(bounded_replay=True)
    with pytest.raises(ConfigError, match=r"swa_bounded_replay: .*Leave it out"):
        engine_groups(config, several(full(), replayed, prefix_cacheable_group_ids=(0,)))


def test_a_model_of_which_vllm_caches_nothing_is_refused(config):
    with pytest.raises(ConfigError, match="no layer keeps any"):
        engine_groups(config, several(ring(), prefix_cacheable_group_ids=()))


def test_states_are_served_at_the_ends_of_blocks_only(config):
    with pytest.raises(ConfigError, match="MambaSpec: mamba_cache_mode: 'none'; it must be 'align'"):
        engine_groups(config, several(full(), state(mamba_cache_mode="none")))


def test_blocks_that_vllm_clears_after_they_were_loaded_are_refused(config, version):
    told = several(full(), window(), needs_kv_cache_zeroing=True)
    assert len(engine_groups(config, told).groups) == 2
    version("0.31.0")
    with pytest.raises(ConfigError, match=r"before 0.32 clears new blocks"):
        engine_groups(config, told)
    assert len(engine_groups(config, several(full(), needs_kv_cache_zeroing=True)).groups) == 1


def test_a_runner_that_clears_blocks_before_they_are_read_is_refused(config):
    class Second:
        use_v2_model_runner = True
        model_config = None
        parallel_config = config.parallel_config

    with pytest.raises(ConfigError, match=r"VLLM_USE_V2_MODEL_RUNNER: .*Set it to 0"):
        engine_groups(Second, several(full(), needs_kv_cache_zeroing=True))


def drafting(config, *, eagle):
    made = SimpleNamespace(
        **{name: getattr(config, name) for name in ("parallel_config", "scheduler_config")}
    )
    made.model_config, made.speculative_config = None, SimpleNamespace(use_eagle=lambda: eagle)
    return made


def test_a_drafting_models_groups_are_those_that_vllm_marks_or_all(config):
    told = several(ring(), full(), window(), prefix_cacheable_group_ids=(1, 2))
    assert engine_groups(config, several(full())).drafts == frozenset()
    assert engine_groups(drafting(config, eagle=False), told).drafts == frozenset()
    assert engine_groups(drafting(config, eagle=True), told).drafts == {0, 1}
    told.kv_cache_groups[2].is_eagle_group = True
    assert engine_groups(drafting(config, eagle=True), told).drafts == {1}


def manager_of(config, told):
    """vLLM's own manager, as its scheduler makes it."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    config.cache_config.block_size = told.kv_cache_groups[0].kv_cache_spec.block_size
    whole, hashed = resolve_kv_cache_block_sizes(told, config)
    return KVCacheManager(told, max_model_len=256, scheduler_block_size=whole, hash_block_size=hashed), whole


def request_of(manager, name, tokens):
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(manager.block_pool.hash_block_size, sha256)
    return Request(name, list(range(tokens)), SamplingParams(max_tokens=1), None, block_hasher=hasher)


@pytest.mark.parametrize("name", MODELS)
def test_vllm_gives_room_for_what_a_prefix_needs_and_no_more(config, name):
    """A request of which so many tokens are to be loaded gets these blocks of each group, and null blocks."""
    told, _ = planned.plan(config, MODELS[name](), layout="BLHNC", blocks=512)
    engine = engine_groups(config, told)
    manager, whole = manager_of(config, told)
    for boundary in range(whole, 256, whole):
        request = request_of(manager, f"to {boundary}", 256)
        assert manager.allocate_slots(
            request, 0, num_external_computed_tokens=boundary, delay_cache_blocks=True
        )
        given = manager.get_blocks(request.request_id)
        for group, table in zip(engine.groups, given.blocks, strict=True):
            held = [place for place, block in enumerate(table) if not block.is_null]
            assert held == list(range(group.first_block(boundary), boundary // group.block_tokens))
        manager.free(request)


@pytest.mark.parametrize("name", ["full", "latent"])
def test_blocks_of_groups_that_keep_all_stay_where_they_are(config, name):
    """Of compressed MLA, too, where one state stands for four tokens."""
    told, _ = planned.plan(config, MODELS[name](), layout="BLHNC", blocks=512)
    [place] = [
        place
        for place, group in enumerate(engine_groups(config, told).groups)
        if group.coverage.rule is Rule.ALL
    ]
    manager, _ = manager_of(config, told)
    request, before = request_of(manager, "a", 250), []
    while request.num_computed_tokens < 250:
        assert manager.allocate_slots(request, 25)
        request.num_computed_tokens += 25
        table = manager.get_block_ids("a")[place]
        assert table[: len(before)] == before
        assert len(table) == -(
            -request.num_computed_tokens // told.kv_cache_groups[place].kv_cache_spec.block_size
        )
        assert 0 not in table
        before = list(table)


def test_ranks_are_replicas_where_every_group_is_alike_on_all(config):
    four = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=4))
    told = several(latent(), latent_window(), kv_tp_replicas=4)
    assert replicas(four, told) == 4
    told.kv_tp_replicas = 1
    assert replicas(four, told) == 1
    assert replicas(four, several(latent(), full(), kv_tp_replicas=4)) == 1
    assert replicas(four, several(latent(), state(), kv_tp_replicas=1)) == 1
    # Earlier releases do not say so, and have one group.
    assert replicas(four, several(latent())) == 4
    assert replicas(four, several(latent(), latent_window())) == 1


def told_lines(caplog, monkeypatch, config, told):
    monkeypatch.setattr(logging.getLogger("kvbm_vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, "kvbm_vllm"):
        tell_groups(told, engine_groups(config, told))
    return [record.message for record in caplog.records if record.name == "kvbm_vllm"]


def test_a_line_tells_of_groups_that_need_less_than_all_blocks(config, caplog, monkeypatch):
    told, _ = planned.plan(config, MODELS["windows"]())
    assert told_lines(caplog, monkeypatch, config, told) == [
        "KV groups: 2 layers in 1 group keep all tokens, 16 tokens a block; "
        "5 layers in 3 groups keep the last 47 tokens, 16 tokens a block"
    ]
    caplog.clear()
    told, _ = planned.plan(config, MODELS["full"]())
    assert told_lines(caplog, monkeypatch, config, told) == []


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (0, "states at the end of a prompt and where two prompts part (--prefix-cache-retention-interval 0)"),
        (64, "and every 64 tokens where a step ends there (--prefix-cache-retention-interval 64)"),
        (None, "vLLM keeps a state wherever a step ends with a block"),
    ],
)
def test_the_line_tells_which_states_vllm_keeps(config, caplog, monkeypatch, interval, said):
    told, _ = planned.plan(config, MODELS["states"]())
    told.prefix_cache_retention_interval = interval
    [line] = told_lines(caplog, monkeypatch, config, told)
    assert "5 layers in 3 groups keep a state, 16 tokens a block. vLLM keeps" in line
    assert said in line


def test_groups_are_a_value():
    one = EngineGroups((KvGroup(16),), (0,))
    assert (one.total, one.drafts, one.sparse) == (1, frozenset(), False)
    assert EngineGroups((KvGroup(16, Coverage(Rule.STATE)),), (0,)).sparse
