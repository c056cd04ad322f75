"""Codecs of this tree in whole stacks: restarts, keys that change, strangers who write to a shared store."""

import contextlib
import random

import numpy as np
import pytest

from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.testing import MemoryDevice

MIB = 1 << 20
BLOCKS = 8
BLOCK_BYTES = 16 << 10
KEYS = chain_keys(root_key(), range(BLOCKS * 16), 16)
CONTENT = [random.Random(at).randbytes(BLOCK_BYTES) for at in range(BLOCKS)]


def source(folder, name):
    """An operator's key file: its content is its name's."""
    file = folder / name
    if not file.exists():
        file.write_bytes(random.Random(name).randbytes(32))
        file.chmod(0o600)
    return {"file": str(file)}


def lmdb(folder, *codecs):
    return {"backend": "lmdb", "name": "low", "capacity": 8 * MIB, "path": f"{folder}/kv", "codecs": codecs}


def remote(folder, *codecs):
    return {
        "backend": "remote",
        "name": "low",
        "url": f"file://{folder}/kv",
        "timeout_s": 30,
        "codecs": codecs,
    }


def crypt(folder, *names, **settings):
    return {"name": "crypt", "keys": [source(folder, name) for name in names], **settings}


class Life(contextlib.AbstractContextManager):
    """An engine's life: a host pool, and below it the tier."""

    def __init__(self, tier):
        self.device = MemoryDevice(BLOCKS, BLOCK_BYTES)
        tiers = [{"backend": "cpu", "capacity": MIB}, tier]
        config = {"tiers": tiers, "load_deadline_s": 60.0, "store_deadline_s": 60.0}
        self.stack = Stack.open(config, self.device, make_namespace({"model": "codecs"}))

    def __exit__(self, *_):
        self.stack.close()

    @property
    def failed(self):
        return self.stack.counts["low"].failed

    def store(self, contents=CONTENT):
        for at, content in enumerate(contents):
            self.device.write(at, content)
        self.stack.store(KEYS, range(BLOCKS))
        self.stack.wait()

    def served(self, contents=CONTENT):
        """Load the prompt; what comes is what was stored. Give how many blocks came."""
        for at in range(BLOCKS):
            self.device.write(at, bytes(BLOCK_BYTES))
        count = self.stack.load(KEYS, range(BLOCKS))
        assert [self.device.read(at) for at in range(count)] == contents[:count]
        self.stack.wait()
        return count


def live(tier):
    """Begin a life, load the prompt, and end it."""
    with Life(tier) as life:
        return life.served(), dict(life.failed)


def objects(folder):
    return sorted(file for file in (folder / "kv").rglob("*") if file.is_file() and len(file.name) == 64)


@pytest.mark.parametrize("place", [lmdb, remote])
def test_compressed_and_encrypted_objects_are_found_after_a_restart_and_are_short(tmp_path, place):
    numbers = np.random.default_rng(1).standard_normal((BLOCKS, BLOCK_BYTES // 2)).astype("<f4")
    contents = [(row.view("<u4") >> 16).astype("<u2").tobytes() for row in numbers]
    tier = place(tmp_path, {"name": "zstd"}, crypt(tmp_path, "a"))
    with Life(tier) as life:
        life.store(contents)
    assert all(file.stat().st_size < 0.8 * BLOCK_BYTES for file in objects(tmp_path))
    with Life(tier) as life:
        assert life.served(contents) == BLOCKS
        assert not life.failed


PLACES = pytest.mark.parametrize("place", [lmdb, remote])
MODES = pytest.mark.parametrize("mode", ["encrypt", "sign"])


@PLACES
@MODES
def test_a_restart_finds_what_was_stored_and_the_medium_shows_what_it_may(tmp_path, place, mode):
    tier = place(tmp_path, crypt(tmp_path, "a", mode=mode))
    with Life(tier) as life:
        life.store()
    assert live(tier) == (BLOCKS, {})
    lies = b"".join(file.read_bytes() for file in (tmp_path / "kv").rglob("*") if file.is_file())
    # LMDB cuts an object into pages.
    assert (CONTENT[0][:1000] in lies) is (mode == "sign")


@PLACES
@MODES
def test_keys_are_rotated_over_restarts_and_nothing_is_lost(tmp_path, place, mode):
    with Life(place(tmp_path, crypt(tmp_path, "a", mode=mode))) as life:
        life.store()
    assert live(place(tmp_path, crypt(tmp_path, "b", "a", mode=mode))) == (BLOCKS, {})
    assert live(place(tmp_path, crypt(tmp_path, "c", "b", "a", mode=mode))) == (BLOCKS, {})


@MODES
def test_in_a_shared_store_another_key_is_a_miss_and_deletes_nothing(tmp_path, mode, caplog):
    tier = remote(tmp_path, crypt(tmp_path, "a", mode=mode))
    with Life(tier) as life:
        life.store()
    before = {file: file.read_bytes() for file in objects(tmp_path)}
    assert len(before) == BLOCKS
    with Life(remote(tmp_path, crypt(tmp_path, "b", mode=mode))) as life:
        assert life.served() == 0
        assert {reason for _, reason in life.failed} <= {"missing"}
        life.store()
        assert life.served() == BLOCKS  # From host memory.
    line, *_ = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "cannot be judged here, and counts as missing: it is of key " in line
    assert {file: file.read_bytes() for file in objects(tmp_path)} == before
    assert live(tier) == (BLOCKS, {})


def test_on_a_disk_of_its_own_what_another_key_asks_for_makes_room_for_what_it_computes(tmp_path):
    with Life(lmdb(tmp_path, crypt(tmp_path, "a"))) as life:
        life.store()
    with Life(lmdb(tmp_path, crypt(tmp_path, "b"))) as life:
        assert life.served() == 0
        assert {reason for _, reason in life.failed} <= {"missing"}
        life.store()
    assert live(lmdb(tmp_path, crypt(tmp_path, "b"))) == (BLOCKS, {})


def test_rings_share_a_store_and_never_meet(tmp_path):
    tiers = [remote(tmp_path, crypt(tmp_path, name, mode="sign", ring=name)) for name in ("a", "b")]
    for count, tier in enumerate(tiers, 1):
        with Life(tier) as life:
            assert life.served() == 0
            life.store()
        assert len(objects(tmp_path)) == count * BLOCKS
    assert [live(tier) for tier in tiers] == [(BLOCKS, {})] * 2


@MODES
def test_a_planted_block_is_refused_whoever_wrote_it(tmp_path, mode):
    """Under a valid key, with a valid seal: by who can write to the store, and has no key of ours."""
    (tmp_path / "his").mkdir()
    ours, his = (
        remote(tmp_path / folder, crypt(tmp_path, key, mode=mode))
        for folder, key in ((".", "a"), ("his", "b"))
    )
    for tier, contents in ((ours, CONTENT), (his, CONTENT[::-1])):
        with Life(tier) as life:
            life.store(contents)
    for mine, other in zip(objects(tmp_path), objects(tmp_path / "his"), strict=True):
        assert mine.name == other.name
        sound, planted = mine.read_bytes(), other.read_bytes()
        # His own trailer, and ours: the first cannot be judged, the second is proved wrong.
        mine.write_bytes(planted if mine.name < "8" else planted[:-64] + sound[-64:])
    with Life(ours) as life:
        assert life.served() == 0
        assert {reason for _, reason in life.failed} <= {"missing", "corrupt"}
        life.store()
    # What is proved wrong was deleted, and stored again.
    assert {file.name for file in objects(tmp_path)} >= {key.hex() for key in KEYS}


def test_blocks_of_a_store_that_signs_are_not_swapped(tmp_path):
    tier = remote(tmp_path, crypt(tmp_path, "a", mode="sign"))
    with Life(tier) as life:
        life.store()
    files = objects(tmp_path)
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    served, failed = live(tier)
    assert served == 0
    assert {reason for _, reason in failed} == {"corrupt"}
