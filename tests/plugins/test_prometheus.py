"""A real Prometheus scrapes a real engine: every metric, with the numbers that the connector counted."""

import math
import threading
import time

import pytest
from engines import BLOCK_TOKENS, connector, drain, forget, generate, make_prompts
from prometheus import DEPLOY, Prometheus, concrete, free_port, panels

from kvbm_core import Op
from kvbm_core.layers import SEAL_BYTES
from kvbm_core.leader.ground.breaker import Breaker
from kvbm_lmdb._directory import OVERHEAD_BYTES
from kvbm_metrics import METRICS
from kvbm_vllm._stats import PREFIX

pytestmark = pytest.mark.engine

PATIENCE_S = 60
BLOCK_BYTES = 3 * 2 * 2 * 32 * BLOCK_TOKENS * 2
"""Of the random Llama over all ranks: layers, keys and values, heads, their size, tokens, bfloat16."""
JOBS = ("vllm", "own")


@pytest.fixture
def watch(start, llama, tmp_path, monkeypatch):
    """Start an engine that serves its metrics twice, as vLLM does and on our port, and its Prometheus."""
    import uvicorn
    from fastapi import FastAPI
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router

    ports = dict(zip(JOBS, (free_port(), free_port()), strict=True))
    monkeypatch.setenv("DYN_KVBM_METRICS", "true")
    monkeypatch.setenv("DYN_KVBM_METRICS_PORT", str(ports["own"]))
    app = FastAPI()
    attach_router(app)  # What `vllm serve` has at /metrics.
    server = uvicorn.Server(uvicorn.Config(app, port=ports["vllm"], log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    opened = []

    def watch(tiers, **options):
        # What is loaded must not depend on how fast this machine is.
        extra = {"only_faster": False, **options.pop("extra", {})}
        llm = start(llama, tiers, disable_log_stats=False, extra=extra, **options)
        opened.append(Prometheus(tmp_path, ports, DEPLOY / "rules" / "kvbm.yml").__enter__())
        return llm, opened[-1]

    yield watch
    for each in opened:
        each.__exit__()
    server.should_exit = True
    thread.join()


def until(get, expected):
    """Ask until Prometheus has scraped what is expected; afterwards the difference is the message."""
    give_up_s = time.monotonic() + PATIENCE_S
    while (got := get()) != expected and time.monotonic() < give_up_s:
        time.sleep(0.2)
    assert got == expected


def counted(llm):
    """What the connector itself has counted, as the metrics should have it; without what is zero."""
    values = {}
    for tier, counts in connector(llm).counts.items():
        values |= {
            ("loaded_blocks", tier): counts.loaded,
            ("loaded_bytes", tier): counts.loaded * BLOCK_BYTES,
            ("stored_blocks", tier): counts.stored,
            ("stored_bytes", tier): counts.stored * BLOCK_BYTES,
            ("evicted_blocks", tier): counts.evicted,
            ("declined_blocks", tier): counts.declined,
        }
        values |= {("dropped_blocks", reason, tier): n for reason, n in counts.dropped.items()}
        values |= {("failed_transfers", *what, tier): n for what, n in counts.failed.items()}
    return {key: value for key, value in values.items() if value}


def scraped(prometheus, job, names):
    """The same of a job's last scrape."""
    found = {}
    for name in names:
        series = prometheus.query(f'{METRICS[name].exported(PREFIX)}{{job="{job}"}}')
        found |= {(name, *labels): value for labels, value in series.items() if value}
    return found


def stack(tmp_path):
    return [
        {"backend": "cpu", "capacity": "8MiB"},
        {"backend": "lmdb", "capacity": "64MiB", "path": str(tmp_path / "lmdb")},
    ]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_prometheus_has_every_metric_with_the_connectors_own_counts(watch, tmp_path, ranks):
    llm, prometheus = watch(stack(tmp_path), tensor_parallel_size=ranks)
    lengths = [100, 33, 320, 65, 20]  # No two share a block.
    prompts = [[1000 + at] * length for at, length in enumerate(lengths)]
    blocks = sum((length - 1) // BLOCK_TOKENS for length in lengths)
    kept = sum(length // BLOCK_TOKENS for length in lengths)
    for prompt in prompts:
        generate(llm, [prompt], max_tokens=1)
    forget(llm)
    for prompt in prompts:
        generate(llm, [prompt], max_tokens=1)
    drain(llm)
    generate(llm, [[5]], max_tokens=1)  # A step after everything has ended, so that all is told.

    own = counted(llm)
    assert own == {
        ("loaded_blocks", "cpu"): blocks, ("loaded_bytes", "cpu"): blocks * BLOCK_BYTES,
        ("stored_blocks", "cpu"): kept, ("stored_bytes", "cpu"): kept * BLOCK_BYTES,
        ("stored_blocks", "lmdb"): kept, ("stored_bytes", "lmdb"): kept * BLOCK_BYTES,
    }  # fmt: skip
    saved = blocks * BLOCK_TOKENS
    # Each rank's share of a block lies on pages of its own, with a seal; in LMDB it has a row beside it.
    page_bytes = -(-(BLOCK_BYTES // ranks + SEAL_BYTES) // 4096) * 4096
    row_bytes = BLOCK_BYTES // ranks + SEAL_BYTES + OVERHEAD_BYTES
    others = {
        ("asked_tokens",): 2 * saved, ("saved_tokens", "cpu"): saved, ("hit_blocks", "cpu"): blocks,
        ("missed_blocks", "cpu"): blocks, ("missed_blocks", "lmdb"): blocks,
        ("device_copied_bytes", "device_to_host"): kept * BLOCK_BYTES,
        ("device_copied_bytes", "host_to_device"): blocks * BLOCK_BYTES,
        ("tier_used_bytes", "cpu"): kept * ranks * page_bytes,
        ("tier_used_bytes", "lmdb"): kept * ranks * row_bytes,
        ("tier_usable", "cpu"): 1, ("tier_usable", "lmdb"): 1,
    }  # fmt: skip
    names = {key[0] for key in own | others} | {"dropped_blocks", "failed_transfers", "queued_blocks"}
    for job in JOBS:
        until(lambda job=job: scraped(prometheus, job, names), own | others)
        types = {name: kind for name, kind in prometheus.types(job).items() if name.startswith("vllm:kvbm_")}
        assert types == {metric.exported(PREFIX): metric.kind.value for metric in METRICS.values()}
        operations = prometheus.query(f'vllm:kvbm_operation_seconds_count{{job="{job}"}}')
        # 20 tokens are no block, and what the memory tier has is copied to the other from there.
        assert operations[("load", "cpu")] == sum(length > BLOCK_TOKENS for length in lengths)
        assert operations[("store", "cpu")] > 0
        assert operations[("store", "lmdb")] > 0
        [capacity] = prometheus.query(f'vllm:kvbm_tier_capacity_bytes{{job="{job}", tier="cpu"}}').values()
        assert capacity == (8 << 20) // ranks // page_bytes * page_bytes * ranks
    # vLLM's own count of the tokens it was promised.
    assert prometheus.query("vllm:external_prefix_cache_hits_total") == {(): saved}


def chat(llm, stop):
    """Conversations that grow, more than the engine's memory and the first tier hold."""
    prompts = make_prompts(40, seed=61, longest=1200)
    while not stop.is_set():
        for prompt in prompts:
            if stop.is_set():
                break
            generate(llm, [prompt], max_tokens=4)


def test_under_load_every_query_of_every_panel_has_data(watch, tmp_path):
    tiers = stack(tmp_path)
    tiers[0]["capacity"] = "2MiB"
    llm, prometheus = watch(tiers, num_gpu_blocks_override=100, max_model_len=2048)
    stop = threading.Event()

    def missing():
        """Titles of panels, and alerts, that have nothing to show."""
        found = [
            panel["title"]
            for panel in panels()
            for target in panel.get("targets", ())
            # Only on an accelerator, with tenants, and while a tier is left alone.
            if not any(name in target["expr"] for name in ("copy_bytes_per_s", "kvbm_tenant_", "left_alone"))
            and not any(map(math.isfinite, prometheus.query(concrete(target["expr"], "4s", "30s")).values()))
        ]
        rules = prometheus.get("rules")["groups"][0]["rules"]
        return found + [rule["name"] for rule in rules if rule["health"] != "ok"]

    # The engine's steps belong to this thread, so the questions are asked from another.
    answers = []

    def ask():
        try:
            give_up_s = time.monotonic() + PATIENCE_S
            while (left := missing()) and time.monotonic() < give_up_s:
                time.sleep(0.2)
            answers.append(left)
        finally:
            stop.set()

    asking = threading.Thread(target=ask)
    asking.start()
    chat(llm, stop)
    asking.join()
    assert answers == [[]]
    for name in ("instance", "engine", "tier"):
        values = prometheus.get(f"label/{name}/values", **{"match[]": "vllm:kvbm_tier_used_bytes"})
        assert values == {"engine": ["0"], "tier": ["cpu", "lmdb"]}.get(name, values)
        assert values


def test_damage_and_a_tier_that_hangs_are_seen(watch, faulty, monkeypatch):
    """Counted in Prometheus as by the connector; the alert is on its way."""
    monkeypatch.setattr(Breaker, "first_pause_s", 600.0)
    extra = {"load_deadline_s": 0.3, "store_deadline_s": 0.3}
    llm, prometheus = watch([{"backend": "faulty", "capacity": "64MiB"}], extra=extra)
    prompts = [[1000 + at] * 200 for at in range(8)]
    generate(llm, prompts, max_tokens=1)
    forget(llm)
    for fault, some in (("flip", prompts[:2]), ("hang", prompts[2:])):
        faulty.fault = lambda transfer, fault=fault: fault if transfer.op is Op.LOAD else None
        for prompt in some:
            generate(llm, [prompt], max_tokens=1)
    generate(llm, [[5]], max_tokens=1)
    own = counted(llm)
    assert own["failed_transfers", "load", "corrupt", "faulty"] == 12
    # Three loads of which nothing came; then it is left alone.
    assert own["failed_transfers", "load", "deadline", "faulty"] == 6
    for job in JOBS:
        until(lambda job=job: scraped(prometheus, job, {key[0] for key in own}), own)
    assert prometheus.query('vllm:kvbm_tier_usable{job="own"}') == {("faulty",): 0}
    faults = prometheus.query('vllm:kvbm_tier_left_alone{job="own"} > 0')
    assert list(faults) == [("load", "deadline", "faulty")]
    assert prometheus.query('vllm:kvbm_saved_tokens_total{job="own"}') == {("faulty",): 0}
    until(
        lambda: {rule["name"]: rule["state"] for rule in prometheus.get("rules")["groups"][0]["rules"]}[
            "KvbmTierLeftAlone"
        ],
        "pending",
    )


def test_a_port_that_is_taken_ends_the_start_with_what_to_write(start, llama, monkeypatch):
    from http.server import HTTPServer

    from kvbm_core import ConfigError

    with HTTPServer(("", 0), None) as taken:
        port = taken.server_address[1]
        monkeypatch.setenv("DYN_KVBM_METRICS", "true")
        monkeypatch.setenv("DYN_KVBM_METRICS_PORT", str(port))
        with pytest.raises(ConfigError, match=f"DYN_KVBM_METRICS_PORT: {port} is in use"):
            start(llama, [{"backend": "cpu", "capacity": "8MiB"}])
    monkeypatch.setenv("DYN_KVBM_METRICS", "perhaps")
    with pytest.raises(Exception, match="DYN_KVBM_METRICS: 'perhaps' is neither yes nor no"):
        start(llama, [{"backend": "cpu", "capacity": "8MiB"}])
