"""Notes when functions of an engine begin and end, in whatever process they run.

Importing this wraps them. vLLM imports it where its worker runs, to mix `Extension` into it, which gives the
notes back; with one worker that is where the scheduler runs, too. Times are of the monotonic clock, which
processes share.
"""

from __future__ import annotations

import functools
import gc
import importlib
import threading
import time
from typing import Any

SPANS: list[tuple[str, str, int, int]] = []
"""What, in which thread, from when to when, in ns."""

WHERE = {
    "request arrives": "vllm.v1.engine.core:EngineCore.preprocess_add_request",
    "schedule": "vllm.v1.core.sched.scheduler:Scheduler.schedule",
    "update": "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    "execute": "vllm.v1.executor.uniproc_executor:UniProcExecutor.execute_model",
    "sample": "vllm.v1.executor.uniproc_executor:UniProcExecutor.sample_tokens",
    "ours: match": "kvbm_vllm:KvbmConnector.get_num_new_matched_tokens",
    "ours: allocated": "kvbm_vllm:KvbmConnector.update_state_after_alloc",
    "ours: plan": "kvbm_vllm:KvbmConnector.build_connector_meta",
    "ours: outcomes": "kvbm_vllm:KvbmConnector.update_connector_output",
    "ours: begin": "kvbm_engine._rank:Rank.begin",
    "ours: collect": "kvbm_engine._rank:Rank.collect",
    "ours: wait": "kvbm_core.worker.worker:Worker.wait",
    "ours: poll": "kvbm_core.worker.transfer_engine:TransferEngine.poll",
    "ours: enqueue in": "kvbm_device._link:Link.load",
    "ours: enqueue out": "kvbm_device._link:Link.store",
    "native: match": "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector:"
    "OffloadingConnector.get_num_new_matched_tokens",
    "native: begin": "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector:"
    "OffloadingConnector.start_load_kv",
    "native: collect": "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector:"
    "OffloadingConnector.get_finished",
}


class Extension:
    """Mixed into vLLM's worker."""

    def take_spans(self) -> list[tuple[str, str, int, int]]:
        taken = list(SPANS)
        SPANS.clear()
        return taken


def _install() -> None:
    for label, place in WHERE.items():
        module, _, path = place.partition(":")
        try:
            owner: Any = importlib.import_module(module)
        except ImportError:
            continue
        *outer, name = path.split(".")
        for each in outer:
            owner = getattr(owner, each)
        setattr(owner, name, _noted(label, getattr(owner, name)))
    gc.callbacks.append(_Collections())


def _noted(label: str, function: Any) -> Any:
    @functools.wraps(function)
    def noted(*args: Any, **options: Any) -> Any:
        begin = time.monotonic_ns()
        try:
            return function(*args, **options)
        finally:
            SPANS.append((label, threading.current_thread().name, begin, time.monotonic_ns()))

    return noted


class _Collections:
    def __init__(self) -> None:
        self.begin = 0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self.begin = time.monotonic_ns()
        else:
            name = f"garbage {info['generation']}"
            SPANS.append((name, threading.current_thread().name, self.begin, time.monotonic_ns()))


_install()
