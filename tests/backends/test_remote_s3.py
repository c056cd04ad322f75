"""The remote tier on a real S3 server: sharing, faults of the server and the network, and recovery."""

import contextlib
import json
import logging
import os
import threading
import time

import pytest
from servers import FaultProxy
from test_cpu import BLOCK, NAMESPACE, content, key, load, lookup, region, run, store

from kvbm_cli._app import run as kvbm
from kvbm_core.command import ExitCode
from kvbm_core.tier import Op, Outcome, Reason, TierContext, Transfer
from kvbm_remote import RemoteConfig, RemoteTier

CLIENTS = ["obstore", "fsspec"]
QUICK = {"timeout_s": 2.0, "connect_timeout_s": 1.0}


@pytest.fixture
def server(s3_server, monkeypatch):
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def proxy(server):
    with FaultProxy(server) as proxy:
        yield proxy


@pytest.fixture
def open_tier(server, request):
    with contextlib.ExitStack() as stack:

        def open_(endpoint=server.endpoint, bucket=server.bucket, nbytes=BLOCK, options=None, **settings):
            # Each test has a folder of its own.
            config = RemoteConfig(
                url=f"s3://{bucket}/{abs(hash(request.node.nodeid))}",
                storage_options={"endpoint_url": endpoint, **(options or {})},
                **{**QUICK, **settings},
            )
            tier = RemoteTier(config, TierContext(NAMESPACE, nbytes))
            stack.callback(tier.close)
            return tier

        yield open_


def ends(tier, first=100):
    """Give {operation: (outcome, reason)} of one operation each; they end in bounded time."""
    target = region(b"\xaa" * BLOCK)
    transfers = [
        Transfer(1, Op.STORE, key(first), region(content(first))),
        Transfer(2, Op.LOAD, key(1), target),
        Transfer(3, Op.LOOKUP, key(first + 1)),
    ]
    done = run(tier, transfers)
    if done[2].outcome is not Outcome.DONE:
        assert bytes(target.view()) == b"\xaa" * BLOCK
    return {t.op: (done[t.ticket].outcome, done[t.ticket].reason) for t in transfers}


def until(true, timeout_s=60):
    give_up_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.1)


@pytest.mark.parametrize("client", CLIENTS)
def test_blocks_are_found_again_by_lookup_and_load(open_tier, client):
    tier = open_tier(client=client)
    assert lookup(tier, 1) is Outcome.MISSING
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    assert store(tier, 1).outcome is Outcome.DONE
    tier.close()
    tier = open_tier(client=client)
    assert lookup(tier, 1) is Outcome.DONE
    assert load(tier, 1)[1] == content(1)
    target = region(b"\xaa" * BLOCK)
    assert run(tier, [Transfer(1, Op.LOAD, key(2), target)])[1].outcome is Outcome.MISSING
    assert bytes(target.view()) == b"\xaa" * BLOCK


def test_the_client_is_obstore_unless_an_option_or_a_profile_needs_the_other(open_tier, monkeypatch):
    assert "by obstore" in open_tier().capabilities.detail
    assert "by fsspec" in open_tier(options={"default_block_size": 1 << 20}).capabilities.detail
    monkeypatch.setenv("AWS_PROFILE", "somebody")
    assert "by fsspec" in open_tier(client="auto").capabilities.detail


def test_engines_with_different_clients_share_a_store(open_tier):
    one, two = open_tier(client="obstore"), open_tier(client="fsspec")
    for n in range(6):
        store((one, two)[n % 2], n)
    for n in range(6):
        assert load((two, one)[n % 2], n)[1] == content(n)


@pytest.mark.parametrize("client", CLIENTS)
def test_what_is_there_is_not_written_again(server, open_tier, client):
    store(open_tier(client=client), 1)
    with contextlib.closing(server._client()) as bare:

        def dates():
            listed = bare.list_objects_v2(Bucket=server.bucket, Prefix=folder)["Contents"]
            return {each["Key"]: each["LastModified"] for each in listed}

        folder = open_tier(client=client)._config.url.split("/", 3)[3]
        before = dates()
        time.sleep(1.1)
        assert store(open_tier(client=client), 1).outcome is Outcome.DONE
        assert dates() == before


@pytest.mark.parametrize("client", CLIENTS)
def test_nobody_reads_half_a_block_that_is_overwritten(open_tier, client):
    nbytes = 1 << 20
    writer, reader = (open_tier(client=client, nbytes=nbytes, timeout_s=30.0) for _ in range(2))
    whole = [region(letter * nbytes, nbytes) for letter in (b"a", b"b")]
    run(writer, [Transfer(1, Op.STORE, key(1), whole[0])])
    stop, torn, loads = threading.Event(), [], 0

    def overwrite():
        n = 0
        while not stop.is_set():
            n += 1
            # Forgotten, so that it is written again although it is there; nothing is deleted.
            writer._gone[key(1)] = None
            writer._seen.clear()
            run(writer, [Transfer(n, Op.STORE, key(1), whole[n % 2])])

    thread = threading.Thread(target=overwrite)
    thread.start()
    target = region(None, nbytes)
    while loads < 60:
        assert run(reader, [Transfer(1, Op.LOAD, key(1), target)])[1].outcome is Outcome.DONE
        got = bytes(target.view())
        torn += [] if got in (b"a" * nbytes, b"b" * nbytes) else [got]
        loads += 1
    stop.set()
    thread.join()
    assert torn == []


@pytest.mark.parametrize("client", CLIENTS)
def test_objects_of_many_lengths_are_loaded_into_regions_that_are_longer(server, open_tier, client):
    writer = open_tier(client=client)
    lengths = (1, 100, 4096, 4097, BLOCK - 1, BLOCK)
    for nbytes in lengths:
        assert store(writer, nbytes, nbytes=nbytes).outcome is Outcome.DONE
    tier = open_tier(client=client)
    for nbytes in lengths:
        end, got = load(tier, nbytes)
        assert (end.outcome, end.nbytes) == (Outcome.DONE, nbytes)
        assert got == content(nbytes, nbytes) + b"\xaa" * (BLOCK - nbytes)
        assert run(open_tier(client=client), [Transfer(1, Op.LOOKUP, key(nbytes))])[1].nbytes == nbytes
    assert load(tier, 4097, nbytes=4096)[0].reason is Reason.CORRUPT


@pytest.mark.parametrize("client", CLIENTS)
def test_an_object_that_is_too_long_is_corrupt_and_is_mended_for_all(server, open_tier, client):
    tier = open_tier(client=client)
    store(tier, 1)
    path = f"{tier._config.url.split('/', 3)[3]}/{tier._path(key(1))}"
    with contextlib.closing(server._client()) as bare:
        bare.put_object(Bucket=server.bucket, Key=path, Body=b"l" * (BLOCK + 1))
    end, _ = load(tier, 1)
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.CORRUPT)
    tier.discard([key(1)])
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    until(lambda: load(open_tier(client=client), 1)[0].outcome is Outcome.MISSING)
    assert store(tier, 1).outcome is Outcome.DONE
    assert load(open_tier(client=client), 1)[1] == content(1)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_corrupt_block_that_could_not_be_deleted_is_written_again(server, open_tier, proxy, client, caplog):
    store(open_tier(), 1)
    tier = open_tier(proxy.endpoint, client=client)
    path = f"{tier._config.url.split('/', 3)[3]}/{tier._path(key(1))}"
    with contextlib.closing(server._client()) as bare:
        bare.put_object(Bucket=server.bucket, Key=path, Body=b"")
    assert load(tier, 1)[0].reason is Reason.CORRUPT
    proxy.mode = "refuse"
    tier.discard([key(1)])
    until(lambda: not tier._deleting)
    assert "connection refused (" in caplog.text
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    proxy.mode = "pass"
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    assert store(tier, 1).outcome is Outcome.DONE
    assert load(open_tier(), 1)[1] == content(1)


FAULTS = {
    "503": Reason.ERROR,
    "429": Reason.ERROR,
    "403": Reason.ERROR,
    "refuse": Reason.ERROR,
    "stall": Reason.DEADLINE,
}


@pytest.mark.parametrize("client", CLIENTS)
def test_each_fault_of_the_server_has_its_reason_and_recovery_needs_no_restart(
    open_tier, proxy, client, caplog
):
    tier = open_tier(proxy.endpoint, client=client)
    store(tier, 1)
    for at, (mode, reason) in enumerate(FAULTS.items()):
        proxy.mode = mode
        assert set(ends(tier, 100 + 10 * at).values()) == {(Outcome.FAILED, reason)}, mode
        proxy.mode = "pass"
        assert load(tier, 1)[1] == content(1), mode
        assert store(tier, 200 + at).outcome is Outcome.DONE
    said = [record.getMessage() for record in caplog.records if record.name == "kvbm_remote"]
    kinds = ["throttled", "access denied", "connection refused", "timeout"]
    assert [sum(f" failed: {kind} (" in line for line in said) for kind in kinds] == [1, 1, 1, 1]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("mode", ["503", "429"])
def test_a_store_that_asks_for_fewer_requests_is_not_asked_again(open_tier, proxy, client, mode):
    tier = open_tier(proxy.endpoint, client=client, attempts=4)
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    until(lambda: not tier._runner._tasks)
    proxy.mode, before = mode, proxy.requests
    assert load(tier, 1)[0].outcome is Outcome.FAILED
    assert proxy.requests == before + 1


@pytest.mark.parametrize("client", CLIENTS)
def test_a_response_that_is_cut_off_is_never_done(open_tier, proxy, client):
    tier = open_tier(proxy.endpoint, client=client)
    store(tier, 1)
    proxy.mode = "cut"
    target = region(b"\xaa" * BLOCK)
    end = run(tier, [Transfer(1, Op.LOAD, key(1), target)])[1]
    assert end.outcome is Outcome.FAILED
    assert end.reason in (Reason.ERROR, Reason.DEADLINE)
    assert bytes(target.view()) == b"\xaa" * BLOCK
    proxy.mode = "pass"
    assert load(tier, 1)[1] == content(1)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_load_given_up_never_touches_the_region_again(open_tier, proxy, client):
    tier = open_tier(proxy.endpoint, client=client)
    store(tier, 1)
    proxy.mode = "stall"
    targets = [region(b"\xaa" * BLOCK) for _ in range(20)]
    deadline_s = time.monotonic() + 0.5
    loads = [Transfer(n, Op.LOAD, key(1), target, deadline_s) for n, target in enumerate(targets)]
    assert {end.reason for end in run(tier, loads).values()} == {Reason.DEADLINE}
    # Ended, not forgotten: nothing waits for the silent server any more.
    until(lambda: not tier._runner._tasks)
    proxy.mode = "pass"
    assert load(tier, 1)[1] == content(1)
    assert all(bytes(target.view()) == b"\xaa" * BLOCK for target in targets)


def test_a_store_given_up_writes_what_it_was_given_or_nothing(open_tier, proxy):
    tier = open_tier(proxy.endpoint)
    proxy.mode = "stall"
    source = region(content(1))
    late = Transfer(1, Op.STORE, key(1), source, time.monotonic() + 0.5)
    assert run(tier, [late])[1].reason is Reason.DEADLINE
    source.view()[:] = b"?" * BLOCK
    proxy.mode = "pass"
    time.sleep(0.5)
    end, got = load(open_tier(), 1)
    assert end.outcome is Outcome.MISSING or got == content(1)


def test_a_slow_server_is_no_fault(open_tier, proxy):
    tier = open_tier(proxy.endpoint, timeout_s=20.0)
    proxy.mode = "slow"
    assert store(tier, 1).outcome is Outcome.DONE
    assert load(tier, 1)[1] == content(1)


@pytest.mark.parametrize("client", CLIENTS)
def test_wrong_credentials_are_said_at_start_and_the_engine_goes_on(open_tier, client, caplog):
    wrong = {"key": "AKWRONG", "secret": "wrong"}
    tier = open_tier(client=client, options=wrong)
    until(lambda: "open failed: access key unknown (" in caplog.text)
    assert "correct AWS_ACCESS_KEY_ID" in caplog.text
    assert set(ends(tier).values()) == {(Outcome.FAILED, Reason.ERROR)}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_missing_bucket_is_said_at_start(open_tier, client, caplog):
    tier = open_tier(client=client, bucket="no-such-bucket")
    until(lambda: "open failed: no such bucket or folder (" in caplog.text)
    assert "make the bucket, or correct 'url'" in caplog.text
    end, _ = load(tier, 1)
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.ERROR)


@pytest.mark.parametrize("client", CLIENTS)
def test_secrets_are_never_said(open_tier, proxy, client, caplog):
    marker = "S3CR3TM4RK3R"
    options = {"key": f"AK{marker}", "secret": f"SK{marker}", "token": f"TK{marker}"}
    with caplog.at_level(logging.DEBUG, "kvbm_remote"), caplog.at_level(logging.INFO):
        tier = open_tier(proxy.endpoint, client=client, options=options)
        for at, mode in enumerate(("pass", *FAULTS, "cut")):
            proxy.mode = mode
            ends(tier, 100 + 10 * at)
        assert marker not in repr(tier) + repr(tier.capabilities) + repr(tier._config) + repr(tier._store)
        tier.close()
    assert "access denied" in caplog.text
    assert marker not in caplog.text


@pytest.mark.parametrize("client", CLIENTS)
def test_an_engine_starts_while_the_store_is_down(open_tier, proxy, client):
    proxy.mode = "refuse"
    tier = open_tier(proxy.endpoint, client=client)
    assert set(ends(tier).values()) == {(Outcome.FAILED, Reason.ERROR)}
    proxy.mode = "pass"
    assert store(tier, 1).outcome is Outcome.DONE
    assert load(tier, 1)[1] == content(1)


def test_closing_while_the_server_is_silent_answers_everything(open_tier, proxy):
    tier = open_tier(proxy.endpoint, timeout_s=60.0)
    proxy.mode = "stall"
    tier.submit([Transfer(n, Op.LOAD, key(n), region()) for n in range(40)])
    tier.close()
    done = tier.poll()
    assert sorted(end.ticket for end in done) == list(range(40))
    assert {(end.outcome, end.reason) for end in done} == {(Outcome.FAILED, Reason.DEADLINE)}


def test_a_server_killed_under_load_costs_misses_and_comes_back_without_a_restart_here(server, open_tier):
    tiers = [open_tier(client=client) for client in CLIENTS]
    for tier in tiers:
        store(tier, 1)
        tier.submit([Transfer(n, Op.STORE, key((id(tier), n)), region(content(n))) for n in range(40)])
    server.kill()
    stored = [[] for _ in tiers]
    for tier, numbers in zip(tiers, stored, strict=True):
        done = []
        until(lambda tier=tier, done=done: done.extend(tier.poll()) or len(done) == 40)
        numbers += [end.ticket for end in done if end.outcome is Outcome.DONE]
        assert {end.reason for end in done} <= {Reason.NONE, Reason.ERROR, Reason.DEADLINE}
        assert load(tier, 1)[0].outcome is Outcome.FAILED
    server.restart()
    for tier, numbers in zip(tiers, stored, strict=True):
        until(lambda tier=tier: store(tier, 2).outcome is Outcome.DONE)
        assert load(tier, 2)[1] == content(2)
        for n in numbers:
            # The server lost what it had not written yet, or has it whole.
            end = run(tier, [Transfer(1, Op.LOAD, key((id(tier), n)), target := region())])[1]
            assert end.outcome is not Outcome.DONE or bytes(target.view()) == content(n)


def test_a_bucket_is_cleared_to_a_size_and_by_age(server, open_tier, capsys):
    tier = open_tier()
    for n in range(8):
        store(tier, n)

    def clear(*words):
        arguments = [
            "clear",
            tier._config.url,
            "--option",
            f"endpoint_url={server.endpoint}",
            "--json",
            *words,
        ]
        assert kvbm(arguments) == 0
        said = json.loads(capsys.readouterr().out)
        return sum(part["objects"] for part in said["parts"]), said["removed"]

    assert clear("--down-to", str(3 * BLOCK)) == (5, None)
    assert clear("--down-to", str(3 * BLOCK), "--yes") == (5, 5)
    other = open_tier(client="fsspec")
    assert sum(load(other, n)[0].outcome is Outcome.DONE for n in range(8)) == 3
    time.sleep(1.1)
    assert clear("--older-than", "1s", "--yes") == (3, 3)
    assert all(load(other, n)[0].outcome is Outcome.MISSING for n in range(8))


def test_clearing_without_permission_says_so(server, capsys, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3CR3TM4RK3R")
    words = ["--older-than", "1d", "--option", f"endpoint_url={server.endpoint}"]
    assert kvbm(["clear", f"s3://{server.bucket}/x", *words]) == ExitCode.UNUSABLE
    said = capsys.readouterr().err
    assert "signature refused" in said
    assert "S3CR3T" not in said
    assert os.environ["AWS_ACCESS_KEY_ID"] not in said


def test_the_command_tries_a_bucket_and_lists_it(server, open_tier, tmp_path, capsys):
    tier = open_tier()
    for n in range(5):
        store(tier, n)
    url, option = tier._config.url, f"endpoint_url={server.endpoint}"
    settings = {"backend": "remote", "url": url, "storage_options": {"endpoint_url": server.endpoint}}
    file = tmp_path / "kvbm.yaml"
    file.write_text(json.dumps({"tiers": [settings]}))

    def ask(*words):
        assert kvbm([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    [found] = ask("check", str(file), "--block-bytes", "64KiB")["tiers"]
    assert (found["tried_objects"], found["problem"]) == (64, None)
    # What was tried is gone, and what was there is there.
    for place in ([url, "--option", option], [str(file)]):
        [listed] = ask("inspect", *place)["namespaces"]
        assert (listed["namespace"], listed["objects"], listed["rank"]) == (NAMESPACE.hex(), 5, 0)
