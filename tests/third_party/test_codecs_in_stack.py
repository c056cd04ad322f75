"""Codecs of strangers over every backend that can bear them: churn, `kill -9`, restart, 95 % full."""

import contextlib
import dataclasses
import json
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from churn import PROMPT, Churn, content_of, du_bytes, keys_of
from toy_install import HERE

from kvbm_cli._app import run as kvbm
from kvbm_core import ConfigError

MIB = 1 << 20
ORDERS = ["pack", "aes-gcm", "pack,aes-gcm", "aes-gcm,pack"]
TURNS = 10
"""Capacities that go through a tier before it is killed."""
SLOT = 2 * MIB
"""Of gds and cpu, so that an object with seal and tag fills its slot."""
IN_SLOT = SLOT // 16 - 96 - 28


@dataclasses.dataclass(frozen=True)
class Case:
    """A tier that is filled, and what fills it."""

    backend: str
    order: str
    capacity: int
    block_bytes: int
    least_du: float
    """Part of the capacity that `du` counts at the end: the rest is what the tier needs for itself."""
    backend_options: tuple = ()

    def __str__(self):
        return f"{self.backend}-{self.order}-{self.capacity // MIB}MiB"


CASES = [
    # Of a small file LMDB needs a fifth for pages that wait to be used again, gds a part for its probe.
    *(Case("lmdb", order, 16 * MIB, 32 << 10, 0.75) for order in ("pack", "pack,aes-gcm")),
    *(Case("toy", order, 12 * MIB, 64 << 10, 0.9) for order in ("aes-gcm", "aes-gcm,pack")),
    Case("gds", "aes-gcm", 16 * MIB, IN_SLOT, 0.92, (("engine", "threads"),)),
]
LARGE = [
    *(Case("lmdb", order, 256 * MIB, MIB, 0.95) for order in ORDERS),
    *(Case("toy", order, 256 * MIB, 256 << 10, 0.95) for order in ORDERS),
    Case("gds", "aes-gcm", 256 * MIB, IN_SLOT, 0.95, (("engine", "threads"),)),
]


def codecs_of(order, folder, content=b"k" * 32):
    """Write codecs as an operator does, in this order."""
    file = folder / "key"
    file.write_bytes(content)
    file.chmod(0o600)
    parts = {"pack": {"name": "pack", "level": 1}, "aes-gcm": {"name": "aes-gcm", "key_file": str(file)}}
    return [parts[name] for name in order.split(",")]


class Child:
    """A process that stores prompt after prompt, see `churn`."""

    def __init__(self, installed, folder, job, **environment):
        paths = os.pathsep.join(filter(None, (str(installed), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, **environment, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(HERE / "churn.py"), json.dumps(job)]
        self.log = folder / "said"
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(command, stdout=out, env=environment)

    @property
    def said(self):
        return [json.loads(line) for line in self.log.read_bytes().split(b"\n")[:-1]]

    def kill(self, when, pause_s):
        """SIGKILL, as soon as something is true of the last line, and so much later."""
        give_up_s = time.monotonic() + 600
        try:
            while not ((said := self.said) and when(said[-1])):
                assert self.process.poll() is None, "the child ended by itself; see the standard error"
                assert time.monotonic() < give_up_s
                time.sleep(0.05)
            time.sleep(pause_s)
        finally:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        return self.said


def chance(name):
    """Give some moment of the prompt after, the same each time."""
    return random.Random(name).uniform(0.0, 0.1)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.soak) for c in LARGE)], ids=str)
def test_after_ten_capacities_and_kill_9_all_that_is_there_is_right_and_it_is_full(
    installed, tmp_path, case, caplog
):
    tier = {"backend": case.backend, "capacity": case.capacity, "path": str(tmp_path / "kv")}
    tier |= dict(case.backend_options) | {"codecs": codecs_of(case.order, tmp_path)}
    job = {"tiers": [tier], "block_bytes": case.block_bytes, "path": tmp_path / "kv"}
    child = Child(installed, tmp_path, job | {"path": str(job["path"])})
    said = child.kill(lambda line: line["turns"] >= TURNS, chance(str(case)))
    assert max(line["du"] for line in said) <= case.capacity
    full = next(at for at, line in enumerate(said) if line["turns"])
    assert min(line["fullness"] for line in said[full + 1 :]) >= 0.95
    assert said[-1]["failed"] == 0
    latest = said[-1]["prompt"]
    with Churn([tier], case.block_bytes) as churn:
        found = churn.objects
        served = [churn.serve(prompt) for prompt in range(latest + 3)]
        assert sum(served) == found > 0
        # What it had said is stored last; the one after that may be there in part.
        assert served[latest - 2 : latest + 1] == [PROMPT] * 3
        assert not churn.counts.failed
        for prompt in range(latest + 3, latest + 23):
            churn.store(prompt)
            assert du_bytes(tmp_path / "kv") <= case.capacity
        assert churn.fullness >= 0.95
        assert du_bytes(tmp_path / "kv") >= case.least_du * case.capacity
        assert not churn.counts.failed
    assert not warnings_in(caplog)


def test_lengths_go_from_a_third_to_more_than_the_object(installed, tmp_path):
    """So the other tests see objects that grow, and such that become short."""
    nbytes, url = 2048, f"file://{tmp_path}/kv"
    with Churn([remote(url, codecs_of("pack,aes-gcm", tmp_path))], nbytes) as churn:
        for prompt in range(20):
            churn.store(prompt)
    parts = sorted(file.stat().st_size / (nbytes + 96) for file in objects_in(tmp_path))
    assert len(parts) == 20 * PROMPT
    assert parts[0] < 0.42
    assert 1 < parts[-1] < 1.05


@pytest.mark.parametrize(
    ("order", "capacity", "block_bytes"),
    [
        ("pack,aes-gcm", 32 * MIB, MIB // 2),
        *(pytest.param(order, 256 * MIB, MIB, marks=pytest.mark.soak) for order in ORDERS),
    ],
)
def test_memory_is_used_to_95_percent_and_never_above(installed, tmp_path, order, capacity, block_bytes):
    tier = {"backend": "memory", "capacity": capacity, "codecs": codecs_of(order, tmp_path)}
    job = {"tiers": [tier], "block_bytes": block_bytes, "turns": TURNS}
    # Each object in pages of its own, given back when it is forgotten: else RSS shows the C library's habits.
    child = Child(installed, tmp_path, job, MALLOC_MMAP_THRESHOLD_=str(32 << 10))
    assert child.process.wait(600) == 0
    said = child.said
    assert said[-1]["fullness"] >= 0.95
    # Beside the objects there are buffers and libraries, all of them when it is half full.
    half = next(line for line in said if line["fullness"] > 0.5)
    beside = half["rss"] - half["used"]
    rss = [(line["rss"] - beside) / capacity for line in said]
    assert rss[-1] >= 0.95
    # A page is lost at each object's end, and a batch is encoded.
    assert max(rss) <= 1.0 + 0.01 + 2 * PROMPT * block_bytes / capacity / 8
    assert said[-1]["failed"] == 0


@pytest.mark.parametrize("capacity", [32 * MIB, pytest.param(512 * MIB, marks=pytest.mark.soak)])
def test_a_second_tier_of_host_memory_bears_what_saves_no_room(installed, tmp_path, capacity):
    codecs = codecs_of("aes-gcm", tmp_path)
    pool = {"backend": "cpu", "name": "pool", "capacity": 8 * MIB}
    second = {"backend": "cpu", "name": "second", "capacity": capacity, "codecs": codecs}
    job = {"tiers": [pool, second], "block_bytes": IN_SLOT, "turns": TURNS}
    child = Child(installed, tmp_path, job)
    assert child.process.wait(600) == 0
    said = child.said
    assert said[-1]["fullness"] >= 0.95
    assert said[-1]["failed"] == 0
    # Its memory is taken at the start, and no more of it later.
    grown = said[-1]["rss"] - said[2]["rss"]
    assert capacity < said[-1]["rss"]
    assert grown <= 0.05 * capacity


def remote(url, codecs, **settings):
    return {"backend": "remote", "url": url, "codecs": codecs, "timeout_s": 30, **settings}


def objects_in(folder):
    return [file for file in (folder / "kv").rglob("*") if file.is_file() and len(file.name) == 64]


@contextlib.contextmanager
def file_store(tmp_path, monkeypatch, request):
    yield f"file://{tmp_path}/kv", {}, lambda: [file.stat().st_size for file in objects_in(tmp_path)]


@contextlib.contextmanager
def s3_store(tmp_path, monkeypatch, request):
    server = request.getfixturevalue("s3_server")
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)

    def listed():
        sizes, more = [], {}
        while True:
            page = client.list_objects_v2(Bucket=server.bucket, Prefix=tmp_path.name, **more)
            sizes += [each["Size"] for each in page.get("Contents", [])]
            if not page["IsTruncated"]:
                return sizes
            more = {"ContinuationToken": page["NextContinuationToken"]}

    with contextlib.closing(server._client()) as client:
        yield f"s3://{server.bucket}/{tmp_path.name}", {"endpoint_url": server.endpoint}, listed


@pytest.mark.parametrize(
    ("store", "order"),
    [
        *((file_store, order) for order in ORDERS),
        (s3_store, "pack,aes-gcm"),
        *(
            pytest.param(s3_store, order, marks=pytest.mark.soak)
            for order in ORDERS
            if order != "pack,aes-gcm"
        ),
    ],
)
def test_a_shared_store_has_whole_objects_after_kill_9_and_is_kept_at_its_size(
    installed, tmp_path, monkeypatch, request, store, order
):
    block_bytes, prompts = 32 << 10, 15
    with store(tmp_path, monkeypatch, request) as (url, options, listed):
        tier = remote(url, codecs_of(order, tmp_path), storage_options=options)
        child = Child(installed, tmp_path, {"tiers": [tier], "block_bytes": block_bytes})
        latest = child.kill(lambda line: line["prompt"] >= prompts, chance(order))[-1]["prompt"]
        sizes = listed()
        assert len(sizes) >= PROMPT * (latest + 1)
        short = sum(sizes) / (len(sizes) * block_bytes)
        # Encrypted bytes do not get shorter; what was compressed before does.
        assert short < 0.8 if order.startswith("pack") else 1 < short < 1.01
        with Churn([tier], block_bytes) as churn:
            assert [churn.serve(prompt) for prompt in range(latest + 1)] == [PROMPT] * (latest + 1)
            assert not churn.counts.failed
        most = int(0.6 * sum(sizes))
        arguments = [f"--option={name}={value}" for name, value in options.items()]
        assert kvbm(["clear", url, "--down-to", str(most), "--yes", *arguments]) == 0
        assert 0.95 * most <= sum(listed()) <= most
        with Churn([tier], block_bytes) as churn:
            served = sum(churn.serve(prompt) for prompt in range(latest + 3))
            assert served == len(listed())
            assert not churn.counts.failed


HERE_REFUSED = "would save no room here: each object takes a slot of 128KiB, whatever its length"


@pytest.mark.parametrize("order", ["pack", "pack,aes-gcm", "aes-gcm,pack"])
@pytest.mark.parametrize("backend", ["gds", "cpu"])
def test_where_an_object_takes_a_slot_a_codec_that_saves_room_is_refused(installed, tmp_path, backend, order):
    tier = {"backend": backend, "name": "slots", "capacity": 8 * MIB, "codecs": codecs_of(order, tmp_path)}
    if backend == "gds":
        tier |= {"path": str(tmp_path / "kv"), "engine": "threads"}
    nbytes = 130_000
    tiers = [{"backend": "cpu", "name": "pool", "capacity": 4 * MIB}, tier]
    with pytest.raises(ConfigError, match=f"tier slots: codecs: 'pack' {HERE_REFUSED}. Leave it out, or"):
        Churn(tiers, nbytes)


@pytest.mark.parametrize("order", ORDERS)
def test_the_host_pool_takes_no_codec(installed, tmp_path, order):
    tiers = [{"backend": "cpu", "name": "pool", "capacity": 4 * MIB, "codecs": codecs_of(order, tmp_path)}]
    with pytest.raises(ConfigError, match="tier pool: codecs: this tier is the host pool, whose memory is"):
        Churn(tiers, 130_000)


DURABLE = {
    "lmdb": lambda folder: {"capacity": 8 * MIB, "path": f"{folder}/kv"},
    "gds": lambda folder: {"capacity": 8 * MIB, "path": f"{folder}/kv", "engine": "threads"},
    "remote": lambda folder: {"url": f"file://{folder}/kv"},
}


@pytest.mark.parametrize("change", ["key file", "codec list", "order"])
@pytest.mark.parametrize("backend", DURABLE)
def test_with_another_key_file_or_list_it_is_a_miss_and_nothing_of_the_other_is_deleted(
    installed, tmp_path, backend, change, caplog
):
    if backend == "gds" and change == "order":
        pytest.skip("there is no second codec that it takes")
    (tmp_path / "other").mkdir()
    first = codecs_of("aes-gcm" if change != "order" else "aes-gcm,pack", tmp_path)
    second = {
        "key file": lambda: codecs_of("aes-gcm", tmp_path / "other", b"o" * 32),
        "codec list": list,
        "order": lambda: first[::-1],
    }[change]()
    # So long that the slots of gds are as long with the codec as without.
    block_bytes, place = 30_000, {"backend": backend, **DURABLE[backend](tmp_path)}
    for life, codecs in enumerate([first, second, first, second]):
        mine = life % 2
        with Churn([{**place, "codecs": codecs}], block_bytes) as churn:
            assert [churn.serve(prompt) for prompt in (0, 1)] == [PROMPT * (life > 1)] * 2
            # Both have the same blocks, and one more prompt of their own.
            if life < 2:
                for prompt in (0, 1, 2 + mine):
                    churn.store(prompt)
            assert churn.serve(2 + mine) == PROMPT
            assert churn.serve(3 - mine) == 0
            assert not churn.counts.failed
    assert not warnings_in(caplog)


def damage_files(folder):
    """Flip a bit of each object of the first prompt; give how many."""
    names = {key.hex() for key in keys_of(0)}
    files = [file for file in objects_in(folder) if file.name in names]
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    return len(files)


def damage_rows(folder):
    with contextlib.closing(sqlite3.connect(folder / "kv/rank0/blocks.sqlite")) as database, database:
        for key in keys_of(0):
            [row] = database.execute("SELECT data FROM block WHERE key = ?", (key,)).fetchall()
            data = bytearray(row[0])
            data[len(data) // 2] ^= 4
            database.execute("UPDATE block SET data = ? WHERE key = ?", (bytes(data), key))
    return PROMPT


def damage_pages(folder):
    """LMDB: flip a bit of what Zstandard has left as it was."""
    file = folder / "kv/rank0/data.mdb"
    data = bytearray(file.read_bytes())
    for at in range(PROMPT):
        content = content_of(0, at, 30_000)
        found = data.find(content[4000:4040])
        assert found > 0
        data[found] ^= 4
    file.write_bytes(data)
    return PROMPT


def damage_slots(folder):
    """Gds: flip a bit of each slot that is in use."""
    [file] = [file for file in (folder / "kv/rank0").iterdir() if file.stat().st_size > 4 * MIB]
    data = bytearray(file.read_bytes())
    slots = [at for at in range(0, len(data), 32 << 10) if any(data[at : at + 30_000])]
    for at in slots[:PROMPT]:
        data[at + 10_000] ^= 4
    file.write_bytes(data)
    return PROMPT


@pytest.mark.parametrize(
    ("backend", "order", "damage"),
    [
        *(("remote", order, damage_files) for order in ORDERS),
        *(("toy", order, damage_rows) for order in ORDERS),
        ("lmdb", "pack", damage_pages),
        ("gds", "aes-gcm", damage_slots),
    ],
)
def test_a_damaged_object_is_corrupt_dropped_and_said_in_one_line(
    installed, tmp_path, backend, order, damage, caplog
):
    places = DURABLE | {"toy": DURABLE["lmdb"]}
    tier = {"backend": backend, **places[backend](tmp_path), "codecs": codecs_of(order, tmp_path)}
    with Churn([tier], 30_000) as churn:
        for prompt in (0, 1):
            churn.store(prompt)
    assert damage(tmp_path) == PROMPT
    with Churn([tier], 30_000) as churn:
        assert churn.serve(1) == PROMPT
        assert churn.serve(0) == 0
        # Each was asked for, once, and is gone with that.
        assert churn.counts.failed == {("load", "corrupt"): PROMPT}
        churn.stack.wait()
        assert churn.objects == PROMPT
        assert churn.serve(0) == 0
        assert churn.counts.failed == {("load", "corrupt"): PROMPT}
        [line] = [record.message for record in caplog.records if record.levelname == "ERROR"]
        assert line.startswith(f"tier {backend}: block ")
        churn.store(0)
        assert [churn.serve(prompt) for prompt in (0, 1)] == [PROMPT] * 2


def test_a_codec_of_the_second_tier_of_host_memory_is_proved_too(installed, tmp_path, monkeypatch):
    """It is addressable, and no host pool: nothing uses its memory as it is."""
    import kvbm_aes_gcm

    tiers = [
        {"backend": "cpu", "name": "pool", "capacity": MIB},
        {"backend": "cpu", "name": "second", "capacity": 8 * MIB, "codecs": codecs_of("aes-gcm", tmp_path)},
    ]
    decode = kvbm_aes_gcm.AesGcmCodec.decode

    def wrong(self, key, source, target):
        nbytes = decode(self, key, source, target)
        target[100] ^= 1
        return nbytes

    with Churn(tiers, 30_000) as churn:
        for prompt in range(10):
            churn.store(prompt)
        monkeypatch.setattr(kvbm_aes_gcm.AesGcmCodec, "decode", wrong)
        assert sum(churn.serve(prompt) for prompt in range(4)) == 0
        assert set(churn.counts.failed) == {("load", "corrupt")}


def warnings_in(caplog):
    """Give the lines that are more than information."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
