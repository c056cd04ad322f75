"""`kvbm top` and `kvbm status`, with servers of the project's own metrics, and of what is none."""

import contextlib
import json
import os
import pty
import re
import socket
import subprocess
import sys

import pytest
from answering import Answer, AnsweringServer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from published import published
from rich.console import Console

from kvbm_cli._app import run as kvbm
from kvbm_cli.top import _commands
from kvbm_cli.top._answer import describe, quantile, status
from kvbm_cli.top._scrape import parse, read_url
from kvbm_cli.top._screen import screen
from kvbm_core import ConfigError
from kvbm_core.command import ExitCode
from kvbm_metrics import Exporter, MetricsAddress, MetricsServer

URL = "http://engine:8000/metrics"
LABELS = ["model_name", "engine"]
PREFIX = "vllm:kvbm_"
START = {
    "tier_usable|cpu": 1, "tier_usable|disk|of mine": 1, "hit_blocks|cpu": 30, "missed_blocks|cpu": 10,
    "saved_tokens|cpu": 1000, "tier_used_bytes|cpu": 1 << 29, "tier_capacity_bytes|cpu": 1 << 31,
    "tier_capacity_now_bytes|cpu": 1 << 30, "operation_seconds|load|cpu": [0.003, 0.004, 0.004, 0.2],
    "operation_seconds|store|cpu": [9.0], "loaded_bytes|cpu": 100, "stored_bytes|cpu": 200,
    "failed_transfers|load|deadline|disk|of mine": 4, "failed_transfers|store|error|cpu": 0,
    "dropped_blocks|backlog|disk|of mine": 3, "evicted_blocks|cpu": 2,
    "queued_blocks|store|cpu": 7, "queued_blocks|load|cpu": 1, "asked_tokens": 5,
}  # fmt: skip
MORE = {
    "hit_blocks|cpu": 1, "missed_blocks|cpu": 3, "saved_tokens|cpu": 64, "loaded_bytes|cpu": 1 << 20,
    "stored_bytes|cpu": 2 << 20, "operation_seconds|load|cpu": [0.02], "evicted_blocks|cpu": 1,
    "dropped_blocks|backlog|disk|of mine": 1,
}  # fmt: skip


class Engines:
    """What vLLM's `/metrics` says, with the exporter that is in it; other metrics are there, too."""

    def __init__(self, count=1):
        registry = CollectorRegistry()
        types = {
            kind: lambda multiprocess_mode=None, kind=kind, **options: kind(registry=registry, **options)
            for kind in (Counter, Gauge, Histogram)
        }
        Gauge("vllm:num_requests_running", "Others'.", registry=registry).set(1)
        values = {number: ["a/model", str(number)] for number in range(count)}
        self.exporter = Exporter(types, LABELS, values, PREFIX)
        self.observe = self.exporter.observe
        self.registry = registry

    def text(self):
        return generate_latest(self.registry).decode()

    def scrape(self):
        return parse(self.text(), URL)


@pytest.fixture
def port():
    server = MetricsServer(MetricsAddress("127.0.0.1", free()), LABELS, ["m", "0"], PREFIX)
    yield server
    server.close()


def free():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(capsys, *arguments, code=0):
    capsys.readouterr()
    assert kvbm(["status", "--interval", "0.1", "--json", *arguments]) == code
    return published("status", capsys.readouterr().out)


def tiers(server):
    [engine] = server.engines
    return {tier.tier: tier for tier in engine.tiers}


# What the numbers mean.


def test_each_number_is_what_the_engine_counted():
    engines = Engines()
    engines.observe(START)
    before = engines.scrape()
    engines.observe(MORE)
    server = describe(URL, engines.scrape(), before, 2.0)
    assert (server.engines[0].model, server.engines[0].engine) == ("a/model", "0")
    cpu, disk = tiers(server)["cpu"], tiers(server)["disk|of mine"]
    assert (cpu.used_bytes, cpu.capacity_bytes, disk.capacity_bytes) == (1 << 29, 1 << 30, None)
    assert (cpu.queued_stores, cpu.queued_loads) == (7, 1)
    assert (cpu.since_start.hit_ratio, cpu.lately.hit_ratio) == (31 / 44, 1 / 4)
    assert (cpu.since_start.saved_tokens, cpu.lately.saved_tokens) == (1064, 64)
    assert (cpu.lately.loaded_bytes, cpu.lately.stored_bytes) == (1 << 20, 2 << 20)
    assert cpu.lately.evicted_blocks == 1
    assert 0.01 < cpu.lately.load_p50_s < cpu.lately.load_p95_s < 0.025
    assert disk.since_start.failed == {"load deadline": 4}
    assert (disk.since_start.dropped, disk.lately.dropped) == ({"backlog": 4}, {"backlog": 1})
    assert disk.lately.hit_ratio is disk.lately.load_p50_s is None
    assert (cpu.state, disk.state, status([server]).to_mend) == ("works", "works", [])


def test_a_quantile_is_the_one_that_prometheus_gives():
    buckets = {0.1: 0.0, 1.0: 4.0, 5.0: 8.0, float("inf"): 10.0}
    assert quantile(0.5, buckets) == pytest.approx(2.0)
    assert quantile(0.2, buckets) == pytest.approx(0.55)
    assert quantile(0.95, buckets) == 5.0
    assert quantile(0.5, dict.fromkeys(buckets, 0.0)) is quantile(0.5, {}) is None


def test_a_server_that_was_started_anew_did_not_undo_anything():
    engines, anew = Engines(), Engines()
    engines.observe(START)
    anew.observe(MORE)
    cpu = tiers(describe(URL, anew.scrape(), engines.scrape(), 2.0))["cpu"]
    assert (cpu.lately.saved_tokens, cpu.lately.loaded_bytes) == (64, (1 << 20) - 100)
    assert cpu.lately.hit_ratio == 1 / 4


@pytest.mark.parametrize(
    ("news", "state"),
    [
        ({"failed_transfers|load|missing|cpu": 9, "failed_transfers|store|busy|cpu": 9}, "works"),
        ({"failed_transfers|load|full|cpu": 9}, "works"),
        ({"failed_transfers|load|corrupt|cpu": 1}, "fails"),
        ({"failed_transfers|store|full|cpu": 1}, "fails"),
        ({"failed_transfers|lookup|deadline|cpu": 1}, "fails"),
        ({"failed_transfers|load|error|cpu": 1, "tier_usable|cpu": 0}, "left alone"),
        ({"tier_usable|cpu": 0}, "left alone"),
    ],
)
def test_a_tier_fails_by_the_fault_of_its_medium_alone(news, state):
    engines = Engines(2)
    engines.observe(START, 1)
    engines.observe(START, 0)
    before = engines.scrape()
    engines.observe(news, 1)
    server = describe(URL, engines.scrape(), before, 2.0)
    states = {(each.engine, tier.tier): tier.state for each in server.engines for tier in each.tiers}
    assert states.pop(("1", "cpu")) == state
    assert set(states.values()) == {"works"}
    to_mend = status([server]).to_mend
    assert len(to_mend) == (state != "works")
    if to_mend:
        assert to_mend[0].startswith(f"{URL} engine 1: tier cpu ")


# The verbs.


def test_status_of_a_server_that_is_well_and_of_one_whose_tier_is_left_alone(port, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # Nothing is folded.
    url = port.url.replace(socket.gethostname(), "127.0.0.1")
    empty = ask(capsys, url)
    assert empty["servers"][0]["engines"] == empty["to_mend"] == []
    port.observe(START)
    found = ask(capsys, url.removeprefix("http://").removesuffix("/metrics"), url)
    [server] = found["servers"]
    assert server["seconds"] >= 0.1
    assert server["url"] == url
    assert [tier["tier"] for tier in server["engines"][0]["tiers"]] == ["cpu", "disk|of mine"]
    port.observe({"tier_usable|cpu": 0})
    [said] = ask(capsys, url, code=ExitCode.MEND)["to_mend"]  # Of an engine that does not tell why.
    assert said == f"{url} engine 0: tier cpu is left alone; failed since the start: none counted"
    why = {f"tier_left_alone|{fault}": on for fault, on in (("load|error|cpu", 0), ("store|deadline|cpu", 1))}
    port.observe(why | {"tier_left_alone|lookup|error|disk|of mine": 0})
    told = ask(capsys, url, code=ExitCode.MEND)
    cpu, disk = told["servers"][0]["engines"][0]["tiers"]
    assert (cpu["left_alone_for"], disk["left_alone_for"]) == ("store deadline", None)
    [said] = told["to_mend"]
    assert "is left alone for store deadline, see 'tier cpu fails' in its log; failed since" in said
    assert kvbm(["status", "--interval", "0.1", url]) == ExitCode.MEND
    shown = capsys.readouterr().out
    assert shown.startswith(f"to mend: {said}")
    for word in ("store deadline", "(75%)", "50% of 1GiB", "load deadline 4", "backlog 3", "7/1"):
        assert word in shown


def test_status_is_told_what_fails_between_its_two_looks(port, capsys):
    port.observe(START)
    looks = 0

    def counted(url):
        nonlocal looks
        looks += 1
        if looks == 2:
            port.observe({"failed_transfers|load|error|cpu": 5})
        return fetch(url)

    fetch = _commands.fetch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_commands, "fetch", counted)
        found = ask(capsys, port.url, code=ExitCode.MEND)
    assert found["to_mend"] == [f"{port.url} engine 0: tier cpu fails; failed lately: 5 load error"]


def test_a_server_without_metrics_is_named_with_what_to_do(port, capsys):
    port.observe(START)
    with AnsweringServer() as server:
        for answer, said in (
            (Answer(404), "answers 404 Not Found; name the address"),
            (
                Answer(body=b"# TYPE up gauge\nup 1\n"),
                "has no metrics of kvbm; start vLLM with KvbmConnector",
            ),
            (Answer(body=b"<html>{ not metrics"), "is no metrics"),
            (Answer(body=b"up 1\n", nbytes=100), "does not answer"),
        ):
            server.answer = answer
            found = ask(capsys, server.endpoint, port.url, code=ExitCode.UNUSABLE)
            assert said in found["servers"][0]["problem"]
            assert found["servers"][1]["problem"] is None
            assert kvbm(["top", server.endpoint]) == ExitCode.UNUSABLE
            assert said in capsys.readouterr().err


def test_a_port_that_nobody_listens_at_is_named(capsys):
    address = f"127.0.0.1:{free()}"
    assert kvbm(["top", address]) == ExitCode.UNUSABLE
    assert f"http://{address}/metrics does not answer: Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ftp://host"], "'ftp://host' is no address of a server; write one like"),
        (["http://"], "is no address"),
        (["host:port"], "is no address"),
        (["http://me:secret@host"], "the address of host has a user's name, which is not sent"),
        (["host", "--interval", "nan"], "write seconds from 0.1"),
        (["host", "--interval", "0"], "write seconds from 0.1"),
        ([], "Missing argument"),
    ],
)
def test_what_is_no_address_or_no_interval_is_refused(capsys, arguments, said):
    for verb in ("top", "status"):
        assert kvbm([verb, *arguments]) == ExitCode.WRONG
        shown = capsys.readouterr().err
        assert said in " ".join(re.sub("[│╭╮╰╯─]", " ", shown).split())
        assert "secret" not in shown


def test_an_address_may_be_short():
    assert read_url("host:8000") == read_url("http://host:8000/v1") == "http://host:8000/metrics"
    assert read_url("https://host/a/metrics?x=1#y") == "https://host/a/metrics?x=1"
    assert read_url("[::1]:6880") == "http://[::1]:6880/metrics"
    with pytest.raises(ConfigError, match="is no address"):
        read_url("host\x1b[2J")


def test_top_prints_lines_and_goes_on_while_a_server_is_away(port, capsys):
    port.observe(START)
    arguments = ["top", "--interval", "0.1", "--count", "2", port.url]
    assert kvbm(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in shown] == [
        f"{port.url} engine 0 {tier}" for _ in range(2) for tier in ("cpu", "disk|of mine")
    ]
    assert "Hits (75%)" in shown[0]
    assert "Failed load deadline 4, Dropped backlog 3" in shown[1]
    assert kvbm([*arguments, "--json"]) == 0
    first, second = [published("top", line) for line in capsys.readouterr().out.splitlines()]
    assert first["servers"][0]["seconds"] is None
    assert second["servers"][0]["seconds"] >= 0.1
    watch = _commands._Watch(port.url, 0.0)
    assert watch.look().problem is None
    port.close()
    assert "does not answer" in watch.look().problem
    assert not watch.seen


def test_top_ends_by_a_signal_as_documented(port):
    port.observe(START)
    command = [sys.executable, "-m", "kvbm_cli", "top", "--interval", "0.1", "--json", port.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for _ in range(2):
            published("top", json.loads(child.stdout.readline()))
        child.terminate()
        assert child.wait() == ExitCode.INTERRUPTED


def test_lately_is_as_long_as_asked_for(port, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(_commands.time, "monotonic", lambda: clock[0])
    port.observe(START)
    watch, seen = _commands._Watch(port.url, 10.0), []
    for _ in range(9):
        seen.append(watch.look().seconds)
        clock[0] += 3.0
    assert seen == [None, 3, 6, 9, 12, 12, 12, 12, 12]
    assert len(watch.seen) == 5


def test_a_narrow_terminal_has_the_tiers_side_by_side_and_obeys_no_server():
    engines = Engines()
    engines.observe(START | {"tier_usable|\x1b[2Jevil[bold]": 1})
    found = status([describe(URL, engines.scrape(), None, None)])
    for width in (80, 200):
        console = Console(width=width, record=True, force_terminal=True)
        console.print(screen(found, width))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "\\x1b[2Jevil[bold]" in text
        assert "Saved tokens/s" in text
        assert "50% of 1GiB" in text


def test_top_draws_a_screen_on_a_terminal_and_leaves_it(port):
    port.observe(START)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kvbm_cli", "top", "--interval", "0.1", "--count", "2", port.url]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed.
            while piece := os.read(ours, 1 << 16):
                written += piece
        assert child.wait() == 0
    os.close(ours)
    shown = written.decode()
    enter, leave = "\x1b[?1049h", "\x1b[?1049l"
    assert shown.count(enter) == shown.count(leave) == 1
    inside = shown.partition(enter)[2].partition(leave)[0]
    for word in ("Saved tokens/s", "50% of 1GiB", "load deadline 4"):
        assert word in inside
