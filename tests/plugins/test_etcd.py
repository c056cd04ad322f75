"""Registration in a real etcd: who comes, who does not, and an etcd that fails in every way.

No engine here: an engine calls `join` and `gather` when it starts, `close` when it ends, and nothing
between. `test_etcd_engine.py` shows that.
"""

import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from certificates import make_certificates
from published import published
from servers import EtcdServer, FaultProxy, ServerMissingError

from kvbm_cli._app import run as kvbm
from kvbm_core import BackendError, ConfigError, Coordinator, CoordinatorError, Member, Registry, load_config
from kvbm_core.command import ExitCode
from kvbm_core.config import convert
from kvbm_etcd import EtcdConfig
from kvbm_etcd._config import init_timeout_s, read_access

LEASE_S = 2
"""The shortest there is."""
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("ETCD_", "DYN_KVBM_LEADER")):
            monkeypatch.delenv(name)


@pytest.fixture
def engine(request):
    """A name that no other test uses."""
    return f"engine of {request.node.name}"


@pytest.fixture
def make(etcd_server, engine):
    """Make coordinators, and close them at the end."""
    made = []

    def make(**settings):
        defaults = {"endpoints": [etcd_server.endpoint], "lease_s": LEASE_S, "timeout_s": 1}
        made.append(Registry().coordinator({"backend": "etcd", **defaults, **settings}))
        return made[-1]

    yield make
    for coordinator in made:
        coordinator.close()


@pytest.fixture
def member(engine):
    """Describe a process of this test's engine."""
    pids = itertools.count(100)

    def member(rank=None, world_size=2, **facts):
        defaults = {"shared_namespace": "" if rank is None else "aa" * 16, "stack": ("cpu 8GiB",)}
        return Member(
            engine=engine, rank=rank, world_size=world_size, host=f"host{rank}", pid=next(pids),
            **{**defaults, **facts},
        )  # fmt: skip

    return member


@pytest.fixture
def join(make, member):
    """Register a process of this test's engine."""

    def join(rank=None, world_size=2, settings=None, **facts):
        coordinator = make(**(settings or {}))
        coordinator.join(member(rank, world_size, **facts))
        return coordinator

    return join


def until(holds):
    give_up_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < give_up_s, "it did not come to that"
        time.sleep(0.05)


def listed(capsys, server, *arguments):
    """What ``ls --json`` shows."""
    capsys.readouterr()
    assert kvbm(["etcd", "ls", "--json", "--endpoint", server.endpoint, *arguments]) == 0
    return published("etcd ls", capsys.readouterr().out)


def ranks(capsys, server, engine):
    return [entry["rank"] for entry in listed(capsys, server).get(engine, [])]


def said(caplog, level, who=""):
    """The log lines of a level that name somebody."""
    lines = [record for record in caplog.records if record.name == "kvbm_etcd" and record.levelno == level]
    return [record.getMessage() for record in lines if who in record.getMessage()]


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "kvbm_etcd")
    return caplog


# Who comes.


def test_the_leader_waits_for_its_workers(join, etcd_server, engine, capsys):
    leader = join()
    with ThreadPoolExecutor() as pool:
        gathered = pool.submit(leader.gather)
        join(1)
        assert not gathered.done()
        join(0)
        assert [worker.rank for worker in gathered.result()] == [0, 1]
    entry = listed(capsys, etcd_server)[engine][1]
    assert (entry["host"], entry["stack"], entry["shared_namespace"]) == ("host0", ["cpu 8GiB"], "aa" * 16)


def test_who_closes_is_listed_no_more(join, etcd_server, engine, capsys):
    leader, worker = join(), join(0)
    assert ranks(capsys, etcd_server, engine) == [None, 0]
    leader.close()
    assert ranks(capsys, etcd_server, engine) == [0]
    worker.close()
    worker.close()
    assert engine not in listed(capsys, etcd_server)


def test_workers_that_never_come_are_named(join):
    leader = join(world_size=4, settings={"init_timeout_s": 0.5})
    join(0, 4)
    join(2, 4)
    with pytest.raises(CoordinatorError) as raised:
        leader.gather()
    message = str(raised.value)
    assert "of 4 workers, rank 1, 3 did not register" in message
    assert "within 0.5 s" in message
    assert "worker 0 (host0, pid 101), worker 2 (host2, pid 102)" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shared_namespace", "bb" * 16),
        ("stack", ("cpu 4GiB",)),
        ("versions", {"kvbm-core": "0.0.1"}),
        ("world_size", 3),
    ],
)
def test_a_worker_that_differs_is_named_with_the_difference(join, key, value):
    versions = {"versions": {"kvbm-core": "0.1.0"}}
    leader = join(settings={"init_timeout_s": PATIENCE_S}, **versions)
    join(0, **versions)
    join(1, **{"world_size": 2, **versions, key: value})
    with pytest.raises(CoordinatorError, match=rf"{key} of worker 1 \(host1, pid 102\) is ") as raised:
        leader.gather()
    assert f" is {json.dumps(value, separators=(',', ':'))}, of " in str(raised.value)


def test_who_comes_twice_is_refused_and_the_first_stays(join, etcd_server, engine, capsys):
    join()
    join(0)
    with ThreadPoolExecutor() as pool:
        for refused, who in [(pool.submit(join), "the leader"), (pool.submit(join, 0), "worker 0")]:
            message = str(refused.exception())
            assert isinstance(refused.exception(), CoordinatorError)
            assert re.search(
                rf"lists {who} \(\w+, pid 10[01]\) in the place of {who} \(\w+, pid 10[23]\)", message
            )
    assert [entry["pid"] for entry in listed(capsys, etcd_server)[engine]] == [100, 101]


def test_a_worker_killed_and_started_again_takes_its_own_place(etcd_server, engine, capsys):
    def start():
        command = [sys.executable, str(Path(__file__).with_name("etcd_rank.py"))]
        process = subprocess.Popen(
            [*command, etcd_server.endpoint, engine, "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert b"listed" in process.stdout.readline()
        return process

    first = start()
    first.kill()
    first.communicate()
    with start() as second:
        assert [entry["pid"] for entry in listed(capsys, etcd_server)[engine]] == [second.pid]
        second.kill()
    until(lambda: engine not in listed(capsys, etcd_server))


# An etcd that fails.


def hang(server):
    server.stop()
    return server.resume


def kill(server):
    server.kill()
    return server.restart


def terminate(server):
    server.kill(signal.SIGTERM)
    return server.restart


def wipe(server):
    server.kill()
    server.wipe()
    return server.restart


@pytest.mark.parametrize("fault", [hang, kill, terminate, wipe])
def test_registration_heals_with_one_line_each_way(join, etcd_server, engine, capsys, log, fault):
    names = ("the leader (", "worker 0 (")
    leader = join(world_size=1)
    join(0, 1)
    assert [worker.rank for worker in leader.gather()] == [0]
    log.clear()
    heal = fault(etcd_server)
    until(lambda: all(said(log, logging.WARNING, name) for name in names))
    heal()
    until(lambda: all(said(log, logging.INFO, name) for name in names))
    assert ranks(capsys, etcd_server, engine) == [None, 0]
    for name in names:
        assert len(said(log, logging.WARNING, name)) == len(said(log, logging.INFO, name)) == 1
        assert "does not list" in said(log, logging.WARNING, name)[0]


def test_an_etcd_that_forgot_everything_between_two_looks_is_told_again(join, etcd_server, engine, capsys):
    join(0)
    etcd_server.ctl("del", "/kvbm/", "--prefix")
    until(lambda: ranks(capsys, etcd_server, engine) == [0])
    [lease] = etcd_server.ctl("lease", "list").split()[-1:]
    etcd_server.ctl("lease", "revoke", lease)
    until(lambda: ranks(capsys, etcd_server, engine) == [0])


def test_a_rank_that_is_cut_off_is_listed_no_more_and_comes_back(join, etcd_server, engine, capsys, log):
    with FaultProxy(etcd_server) as proxy:
        join()
        join(0)
        join(1, settings={"endpoints": [proxy.endpoint]})
        log.clear()
        proxy.mode = "stall"
        until(lambda: ranks(capsys, etcd_server, engine) == [None, 0])
        until(lambda: said(log, logging.WARNING))
        proxy.mode = "pass"
        until(lambda: ranks(capsys, etcd_server, engine) == [None, 0, 1])
        until(lambda: said(log, logging.INFO))
        assert len(log.records) == 2
        assert "worker 1 (" in log.messages[0]
        assert "worker 1 (" in log.messages[1]


def test_an_etcd_that_comes_and_goes_is_one_line_a_minute_with_a_count(join, etcd_server, log):
    with FaultProxy(etcd_server) as proxy:
        worker = join(0, settings={"endpoints": [proxy.endpoint]})
        log.clear()
        for _ in range(3):
            proxy.mode = "refuse"
            until(lambda: "adrift" in repr(worker))
            proxy.mode = "pass"
            until(lambda: "listed" in repr(worker))
        gone, back = log.messages
        assert "does not list worker 0 (" in gone
        assert "lists worker 0 (" in back
        worker.close()
        [count] = log.messages[2:]
        assert count.startswith("2 more in the last ")
        assert gone in count


def test_a_worker_cut_off_from_the_start_is_missed(join, etcd_server):
    with FaultProxy(etcd_server) as proxy:
        proxy.mode = "stall"
        leader = join(world_size=1, settings={"init_timeout_s": 0.5})
        join(0, 1, settings={"endpoints": [proxy.endpoint]})
        with pytest.raises(CoordinatorError, match=r"rank 0 did not register .*; registered: none"):
            leader.gather()


@pytest.mark.parametrize("fault", [kill, hang])
def test_an_engine_starts_without_etcd_and_is_listed_later(join, etcd_server, engine, capsys, log, fault):
    heal = fault(etcd_server)
    try:
        worker, leader = join(0, 1), join(world_size=1)
        assert leader.gather() == ()
        assert "adrift" in repr(worker)
        assert any("the workers are not counted" in line for line in said(log, logging.WARNING))
    finally:
        heal()
    until(lambda: ranks(capsys, etcd_server, engine) == [None, 0])


def test_closing_while_etcd_hangs_ends(join, etcd_server):
    worker = join(0)
    etcd_server.stop()
    worker.close()
    etcd_server.resume()


def test_another_endpoint_is_tried(join, etcd_server, engine, capsys, log):
    with FaultProxy(etcd_server) as dead, FaultProxy(etcd_server) as proxy:
        dead.mode = "refuse"
        join(0, settings={"endpoints": [dead.endpoint, proxy.endpoint]})
        assert ranks(capsys, etcd_server, engine) == [0]
        dead.mode, proxy.mode = "pass", "refuse"
        requests = dead.requests
        until(lambda: dead.requests > requests + 3)
        assert ranks(capsys, etcd_server, engine) == [0]
        assert said(log, logging.WARNING) == []


# TLS, users and passwords.

SECRET = "pa55-w0rd-M4RK"


@pytest.fixture(scope="module")
def safe_server(tmp_path_factory):
    """An etcd with TLS, client certificates and a user who may write below /kvbm only."""
    folder = make_certificates(tmp_path_factory.mktemp("certificates"))
    try:
        server = EtcdServer(folder)
        with server:
            for command in (
                f"user add root:{SECRET}", "user grant-role root root", "role add kvbm",
                "role grant-permission kvbm readwrite /kvbm/ --prefix=true", f"user add kvbm:{SECRET}",
                "user grant-role kvbm kvbm", "auth enable",
            ):  # fmt: skip
                server.ctl(*command.split())
            server.folder = folder
            yield server
    except ServerMissingError as error:
        pytest.skip(f"SERVER MISSING: {error}")


@pytest.fixture
def safe(safe_server, monkeypatch):
    """Settings that are right, the user and the password in the environment."""
    monkeypatch.setenv("ETCD_AUTH_USERNAME", "kvbm")
    monkeypatch.setenv("ETCD_AUTH_PASSWORD", SECRET)
    files = {
        name: str(safe_server.folder / file)
        for name, file in [("ca_file", "ca.pem"), ("cert_file", "client.pem"), ("key_file", "client.key")]
    }
    return {"endpoints": [safe_server.endpoint], **files}


def test_tls_with_a_user_heals_too(join, safe, safe_server, engine, tmp_path, capsys, log):
    leader = join(settings=safe, world_size=1)
    join(0, 1, settings=safe)
    assert len(leader.gather()) == 1
    config = tmp_path / "kvbm.yaml"
    tiers = [{"backend": "cpu", "capacity": "1GiB"}]
    config.write_text(json.dumps({"tiers": tiers, "coordinator": {"backend": "etcd", **safe}}))
    assert kvbm(["etcd", "ls", "--config", str(config)]) == 0
    assert engine in capsys.readouterr().out
    log.clear()
    # It forgets everybody's token.
    safe_server.kill()
    until(lambda: len(said(log, logging.WARNING)) == 2)
    safe_server.restart()
    until(lambda: len(said(log, logging.INFO)) == 2)
    assert len(log.records) == 4


def test_a_token_that_has_ended_is_replaced_in_silence(join, safe, safe_server, log):
    with FaultProxy(safe_server) as proxy:
        worker = join(0, settings={**safe, "endpoints": [proxy.endpoint.replace("http:", "https:")]})
        log.clear()
        # It forgets all tokens.
        safe_server.ctl(f"--user=root:{SECRET}", "auth", "disable")
        safe_server.ctl("auth", "enable")
        requests = proxy.requests
        until(lambda: proxy.requests > requests + 10)
        assert "listed" in repr(worker)
        assert log.records == []


@pytest.mark.parametrize(
    ("variables", "settings"),
    [
        ({"ETCD_AUTH_PASSWORD": f"{SECRET}-wrong"}, {}),
        ({"ETCD_AUTH_USERNAME": "", "ETCD_AUTH_PASSWORD": ""}, {}),
        ({}, {"prefix": "/elsewhere"}),
    ],
)
def test_who_is_refused_is_told_without_the_password(join, safe, monkeypatch, caplog, variables, settings):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CoordinatorError, match=r"refuses worker 0 .*check ETCD_AUTH_USERNAME") as raised:
        join(0, settings={**safe, **settings})
    causes = []
    error = raised.value
    while error is not None:
        causes.append(repr(error))
        error = error.__cause__ or error.__context__
    assert SECRET not in caplog.text + "".join(causes)


def test_a_server_that_nobody_vouches_for_is_not_spoken_to(join, safe, safe_server, log):
    worker = join(0, settings={**safe, "ca_file": None})
    assert "adrift" in repr(worker)
    assert len(said(log, logging.WARNING)) == 1


def test_no_secret_in_what_is_printed(safe, make):
    access = read_access(convert(safe, EtcdConfig, "coordinator"))
    assert access.password == SECRET
    assert SECRET not in f"{access!r} {access} {make(**safe)!r}"
    assert "PRIVATE" not in repr(access)


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"endpoint": []}, "unknown key 'endpoint'; did you mean 'endpoints'"),
        ({"endpoints": ["http://a:1", "https://b:1"]}, "endpoints: number 1 of 2; write http://host:port"),
        ({"endpoints": ["http://a:1", f"http://u:{SECRET}@b:1"]}, "endpoints: number 2 of 2"),
        ({"endpoints": ["a"]}, "endpoints: number 1 of 1"),
        ({"prefix": "kvbm"}, "prefix: 'kvbm'; write a path like /kvbm"),
        ({"lease_s": 1}, "lease_s: 1; write at least 2"),
        ({"timeout_s": 0}, "timeout_s: 0.0; write seconds above 0"),
        ({"init_timeout_s": -1}, "init_timeout_s: -1.0; write seconds above 0"),
        ({"endpoints": ["https://a:1"], "ca_file": "/no/such"}, "ca_file: /no/such: No such file"),
        ({"ca_file": __file__}, "the endpoints begin with http://; write https://"),
        ({"endpoints": ["https://a:1"], "key_file": __file__}, "cert_file and key_file: only one"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(settings, message):
    with pytest.raises(ConfigError) as raised:
        Registry().coordinator({"backend": "etcd", **settings})
    assert message in str(raised.value)
    assert SECRET not in str(raised.value)


def test_the_environment_is_read_where_no_setting_is(monkeypatch):
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://a:1,b:2")
    monkeypatch.setenv("DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS", "7.5")
    assert read_access(EtcdConfig()).targets == ("a:1", "b:2")
    assert init_timeout_s(EtcdConfig()) == 7.5
    assert read_access(EtcdConfig(endpoints=("http://c:3",))).targets == ("c:3",)
    assert init_timeout_s(EtcdConfig(init_timeout_s=3)) == 3
    monkeypatch.setenv("ETCD_AUTH_CA", __file__)
    assert read_access(EtcdConfig(endpoints=("https://c:3",))).ca == Path(__file__).read_bytes()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS", "soon", "'soon'; write seconds above 0, like 120"),
        ("DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS", "0", "'0'; write seconds above 0"),
        ("ETCD_AUTH_PASSWORD", SECRET, "ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD: only one"),
        ("ETCD_ENDPOINTS", f"http://u:{SECRET}@a:1", "endpoints: number 1 of 1"),
    ],
)
def test_a_wrong_variable_is_refused(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as raised:
        Registry().coordinator({"backend": "etcd"})
    assert SECRET not in str(raised.value)


def test_the_stack_has_a_key_for_it():
    entry = {"backend": "etcd", "prefix": "/x"}
    tiers = [{"backend": "memory", "capacity": 1}]
    assert load_config({"tiers": tiers, "coordinator": entry}).coordinator == entry
    assert load_config({"tiers": tiers}).coordinator is None
    made = Registry().coordinator(entry)
    assert isinstance(made, Coordinator)
    made.close()


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"endpoints": []}, ConfigError, "coordinator: write a mapping with a 'backend'"),
        ({"backend": "etdc"}, BackendError, "unknown backend 'etdc'; did you mean 'etcd'"),
        ({"backend": "cpu"}, BackendError, "backend 'cpu' of kvbm-core .* makes no coordinator"),
    ],
)
def test_a_coordinator_that_is_none_is_refused(entry, error, message):
    with pytest.raises(error, match=message):
        Registry().coordinator(entry)


def test_etcd_is_no_tier():
    with pytest.raises(BackendError, match="offers no such backend"):
        Registry().backend("etcd")


# The command line.


def test_a_table_of_engines(join, etcd_server, engine, capsys):
    join(metrics="http://host:8000/metrics", versions={"kvbm-core": "0.1.0"})
    join(0, settings={"metrics_address": "http://else:1/metrics"}, versions={"kvbm-core": "0.1.0"})
    assert kvbm(["etcd", "ls", "--endpoint", etcd_server.endpoint]) == 0
    heading, leader, worker = (line.split("  ") for line in capsys.readouterr().out.splitlines())
    assert heading[0] == "ENGINE"
    assert [engine, "leader", "http://host:8000/metrics"] == [c.strip() for c in leader if c.strip()][:2] + [
        c for c in leader if c.startswith("http")
    ]
    for cell in ("worker 0 of 2", "host0", "aaaaaaaaaaaa", "cpu 8GiB", "kvbm-core 0.1.0"):
        assert cell in "  ".join(worker)
    assert "http://else:1/metrics" in worker


def test_nobody_is_registered(etcd_server, capsys):
    assert kvbm(["etcd", "ls", "--endpoint", etcd_server.endpoint, "--prefix", "/nobody"]) == 0
    assert capsys.readouterr().out == "no engine is registered under /nobody\n"
    assert listed(capsys, etcd_server, "--prefix", "/nobody") == {}


def test_what_is_not_ours_is_left_out(etcd_server, capsys):
    etcd_server.ctl("put", "/strange/v1/x/leader", "something")
    etcd_server.ctl("put", "/strange/v1/x/0", '{"engine": 1}')
    assert listed(capsys, etcd_server, "--prefix", "/strange") == {}


def test_an_etcd_that_is_away_is_an_error_of_the_command(capsys):
    assert kvbm(["etcd", "ls", "--endpoint", "127.0.0.1:9"]) == ExitCode.UNUSABLE
    assert "etcd at http://127.0.0.1:9: " in capsys.readouterr().err
    assert kvbm(["etcd", "ls", "--endpoint", "nowhere"]) == ExitCode.WRONG
    assert "endpoints: number 1 of 1; write http://host:port" in capsys.readouterr().err


def test_a_file_without_a_coordinator_is_an_error_of_the_command(tmp_path, capsys):
    file = tmp_path / "kvbm.yaml"
    file.write_text("tiers: [{backend: cpu, capacity: 1GiB}]")
    assert kvbm(["etcd", "ls", "--config", str(file)]) == ExitCode.WRONG
    assert "has no coordinator with 'backend: etcd'" in capsys.readouterr().err


def test_watching(join, etcd_server, engine):
    worker = join(0)
    command = [sys.executable, "-m", "kvbm_etcd", "watch", "--interval", "0.1", "--endpoint"]
    with subprocess.Popen(
        [*command, etcd_server.endpoint],
        stdout=subprocess.PIPE,
        text=True,
        # What a shell starts beside itself ignores it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as watch:
        try:
            assert f"+ {engine} worker 0 (host0" in watch.stdout.readline()
            join(1)
            assert f"+ {engine} worker 1 (host1" in watch.stdout.readline()
            worker.close()
            assert f"- {engine} worker 0 (host0" in watch.stdout.readline()
            etcd_server.kill()
            assert "? etcd is away: " in watch.stdout.readline()
            etcd_server.restart()
            assert "? etcd is back" in watch.stdout.readline()
        finally:
            watch.send_signal(signal.SIGINT)
    assert watch.returncode == 0


def test_watching_as_json(join, etcd_server, engine):
    join(0)
    command = [
        sys.executable,
        "-m",
        "kvbm_cli",
        "etcd",
        "watch",
        "--json",
        "--endpoint",
        etcd_server.endpoint,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        try:
            seen = published("etcd watch", watch.stdout.readline())
            while seen["engine"] != engine:  # One of another test may be listed until its lease ends.
                seen = published("etcd watch", watch.stdout.readline())
        finally:
            watch.terminate()
    assert (seen["sign"], seen["engine"], seen["rank"]) == ("+", engine, 0)
    assert watch.returncode == 0


ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"


def put(etcd_server, key, **facts):
    """Write an entry as a stranger might."""
    entry = {
        "engine": "e", "rank": 0, "world_size": 1, "host": "h", "pid": 1, "instance": key,
        "since": "2026-11-01T00:00:00Z", "shared_namespace": "", "stack": ["cpu"],
    }  # fmt: skip
    etcd_server.ctl("put", f"/odd/v1/e/{key}", json.dumps({**entry, **facts}))


def test_what_others_wrote_cannot_command_the_terminal(etcd_server, capsys):
    put(
        etcd_server,
        "0",
        engine=f"e{ESCAPE}",
        host=ESCAPE,
        stack=[ESCAPE],
        versions={ESCAPE: ESCAPE},
        metrics=ESCAPE,
    )
    put(etcd_server, "1", since="2026-11-01T00:00:00")  # Without a zone: not ours.
    put(etcd_server, "2", since=5)
    etcd_server.ctl("put", "/odd/v1/e/3", "[" * 100_000)
    etcd_server.ctl("put", "/odd/v1/e/\udcff".encode("utf-8", "surrogateescape"), "x")
    for arguments in (["ls"], ["ls", "--json"]):
        assert kvbm(["etcd", *arguments, "--prefix", "/odd", "--endpoint", etcd_server.endpoint]) == 0
        printed = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in printed)
        assert "x1b" in printed
    etcd_server.ctl("del", "/odd/", "--prefix")


def test_what_others_wrote_cannot_command_the_log(join, etcd_server, engine):
    from urllib.parse import quote

    leader = {
        "engine": engine,
        "world_size": 1,
        "host": ESCAPE,
        "pid": 1,
        "instance": "x",
        "since": "2026-11-01T00:00:00Z",
    }
    etcd_server.ctl("put", f"/kvbm/v1/{quote(engine, safe='')}/leader", json.dumps(leader))
    with pytest.raises(CoordinatorError, match=r"lists the leader \(\\x1b\]0;owned") as raised:
        join(world_size=1)
    assert str(raised.value).isprintable()
    etcd_server.ctl("del", "/kvbm/", "--prefix")


# ---- kvbm check


@pytest.fixture
def check(capsys):
    def run(status=ExitCode.DONE, **settings):
        config = {"tiers": [{"backend": "cpu", "capacity": "8MiB"}],
                  "coordinator": {"backend": "etcd", "timeout_s": 0.5, **settings}}  # fmt: skip
        capsys.readouterr()
        assert kvbm(["check", json.dumps(config), "--json", "--block-bytes", "64KiB"]) == status
        return published("check", capsys.readouterr().out)["coordinator"]

    return run


def test_check_registers_a_key_and_takes_it_back(check, join, etcd_server):
    join()
    found = check(endpoints=[etcd_server.endpoint], prefix="/kvbm")
    assert re.fullmatch(
        r"etcd 3\.\d+\.\d+; 1 of 1 endpoints answer, the last 0 entries behind; a key was written, read and "
        r"deleted in \d+\.\d ms; \d+ engines registered",
        found["detail"],
    )
    assert (found["problem"], found["warnings"]) == (None, [])
    assert ".check" not in etcd_server.ctl("get", "/kvbm", "--prefix", "--keys-only")


def test_check_names_endpoints_that_are_away(check, etcd_server):
    found = check(endpoints=["http://127.0.0.1:9", etcd_server.endpoint])
    assert "1 of 2 endpoints answer" in found["detail"]
    [said] = found["warnings"]
    assert said.startswith("etcd at 127.0.0.1:9: ")
    assert said.endswith("start it, or take it out of 'endpoints'")
    etcd_server.stop()
    try:
        found = check(ExitCode.MEND, endpoints=[etcd_server.endpoint])
    finally:
        etcd_server.resume()
    assert "no endpoint answers" in found["problem"]
    assert "no answer within 0.5 s" in found["problem"]
    assert "start etcd there, or write its 'endpoints'" in found["problem"]


def test_check_says_who_may_not_write(check, safe, monkeypatch):
    assert check(timeout_s=5, **safe)["problem"] is None
    found = check(ExitCode.MEND, timeout_s=5, prefix="/elsewhere", **safe)
    assert "it refuses the user of ETCD_AUTH_USERNAME" in found["problem"]
    assert "grant readwrite below /elsewhere/v1/" in found["problem"]
    monkeypatch.setenv("ETCD_AUTH_PASSWORD", f"{SECRET}-wrong")
    found = check(ExitCode.MEND, timeout_s=5, **safe)
    assert "it refuses the user of ETCD_AUTH_USERNAME" in found["problem"]
    assert SECRET not in found["problem"]


def test_check_of_a_wrong_setting(check):
    found = check(ExitCode.MEND, prefix="kvbm")
    assert "prefix: 'kvbm'; write a path like /kvbm" in found["problem"]
