"""Every client library of the remote tier against servers that mean it ill.

The libraries are the real ones; those that are not installed are skipped by name. The servers are small and
say what is written here, because no real store plants objects or sends its clients away on request. Where a
real store is needed, see `test_remote_s3.py`.
"""

import contextlib
import gc
import http.server
import importlib.util
import os
import re
import threading
import warnings

import pytest
from test_cpu import BLOCK, NAMESPACE, key, load, run, store

from kvbm_core.tier import Op, Outcome, Reason, TierContext, Transfer
from kvbm_remote import RemoteConfig, RemoteTier

# Three of the libraries are not in `make test`.
pytestmark = pytest.mark.soak

LARGE = 256 << 20
"""Bytes of a planted object."""
MUCH = 16 << 20
"""Bytes that are too many to be what lies in buffers between a server and a client that asked for a block."""
TOKEN = "s3cr3t-t0k3n"
LISTING = re.compile(r"[?&](list-type|comp|delimiter|prefix)=")
"""In a request for what a folder has in it."""

NEEDS = {"s3fs": "s3fs", "obstore": "obstore", "http": "aiohttp", "gcsfs": "gcsfs", "adlfs": "adlfs"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's `answer` says: a status, headers, and a body or its length."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self):
        server = self.server
        self.rfile.read(int(self.headers.get("content-length") or 0))
        server.seen.append((self.command, self.path, str(self.headers)))
        status, headers, body = server.answer
        if isinstance(body, int) and LISTING.search(self.path):
            # A planted object is not what its folder has in it: a client would read it for hours as XML.
            status, headers, body = 404, {}, b""
        length = body if isinstance(body, int) else len(body)
        first, last = 0, length - 1
        asked = self.headers.get("x-ms-range") or self.headers.get("range")
        if asked and server.ranges and status == 200:
            first, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            first, last = int(first), min(int(end or last), last)
            if first > last:  # Nothing has bytes in that range: RFC 9110, 15.5.17.
                status, headers, body = 416, {**headers, "content-range": f"bytes */{length}"}, b""
                first, last = 0, -1
            else:
                status, headers = 206, {**headers, "content-range": f"bytes {first}-{last}/{length}"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(last - first + 1))
        self.end_headers()
        if self.command == "HEAD":
            return
        if not isinstance(body, int):
            self.wfile.write(body[first : last + 1])
            return
        try:
            for at in range(first, last + 1, 1 << 20):
                server.sent_bytes += self.wfile.write(bytes(min(1 << 20, last + 1 - at)))
        except OSError:
            self.close_connection = True

    # What `http.server` calls.
    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do_PATCH = answer  # noqa: N815


class Server(http.server.ThreadingHTTPServer):
    """Says the same to everybody."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = 404, {}, b""
        self.ranges = True
        self.seen, self.sent_bytes = [], 0

    def handle_error(self, *_):
        """Clients that hang up are what is tested."""

    def here(self, host="127.0.0.1"):
        return f"http://{host}:{self.server_port}"


@pytest.fixture
def server():
    with contextlib.ExitStack() as stack:

        def start():
            made = stack.enter_context(Server())
            thread = threading.Thread(target=made.serve_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(made.shutdown)
            return made

        made = start()
        made.another = start
        yield made


@pytest.fixture(params=list(NEEDS))
def open_tier(request, server, monkeypatch):
    """Open a tier by one client; all are given a secret that others must not see."""
    if importlib.util.find_spec(NEEDS[request.param]) is None:
        pytest.skip(f"NOT TESTED WITH {request.param}: it is not installed")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    here = server.here()
    s3 = {"endpoint_url": here, "key": "AK", "secret": "SK", "token": TOKEN}
    account = f"BlobEndpoint={here}/account;SharedAccessSignature=sv=1&sig={TOKEN}"
    settings = {
        "s3fs": {"url": "s3://bucket/x", "client": "fsspec", "storage_options": s3},
        "obstore": {"url": "s3://bucket/x", "client": "obstore", "storage_options": s3},
        "http": {"url": f"{here}/x", "storage_options": {"headers": {"X-Token": TOKEN}}},
        "gcsfs": {"url": "gs://bucket/x", "storage_options": {"endpoint_url": here, "token": "anon"}},
        "adlfs": {"url": "abfs://container/x", "storage_options": {"connection_string": account}},
    }[request.param]
    with contextlib.ExitStack() as stack:

        def open_():
            tier = RemoteTier(RemoteConfig(**settings, timeout_s=8.0), TierContext(NAMESPACE, BLOCK))
            stack.callback(tier.close)
            tier.by = request.param
            return tier

        yield open_


FACTS = {"etag": '"x"', "last-modified": "Wed, 21 Oct 2026 07:28:00 GMT"}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_planted_object_is_corrupt_and_is_not_read(server, open_tier, ranges):
    server.answer, server.ranges = (200, FACTS, LARGE), ranges
    tier = open_tier()
    end, got = load(tier, 1)
    # azure refuses a server that does not know ranges.
    ends = {Reason.CORRUPT} if ranges or tier.by != "adlfs" else {Reason.CORRUPT, Reason.ERROR}
    if not ranges and tier.by == "gcsfs":
        pytest.skip("gcsfs reads what it is sent; Google's store knows ranges")
    assert end.outcome is Outcome.FAILED
    assert end.reason in ends
    assert got == b"\xaa" * BLOCK
    assert server.sent_bytes < MUCH
    if tier.by == "adlfs" and not ranges:
        # azure-core forgets the answer that it refuses, and its connection says so when it is collected.
        tier.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK])
def test_a_load_learns_the_length_of_an_object(server, open_tier, length):
    server.answer = 200, FACTS, b"x" * length
    end, got = load(open_tier(), 1)
    assert (end.outcome, end.nbytes) == (Outcome.DONE, length)
    assert got == b"x" * length + b"\xaa" * (BLOCK - length)


@pytest.mark.parametrize("length", [0, BLOCK + 1])
def test_an_object_that_is_empty_or_too_long_is_corrupt(server, open_tier, length):
    server.answer = 200, FACTS, b"x" * length
    end, got = load(open_tier(), 1)
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.CORRUPT)
    assert got == b"\xaa" * BLOCK


def test_no_object_can_satisfy_a_range_is_corrupt(server, open_tier):
    # What a store says of an empty object.
    server.answer = 416, {"content-range": "bytes */0"}, b"<Error><Code>InvalidRange</Code></Error>"
    end, _ = load(open_tier(), 1)
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.CORRUPT)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_another_host_is_not_followed(server, open_tier, status, caplog):
    other = server.another()
    other.answer = 200, FACTS, b"x" * BLOCK
    location = {"location": f"{other.here('localhost')}/x?a=b", "x-amz-bucket-region": "eu-west-7"}
    server.answer = status, location, b"<Error><Code>PermanentRedirect</Code></Error>"
    tier = open_tier()
    tier.discard([key(9)])
    end, got = load(tier, 1)
    assert end.outcome is Outcome.FAILED
    assert got == b"\xaa" * BLOCK
    run(tier, [Transfer(1, Op.LOOKUP, key(2))])
    if not tier._read_only:
        assert store(tier, 3).outcome is Outcome.FAILED
    tier.close()
    assert other.seen == []
    assert TOKEN not in caplog.text


def test_a_redirect_at_the_same_host_is_followed_by_who_serves_files(tmp_path, server, open_tier):
    tier = open_tier()
    if tier.by != "http":
        pytest.skip("stores of objects do not send clients to and fro")
    other = server.another()
    other.answer = 200, FACTS, b"x" * BLOCK
    server.answer = 302, {"location": f"{other.here()}/x"}, b""
    assert load(tier, 1)[1] == b"x" * BLOCK


CONFLICTS = {
    "ConditionalRequestConflict": False,
    "OperationAborted": False,
    "ContainerBeingDeleted": False,
    "LeaseAlreadyPresent": False,
}


@pytest.mark.parametrize(("code", "stored"), CONFLICTS.items())
def test_a_conflict_is_no_proof_that_a_block_is_stored(server, open_tier, code, stored):
    tier = open_tier()
    if tier._read_only or (stored and tier.by != "adlfs"):
        pytest.skip("this client's store does not say so")
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    server.answer = 409, {"x-ms-error-code": code, "content-type": "application/xml"}, body
    assert store(tier, 1).outcome is (Outcome.DONE if stored else Outcome.FAILED)


def test_a_block_that_was_there_is_stored(server, open_tier):
    tier = open_tier()
    if tier._read_only or tier.by == "adlfs":
        pytest.skip("this client's store says otherwise")
    server.answer = 412, {}, b"<?xml version='1.0'?><Error><Code>PreconditionFailed</Code></Error>"
    assert store(tier, 1).outcome is Outcome.DONE
