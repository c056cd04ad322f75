"""A model is served where a loaded prefix gives the tokens that the computed one gives, and else refused."""

import logging
from types import SimpleNamespace

import pytest
from engines import VOCABULARY, connector, drain, forget, generate, loaded, make_engine, make_prompts, restore
from models import WINDOW, write_config, write_model, write_words
from test_configuration import CPU, configure

pytest.importorskip("vllm")
from kvbm_core import ConfigError
from kvbm_vllm import _models
from kvbm_vllm._groups import engine_groups
from kvbm_vllm._models import check_engine
from kvbm_vllm._settings import _block_bytes

pytestmark = pytest.mark.vllm


def refusal(*args, **kwargs):
    with pytest.raises(Exception) as caught:
        configure(*args, **kwargs)
    return str(caught.value)


def pooling(**pooler):
    from vllm.config import PoolerConfig

    return {"runner": "pooling", "convert": "embed", "pooler_config": PoolerConfig(**pooler)}


# Before the weights are read: the models of these have none.

UNIFIED = {"disable_hybrid_kv_cache_manager": True}
"""All layers in one group, windows too."""
STATES = {"block_size": 32, "enable_prefix_caching": True}


@pytest.mark.parametrize(
    ("kind", "engine", "words"),
    [
        ("mamba2", {"block_size": 32}, ["enable_prefix_caching: False", "Write enable_prefix_caching: True"]),
        ("bert", {"max_model_len": 512, "runner": "pooling"}, ["not causal", "without KvbmConnector"]),
        ("gpt_oss", UNIFIED, ["Set VLLM_CPU_ATTN_SPLIT_KV=0"]),
        ("llama4", pooling(seq_pooling_type="MEAN"), ["seq_pooling_type: MEAN"]),
        ("llama4", pooling(seq_pooling_type="CLS"), ["seq_pooling_type: CLS"]),
    ],
)
def test_a_model_is_refused_before_its_weights_are_read(tmp_path, kind, engine, words):
    said = refusal(write_config(tmp_path, kind), [CPU], engine=engine)
    for word in words:
        assert word in said


@pytest.mark.parametrize("kind", ["gemma3", "gpt_oss", "llama4", "mistral"])
def test_windows_pass(tmp_path, kind):
    configure(write_config(tmp_path, kind), [CPU])


def test_a_blocks_bytes_are_estimated_where_there_is_one_length(tmp_path, llama):
    for kind, engine in (("gemma3", {}), ("llama4", {}), ("mamba2", STATES)):
        assert _block_bytes(configure(write_config(tmp_path / kind, kind), [CPU], engine=engine)) is None
    assert _block_bytes(configure(llama, [CPU])) == 24 << 10
    unified = configure(write_config(tmp_path / "unified", "gemma3"), [CPU], engine=UNIFIED)
    assert _block_bytes(unified) == 2 * 6 * 2 * 32 * 2 * 32


def test_windows_in_all_layers_are_refused_with_a_vllm_that_tells_too_little(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.29.0")
    said = refusal(write_config(tmp_path, "mistral"), [CPU])
    assert f"sliding_window: {WINDOW}" in said
    assert "disable_sliding_window: True" in said


def test_states_pass_from_the_version_on_that_hands_them_over(tmp_path, monkeypatch):
    folder = write_config(tmp_path, "mamba2")
    configure(folder, [CPU], engine=STATES)
    monkeypatch.setattr("vllm.__version__", "0.31.2")
    said = refusal(folder, [CPU], engine=STATES)
    assert "keep a state" in said
    assert "Install vLLM 0.32 or newer" in said


def test_states_are_refused_with_what_moves_or_splits_them(tmp_path):
    config = configure(write_config(tmp_path, "mamba2"), [CPU], engine=STATES)
    check_engine(config)
    config.cache_config.use_replayssm = True
    with pytest.raises(ConfigError, match=r"use_replayssm: True.*Leave it out"):
        check_engine(config)
    config.cache_config.use_replayssm = False
    config.speculative_config = SimpleNamespace(method="mtp")
    with pytest.raises(ConfigError, match=r"speculative_config: .*while it speculates.*Leave it out"):
        check_engine(config)
    config.speculative_config = None
    config.model_config = SimpleNamespace(is_hybrid=True)
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    with pytest.raises(ConfigError, match=r"disable_hybrid_kv_cache_manager: .*Leave those out"):
        _models.require_states(config)


def test_what_the_refusals_say_to_write_is_accepted(tmp_path, monkeypatch):
    configure(
        write_config(tmp_path / "mistral", "mistral"),
        [CPU],
        engine={"disable_sliding_window": True, "max_model_len": WINDOW},
    )
    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "0")
    configure(write_config(tmp_path / "gpt_oss", "gpt_oss"), [CPU], engine=UNIFIED)
    configure(write_config(tmp_path / "llama4", "llama4"), [CPU], engine=pooling(seq_pooling_type="LAST"))


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1"])
def test_windows_are_refused_with_a_vllm_that_computes_all_layers_with_one(tmp_path, monkeypatch, version):
    monkeypatch.setattr("vllm.__version__", version)
    folder = write_config(tmp_path, "gemma3")
    assert f"vLLM {version} computes all layers" in refusal(folder, [CPU], engine=UNIFIED)
    configure(write_config(tmp_path / "llama4", "llama4"), [CPU])


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        # From 0.33 vLLM asks the connector's class before we are asked.
        ({"enable_sleep_mode": True}, "enable_sleep_mode: True; sleep|not support sleep mode"),
        ({"enable_cumem_allocator": True}, "enable_cumem_allocator: True; .*/release_kv_cache_memory"),
    ],
)
def test_memory_that_vllm_may_give_back_is_refused(llama, monkeypatch, engine, words):
    from vllm.platforms import current_platform

    # vLLM's CPU build refuses these itself, its CUDA build does not.
    for name in ("is_sleep_mode_available", "is_cumem_allocator_available"):
        monkeypatch.setattr(type(current_platform), name, lambda *_: True)
    with pytest.raises(Exception, match=words):
        configure(llama, [CPU], engine=engine)


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("model_config", "enable_sleep_mode", True, "True; sleep mode gives.*Leave it out"),
        ("model_config", "sleep_mode_backend", "theirs", "sleep_mode_backend: 'theirs'; it may give"),
        ("parallel_config", "enable_fault_tolerance", True, "a step that failed.*Leave it out"),
        ("parallel_config", "decode_context_parallel_size", 2, "does not support more than 1; leave it out"),
        ("parallel_config", "prefill_context_parallel_size", 2, "does not support more than 1; leave it out"),
    ],
)
def test_other_features_with_which_no_kv_can_be_kept_are_refused(llama, part, key, value, words):
    """These need several GPUs or another's package to be set in earnest."""
    config = configure(llama, [CPU])
    assert hasattr(getattr(config, part), key)
    setattr(getattr(config, part), key, value)
    with pytest.raises(ConfigError, match=f"{key}.*{words}" if key not in words else words):
        check_engine(config)


# When the layers are built: how each keeps its KV.


def spec(kind, **fields):
    import torch
    from vllm.v1 import kv_cache_interface as interface

    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    return getattr(interface, kind)(**shape, **fields)


def uniform(**specs):
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    return UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=specs)


def late(*specs):
    """What a connector is told when it is made."""
    config = SimpleNamespace(model_config=None, parallel_config=SimpleNamespace())
    groups = [SimpleNamespace(kv_cache_spec=each) for each in specs]
    return engine_groups(config, SimpleNamespace(kv_cache_groups=groups)).groups[0].block_tokens


def test_layouts_that_keep_every_token_are_accepted():
    full = spec("FullAttentionSpec")
    wide = spec("FullAttentionSpec", head_size_v=128)
    promoted = spec("FullAttentionSpec", sliding_window=64)
    chunked = spec("FullAttentionSpec", attention_chunk_size=64)
    latent = spec("MLAAttentionSpec")
    compressed = spec("MLAAttentionSpec", tokens_per_state=4)
    for each in (full, latent, compressed, promoted, chunked):
        assert late(each) == 16
    for each in (uniform(a=full, b=wide), uniform(a=full, b=promoted)):
        assert late(each) == 16


def test_layouts_that_do_not_are_refused_by_name_and_reason():
    window = spec("SlidingWindowSpec", sliding_window=64)
    for each, words in [
        (spec("FullAttentionSpec", non_causal=True), "FullAttentionSpec: its attention is not causal"),
        (spec("RSWASpec", rswa_window=64), "RSWASpec: it forgets tokens"),
        (uniform(a=window, b=spec("FullAttentionSpec")), "a prefix needs other blocks of one layer"),
        (spec("HiddenStateCacheSpec"), "HiddenStateCacheSpec: it keeps hidden states"),
        (spec("SinkFullAttentionSpec", sink_len=4), "SinkFullAttentionSpec"),
        (spec("MLAAttentionSpec", tokens_per_state=32), "one state for 32 tokens, and 16 are a block"),
        (uniform(a=spec("FullAttentionSpec"), b=spec("RSWASpec", rswa_window=64)), "RSWASpec"),
    ]:
        with pytest.raises(ConfigError, match=words):
            late(each)


def test_a_layout_that_nobody_knows_is_refused():
    class NextYearsSpec:
        block_size = 16

    with pytest.raises(ConfigError, match="NextYearsSpec: nobody has compared its answers"):
        late(NextYearsSpec())


def test_where_plug_ins_are_switched_off_the_model_is_looked_at_all_the_same(llama):
    config = configure(llama, [CPU])
    config.model_config.pooler_config = pooling(seq_pooling_type="MEAN")["pooler_config"]
    groups = [SimpleNamespace(kv_cache_spec=spec("FullAttentionSpec"))]
    with pytest.raises(ConfigError, match="seq_pooling_type: MEAN"):
        engine_groups(config, SimpleNamespace(kv_cache_groups=groups))


def test_what_a_version_tells_too_little_of_is_refused_in_words(monkeypatch):
    full = spec("FullAttentionSpec")
    assert late(full, full) == 16
    monkeypatch.setattr("vllm.__version__", "0.29.1")
    with pytest.raises(ConfigError, match=r"in 2 groups .*FullAttentionSpec.*Install vLLM 0.30 or newer"):
        late(full, full)
    with pytest.raises(ConfigError, match=r"SlidingWindowSpec.*Install vLLM 0.30 or newer"):
        late(spec("SlidingWindowSpec", sliding_window=64))
    with pytest.raises(ConfigError, match=r"MLAAttentionSpec: .* one state for several tokens; vLLM 0.32"):
        late(spec("MLAAttentionSpec", tokens_per_state=4))


def test_a_model_without_kv_is_refused():
    with pytest.raises(ConfigError, match="no layer keeps any"):
        late()


def test_batch_invariance_is_kept_where_vllm_keeps_it(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    layer = SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: "TRITON_MLA"))
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"a": layer}))
    with pytest.raises(ConfigError, match=r"VLLM_BATCH_INVARIANT.*TRITON_MLA"):
        _models._require_like_bits(config)
    layer.attn_backend.get_name = lambda: "FLASH_ATTN"
    _models._require_like_bits(config)


# With engines: equal answers, and blocks that were really loaded. All layers are in one group, as where vLLM
# serves windows in no other way. For groups of their own see test_hybrid.py.

ONE_GROUP = {"disable_hybrid_kv_cache_manager": True}


def restored(start, folder, tmp_path, **options):
    """Answers without any cache, and again from host memory; all blocks of all prompts are loaded."""
    prompts = [[2 + token % 510 for token in p] for p in make_prompts(14, seed=41, longest=1200)[-5:]]
    options = {"dtype": "float32", "max_model_len": 2048, **options}
    cold = [
        generate(llm, [p])[0]
        for llm in [start(folder, None, enable_prefix_caching=False, **options)]
        for p in prompts
    ]
    llm = start(folder, [{"backend": "cpu", "capacity": "512MiB"}], **ONE_GROUP, **options)
    assert [generate(llm, [p])[0] for p in prompts] == cold
    assert restore(llm, prompts) == [(a, (len(p) - 1) // 32) for a, p in zip(cold, prompts, strict=True)]
    return llm


@pytest.mark.engine
@pytest.mark.parametrize(("kind", "seed"), [("gemma3", 0), ("llama4", 2)])
def test_models_with_windows_and_chunks_are_restored(start, tmp_path, caplog, kind, seed):
    logging.getLogger("kvbm_vllm").propagate = True
    with caplog.at_level(logging.INFO, "kvbm_vllm"):
        restored(start, write_model(tmp_path / kind, kind, seed), tmp_path)
    [line] = [each.message for each in caplog.records if "attend to" in each.message]
    # Of 2,048 tokens the others keep 64: 6 * 2048 / (2 * 2048 + 4 * 64), and with three and three layers.
    share = {"gemma3": ("4 of 6", "2.8 times"), "llama4": ("3 of 6", "1.9 times")}[kind]
    assert all(part in line for part in share), line


@pytest.mark.engine
def test_sinks_beside_windows_are_restored_where_vllm_computes_them_rightly(start, tmp_path, monkeypatch):
    """`cold` is with vLLM's hybrid KV cache manager, which computes rightly in any case."""
    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "0")
    restored(start, write_model(tmp_path / "gpt_oss", "gpt_oss"), tmp_path)


@pytest.mark.engine
def test_sinks_are_found_in_the_layers_when_the_name_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_models, "_SINKS", ("Nothing",))
    with pytest.raises(Exception, match="VLLM_CPU_ATTN_SPLIT_KV"):
        make_engine(write_model(tmp_path, "gpt_oss"), [CPU], max_model_len=1024, **ONE_GROUP)


@pytest.mark.engine
def test_prefix_caching_that_the_user_switched_off_is_no_reason_to_load_nothing(llama, start, tmp_path):
    prompt = make_prompts(1, seed=42, longest=640)[-1]
    llm = start(llama, [CPU], enable_prefix_caching=False)
    answer = generate(llm, [prompt])
    drain(llm)
    assert generate(llm, [prompt]) == answer
    assert loaded(llm) == {"cpu": 19}


def embed(llm, prompt, task=None):
    [output] = llm.encode({"prompt_token_ids": prompt}, pooling_task=task or "embed", use_tqdm=False)
    return output.outputs.data.tolist()


@pytest.mark.engine
def test_an_embedding_of_the_last_token_is_restored(llama, start, tmp_path):
    import shutil

    folder = shutil.copytree(llama, tmp_path / "llama")
    write_words(folder, VOCABULARY)
    prompt = make_prompts(1, seed=43, longest=300)[-1]
    options = {"skip_tokenizer_init": False, "max_model_len": 1024, **pooling(seq_pooling_type="LAST")}
    llm = start(folder, [CPU], **options)
    assert connector(llm)
    first = embed(llm, prompt)
    forget(llm)
    assert embed(llm, prompt) == first
    assert loaded(llm) == {"cpu": 9}


@pytest.mark.engine
def test_every_tokens_embedding_is_computed(llama, start, tmp_path):
    import shutil

    folder = write_words(shutil.copytree(llama, tmp_path / "llama"), VOCABULARY)
    prompt = make_prompts(1, seed=44, longest=300)[-1]
    options = {
        "skip_tokenizer_init": False,
        "max_model_len": 1024,
        **pooling(task="token_embed", tok_pooling_type="ALL"),
    }
    llm = start(folder, [CPU], **options)
    first = embed(llm, prompt, "token_embed")
    forget(llm)
    again = embed(llm, prompt, "token_embed")
    assert (len(again), again) == (len(prompt), first)
    assert loaded(llm) == {"cpu": 0}
