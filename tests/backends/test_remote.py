"""What is the remote tier's own, without a server: files, memory, http, settings, and clearing it."""

import contextlib
import datetime
import functools
import http.server
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from published import published
from test_cpu import BLOCK, NAMESPACE, content, key, load, lookup, region, run, store

from kvbm_cli._app import run as kvbm
from kvbm_core.config import convert
from kvbm_core.errors import ConfigError, TierError, TierOpenError
from kvbm_core.log_limit import TierLog
from kvbm_core.tier import Op, Outcome, Reason, TierContext, Transfer
from kvbm_remote import RemoteConfig, RemoteTier, _runners
from kvbm_remote._clients import check
from kvbm_remote._local_store import LocalStore
from kvbm_remote._runners import run_through
from kvbm_remote._stores import ThreadStore

MARKER = "s3cr3t-m4rk3r"


@pytest.fixture
def open_tier():
    with contextlib.ExitStack() as stack:

        def open_(url, namespace=NAMESPACE, nbytes=BLOCK, rank=0, world_size=1, **settings):
            facts = TierContext(namespace, nbytes, rank, world_size)
            tier = RemoteTier(RemoteConfig(url=url, **settings), facts)
            stack.callback(tier.close)
            return tier

        yield open_


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    yield f"file://{tmp_path}/kv" if request.param == "file" else f"memory://{tmp_path.name}"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def wait_for(true, timeout_s=20):
    give_up_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_blocks_are_found_again_by_lookup_and_load(url, open_tier):
    tier = open_tier(url)
    assert lookup(tier, 1) is Outcome.MISSING
    assert store(tier, 1).outcome is Outcome.DONE
    tier.close()
    tier = open_tier(url)
    assert list(tier.inventory()) == []
    assert lookup(tier, 1) is Outcome.DONE
    assert load(tier, 1)[1] == content(1)
    assert load(tier, 2)[0].outcome is Outcome.MISSING
    assert load(tier, 2)[1] == b"\xaa" * BLOCK


def test_two_tiers_share_a_store(url, open_tier):
    one, two = open_tier(url), open_tier(url)
    for n in range(20):
        run((one, two)[n % 2], [Transfer(1, Op.STORE, key(n), region(content(n)))])
    for n in range(20):
        assert load((two, one)[n % 2], n)[1] == content(n)


def test_only_memory_does_not_outlive_a_kill(url, open_tier):
    assert open_tier(url).capabilities.durable is url.startswith("file")


def test_ranks_and_namespaces_keep_apart(url, open_tier):
    store(open_tier(url, rank=0, world_size=2), 1)
    for others in ({"rank": 1, "world_size": 2}, {"rank": 0}, {"namespace": b"m" * 16}):
        assert load(open_tier(url, **others), 1)[0].outcome is Outcome.MISSING


def test_what_is_there_is_not_written_again(tmp_path, open_tier):
    store(open_tier(f"file://{tmp_path}"), 1)
    (file,) = (path for path in tmp_path.rglob("*/*") if path.is_file())
    before = file.stat()
    assert store(open_tier(f"file://{tmp_path}"), 1).outcome is Outcome.DONE
    assert file.stat().st_ino == before.st_ino
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def test_the_layout_on_the_store_and_who_may_read_it(tmp_path, open_tier):
    store(open_tier(f"file://{tmp_path}/a/b", rank=1, world_size=4), 1)
    name = key(1).hex()
    file = tmp_path / "a/b/v1" / NAMESPACE.hex() / "r1of4" / name[:2] / name
    assert file.read_bytes() == content(1)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    folders = [folder for folder in (tmp_path / "a", *(tmp_path / "a").rglob("*")) if folder.is_dir()]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


LENGTHS = (1, 100, 4096, 4097, BLOCK - 1, BLOCK)


def test_an_object_has_a_length_of_its_own_and_a_load_leaves_what_is_behind_it(url, open_tier):
    writer = open_tier(url)
    for nbytes in LENGTHS:
        assert store(writer, nbytes, nbytes=nbytes).outcome is Outcome.DONE
    for tier in (writer, open_tier(url)):
        for nbytes in LENGTHS:
            end, got = load(tier, nbytes)
            assert (end.outcome, end.nbytes) == (Outcome.DONE, nbytes)
            assert got == content(nbytes, nbytes) + b"\xaa" * (BLOCK - nbytes)


def test_a_lookup_says_how_long_an_object_is_once_the_store_has_said_it(url, open_tier):
    tier = open_tier(url)
    store(tier, 1, nbytes=100)
    other = open_tier(url)
    # The second is answered from memory.
    assert [run(other, [Transfer(1, Op.LOOKUP, key(1))])[1].nbytes for _ in range(2)] == [100, 100]
    # Another engine may have been first, with another length.
    assert run(tier, [Transfer(1, Op.LOOKUP, key(1))])[1].nbytes == 0
    load(tier, 1)
    assert run(tier, [Transfer(1, Op.LOOKUP, key(1))])[1].nbytes == 100


def test_an_object_longer_than_the_region_is_corrupt_and_leaves_it_as_it_was(url, open_tier):
    tier = open_tier(url)
    store(tier, 1, nbytes=4097)
    end, got = load(tier, 1, nbytes=4096)
    assert (end.outcome, end.reason, end.nbytes) == (Outcome.FAILED, Reason.CORRUPT, 0)
    assert got == b"\xaa" * 4096
    assert load(tier, 1, nbytes=4097)[1] == content(1, 4097)


@pytest.mark.parametrize("length", [0, BLOCK + 1])
def test_an_object_that_is_empty_or_too_long_is_corrupt_and_is_mended(url, open_tier, length):
    store(open_tier(url), 1)
    fs, root = fsspec.core.url_to_fs(url)
    (file,) = fs.find(root)
    fs.pipe_file(file, b"x" * length)
    tier = open_tier(url)
    for op, target in ((Op.LOAD, region()), (Op.LOOKUP, None)):
        end = run(tier, [Transfer(1, op, key(1), target)])[1]
        assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.CORRUPT)
    tier.discard([key(1)])
    assert lookup(tier, 1) is Outcome.MISSING
    assert store(tier, 1).outcome is Outcome.DONE
    assert load(tier, 1)[1] == content(1)
    assert load(open_tier(url), 1)[1] == content(1)


def test_a_discarded_block_is_deleted_for_all(url, open_tier):
    tier, other = open_tier(url), open_tier(url)
    for n in range(8):
        store(tier, n)
    tier.discard([key(n) for n in range(8)])
    assert all(load(tier, n)[0].outcome is Outcome.MISSING for n in range(8))
    wait_for(lambda: all(load(other, n)[0].outcome is Outcome.MISSING for n in range(8)))


def alternating(make_store, rounds=150, nbytes=1 << 18):
    """Overwrite one object with two contents in turn, and read it all the while."""
    whole = (b"a" * nbytes, b"b" * nbytes)
    run_through(make_store().put("v1/x/y", whole[0], overwrite=True))
    torn, stop = [], threading.Event()

    def read():
        store, target = make_store(), bytearray(nbytes)
        got = []

        async def get():
            got[:] = [bytes(await store.get("v1/x/y", memoryview(target)))]

        while not stop.is_set():
            run_through(get())
            if got[0] not in whole:
                torn.append(got[0])

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    writer = make_store()
    for n in range(rounds):
        run_through(writer.put("v1/x/y", whole[n % 2], overwrite=True))
    stop.set()
    for reader in readers:
        reader.join()
    return torn


def test_nobody_reads_half_a_block_that_is_overwritten(tmp_path):
    assert alternating(lambda: LocalStore(tmp_path, TierLog("kvbm_remote"))) == []
    fs = fsspec.filesystem("file")
    assert alternating(lambda: ThreadStore(lambda: fs, str(tmp_path), atomic=False)) == []
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"v1/x/y"}


CHILD = """
import sys
sys.path[:0] = {paths!r}
from test_remote import *
tier = RemoteTier(RemoteConfig(url={url!r}, max_in_flight=4), TierContext(NAMESPACE, 1 << 20))
block, n = region(b"k" * (1 << 20), 1 << 20), 0
print("ready", flush=True)
while True:
    run(tier, [Transfer(n + i, Op.STORE, key(n + i), block) for i in range(8)])
    n += 8
"""


def test_a_writer_killed_in_the_middle_leaves_no_torn_block_and_its_litter_is_collected(tmp_path, open_tier):
    paths = [str(folder) for folder in Path(__file__).parents[:2]]
    code = CHILD.format(paths=paths, url=f"file://{tmp_path}/kv")
    for delay_s in (0.2, 0.33, 0.47):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    files = [path for path in (tmp_path / "kv/v1" / NAMESPACE.hex()).rglob("*") if path.is_file()]
    blocks = [path for path in files if not path.name.startswith(".")]
    assert blocks
    assert all(path.read_bytes() == b"k" * (1 << 20) for path in blocks)
    # Whether one of them died in the middle of a file is chance; this one did, two hours ago.
    old, fresh = (blocks[0].parent / f".kvbm-{digit * 32}.tmp" for digit in "01")
    for file in (old, fresh):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    tier = open_tier(f"file://{tmp_path}/kv", nbytes=1 << 20)
    block = region(b"k" * (1 << 20), 1 << 20)
    again = bytes.fromhex(blocks[0].name[:-2] + "00")
    assert run(tier, [Transfer(1, Op.STORE, again, block)])[1].outcome is Outcome.DONE
    assert not old.exists()
    assert fresh.exists()


def test_litter_of_a_file_server_is_collected_at_open(stuck, open_tier):
    fs = StuckFileSystem()
    tier = open_tier("stuck://kv")
    store(tier, 1)
    root = fs._strip_protocol("stuck://kv")
    old, fresh = (f"{root}/v1/tmp/{digit * 32}" for digit in "01")
    for file in (old, fresh):
        fs.pipe_file(file, b"half")
    fs.store[old].created = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=2)
    open_tier("stuck://kv")
    wait_for(lambda: not fs.exists(old))
    assert fs.exists(fresh)
    assert load(tier, 1)[1] == content(1)


def test_a_directory_deleted_under_a_running_engine_is_made_again(tmp_path, open_tier):
    tier = open_tier(f"file://{tmp_path}/kv")
    store(tier, 1)
    fsspec.filesystem("file").rm(f"{tmp_path}/kv", recursive=True)
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    assert store(tier, 1).outcome is Outcome.DONE
    assert load(tier, 1)[1] == content(1)


class StuckFileSystem(MemoryFileSystem):
    """Blocks every read and write while `free` is clear, as a file server does that fell silent."""

    protocol = "stuck"
    free = threading.Event()
    writing = threading.Event()

    def cat_file(self, path, **options):
        self.free.wait()
        return super().cat_file(path, **options)

    def pipe_file(self, path, value, **options):
        self.writing.set()
        self.free.wait()
        return super().pipe_file(path, value, **options)


@pytest.fixture
def stuck():
    fsspec.register_implementation("stuck", StuckFileSystem, clobber=True)
    StuckFileSystem.free.set()
    yield StuckFileSystem.free
    StuckFileSystem.free.set()
    MemoryFileSystem.store.clear()


def test_a_file_system_that_hangs_costs_a_deadline_and_never_touches_the_region_again(stuck, open_tier):
    tier = open_tier("stuck://kv", timeout_s=0.3, max_in_flight=2)
    store(tier, 1)
    stuck.clear()
    StuckFileSystem.writing.clear()
    source, targets = region(content(2)), [region(b"\xaa" * BLOCK) for _ in range(5)]
    tier.submit([Transfer(9, Op.STORE, key(2), source)])
    assert StuckFileSystem.writing.wait(20)
    tier.submit([Transfer(n, Op.LOAD, key(1), target) for n, target in enumerate(targets)])
    done = []
    wait_for(lambda: done.extend(tier.poll()) or len(done) == 6)
    assert {(end.outcome, end.reason) for end in done} == {(Outcome.FAILED, Reason.DEADLINE)}
    # The region is the caller's again: what it puts there must not reach the store.
    source.view()[:] = b"?" * BLOCK
    stuck.set()
    wait_for(lambda: load(tier, 1)[1] == content(1))
    assert all(bytes(target.view()) == b"\xaa" * BLOCK for target in targets)
    # The write that was given up went on, with the bytes it was given.
    wait_for(lambda: load(tier, 2)[0].outcome is Outcome.DONE)
    assert load(tier, 2)[1] == content(2)


def test_what_was_given_up_does_not_pile_up_behind_a_file_system_that_hangs(stuck, open_tier, monkeypatch):
    monkeypatch.setattr(_runners, "_TIDY_ABOVE", 10)
    tier = open_tier("stuck://kv", timeout_s=5.0, max_in_flight=2)
    store(tier, 1)
    stuck.clear()
    for _ in range(8):
        soon_s = time.monotonic() + 0.05
        loads = [Transfer(n, Op.LOAD, key(1), region(), deadline_s=soon_s) for n in range(4)]
        stores = [Transfer(n, Op.STORE, key(n), region(content(n)), deadline_s=soon_s) for n in range(4, 8)]
        assert {end.reason for end in run(tier, [*loads, *stores]).values()} == {Reason.DEADLINE}
    assert max(len(tier._runner._ahead), len(tier._runner._behind)) <= 10 + 4
    stuck.set()
    assert load(tier, 1)[1] == content(1)


def test_a_late_transfer_ends_with_deadline(url, open_tier):
    tier = open_tier(url)
    store(tier, 1)
    late_s = time.monotonic() - 1
    late = [
        Transfer(1, Op.LOAD, key(1), region(), deadline_s=late_s),
        Transfer(2, Op.STORE, key(2), region(content(2)), deadline_s=late_s),
        Transfer(3, Op.LOOKUP, key(3), deadline_s=late_s),
    ]
    assert {end.reason for end in run(tier, late).values()} == {Reason.DEADLINE}


def test_after_close_nothing_is_taken_and_what_was_in_flight_is_answered(stuck, open_tier):
    tier = open_tier("stuck://kv", timeout_s=1.0, max_in_flight=1)
    stuck.clear()
    tier.submit([Transfer(n, Op.LOAD, key(n), region()) for n in range(4)])
    threading.Timer(4.0, stuck.set).start()
    tier.close()
    tier.close()
    assert sorted(end.ticket for end in tier.poll()) == [0, 1, 2, 3]
    with pytest.raises(TierError, match="closed"):
        tier.submit([])
    tier.discard([key(1)])
    assert not tier._deleting
    assert repr(tier) == "<RemoteTier stuck://kv by fsspec, threads, closed>"


def test_the_state_in_one_line(tmp_path, open_tier):
    tier = open_tier(f"file://{tmp_path}", read_only=True)
    assert repr(tier) == f"<RemoteTier file://{tmp_path} by files, 0 in flight>"
    assert tier.capabilities.detail == f"file://{tmp_path} by files, read only"
    assert tier.capabilities.shared
    assert tier.capabilities.durable
    assert tier.capabilities.remote_lookup
    assert tier.capabilities.capacity_bytes is None
    assert tier.capabilities.read_only
    assert not open_tier(f"file://{tmp_path}").capabilities.read_only


def test_a_line_in_the_log_begins_with_the_tier_s_name(tmp_path, caplog):
    config = RemoteConfig(url=f"file://{tmp_path}/kv")
    tier = RemoteTier(config, TierContext(NAMESPACE, BLOCK, name="shared-kv"))
    store(tier, 1)
    (file,) = (path for path in tmp_path.rglob("*/*") if path.is_file())
    file.write_bytes(b"")
    assert load(tier, 1)[0].reason is Reason.CORRUPT
    tier.close()
    [line] = caplog.messages
    assert line.startswith(f"tier shared-kv: file://{tmp_path}/kv: load failed: corrupt (WrongLengthError): ")
    with pytest.raises(TierError) as caught:
        tier.submit([])
    assert caught.value.tier == "shared-kv"


def test_a_full_disk_ends_stores_with_full(tmp_path, open_tier):
    (tmp_path / "disk").mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / "disk"], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"THE FULL DISK IS NOT TESTED: mount is not allowed here: {made.stderr.decode()}")
    try:
        tier = open_tier(f"file://{tmp_path}/disk")
        ends = [store(tier, n) for n in range(24)]
        stored = [n for n, end in enumerate(ends) if end.outcome is Outcome.DONE]
        assert 5 < len(stored) < 20
        assert {end.reason for end in ends} == {Reason.NONE, Reason.FULL}
        assert all(load(tier, n)[1] == content(n) for n in stored)
        assert len([path for path in (tmp_path / "disk").rglob("*") if path.is_file()]) == len(stored)
    finally:
        subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


# http


@pytest.fixture
def web(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/kv"
    server.shutdown()
    thread.join()
    server.server_close()


def test_http_serves_and_stores_nothing(tmp_path, web, open_tier, caplog):
    store(open_tier(f"file://{tmp_path}/kv"), 1)
    tier = open_tier(web)
    with caplog.at_level(logging.DEBUG, "kvbm_remote"):
        assert lookup(tier, 1) is Outcome.DONE
        assert load(tier, 1)[1] == content(1)
        assert lookup(tier, 2) is Outcome.MISSING
        assert load(tier, 2)[0].outcome is Outcome.MISSING
        end = store(tier, 2)
        tier.discard([key(1)])
        assert load(tier, 1)[0].outcome is Outcome.MISSING
    # FULL: a reason that does not count against the tier.
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.FULL)
    assert caplog.text == ""
    assert load(open_tier(web), 1)[1] == content(1)


# settings


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"url": "bucket/folder"}, "url: 'bucket/folder' is not a URL; write one like s3://bucket/folder"),
        ({"url": ""}, "url: '' is not a URL"),
        ({"url": "s3:///folder"}, "url: 's3:///folder' names no bucket or host"),
        ({"url": "file://folder"}, "write an absolute directory after file://, like file:///kvbm"),
        ({"url": "file:///"}, "write an absolute directory"),
        ({"url": "simplecache::s3://bucket"}, "chains file systems; write one alone"),
        ({"max_in_flight": 0}, "max_in_flight: 0; write 1 to 256"),
        ({"connect_timeout_s": 0}, "connect_timeout_s: 0; write seconds above 0"),
        ({"timeout_s": float("inf")}, "timeout_s: inf; write seconds above 0"),
        ({"attempts": 11}, "attempts: 11; write 1 to 10"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_what_to_write(setting, said):
    with pytest.raises(ConfigError, match=said):
        RemoteConfig(**{"url": "s3://bucket", **setting})


def test_an_unknown_protocol_is_refused_with_the_known_ones():
    for use in (check, lambda config: RemoteTier(config, TierContext(NAMESPACE, BLOCK))):
        with pytest.raises(TierOpenError, match=r"no file system is called 'ess3'; write one of .*s3"):
            use(RemoteConfig(url="ess3://bucket"))


@pytest.mark.parametrize(("protocol", "package"), [("gs", "gcsfs"), ("abfs", "adlfs"), ("sftp", "paramiko")])
def test_a_package_that_is_not_installed_is_named(protocol, package, monkeypatch):
    # As if it were not there, also where it is.
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("fsspec.implementations.sftp", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(
        TierOpenError,
        match=f"'{protocol}://place/x' needs {package}, which is not installed; pip install {package}",
    ):
        check(RemoteConfig(url=f"{protocol}://place/x"))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for url in ("file:///proc/kvbm", f"file://{tmp_path}/file"):
        for use in (check, lambda config: RemoteTier(config, TierContext(NAMESPACE, BLOCK))):
            with pytest.raises(TierOpenError, match=r"url: \S+ cannot be used by uid"):
                use(RemoteConfig(url=url))


def test_check_changes_nothing(tmp_path):
    check(RemoteConfig(url=f"file://{tmp_path}/x/y"))
    check(RemoteConfig(url="s3://bucket/x", storage_options={"endpoint_url": "http://127.0.0.1:1"}))
    assert list(tmp_path.iterdir()) == []


def test_an_option_obstore_does_not_know_goes_to_fsspec_or_is_refused():
    options = {"endpoint_url": "http://127.0.0.1:1", "s3_additional_kwargs": {"ACL": MARKER}}
    check(RemoteConfig(url="s3://bucket/x", storage_options=options))
    with pytest.raises(
        TierOpenError, match=r"obstore has no 's3_additional_kwargs' \(it has key, .*client: fsspec"
    ) as caught:
        check(RemoteConfig(url="s3://bucket/x", storage_options=options, client="obstore"))
    assert MARKER not in str(caught.value)


def refusal(config):
    """What opening says, with all that it is chained to; some are refused, and some wait for a server."""
    try:
        RemoteTier(config, TierContext(NAMESPACE, BLOCK)).close()
    except TierOpenError as error:
        return "".join(traceback.format_exception(error))
    return ""


@pytest.mark.parametrize(
    "bad",
    [
        "s3://{}@bucket/x", "ess3://user:{}@host/x", "sftp://u:{}@host", "http://h/x?t={}",
        # As people write them who do not encode: the library may not understand, and must not tell.
        "sftp://u:a/{}@host/x", "sftp://u:{}/b@host/x", "s3://{}:a/b@bucket/x", "sftp://u:{}?b@host", "sftp://u:a#{}@host",
    ],
)  # fmt: skip
def test_a_password_in_the_url_is_never_shown(bad):
    url = bad.format(MARKER)
    config = RemoteConfig(url=url, storage_options={"secret": MARKER})
    assert MARKER not in repr(config)
    assert "secret" in repr(config)
    assert MARKER not in refusal(config)
    with pytest.raises(ConfigError) as caught:
        RemoteConfig(url=f"file::{url}")
    assert MARKER not in str(caught.value)


def test_the_settings_are_read_from_a_mapping():
    config = convert(
        {"url": "s3://b/x", "storage_options": {"anon": True}, "timeout_s": 2}, RemoteConfig, "x"
    )
    assert config.storage_options == {"anon": True}
    with pytest.raises(ConfigError):
        convert({"url": "s3://b/x", "client": "boto3"}, RemoteConfig, "x")
    with pytest.raises(ConfigError, match="storage_options: a str; write a mapping") as caught:
        convert({"url": "s3://b/x", "storage_options": f"secret={MARKER}"}, RemoteConfig, "x")
    assert MARKER not in "".join(traceback.format_exception(caught.value))


# kvbm clear


@pytest.fixture
def aged(tmp_path, open_tier):
    """Ten blocks, block n stored n days ago, and files that are not ours."""
    tier = open_tier(f"file://{tmp_path}/kv")
    for n in range(10):
        store(tier, n)
        name = key(n).hex()
        file = tmp_path / "kv/v1" / NAMESPACE.hex() / "r0of1" / name[:2] / name
        os.utime(file, (time.time() - n * 86400 - 60,) * 2)
    foreign = [tmp_path / "kv/notes.txt", tmp_path / "kv/v1/notes.txt"]
    for file in foreign:
        file.write_text("not a block")
        os.utime(file, (0, 0))
    tier.close()
    yield tmp_path
    assert all(file.exists() for file in foreign)


def left(tmp_path, open_tier):
    tier = open_tier(f"file://{tmp_path}/kv")
    return [n for n in range(10) if load(tier, n)[0].outcome is Outcome.DONE]


def clear(aged, *arguments, yes=True):
    assert kvbm(["clear", f"file://{aged}/kv", *arguments, *(["--yes"] if yes else [])]) == 0


def test_what_is_old_is_deleted(aged, open_tier):
    clear(aged, "--older-than", "6.5d", yes=False)
    assert left(aged, open_tier) == list(range(10))
    clear(aged, "--older-than", "6.5d")
    assert left(aged, open_tier) == list(range(7))


def test_the_oldest_are_deleted_until_it_fits(aged, open_tier):
    clear(aged, "--down-to", f"{4 * BLOCK}B")
    assert left(aged, open_tier) == [0, 1, 2, 3]


def test_what_dead_writers_left_is_deleted(aged, capsys):
    (folder, *_) = (aged / "kv/v1" / NAMESPACE.hex() / "r0of1").iterdir()
    (aged / "kv/v1/tmp").mkdir()
    litter = [folder / f".kvbm-{'0' * 32}.tmp", aged / "kv/v1/tmp" / ("0" * 32)]
    foreign = [folder / ".bashrc", folder / ("." + "0" * 32), aged / "kv/v1/tmp/notes.txt"]
    for file in (*litter, *foreign):
        file.write_bytes(b"half")

    def collect():
        capsys.readouterr()
        clear(aged, "--older-than", "99d", "--json")
        said = published("clear", capsys.readouterr().out)
        return said["removed"], said["tidied"]

    assert collect() == (0, 0)
    assert all(file.exists() for file in litter)
    for file in (*litter, *foreign):
        os.utime(file, (time.time() - 7200,) * 2)
    assert collect() == (0, 2)
    assert not any(file.exists() for file in litter)
    assert all(file.exists() for file in foreign)


def test_age_and_size_together_delete_no_more_than_they_must(aged, open_tier):
    clear(aged, "--older-than", "5d", "--down-to", f"{3 * BLOCK + 1}B")
    assert left(aged, open_tier) == [0, 1, 2]


def test_engines_that_lose_a_block_miss_it(aged, open_tier):
    tier = open_tier(f"file://{aged}/kv")
    assert lookup(tier, 9) is Outcome.DONE
    clear(aged, "--older-than", "1d")
    completion, target = load(tier, 9)
    assert completion.outcome is Outcome.MISSING
    assert target == b"\xaa" * BLOCK
    assert lookup(tier, 9) is Outcome.MISSING
    assert store(tier, 9).outcome is Outcome.DONE
    assert load(tier, 9)[1] == content(9)


def test_the_memory_file_system_can_be_cleared(open_tier, capsys):
    tier = open_tier("memory://collected")
    for n in range(4):
        store(tier, n)
    assert kvbm(["clear", "memory://collected", "--down-to", f"{BLOCK}B", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 3
    MemoryFileSystem.store.clear()
