"""The codecs of this tree under a real engine and a real model: the same answers as without a cache, after a
``kill -9``, with a rotated key, with a wrong key, and with planted blocks."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xxhash
from engines import BLOCK_TOKENS, connector, drain, forget, generate, keys_of, story_tokens

from kvbm_core.layers.seal import SEAL_BYTES

pytestmark = pytest.mark.engine

PATIENCE_S = 300
OPTIONS = {
    "dtype": "float32",
    "max_model_len": 1024,
    "num_gpu_blocks_override": 120,
    "extra": {"lookup_deadline_s": 60, "load_deadline_s": 60, "store_deadline_s": 60},
}
TRAILER = 64
"""Bytes that `crypt` writes behind an object."""


@functools.cache
def story():
    """SmolLM2, and prompts from a story, of which two share a prefix."""
    model, tokens = story_tokens()
    return model, [tokens[at : at + length] for at, length in ((0, 416), (0, 300), (50, 350), (99, 230))]


@pytest.fixture
def stacks(tmp_path):
    """Make tiers: ``disk`` compresses and encrypts, ``store`` is shared and signs, ``plain`` trusts all."""
    for name in "abc":
        file = tmp_path / name
        file.write_bytes(name.encode() * 32)
        file.chmod(0o600)

    def make(medium, keys=""):
        crypt = {"name": "crypt", "keys": [{"file": str(tmp_path / name)} for name in keys]}
        store = {"backend": "remote", "url": f"file://{tmp_path}/{medium}", "timeout_s": 60}
        lower = {
            "disk": {
                "backend": "lmdb",
                "capacity": "128MiB",
                "path": f"{tmp_path}/disk",
                "codecs": [{"name": "zstd", "element_bytes": 4}, crypt],
            },
            "store": {**store, "codecs": [{**crypt, "mode": "sign"}]},
            "plain": store,
        }[medium]
        return [{"backend": "cpu", "capacity": "64MiB"}, {**lower, "name": medium}]

    return make


def objects(folder):
    return sorted(file for file in folder.rglob("*") if len(file.name) == 64)


def killed(folder, stacks, answers, kills):
    """Run engines that store and load, and kill each; `crash_child.py` imports vLLM once for all of them."""
    model, prompts = story()
    job = {
        "model": str(model),
        "stacks": stacks,
        "options": OPTIONS,
        "prompts": prompts,
        "answers": answers,
        "acknowledged": f"{folder}/acknowledged-",
    }
    (folder / "job.json").write_text(json.dumps(job))
    program = [sys.executable, Path(__file__).with_name("crash_child.py"), folder / "job.json"]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as child,
    ):
        try:
            for order in [name for name in stacks for _ in range(kills)]:
                print("go", order, file=child.stdin, flush=True)
                life = json.loads(
                    child.stdout.readline() or pytest.fail((folder / "log").read_text()[-3000:])
                )
                assert life["lost"] == 0
                wait_for_stores(folder / f"acknowledged-{order}")
                os.kill(life["pid"], signal.SIGKILL)
                assert json.loads(child.stdout.readline())["wrong"] == 0
        finally:
            child.kill()


def wait_for_stores(log, least=20):
    """Wait until so many more blocks are stored."""
    before, give_up_s = log.read_bytes().count(b"\n"), time.monotonic() + PATIENCE_S
    if before >= least:  # An earlier life has stored what there is.
        return
    while log.read_bytes().count(b"\n") < least:
        assert time.monotonic() < give_up_s, "nothing is stored"
        time.sleep(0.05)


def plant(folder, prompt, other, trailer):
    """Put another prompt's KV under a prompt's keys, with a seal that fits, as who can write there can.

    Args:
        folder: Of the store.
        prompt: Whose blocks are replaced, seven of them.
        other: Whose KV takes their place.
        trailer: Bytes behind each seal, which stay as they were.
    """
    files = {file.name: file for file in objects(folder)}
    for key, source in zip(keys_of(prompt, 7), keys_of(other, 7), strict=True):
        mine, planted = files[key.hex()].read_bytes(), files[source.hex()].read_bytes()
        payload = planted[: len(planted) - trailer - SEAL_BYTES]
        fields = mine[len(payload) :][:72]
        seal = (fields + xxhash.xxh3_128_digest(payload + fields)).ljust(SEAL_BYTES, b"\0")
        files[key.hex()].write_bytes(payload + seal + mine[len(payload) + SEAL_BYTES :])


@pytest.fixture
def ask(start, stacks):
    """Start an engine and ask all; give the answers, the blocks that were loaded, and how many failed why."""

    def run(medium, keys=""):
        model, prompts = story()
        llm = start(model, stacks(medium, keys), **OPTIONS)
        answers = []
        for prompt in prompts:
            forget(llm)
            answers += generate(llm, [prompt])
        drain(llm)
        counts = connector(llm).counts[medium]
        return answers, counts.loaded, {reason: n for (_, reason), n in counts.failed.items()}

    return run


@pytest.mark.early
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.soak)])
def test_answers_are_those_without_a_cache_after_kill_9_with_other_keys_and_planted_blocks(
    start, stacks, ask, tmp_path, kills
):
    model, prompts = story()
    llm = start(model, None, enable_prefix_caching=False, **OPTIONS)
    right = [generate(llm, [prompt])[0] for prompt in prompts]
    media = ("disk", "store")
    killed(tmp_path, {name: stacks(name, "a") for name in media}, right, kills)
    for medium in media:
        # What was stored before the kill is loaded by who writes with the next key.
        answers, count, failed = ask(medium, "ba")
        assert answers == right
        assert count > 0
        assert not failed
    before = {file.name: file.read_bytes() for file in objects(tmp_path / "store")}
    for medium in media:
        answers, count, failed = ask(medium, "c")
        assert answers == right
        assert count == 0
        assert failed.keys() == {"missing"}
    # In the shared store nothing of another's was deleted.
    assert {file.name: file.read_bytes() for file in objects(tmp_path / "store")} == before
    plant(tmp_path / "store", prompts[3], prompts[2], TRAILER)
    answers, count, failed = ask("store", "ba")
    assert answers == right
    assert count > 0
    assert failed == {"corrupt": 7}


@pytest.mark.soak
def test_without_a_signature_each_planted_block_is_served(ask, tmp_path):
    """So the test above tries what works where nobody signs."""
    right, _, _ = ask("plain")
    _, prompts = story()
    plant(tmp_path / "plain", prompts[3], prompts[2], 0)
    answers, count, failed = ask("plain")
    # Each once: those of the second prompt are in host memory by then, as the first one's.
    assert count == sum((len(prompts[at]) - 1) // BLOCK_TOKENS for at in (0, 2, 3))
    assert not failed
    assert answers[:3] == right[:3]
    assert answers[3] != right[3]
