"""A real engine registers in a real etcd, and serves whatever becomes of that."""

import json
import logging
import threading

import pytest
from engines import connector, drain, forget, generate, loaded, make_prompts

from kvbm_cli._app import run as kvbm

pytestmark = pytest.mark.engine

ENGINE = "the engine under test"


def test_etcd_is_killed_under_load_and_comes_back(llama, start, etcd_server, capsys, caplog):
    caplog.set_level(logging.INFO, "kvbm_etcd")

    def lines(level):
        # vLLM's own lines are among the records where its logger was made within a test.
        ours = [record for record in caplog.records if record.name == "kvbm_etcd"]
        return [record.getMessage() for record in ours if record.levelno == level]

    def listed():
        capsys.readouterr()
        assert kvbm(["etcd", "ls", "--json", "--endpoint", etcd_server.endpoint]) == 0
        return json.loads(capsys.readouterr().out).get(ENGINE, [])

    entry = {"backend": "etcd", "endpoints": [etcd_server.endpoint], "lease_s": 2, "timeout_s": 1}
    tiers = [{"backend": "cpu", "capacity": "64MiB"}]
    llm = start(llama, tiers, extra={"coordinator": entry}, transfer={"engine_id": ENGINE})
    leader, worker = listed()
    assert (leader["rank"], worker["rank"], worker["world_size"]) == (None, 0, 1)
    assert leader["stack"] == worker["stack"] == ["cpu 64MiB"]
    assert leader["versions"] == worker["versions"]
    assert len(bytes.fromhex(worker["namespace"])) == len(bytes.fromhex(worker["shared_namespace"])) == 16

    prompts = [prompt for prompt in make_prompts(30, seed=21, longest=900) if len(prompt) > 100][:4]
    answers = [generate(llm, [prompt])[0] for prompt in prompts]

    def serve_until(event):
        """Load each prompt anew, again and again; every answer is right and was loaded."""
        while True:
            before = loaded(llm)["cpu"]
            for prompt, answer in zip(prompts, answers, strict=True):
                forget(llm)
                assert generate(llm, [prompt])[0] == answer
            assert loaded(llm)["cpu"] - before == sum((len(prompt) - 1) // 32 for prompt in prompts)
            if event():
                return

    caplog.clear()
    killer = threading.Timer(0.2, etcd_server.kill)
    killer.start()
    serve_until(lambda: len(lines(logging.WARNING)) == 2)
    killer.join()
    back = threading.Thread(target=etcd_server.restart)
    back.start()
    serve_until(lambda: len(lines(logging.INFO)) == 2)
    back.join()
    assert [entry["instance"] for entry in listed()] == [leader["instance"], worker["instance"]]
    assert len(lines(logging.WARNING)) == len(lines(logging.INFO)) == 2

    drain(llm)
    connector(llm).shutdown()
    assert [entry["rank"] for entry in listed()] == [0]
