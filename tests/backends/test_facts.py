"""What namespaces are made of, beside the objects of tiers that keep them: on disks and on a real server."""

import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import time

import msgspec
import pytest
from test_cpu import BLOCK, content, key, load, region, run, store
from test_lmdb import du_bytes

from kvbm_cli._app import run as kvbm
from kvbm_core import Registry, Stack, chain_keys, make_namespace, root_key
from kvbm_core.codec import Codec, CodecConfig, CodecKind
from kvbm_core.config import ByteSize
from kvbm_core.testing import MemoryDevice
from kvbm_core.tier import Op, Outcome, Reason, TierContext, Transfer
from kvbm_gds import GdsConfig, GdsTier
from kvbm_gds import _tier as gds_tier
from kvbm_lmdb import LmdbConfig, LmdbTier
from kvbm_remote import RemoteConfig, RemoteTier, _contents
from kvbm_remote._clients import make_store
from kvbm_remote._faults import WrongLengthError

MIB = 1 << 20
STRANGER = 54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="OTHER OWNERS ARE NOT TESTED: this is not root")
FACTS = {"block_tokens": 16, "dtype": "bfloat16"}
OTHER = {"block_tokens": 16, "dtype": "float16"}
QUICK = {"timeout_s": 2.0, "connect_timeout_s": 1.0}


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO)

    def take(word="starts empty"):
        taken = [record.getMessage() for record in caplog.records if word in record.getMessage()]
        caplog.clear()
        return taken

    return take


def entry(backend, path):
    if backend == "remote":
        return {"backend": "remote", "name": "disk", "url": f"file://{path}"}
    more = {"engine": "threads"} if backend == "gds" else {}
    return {"backend": backend, "name": "disk", "path": str(path), "capacity": "16MiB", **more}


def use(entry, facts, registry=None, blocks=4):
    """Start an engine, store, and stop it; give the blocks that it found."""
    device, keys = MemoryDevice(blocks, BLOCK), chain_keys(root_key(), range(blocks), 1)
    with Stack.open(
        {"tiers": [entry]}, device, make_namespace(facts), registry=registry, facts=facts
    ) as stack:
        found = stack.match(keys)
        stack.store(keys, range(blocks))
        stack.wait()
    return found


@pytest.mark.parametrize("backend", ["lmdb", "gds", "remote"])
def test_a_tier_that_starts_empty_says_what_was_changed_and_else_nothing(tmp_path, lines, backend):
    disk = entry(backend, tmp_path / "kv")
    assert use(disk, FACTS) == 0
    assert use(disk, FACTS) == 4
    assert lines() == []
    assert use(disk, OTHER) == 0
    place = f"file://{tmp_path}/kv" if backend == "remote" else tmp_path / "kv/rank0"
    assert lines() == [
        f"tier disk: starts empty; {place} was used with 1 other configuration before; "
        "it differs in: dtype (float16 here, bfloat16 there)"
    ]
    assert (use(disk, OTHER), use(disk, FACTS)) == (4, 4)
    assert lines() == []


class Flip(Codec):
    """Changes nothing but the namespace."""

    identity = b"the digest of a key"

    def max_bytes(self, nbytes):
        return nbytes

    def encode(self, key, source, target):
        target[: len(source)] = source
        return len(source)

    decode = encode


class NoSettings(CodecConfig, frozen=True):
    pass


@pytest.mark.parametrize("backend", ["lmdb", "remote"])
def test_codecs_are_facts_of_their_tier(tmp_path, lines, backend):
    registry = Registry()
    registry.codec = lambda name: CodecKind(name, NoSettings, lambda *_: Flip())
    disk = entry(backend, tmp_path / "kv")
    assert use(disk, FACTS, registry) == 0
    assert use({**disk, "codecs": ["flip"]}, FACTS, registry) == 0
    [said] = lines()
    assert said.endswith("in: codecs (1 entries here, nothing there)")
    written = [each.read_text() for each in (tmp_path / "kv").rglob("*.json")]
    told = [json.loads(each)["facts"].get("codecs", []) for each in written]
    [[name, digest]] = max(told)
    assert (name, len(digest)) == ("flip", 16)
    assert not any("the digest" in each for each in written)


@pytest.fixture
def open_local(tmp_path):
    with contextlib.ExitStack() as stack:

        def open_(backend, facts, capacity=8 * MIB, path=tmp_path / "kv"):
            context = TierContext(make_namespace(facts), BLOCK, name="disk", facts=facts)
            size = ByteSize(capacity)
            if backend == "lmdb":
                tier = LmdbTier(LmdbConfig(path=str(path), capacity=size), context)
            else:
                tier = GdsTier(GdsConfig(path=str(path), capacity=size, engine="threads"), context)
            stack.callback(tier.close)
            return tier

        yield open_


@pytest.mark.parametrize("backend", ["lmdb", "gds"])
def test_facts_of_many_configurations_and_a_full_tier_stay_within_the_capacity(tmp_path, open_local, backend):
    rng = random.Random(3)
    for n in range(40):
        tier = open_local(backend, {"n": n, "config": "x" * rng.randrange(9000)})
        store(tier, n)
        tier.close()
    tier = open_local(backend, FACTS)
    for n in range(tier.capabilities.capacity_bytes // tier.capabilities.charge(BLOCK)):
        assert store(tier, n).outcome is Outcome.DONE
    assert du_bytes(tmp_path / "kv") <= 8 * MIB
    assert list((tmp_path / "kv/rank0/namespaces").iterdir())


@needs_root
@pytest.mark.parametrize("backend", ["lmdb", "gds"])
def test_facts_that_cannot_be_written_keep_no_tier_from_opening(tmp_path, open_local, lines, backend):
    folder = tmp_path / "kv/rank0/namespaces"
    folder.mkdir(parents=True)
    os.chown(folder, STRANGER, STRANGER)
    tier = open_local(backend, FACTS)
    assert store(tier, 1).outcome is Outcome.DONE
    assert load(tier, 1)[1] == content(1)
    [said] = lines("cannot be written")
    assert said.startswith(f"tier disk: {folder}: the facts of this configuration cannot be written (")
    assert f"belongs to uid {STRANGER}" in said


def test_a_folder_that_is_made_anew_under_an_engine_has_them_again(tmp_path, open_local, monkeypatch):
    monkeypatch.setattr(gds_tier, "_REOPEN_EVERY_S", 0.0)
    tier = open_local("gds", FACTS)
    shutil.rmtree(tmp_path / "kv")
    until(lambda: store(tier, 1).outcome is Outcome.DONE)
    [written] = (tmp_path / "kv/rank0/namespaces").iterdir()
    assert json.loads(written.read_text())["facts"] == FACTS


# in a store that engines share


def until(true, timeout_s=60):
    give_up_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.05)


@pytest.fixture
def s3(s3_server, monkeypatch, request):
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return {
        "url": f"s3://{s3_server.bucket}/{abs(hash(request.node.nodeid))}",
        "storage_options": {"endpoint_url": s3_server.endpoint},
    }


@pytest.fixture
def open_remote():
    with contextlib.ExitStack() as stack:

        def open_(place, facts, **settings):
            context = TierContext(make_namespace(facts), BLOCK, name="s3", facts=facts)
            tier = RemoteTier(RemoteConfig(**place, **{**QUICK, **settings}), context)
            stack.callback(tier.close)
            return tier

        yield open_


def written(tier):
    """Give the paths and contents of what lies in the tier's store beside blocks."""

    async def read():
        found = {}
        opened = make_store(tier._config)
        async for each in opened.entries("v1/facts"):
            with contextlib.suppress(WrongLengthError):
                found[each.path] = bytes(await opened.get(each.path, memoryview(bytearray(65536))))
        await opened.close()
        return found

    return asyncio.run(read())


def put(tier, path, content):
    async def write():
        opened = make_store(tier._config)
        await opened.put(path, content, overwrite=True)
        await opened.close()

    asyncio.run(write())


def path_of(facts):
    return f"v1/facts/r0/{make_namespace(facts).hex()}.json"


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_on_s3_they_come_with_the_first_block(s3, open_remote, lines, client):
    tier = open_remote(s3, FACTS, client=client)
    assert load(tier, 1)[0].outcome is Outcome.MISSING
    assert written(tier) == {}
    store(tier, 1)
    until(lambda: written(tier))
    [(path, content)] = written(tier).items()
    assert (path, json.loads(content)["facts"]) == (path_of(FACTS), FACTS)
    tier.close()
    open_remote(s3, FACTS, client=client).close()
    assert lines() == []
    other = open_remote(s3, OTHER, client=client)
    said = []
    until(lambda: said.extend(lines()) or said)
    assert said == [
        f"tier s3: starts empty; {s3['url']} was used with 1 other configuration before; "
        "it differs in: dtype (float16 here, bfloat16 there)"
    ]
    other.close()


def test_two_engines_at_once_write_what_is_alike_once_and_else_each_its_own(s3, open_remote):
    alike = [open_remote(s3, FACTS), open_remote(s3, FACTS), open_remote(s3, OTHER)]
    for tier in alike:
        tier.submit([Transfer(n, Op.STORE, key(n), region(content(n))) for n in range(8)])
    for tier in alike:
        tier.close()
        assert {each.outcome for each in tier.poll()} <= {Outcome.DONE, Outcome.FAILED}
    found = written(alike[0])
    assert {path: json.loads(each)["facts"] for path, each in found.items()} == {
        path_of(FACTS): FACTS,
        path_of(OTHER): OTHER,
    }


def test_one_that_may_only_read_writes_none_and_says_what_differs(s3, open_remote, lines):
    tier = open_remote(s3, FACTS)
    store(tier, 1)
    until(lambda: written(tier))
    reader = open_remote(s3, OTHER, read_only=True)
    until(lambda: lines())
    assert run(reader, [Transfer(1, Op.STORE, key(1), region(content(1)))])[1].reason is Reason.FULL
    reader.close()
    assert list(written(tier)) == [path_of(FACTS)]


def test_damaged_ones_are_passed_over_or_written_anew(s3, open_remote, lines):
    tier = open_remote(s3, FACTS)
    for n, garbage in enumerate((b"", b"{", b"x" * 70_000, b"\xff")):
        put(tier, f"v1/facts/r0/{n:032x}.json", garbage)
    put(tier, "v1/facts/r0/notes.txt", b"mine")
    put(tier, path_of(FACTS), b"garbage")
    store(tier, 1)
    until(lambda: msgspec.json.decode(written(tier)[path_of(FACTS)])["facts"] == FACTS)
    other = open_remote(s3, OTHER)
    said = []
    until(lambda: said.extend(lines()) or said)
    assert "was used with 1 other configuration before" in said[0]
    other.close()


def test_they_are_kept_as_long_as_there_are_blocks(s3, open_remote, monkeypatch, capsys):
    def clear(*arguments):
        option = f"endpoint_url={s3['storage_options']['endpoint_url']}"
        assert kvbm(["clear", s3["url"], "--option", option, "--json", *arguments]) == 0
        said = json.loads(capsys.readouterr().out)
        return said["removed"], sum(part["left_objects"] for part in said["parts"]), said["tidied"]

    tiers = [open_remote(s3, FACTS), open_remote(s3, OTHER)]
    for n, tier in enumerate(tiers):
        store(tier, n)
        store(tier, n + 10)
    until(lambda: len(written(tiers[0])) == 2)
    tiers[0].discard([key(0), key(10)])
    until(lambda: clear("--older-than", "1d")[1] == 2)
    # Young: it may have been written ahead of the first block.
    assert len(written(tiers[0])) == 2
    monkeypatch.setattr(_contents, "LITTER_S", -60.0)
    assert clear("--older-than", "1d") == (None, 2, 1)
    assert clear("--older-than", "1d", "--yes") == (0, 2, 1)
    assert list(written(tiers[0])) == [path_of(OTHER)]
    assert clear("--down-to", "1B", "--yes") == (2, 0, 1)
    assert written(tiers[0]) == {}


def test_they_come_back_with_a_later_block(s3, open_remote):
    tier = open_remote(s3, FACTS)
    store(tier, 1)
    until(lambda: written(tier))
    put(tier, path_of(FACTS), b"garbage")
    store(tier, 2)
    assert written(tier)[path_of(FACTS)] == b"garbage"
    tier._facts.due_s = 0.0  # An hour later.
    store(tier, 3)
    until(lambda: written(tier)[path_of(FACTS)] != b"garbage")


def test_a_server_that_is_away_costs_a_line(open_remote, lines):
    place = {"url": "s3://b/x", "storage_options": {"endpoint_url": "http://127.0.0.1:9", "anon": True}}
    tier = open_remote(place, FACTS, attempts=1)
    assert store(tier, 1).outcome is Outcome.FAILED
    said = []
    until(lambda: said.extend(lines("failed")) or said)
    tier.close()
    assert all("connection refused" in each for each in said)


@needs_root
@pytest.mark.parametrize("strange", ["link", "owner"])
def test_in_a_shared_directory_no_link_and_no_stranger_s_folder_is_followed(
    tmp_path, open_remote, lines, strange
):
    folder, elsewhere = tmp_path / "kv/v1/facts", tmp_path / "elsewhere"
    folder.parent.mkdir(parents=True)
    elsewhere.mkdir()
    if strange == "link":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir()
        os.chown(folder, STRANGER, STRANGER)
    tier = open_remote({"url": f"file://{tmp_path}/kv"}, FACTS)
    assert store(tier, 1).outcome is Outcome.DONE
    said = []
    until(lambda: said.extend(lines("facts failed")) or said)
    assert not list(elsewhere.iterdir())
    assert not list(folder.iterdir())


def test_a_link_in_place_of_own_facts_is_replaced_and_not_written_through(tmp_path, open_remote):
    own, precious = tmp_path / "kv" / path_of(FACTS), tmp_path / "precious"
    own.parent.mkdir(parents=True)
    precious.write_text("mine")
    own.symlink_to(precious)
    tier = open_remote({"url": f"file://{tmp_path}/kv"}, FACTS)
    store(tier, 1)
    until(lambda: not own.is_symlink())
    assert json.loads(own.read_text())["facts"] == FACTS
    assert precious.read_text() == "mine"
