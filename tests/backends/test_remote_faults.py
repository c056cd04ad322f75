"""What the real clients of the remote tier make of faults, and what the log then says to do."""

import contextlib
import os
import resource
import socket
import sys
import time

import pytest
from answering import Answer, AnsweringServer, error
from certificates import make_certificates
from test_cpu import BLOCK, NAMESPACE, content, key, load, lookup, region, run, store

from kvbm_core.errors import TierOpenError
from kvbm_core.tier import Op, Outcome, Reason, TierContext, Transfer
from kvbm_remote import RemoteConfig, RemoteTier
from kvbm_remote._clients import check

CLIENTS = ["obstore", "fsspec"]
TOKEN = "T0K3NM4RK3R"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [*os.environ]:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AK",
        "AWS_SECRET_ACCESS_KEY": "SK",
        "AWS_SESSION_TOKEN": TOKEN,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def server():
    with AnsweringServer() as server:
        yield server


@pytest.fixture
def open_tier():
    with contextlib.ExitStack() as stack:

        def open_(endpoint, client="auto", url="s3://bucket/kv", options=None, **settings):
            given = {"endpoint_url": endpoint} if url.startswith("s3") else {}
            settings = {"timeout_s": 5.0, "connect_timeout_s": 2.0, "attempts": 1, **settings}
            config = RemoteConfig(
                url=url, client=client, storage_options={**given, **(options or {})}, **settings
            )
            tier = RemoteTier(config, TierContext(NAMESPACE, BLOCK))
            stack.callback(tier.close)
            return tier

        yield open_


def failure(tier, op, n=1):
    """Give the reason and the words of one operation that fails, and the bytes it leaves alone."""
    target = None if op is Op.LOOKUP else region(content(n) if op is Op.STORE else b"\xaa" * BLOCK)
    end = run(tier, [Transfer(1, op, key(n), target)])[1]
    assert end.outcome is Outcome.FAILED, end
    assert op is not Op.LOAD or bytes(target.view()) == b"\xaa" * BLOCK
    return end.reason, end.detail


ANSWERS = {
    "ExpiredToken": (400, "credentials expired", "renew AWS_SESSION_TOKEN"),
    "InvalidAccessKeyId": (403, "access key unknown", "correct AWS_ACCESS_KEY_ID"),
    "SignatureDoesNotMatch": (403, "signature refused", "correct AWS_SECRET_ACCESS_KEY"),
    "RequestTimeTooSkewed": (403, "clock differs", "set this machine's clock"),
    "AuthorizationHeaderMalformed": (400, "redirected", "set AWS_REGION"),
    "PermanentRedirect": (301, "redirected", "set AWS_REGION"),
    "AccessDenied": (403, "access denied", "get, put, delete and list"),
    "NoSuchBucket": (404, "no such bucket or folder", "make the bucket, or correct 'url'"),
    "SlowDown": (503, "throttled", "lower 'max_in_flight'"),
    "InternalError": (500, "server error", "look into the server's log"),
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("code", ANSWERS)
def test_what_the_store_refuses_is_said_with_its_remedy(server, open_tier, client, code, caplog):
    status, name, remedy = ANSWERS[code]
    region_ = "<Region>eu-north-1</Region>" if name == "redirected" else ""
    server.answer = Answer(
        status, error(code, region_), {"x-amz-bucket-region": "eu-north-1"} if region_ else {}
    )
    tier = open_tier(server.endpoint, client)
    for op in (Op.LOAD, Op.STORE):
        reason, said = failure(tier, op)
        assert reason is Reason.ERROR
        assert said.startswith(f"{name} (")
        assert remedy in said
        # Of a redirect that names no place obstore tells neither the number nor the document.
        if (client, status) != ("obstore", 301):
            assert f"status {status}" in said
            assert "eu-north-1" in said or not region_
    lines = [record.getMessage() for record in caplog.records if record.name == "kvbm_remote"]
    assert len([line for line in lines if f"failed: {name} (" in line]) == 1
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(("client", "url"), [("obstore", ""), ("fsspec", ""), ("auto", "http")])
def test_a_redirect_takes_nothing_to_another_host(server, open_tier, client, url, status):
    with AnsweringServer() as stranger:
        stranger.answer = Answer(200, bytes(BLOCK))

        def redirect(request):
            return Answer(status, b"", {"Location": f"http://localhost:{stranger.port}{request.path}"})

        server.answer = redirect
        where = f"{server.endpoint}/kv" if url else "s3://bucket/kv"
        headers = {"client_kwargs": {"headers": {"X-Api-Key": TOKEN}}} if url else {}
        tier = open_tier(server.endpoint, client, where, headers)
        for op in (Op.LOAD, Op.LOOKUP) if url else (Op.LOAD, Op.LOOKUP, Op.STORE):
            reason, said = failure(tier, op)
            assert reason is Reason.ERROR
            assert said.startswith("redirected (")
            assert "set AWS_REGION" in said
            assert "'endpoint_url'" in said
        tier.discard([key(1)])
        tier.close()
        assert server.requests
        assert stranger.requests == []


@pytest.mark.parametrize("client", CLIENTS)
def test_a_redirect_within_the_host_is_followed(server, open_tier, client):
    def redirect(request):
        if "moved" in request.path:
            return Answer(200, content(1))
        return Answer(307, b"", {"Location": f"{server.endpoint}/moved{request.path}"})

    server.answer = redirect
    assert load(open_tier(server.endpoint, client), 1)[1] == content(1)


def test_obstore_gets_a_role_s_credentials_and_keeps_them_from_another_host(server, open_tier, monkeypatch):
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_EC2_METADATA_DISABLED",
    ):
        monkeypatch.delenv(name)
    role = (
        f'{{"AccessKeyId": "AK", "SecretAccessKey": "SK", "Token": "{TOKEN}", "Code": "Success", '
        '"Expiration": "2099-01-01T00:00:00Z", "LastUpdated": "2024-01-01T00:00:00Z", "Type": "AWS-HMAC"}'
    ).encode()
    with AnsweringServer() as metadata:
        metadata.answer = lambda request: Answer(200, role if request.path.endswith("/role") else b"role")
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://localhost:{metadata.port}")
        server.answer = Answer(200, content(1))
        assert load(open_tier(server.endpoint, "obstore"), 1)[1] == content(1)
        assert {request.headers["X-Amz-Security-Token"] for request in server.requests} == {TOKEN}


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
@pytest.mark.parametrize("client", CLIENTS)
def test_the_endpoint_may_come_from_the_environment(server, open_tier, monkeypatch, name, client):
    monkeypatch.setenv(name, server.endpoint)
    server.answer = Answer(200, content(1))
    tier = RemoteTier(
        RemoteConfig(url="s3://bucket/kv", client=client, attempts=1), TierContext(NAMESPACE, BLOCK)
    )
    try:
        assert load(tier, 1)[1] == content(1)
    finally:
        tier.close()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_conflict_is_tried_again_and_never_counts_as_stored(server, open_tier, client):
    conflict = Answer(409, error("ConditionalRequestConflict"))
    tier = open_tier(server.endpoint, client, attempts=3)
    server.answer = lambda request: conflict if request.method == "PUT" else Answer(404, error("NoSuchKey"))
    reason, said = failure(tier, Op.STORE)
    assert reason is Reason.BUSY
    assert "another engine writes the same block just now" in said
    puts = [request for request in server.requests if request.method == "PUT"]
    assert len(puts) == 3
    assert {request.headers["If-None-Match"] for request in puts} == {"*"}
    assert lookup(tier, 1) is Outcome.MISSING
    conflicts = iter([conflict])
    server.answer = lambda request: next(conflicts, Answer())
    assert store(tier, 2).outcome is Outcome.DONE


@pytest.mark.parametrize("client", CLIENTS)
def test_what_is_there_counts_as_stored(server, open_tier, client):
    server.answer = Answer(412, error("PreconditionFailed", "<Condition>If-None-Match</Condition>"))
    assert store(open_tier(server.endpoint, client), 1).outcome is Outcome.DONE


@pytest.mark.parametrize(("client", "url"), [("obstore", ""), ("fsspec", ""), ("auto", "http")])
def test_of_an_object_that_is_too_long_hardly_more_is_read_than_a_block_has(server, open_tier, client, url):
    # It does as servers do that know no ranges: it sends everything.
    def planted(request):
        if "list-type" in request.path:
            return Answer(200, b"<ListBucketResult></ListBucketResult>")
        return Answer(200, nbytes=1 << 28, endless=True)

    server.answer = planted
    tier = open_tier(server.endpoint, client, f"{server.endpoint}/kv" if url else "s3://bucket/kv")
    for n in range(3):
        assert failure(tier, Op.LOAD, n)[0] is Reason.CORRUPT
        assert failure(tier, Op.LOOKUP, n)[0] is Reason.CORRUPT
    tier.close()
    # Beside the block, what the sockets' buffers hold. The first look at the store counts, too.
    assert server.sent_bytes < 4 * (8 << 20)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_body_that_is_cut_short_says_so(server, open_tier, client):
    server.answer = Answer(200, content(1)[: BLOCK // 2], nbytes=BLOCK)
    reason, said = failure(open_tier(server.endpoint, client), Op.LOAD)
    assert reason is Reason.ERROR
    assert said.startswith("answer cut short (")
    assert "look into the logs of the server and of proxies" in said


@pytest.mark.parametrize("client", CLIENTS)
def test_an_authority_that_is_not_known_is_named_and_can_be_given(tmp_path, open_tier, client, monkeypatch):
    folder = make_certificates(tmp_path)
    with AnsweringServer(folder) as server:
        server.answer = Answer(200, content(1))
        reason, said = failure(open_tier(server.endpoint, client), Op.LOAD)
        assert reason is Reason.ERROR
        assert said.startswith("certificate refused (")
        assert "set AWS_CA_BUNDLE" in said
        assert server.requests == []
        monkeypatch.setenv("AWS_CA_BUNDLE", str(folder / "ca.pem"))
        assert load(open_tier(server.endpoint, client), 1)[1] == content(1)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_bundle_that_cannot_be_used_is_named_at_the_check(tmp_path, client, monkeypatch):
    config = RemoteConfig(url="s3://bucket/kv", client=client)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(TierOpenError, match=r"AWS_CA_BUNDLE: \S+/none.pem cannot be read \(No such file"):
        check(config)
    (tmp_path / "none.pem").write_text("no certificate")
    with pytest.raises(TierOpenError, match=r"AWS_CA_BUNDLE: \S+/none.pem has no certificate in it"):
        check(config)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_that_is_not_there_says_which_way_it_is_not(open_tier, client):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
        reason, said = failure(open_tier(closed, client), Op.LOAD)
    assert reason is Reason.ERROR
    assert said.startswith("connection refused (")
    assert "nothing listens there" in said
    reason, said = failure(open_tier("http://no.such.host.invalid", client), Op.LOAD)
    assert reason is Reason.ERROR
    assert said.startswith("unknown host (")
    assert "name resolution" in said


@pytest.mark.parametrize("client", CLIENTS)
def test_a_silent_server_is_a_timeout(open_tier, client):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        tier = open_tier(f"http://127.0.0.1:{silent.getsockname()[1]}", client, timeout_s=0.5)
        reason, said = failure(tier, Op.LOAD)
    assert reason is Reason.DEADLINE
    assert said.startswith("timeout (")
    assert "raise 'timeout_s', or check the network" in said


def test_a_proxy_is_left_to_s3fs_and_named_where_it_does_not_answer(server, open_tier, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HTTP_PROXY", f"http://user:{TOKEN}@127.0.0.1:{taken.getsockname()[1]}")
        tier = open_tier(server.endpoint)
        assert "by fsspec" in tier.capabilities.detail
        reason, said = failure(tier, Op.LOAD)
    assert reason is Reason.ERROR
    assert said.startswith("proxy (")
    assert "correct HTTPS_PROXY or HTTP_PROXY" in said
    assert TOKEN not in said
    with AnsweringServer() as proxy:
        proxy.answer = Answer(407, b"", {"Proxy-Authenticate": "Basic"})
        monkeypatch.setenv("HTTP_PROXY", proxy.endpoint)
        assert failure(open_tier(server.endpoint), Op.LOAD)[1].startswith("proxy (")
        with pytest.raises(TierOpenError, match=r"HTTP_PROXY: obstore is not used with a proxy; .*NO_PROXY"):
            open_tier(server.endpoint, "obstore")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        server.answer = Answer(200, content(1))
        tier = open_tier(server.endpoint)
        assert "by obstore" in tier.capabilities.detail
        assert load(tier, 1)[1] == content(1)


@pytest.mark.parametrize("client", CLIENTS)
def test_no_credentials_are_said(server, open_tier, client, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with AnsweringServer() as metadata:
        metadata.answer = Answer(404)
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", metadata.endpoint)
        reason, said = failure(open_tier(server.endpoint, client), Op.LOAD)
    assert reason is Reason.ERROR
    assert said.startswith("no credentials (")
    assert "set AWS_ACCESS_KEY_ID" in said
    assert server.requests == []


@contextlib.contextmanager
def no_descriptors():
    """Leave this process none to open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256 + len(os.listdir("/proc/self/fd")), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(2))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("client", "url"), [("obstore", "s3"), ("fsspec", "s3"), ("auto", "file")])
def test_out_of_descriptors_is_no_word_about_the_server(tmp_path, server, open_tier, client, url):
    server.answer = Answer(200, content(1), {"Connection": "close"})
    tier = open_tier(server.endpoint, client, f"file://{tmp_path}/kv" if url == "file" else "s3://bucket/kv")
    store(tier, 1)
    assert load(tier, 1)[1] == content(1)
    give_up_s = time.monotonic() + 20
    with no_descriptors():
        reason, said = failure(tier, Op.LOAD)
        while not said.startswith("out of descriptors") and time.monotonic() < give_up_s:
            reason, said = failure(tier, Op.LOAD)
    assert reason is Reason.ERROR
    assert said.startswith("out of descriptors (")
    assert "raise `ulimit -n`" in said
    assert load(tier, 1)[1] == content(1)


@pytest.mark.parametrize("hidden", ["", "s3fs"])
@pytest.mark.parametrize("client", ["auto", *CLIENTS])
def test_a_misspelt_option_is_named_with_the_right_one(client, hidden, monkeypatch):
    if hidden:
        monkeypatch.setitem(sys.modules, "s3fs", None)
        if client == "fsspec":
            return
    options = {"endpont_url": f"http://{TOKEN}", "secert": TOKEN}
    with pytest.raises(
        TierOpenError, match=r"'endpont_url', write 'endpoint_url'; 'secert', write 'secret'"
    ) as caught:
        check(RemoteConfig(url="s3://bucket/kv", client=client, storage_options=options))
    assert TOKEN not in str(caught.value)
    assert "not installed" not in str(caught.value)


def test_a_misspelt_option_of_another_file_system_is_named():
    with pytest.raises(TierOpenError, match=r"fsspec has no 'client_kwarg', write 'client_kwargs'"):
        check(RemoteConfig(url="http://host/kv", storage_options={"client_kwarg": {}}))
