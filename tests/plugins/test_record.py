"""The log of hashes that a running engine writes, and that a replay of it counts what the engine counted."""

import json
import random
import stat

import pytest
from engines import VOCABULARY, connector, drain, forget, generate, loaded
from hybrid import make_prompt, options_of
from models import write_model

from kvbm_core.registry import Registry
from kvbm_replay._driver import replay
from kvbm_replay._layout import read_layout
from kvbm_replay._machine import Machine
from kvbm_replay._reader import read_trace

pytestmark = pytest.mark.engine

BLOCK_TOKENS = 32


def conversations(rng, count):
    """Prompts in turns of a few conversations, some of which begin alike."""
    system = [rng.randrange(2, VOCABULARY) for _ in range(3 * BLOCK_TOKENS + 5)]
    texts = [system[: rng.choice([0, 50, 101])] for _ in range(6)]
    for _ in range(count):
        text = rng.choice(texts)
        text += [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(20, 150))]
        if len(text) > 900:
            del text[rng.randrange(100) :]
        yield text


@pytest.fixture
def tiers(tmp_path):
    """Small enough to evict."""
    disk = {"backend": "lmdb", "capacity": "4MiB", "path": f"{tmp_path}/lmdb"}
    return [{"backend": "cpu", "capacity": "1MiB"}, disk]


def count(llm):
    """Count what was loaded, and evicted, by tier."""
    counts = connector(llm).counts
    return loaded(llm), {name: each.evicted for name, each in counts.items()}


def replayed(log, tiers):
    """Replay a log through the tiers that the engine had; give its trace, too."""
    trace = read_trace([log])
    layout = read_layout({"tiers": tiers, "only_faster": False}, trace.group_bytes, Registry())
    return trace, replay(trace, layout, Machine(token_bytes=trace.token_bytes))


def test_a_replay_of_the_log_hits_what_the_engine_hit(start, llama, tmp_path, tiers):
    log = tmp_path / "engine.log"
    # A KV cache of one long prompt, so that the tiers are asked; small tiers, so that they evict.
    llm = start(
        llama, tiers, extra={"record": str(log)}, max_model_len=1024, num_gpu_blocks_override=36,
    )  # fmt: skip
    for prompt in conversations(random.Random(4), 50):
        text = [*prompt]
        prompt += generate(llm, [text], max_tokens=5)[0]
        drain(llm)
    counted, evicted = count(llm)
    llm.llm_engine.engine_core.shutdown()

    trace, outcome = replayed(log, tiers)
    assert len(trace.requests) == 50
    assert trace.block_tokens == BLOCK_TOKENS
    assert {tier.name: tier.hits for tier in outcome.tiers} == counted
    assert {tier.name: tier.evicted for tier in outcome.tiers} == evicted
    assert min(counted.values()) > 5
    assert min(evicted.values()) > 20
    assert outcome.engine_hits > 20


def test_requests_side_by_side_are_replayed_as_they_met_the_tiers(start, llama, tmp_path, tiers):
    log = tmp_path / "engine.log"
    llm = start(
        llama, tiers, extra={"record": str(log)}, max_model_len=1024, num_gpu_blocks_override=36,
    )  # fmt: skip
    prompts = [[*prompt] for prompt in conversations(random.Random(4), 52)]
    for at in range(0, len(prompts), 4):
        generate(llm, prompts[at : at + 4], max_tokens=5)
        drain(llm)
    counted, evicted = count(llm)
    llm.llm_engine.engine_core.shutdown()
    _, outcome = replayed(log, tiers)
    hits = sum(tier.hits for tier in outcome.tiers)
    assert hits == pytest.approx(sum(counted.values()), rel=0.1)
    assert sum(tier.evicted for tier in outcome.tiers) == pytest.approx(sum(evicted.values()), rel=0.1)
    assert hits > 100
    assert outcome.engine_hits > 200


def test_of_several_kv_groups_a_replay_loads_what_the_engine_loaded(start, tmp_path):
    log = tmp_path / "engine.log"
    tiers = [
        {"backend": "cpu", "capacity": "2MiB"},
        {"backend": "lmdb", "capacity": "8MiB", "path": f"{tmp_path}/lmdb"},
    ]
    model = write_model(tmp_path / "gemma3", "gemma3")
    llm = start(model, tiers, extra={"record": str(log)}, **options_of("gemma3", max_model_len=2048))
    prompts = [make_prompt(*each) for each in ((900, 1), (1300, 2), (1000, 1), (700, 3), (1200, 1))]
    for prompt in [*prompts, *prompts]:
        generate(llm, [prompt], max_tokens=5)
        forget(llm)
    counted, evicted = count(llm)
    llm.llm_engine.engine_core.shutdown()
    trace, outcome = replayed(log, tiers)
    assert not trace.is_plain
    assert {tier.name: tier.hits for tier in outcome.tiers} == counted
    assert {tier.name: tier.evicted for tier in outcome.tiers} == evicted
    assert min(counted.values()) > 0


def test_the_log_has_times_lengths_and_hashes_and_is_nobody_elses(start, llama, tmp_path, tiers):
    log, old = tmp_path / "engine.log", b'{"kvbm_log": 1, "run": "before", "block_tokens": 32}\n'
    log.write_bytes(old)
    llm = start(llama, tiers, extra={"record": str(log)})
    prompt = [random.Random(1).randrange(2, VOCABULARY) for _ in range(100)]
    generate(llm, [prompt, [*prompt[:70], 7, 8, 9]], max_tokens=30)
    drain(llm)
    llm.llm_engine.engine_core.shutdown()
    assert (tmp_path / "engine.log.1").read_bytes() == old
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    header, *rows = map(json.loads, log.read_text().splitlines())
    assert {*header} == {"kvbm_log", "run", "block_tokens", "token_bytes", "groups"}
    keys = {
        "timestamp",
        "input_length",
        "output_length",
        "engine_blocks",
        "looks",
        "stores",
        "ended",
        "hash_ids",
    }
    assert [{*row} for row in rows] == [keys] * 2
    # Of 129 tokens with KV four blocks are complete, of 102 three; the first two are the same in both.
    by_length = {row["input_length"]: row["hash_ids"] for row in rows}
    assert {length: len(hashes) for length, hashes in by_length.items()} == {100: 4, 73: 3}
    assert by_length[100][:2] == by_length[73][:2]
    assert by_length[100][2] != by_length[73][2]
