"""Each kind of tier under a real engine, alone and below host memory; S3 by a real server that fails."""

import importlib
import time

import pytest
from engines import (
    assert_restored,
    connector,
    drain,
    forget,
    generate,
    loaded,
    make_engine,
    make_prompts,
    own_answers,
    restore,
    story_tokens,
)
from servers import FaultProxy
from third_party.toy_install import install_toy

pytestmark = pytest.mark.engine

PATIENCE_S = 120


def remote(endpoint, folder, bucket="kvbm-test", **settings):
    options = {"endpoint_url": endpoint}
    return {"backend": "remote", "url": f"s3://{bucket}/{folder}", "storage_options": options, **settings}


@pytest.fixture
def s3(s3_server, monkeypatch):
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def make_stack(tmp_path, request):
    """Make the tiers named like ``cpu+gds``."""

    def tier(name):
        if name == "cpu":
            return {"backend": "cpu", "capacity": "256MiB"}
        if name == "gds":
            return {"backend": "gds", "capacity": "256MiB", "path": str(tmp_path / "gds")}
        return remote(request.getfixturevalue("s3").endpoint, tmp_path.name)

    return lambda names: [tier(name) for name in names.split("+")]


@pytest.mark.early
@pytest.mark.parametrize(
    "names",
    [
        "cpu+remote",
        "gds",
        pytest.param("cpu+gds", marks=pytest.mark.soak),
        pytest.param("remote", marks=pytest.mark.soak),
    ],
)
def test_restored_after_a_restart_with_the_same_answers(start, make_stack, names):
    model, tokens = story_tokens()
    starts, lengths = [0, 0, 0, 50, 99], [65, 200, 416, 100, 555]
    prompts = [tokens[at : at + length] for at, length in zip(starts, lengths, strict=True)]
    durable = names.split("+")[-1]
    options = {"num_gpu_blocks_override": 300, "max_model_len": 2048, "dtype": "float32"}
    # The server shares two cores with the engine.
    options["extra"] = {"lookup_deadline_s": 30, "load_deadline_s": 60}
    llm = start(model, make_stack(names), **options)
    own = own_answers(llm, prompts)
    drain(llm)
    assert connector(llm).counts[durable].failed.total() == 0
    llm = start(model, make_stack(names), **options)
    restored = restore(llm, prompts)
    assert_restored(prompts, own, restored)
    assert loaded(llm)[durable] > 0


def seconds_of(call):
    start_s = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start_s


@pytest.mark.early
def test_an_s3_server_that_fails_in_every_way_costs_hits_and_comes_back(s3, start, llama, tmp_path, capsys):
    """float32, so that a restored prompt answers as a computed one does, whatever was loaded."""
    prompts = [p for p in make_prompts(60, seed=41, longest=900) if len(p) > 300][:6]
    extra = {"lookup_deadline_s": 0.5, "load_deadline_s": 2.0, "store_deadline_s": 3.0}
    options = {"dtype": "float32", "max_model_len": 2048, "extra": extra}
    reference = [generate(llm, [p])[0] for llm in [start(llama, None, **options)] for p in prompts]
    with FaultProxy(s3) as proxy:
        llm = start(llama, [remote(proxy.endpoint, tmp_path.name, timeout_s=1.0)], **options)

        def ask():
            """Every prompt, with an empty prefix cache; the longest wait for an answer."""
            waits = []
            for prompt, answer in zip(prompts, reference, strict=True):
                assert llm.reset_prefix_cache()
                got, seconds = seconds_of(lambda prompt=prompt: generate(llm, [prompt])[0])
                assert got == answer
                waits.append(seconds)
            return max(waits)

        def until_loaded(why):
            """Ask until something is loaded again; nothing is restarted."""
            before, give_up_s = sum(loaded(llm).values()), time.monotonic() + PATIENCE_S
            while sum(loaded(llm).values()) == before:
                assert time.monotonic() < give_up_s, f"did not come back after {why}"
                ask()
                time.sleep(0.2)

        ask()
        drain(llm)
        until_loaded("the start")
        waits = {"pass": ask()}
        for mode in ("503", "403", "stall", "cut", "refuse"):
            proxy.mode = mode
            failed = connector(llm).counts["remote"].failed.total()
            waits[mode] = ask()
            assert connector(llm).counts["remote"].failed.total() > failed, mode
            proxy.mode = "pass"
            until_loaded(mode)
        s3.kill()
        waits["killed"] = ask()
        s3.restart()
        until_loaded("a kill")
    with capsys.disabled():
        text = ", ".join(f"{mode} {seconds:.2f} s" for mode, seconds in waits.items())
        print(f"\nlongest answer of {len(prompts)} prompts: {text}")


@pytest.fixture(scope="module")
def plain(llama):
    """A prompt, and what an engine without tiers answers."""
    prompt = make_prompts(1, seed=42, longest=700)[-1]
    llm = make_engine(llama, None)
    [answer] = generate(llm, [prompt])
    llm.llm_engine.engine_core.shutdown()
    return prompt, answer


@pytest.mark.parametrize("wrong", ["credentials", "bucket", "server"])
def test_an_engine_starts_and_answers_without_its_store(
    s3, start, llama, plain, tmp_path, monkeypatch, wrong, caplog
):
    prompt, answer = plain
    endpoint, bucket = s3.endpoint, s3.bucket
    if wrong == "credentials":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    if wrong == "bucket":
        bucket = "no-such-bucket"
    if wrong == "server":
        endpoint = "http://127.0.0.1:1"
    llm = start(llama, [remote(endpoint, tmp_path.name, bucket)])
    for _ in range(2):
        assert generate(llm, [prompt]) == [answer]
        forget(llm)
    assert loaded(llm) == {"remote": 0}
    assert connector(llm).counts["remote"].failed.total() > 0
    assert s3.secret_key not in caplog.text
    assert "not-the-secret" not in caplog.text


def test_a_strangers_backend_below_host_memory(start, llama, tmp_path, monkeypatch):
    """Installed as a stranger's package is, found by its entry point, kept over a restart."""
    monkeypatch.syspath_prepend(str(install_toy(tmp_path / "site")))
    importlib.invalidate_caches()
    prompts = make_prompts(12, seed=43, longest=900)
    tiers = [
        {"backend": "cpu", "capacity": "8MiB"},
        {"backend": "toy", "capacity": "64MiB", "path": str(tmp_path / "toy")},
    ]
    llm = start(llama, tiers)
    own = own_answers(llm, prompts)
    drain(llm)
    llm = start(llama, tiers)
    assert_restored(prompts, own, restore(llm, prompts))
    assert loaded(llm)["toy"] > 0
