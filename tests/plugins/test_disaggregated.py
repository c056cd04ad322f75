"""Prefill and decode on two engines: vLLM's own NixlConnector hands over, ours keeps what both computed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
import disaggregated_child
from engines import BLOCK_TOKENS, generate, make_engine, make_prompts

pytestmark = pytest.mark.engine

if not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu13")):
    pytest.skip("NIXL is not installed: install the extra gds", allow_module_level=True)

TO_PREFILL = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip


class Engine:
    """One of the two, in a process of its own."""

    def __init__(self, model, order, log):
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", disaggregated_child.__file__, str(model), order],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def ready(self):
        assert self._read() == {"ready": True}

    def ask(self, prompt, *, max_tokens=32, params=None):
        return self._tell({"prompt": prompt, "max_tokens": max_tokens, "params": params})

    def forget(self):
        return self._tell({"forget": True})

    def close(self):
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        finally:
            self._process.kill()
            self._process.stdout.close()
            self._log.close()

    def _tell(self, asked):
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self):
        line = self._process.stdout.readline()
        said = Path(self._log.name).read_text()[-4000:]
        assert line, f"an engine has ended ({self._process.wait()}): {said}"
        return json.loads(line)


@pytest.fixture(scope="module")
def cold(llama):
    """Prompts, and what an engine without any cache answers."""
    prompts = [prompt for prompt in make_prompts(40, seed=51, longest=900) if len(prompt) > 200][:3]
    llm = make_engine(llama, None, enable_prefix_caching=False)
    answers = [list(generate(llm, [prompt])[0]) for prompt in prompts]
    llm.llm_engine.engine_core.shutdown()
    return list(zip(prompts, answers, strict=True))


@pytest.mark.parametrize("order", ["nixl-kvbm", "kvbm-nixl"])
def test_nixl_hands_over_and_ours_restores_in_either_order(llama, cold, tmp_path, order):
    engines = [Engine(llama, order, tmp_path / f"{name}.log") for name in ("prefill", "decode")]
    prefill, decode = engines
    try:
        for each in engines:
            each.ready()
        blocks = sum((len(prompt) - 1) // BLOCK_TOKENS for prompt, _ in cold)

        def serve():
            """What a proxy does: the prompt to one, what that says of it and the prompt to the other."""
            for prompt, answer in cold:
                first = prefill.ask(prompt, max_tokens=1, params=TO_PREFILL)
                assert first["answer"] == answer[:1]
                assert first["params"]["do_remote_prefill"]
                second = decode.ask(prompt, params=first["params"])
                assert second["answer"] == answer
            return prefill.forget(), decode.forget()

        at_prefill, at_decode = serve()
        assert at_decode["nixl"]["received"] == at_prefill["nixl"]["sent"] == len(cold)
        assert at_decode["nixl"]["asked_tokens"] == sum(len(prompt) for prompt, _ in cold)
        assert at_prefill["kvbm"] == at_decode["kvbm"] == {"cpu": 0}
        # Both have forgotten. Prefill is restored from ours; at decode the first one loads.
        at_prefill, at_decode = serve()
        assert at_prefill["kvbm"] == {"cpu": blocks}
        assert at_decode["kvbm"] == {"cpu": blocks if order == "kvbm-nixl" else 0}
        assert at_decode["nixl"]["received"] == len(cold) * (2 if order == "nixl-kvbm" else 1)
        # What came over NIXL was stored at decode, and is right.
        for prompt, answer in cold:
            assert decode.ask(prompt)["answer"] == answer
        assert decode.forget()["kvbm"] == {"cpu": blocks * (2 if order == "kvbm-nixl" else 1)}
    finally:
        for each in engines:
            each.close()
