"""Models that keep their KV in several groups, on real engines: what is loaded of each, and the answers.

A restored prompt is compared with what the same engine answers when its own prefix cache serves the same
prefix. That the comparison means something is proved by loading zeros in place of one object.
"""

import pytest
from engines import drain, forget, generate, loaded
from hybrid import (
    alignment_of,
    ask,
    boundary_of,
    failed_loads,
    make_prompt,
    mended,
    needed_of,
    options_of,
    own_answer,
    restored,
    watching,
)
from models import FAMILIES, write_adapter, write_model

from kvbm_core import Op
from kvbm_core.memory import MemoryTier
from kvbm_vllm._scheduler import SchedulerHalf

pytestmark = pytest.mark.engine

CPU = {"backend": "cpu", "capacity": "256MiB"}
FAULTY = {"backend": "faulty", "capacity": "256MiB"}
SPARSE = ("gemma3", "granite4", "gemma4")
"""A window, a state, and groups whose blocks have other sizes: these run always."""
OTHERS = ("mistral", "gpt_oss", "llama4", "qwen3_next", "nemotron_h", "mamba2")
"""These run where -m names `soak`."""
LENGTHS = (2016, 2017, 2111, 2350, 2499, 2750, 3003, 3201, 3555, 3841, 4000)


def families(*always, without=()):
    late = [kind for kind in (*SPARSE, *OTHERS) if kind not in (*always, *without)]
    return pytest.mark.parametrize(
        "kind", [*always, *(pytest.param(k, marks=pytest.mark.soak) for k in late)]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a model of a family once."""
    written = {}

    def folder(kind):
        if kind not in written:
            written[kind] = write_model(tmp_path_factory.mktemp(kind), kind)
        return written[kind]

    return folder


@pytest.fixture
def watch():
    with watching() as watch:
        yield watch


@pytest.fixture
def launch(start, folder):
    """Start an engine of a family."""

    def launch(kind, tiers, **options):
        with mended(kind):
            return start(folder(kind), tiers, **options_of(kind, **options))

    return launch


def assert_restored(llm, watch, prompts, own):
    """Same answers, hits that end where vLLM's own do, and of each group the objects that the rules say."""
    wrong = {}
    for prompt, answer in zip(prompts, own, strict=True):
        tokens = boundary_of(llm, prompt)
        found = restored(llm, watch, prompt)
        if found != (answer, tokens, needed_of(llm, tokens)):
            wrong[len(prompt)] = found[0] == answer, found[1:], (tokens, needed_of(llm, tokens))
    assert not wrong, "answer is right, what was loaded, what had to be"


def assert_zeros_show(llm, watch, prompt, places):
    """Zeros in place of one loaded object change the answer; `places` chooses of as many as a group has."""
    right, _, counts = restored(llm, watch, prompt)
    silent = []
    for group, count in counts.items():
        for place in places(count):
            watch.spoils = lambda of, at, victim=(group, place): (of, at) == victim
            if restored(llm, watch, prompt)[0] == right:
                silent.append((group, place))
    watch.spoils = None
    assert not silent, "group and place of objects on which the answer does not depend"


def ends_and_middle(count):
    return sorted({0, count // 2, count - 1})


@families(*SPARSE)
def test_restored_from_host_memory_and_after_a_restart_from_a_disk_and_a_remote_tier(
    launch, watch, tmp_path, kind
):
    # On the disk there is no room for the first prompts.
    below = [
        {"backend": "lmdb", "capacity": "16MiB", "path": str(tmp_path / "lmdb")},
        {"backend": "remote", "url": f"file://{tmp_path}/remote"},
    ]
    prompts = [make_prompt(length, seed=length) for length in LENGTHS]
    llm = launch(kind, [CPU, *below])
    assert len({boundary_of(llm, prompt) for prompt in prompts}) >= 10
    own = [own_answer(llm, prompt) for prompt in prompts]
    assert_restored(llm, watch, prompts, own)
    assert_zeros_show(llm, watch, prompts[0], ends_and_middle)
    drain(llm)
    assert failed_loads(llm) == loaded(llm)["lmdb"] == loaded(llm)["remote"] == 0

    llm = launch(kind, below, extra={"lookup_deadline_s": 30, "load_deadline_s": 60})
    assert_restored(llm, watch, prompts, own)
    assert failed_loads(llm) == 0
    assert min(loaded(llm).values()) > 0


@families()
def test_zeros_in_place_of_any_object_change_the_answer(launch, watch, kind):
    llm = launch(kind, [CPU])
    prompt = make_prompt(2111, seed=1)
    own_answer(llm, prompt)
    assert_zeros_show(llm, watch, prompt, range)


def small_steps(kind):
    """Steps shorter than a window; a state needs at least a block in a step."""
    return {"max_num_batched_tokens": 128 if FAMILIES[kind].has_state else 48, "enable_chunked_prefill": True}


# Without full attention vLLM knows of no part that prompts share.
@families("gemma3", "granite4", without=("mamba2", "mistral"))
def test_small_steps_junctions_salt_and_local_hits_shorter_and_longer_than_ours(launch, watch, kind):
    llm = launch(kind, [CPU], **small_steps(kind))
    whole = make_prompt(3000, seed=1)
    own = own_answer(llm, whole)
    assert_restored(llm, watch, [whole], [own])

    # Who shares a part is the first to know of it; the next one finds it. Where vLLM has the part itself, it
    # keeps a state there; else ours is known alone, and only windows can be stored.
    align = alignment_of(llm)
    for shared, has_part in ((700, True), (1500, True), (1800, False)):
        first, second = (whole[:shared] + make_prompt(200, seed=shared + n) for n in (1, 2))
        forget(llm)
        if has_part:
            ask(llm, whole)
        ask(llm, first)
        watch.deaf = True
        forget(llm)
        reference = cold_answer(llm, second)
        watch.deaf = False
        junction = (shared if has_part or not FAMILIES[kind].has_state else 1500) // align * align
        assert tokens_of(restored(llm, watch, second)) == (reference, junction, needed_of(llm, junction))

    # Ours is longer than vLLM's own; by one block, so that a window begins in the one and ends in the other.
    tokens = boundary_of(llm, whole)
    for length in (1000, tokens - align + 1):
        forget(llm)
        ask(llm, whole[:length])
        watch.clear()
        said, cached = ask(llm, whole)
        assert (said.tokens, cached) == (own.tokens, tokens)
        assert watch.counts() == needed_of(llm, tokens, boundary_of(llm, whole[:length]))

    # And shorter.
    other = make_prompt(2500, seed=2)
    ask(llm, other[:1000])
    watch.deaf = True
    answer = own_answer(llm, other)
    watch.clear()
    assert ask(llm, other) == (answer, boundary_of(llm, other))
    assert not watch.counts()
    tokens = boundary_of(llm, other[:1000])
    assert tokens_of(restored(llm, watch, other)) == (answer.tokens, tokens, needed_of(llm, tokens))
    watch.deaf = False

    salted = restored(llm, watch, whole, cache_salt="pepper")
    assert tokens_of(salted) == (own.tokens, 0, {})
    assert restored(llm, watch, whole, cache_salt="pepper")[1] == boundary_of(llm, whole)


def cold_answer(llm, prompt):
    """What the engine answers when it computes all of a prompt."""
    said, cached = ask(llm, prompt, cache_salt="computed")
    assert cached == 0
    return said.tokens


def tokens_of(found):
    """Without the probabilities: a sum rounds otherwise where a prompt is divided otherwise over steps."""
    said, *rest = found
    return (said.tokens, *rest)


# In bfloat16 a sum rounds otherwise in a batch. Of windows or states alone nobody has enough to be preempted.
@families("gemma3", "granite4", without=("qwen3_next", "mamba2", "mistral"))
def test_preempted_requests_and_blocks_that_are_given_away_in_the_step_that_stores_them(
    launch, watch, monkeypatch, kind
):
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, preempt = [], Scheduler._preempt_request
    monkeypatch.setattr(
        Scheduler,
        "_preempt_request",
        lambda scheduler, request, *args, **more: (
            preempted.append(request.request_id),
            preempt(scheduler, request, *args, **more),
        )[1],
    )
    prompts = [make_prompt(length, seed=length) for length in range(400, 1000, 75)]
    parts = [prompt[: len(prompt) // 2] + make_prompt(40) for prompt in prompts]
    has_state = FAMILIES[kind].has_state
    options = {"max_model_len": 1280, "max_num_batched_tokens": 128, "extra": {"sparse_stores": "dense"}}
    llm = launch(kind, [CPU], num_gpu_blocks_override=44 if has_state else 60, **options)
    watch.deaf = True
    reference = [generate(llm, [prompt], 64)[0] for prompt in prompts]
    expected = [cold_answer(llm, part) for part in parts]
    watch.deaf = False
    forget(llm)
    for _ in range(2):
        assert generate(llm, prompts, 64) == reference
    assert preempted
    assert watch.at_once or has_state  # A state is stored before its block can be taken.
    assert sum(loaded(llm).values()) > 0
    # Blocks of windows in the middle of a prompt were stored on the way, when they were given away.
    answers = [restored(llm, watch, part)[:2] for part in parts]
    assert [said.tokens for said, _ in answers] == expected
    assert has_state or min(cached for _, cached in answers) > 0


@families("gemma3", "granite4")
def test_a_load_that_fails_or_is_aborted_costs_that_hit_and_nothing_else(
    faulty, launch, watch, monkeypatch, kind
):
    tiers, make = [], MemoryTier.__init__
    monkeypatch.setattr(MemoryTier, "__init__", lambda tier, *a: (tiers.append(tier), make(tier, *a))[1])
    llm = launch(kind, [FAULTY])
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    for group in needed_of(llm, boundary_of(llm, make_prompt(2111))):
        for number, fault in enumerate(("flip", "error", "missing")):
            prompt = make_prompt(2111, seed=10 * group + number)
            own = own_answer(llm, prompt)
            _, _, counts = restored(llm, watch, prompt)
            victim = next(key for _, of, key in reversed(watch.loads) if of == group)
            assert counts == needed_of(llm, boundary_of(llm, prompt))
            failed = failed_loads(llm)
            if fault == "missing":
                tiers[-1].discard([victim])
            else:
                faulty.fault = lambda t, f=fault, v=victim: f if (t.op, t.key) == (Op.LOAD, v) else None
            said, cached, _ = restored(llm, watch, prompt)
            assert (said.tokens, cached, failed_loads(llm)) == (own.tokens, 0, failed + 1), (group, fault)
            assert len({request for request, _, _ in watch.loads}) == 1
            faulty.fault = None
            # What was computed in its place is stored again.
            assert restored(llm, watch, prompt) == (own, boundary_of(llm, prompt), counts)

    faulty.fault = lambda transfer: "late" if transfer.op is Op.LOAD else None
    forget(llm)
    abort_while_it_loads(llm, prompt)
    assert restored(llm, watch, prompt)[0].tokens == own.tokens
    forget(llm)
    assert pool.get_num_free_blocks() == free


def abort_while_it_loads(llm, prompt):
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    engine.add_request(
        "aborted", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=4, detokenize=False)
    )
    while not any(r.status.name == "WAITING_FOR_REMOTE_KVS" for r in scheduler.requests.values()):
        engine.step()
    engine.abort_request(["aborted"])
    assert not engine.has_unfinished_requests()
    drain(llm)


@pytest.mark.soak
def test_an_adapter_has_objects_of_its_own_in_every_group(launch, watch, tmp_path):
    from vllm.lora.request import LoRARequest

    adapters = [LoRARequest(f"a{n}", n, str(write_adapter(tmp_path / f"a{n}", "gemma3", n))) for n in (1, 2)]
    llm = launch("gemma3", [CPU], enable_lora=True, max_loras=2)
    prompt = make_prompt(2111)
    tokens = boundary_of(llm, prompt)
    computed = [restored(llm, watch, prompt, lora=each) for each in (None, *adapters)]
    assert [what for _, *what in computed] == [[0, {}]] * 3
    assert len({said.tokens for said, _, _ in computed}) == 3
    for each, (said, _, _) in zip((None, *adapters), computed, strict=True):
        found = restored(llm, watch, prompt, lora=each)
        assert tokens_of(found) == (said.tokens, tokens, needed_of(llm, tokens))


@pytest.fixture
def two_ranks(start, watch, monkeypatch, tmp_path):
    """Prove a model on an engine with two workers, over a restart."""
    # Two workers and the scheduler share the machine; threads that spin would take all of it.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    disk = {"backend": "lmdb", "capacity": "256MiB", "path": str(tmp_path / "lmdb")}
    prompts = [make_prompt(length, seed=length) for length in LENGTHS[:4]]

    def prove(model, kind="gemma3", **options):
        llm = start(model, [CPU, disk], **options_of(kind, **options))
        own = [own_answer(llm, prompt) for prompt in prompts]
        assert_restored(llm, watch, prompts, own)
        drain(llm)
        llm = start(model, [disk], **options_of(kind, **options))
        assert_restored(llm, watch, prompts, own)
        assert failed_loads(llm) == 0

    return prove


@pytest.mark.soak
def test_two_tensor_parallel_ranks_each_restore_their_part_of_every_group(folder, two_ranks):
    two_ranks(folder("gemma3"), tensor_parallel_size=2)


@pytest.mark.soak
def test_two_tensor_parallel_ranks_each_restore_their_heads_of_a_recurrent_state(tmp_path, two_ranks):
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    two_ranks(write_model(tmp_path / "model", "qwen3_next", **heads), "qwen3_next", tensor_parallel_size=2)


@pytest.mark.soak
def test_two_pipeline_stages_of_which_each_has_no_layer_of_a_group(tmp_path, two_ranks, monkeypatch):
    said, begin = [], SchedulerHalf.start
    monkeypatch.setattr(SchedulerHalf, "start", lambda half, all_: (said.extend(all_), begin(half, all_))[1])
    layers = ["sliding_attention"] * 2 + ["full_attention"] * 2
    model = write_model(tmp_path / "model", "gemma3", num_hidden_layers=4, layer_types=layers)
    # vLLM's CPU build makes the tensors between the stages only where it warms the model up for compiling.
    compiling = {"enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}}
    two_ranks(model, pipeline_parallel_size=2, **compiling)
    (first, none), (none_either, second) = (said[rank].status[0].block_bytes for rank in (0, 1))
    assert min(first, second) > none == none_either == 0
