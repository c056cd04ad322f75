"""Engines of pairs, prefill and decode: vLLM's NixlConnector and ours, in a MultiConnector.

    python disaggregated_child.py MODEL SOCKET

Imports vLLM once. Each connection to the socket is an engine in a process of its own. Its first line is the
order of the connectors and a file for the engine's log; then come lines like ``{"prompt": […],
"max_tokens": 1, "params": {…}}`` or ``{"forget": true}``, and it answers each.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

TIER = {"backend": "cpu", "capacity": "64MiB"}


def find_nixl():
    """Have vLLM find NIXL, which it imports as `nixl`, where only the package for one CUDA is installed."""
    try:
        import nixl._api  # noqa: F401
    except ModuleNotFoundError:
        for name in ("", "._api", "._bindings", "._utils", ".logging"):
            sys.modules[f"nixl{name}"] = importlib.import_module(f"nixl_cu13{name}")


def allow_amx():
    """Ask the kernel for AMX before UCX begins its threads: vLLM would ask later, and is refused then."""
    import torch

    if hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def child(name, extra):
    return {
        "kv_connector": name, "kv_role": "kv_both", "kv_buffer_device": "cpu",
        "kv_connector_extra_config": extra,
    }  # fmt: skip


def watch(connector_cls, seen):
    """Count what NIXL is told to load, and what it says it has."""
    # vLLM asks for the second since 0.30.
    name = "get_transfer_results" if hasattr(connector_cls, "get_transfer_results") else "get_finished"
    allocated, finished = connector_cls.update_state_after_alloc, getattr(connector_cls, name)

    def watch_allocated(self, request, blocks, num_external_tokens):
        seen["asked_tokens"] += num_external_tokens
        allocated(self, request, blocks, num_external_tokens)

    def watch_finished(self, finished_req_ids):
        ended = finished(self, finished_req_ids)
        sent, received = (
            ended if isinstance(ended, tuple) else (ended.finished_sending, ended.finished_recving)
        )
        seen["received"] += len(received or ())
        seen["sent"] += len(sent or ())
        return ended

    connector_cls.update_state_after_alloc = watch_allocated
    setattr(connector_cls, name, watch_finished)


def main():
    model, address = sys.argv[1:]
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "127.0.0.1"
    allow_amx()
    import vllm  # noqa: F401 - imported once, for every engine.

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for an engine.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                with connection, connection.makefile("rw") as talk:
                    live(model, talk)
                os._exit(0)
            connection.close()


def live(model, talk):
    """Be an engine until the other side hangs up."""
    order, log = json.loads(talk.readline())
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
    find_nixl()
    from engines import connector, make_engine
    from vllm import SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    nixl = KVConnectorFactory.get_connector_class_by_name("NixlConnector")
    seen = {"asked_tokens": 0, "received": 0, "sent": 0}
    watch(nixl, seen)
    children = {
        "kvbm": child("KvbmConnector", {"tiers": [TIER], "only_faster": False}),
        "nixl": child("NixlConnector", {}),
    }
    transfer = KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both", kv_load_failure_policy="recompute",
        kv_buffer_device="cpu",
        kv_connector_extra_config={"connectors": [children[name] for name in order.split("-")]},
    )  # fmt: skip
    llm = make_engine(Path(model), None, kv_transfer_config=transfer)
    print(json.dumps({"ready": True}), file=talk, flush=True)
    for line in talk:
        asked = json.loads(line)
        if asked.get("forget"):
            until = time.monotonic() + 60
            # What was handed over is given back in a step after it was read, and an idle engine makes none.
            while not llm.reset_prefix_cache() and time.monotonic() < until:
                llm.generate([{"prompt_token_ids": [2, 3]}], SamplingParams(max_tokens=1), use_tqdm=False)
            told = {}
        else:
            extra = {"kv_transfer_params": asked["params"]} if asked["params"] else None
            params = SamplingParams(
                temperature=0,
                max_tokens=asked["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                extra_args=extra,
            )
            [output] = llm.generate([{"prompt_token_ids": asked["prompt"]}], params, use_tqdm=False)
            told = {"answer": list(output.outputs[0].token_ids), "params": output.kv_transfer_params}
        counts = {tier: counts.loaded for tier, counts in connector(llm).counts.items()}
        print(json.dumps({**told, "nixl": seen, "kvbm": counts}), file=talk, flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
