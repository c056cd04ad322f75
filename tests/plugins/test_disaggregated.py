"""Prefill and decode on two engines: vLLM's own NixlConnector hands over, ours keeps what both computed."""

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("vllm")
import disaggregated_child
from engines import ANSWER_TOKENS, BLOCK_TOKENS, generate, make_engine, make_prompts

pytestmark = pytest.mark.engine

if not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu13")):
    pytest.skip("NIXL is not installed: install the extra gds", allow_module_level=True)

PATIENCE_S = 300
TO_PREFILL = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def begin(llama, tmp_path_factory):
    """Give a function that begins an engine in a process of its own."""
    folder = tmp_path_factory.mktemp("engines")
    address, log = folder / "socket", folder / "log"
    program = [sys.executable, "-X", "faulthandler", disaggregated_child.__file__, str(llama), str(address)]
    with log.open("w") as file, subprocess.Popen(program, stdout=file, stderr=file) as parent:

        def begin(order, said):
            until = time.monotonic() + PATIENCE_S
            while parent.poll() is None and time.monotonic() < until:
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                    return Engine(address, order, said)
                time.sleep(0.1)
            raise AssertionError(log.read_text()[-4000:])

        yield begin
        parent.kill()


class Engine:
    """One of the two, at the other end of a connection."""

    def __init__(self, address, order, log):
        self._log = log
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(address))
            self._talk = connection.makefile("rw")
        self._write([order, str(log)])

    def ready(self):
        assert self._read() == {"ready": True}

    def ask(self, prompt, *, max_tokens=ANSWER_TOKENS, params=None):
        self._write({"prompt": prompt, "max_tokens": max_tokens, "params": params})
        return self._read()

    def forget(self):
        self._write({"forget": True})
        return self._read()

    def close(self):
        """Hang up; the process ends by that."""
        self._talk.close()

    def _write(self, asked):
        self._talk.write(json.dumps(asked) + "\n")
        self._talk.flush()

    def _read(self):
        line = self._talk.readline()
        assert line, f"an engine has ended: {self._log.read_text()[-4000:]}"
        return json.loads(line)


@pytest.fixture(scope="module")
def cold(llama):
    """Prompts, and what an engine without any cache answers."""
    prompts = [prompt for prompt in make_prompts(40, seed=51, longest=900) if len(prompt) > 200][:3]
    llm = make_engine(llama, None, enable_prefix_caching=False)
    answers = [list(generate(llm, [prompt])[0]) for prompt in prompts]
    llm.llm_engine.engine_core.shutdown()
    return list(zip(prompts, answers, strict=True))


@pytest.mark.early
@pytest.mark.parametrize("order", ["nixl-kvbm", "kvbm-nixl"])
def test_nixl_hands_over_and_ours_restores_in_either_order(begin, cold, tmp_path, order):
    engines = [begin(order, tmp_path / f"{name}.log") for name in ("prefill", "decode")]
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
