"""The suite in ten lines, and what it cannot know: SQLite, the disk, and this tier's messages."""

import ctypes
import hashlib
import mmap
import random
import stat
import time

import pytest
from kvbm_toy import ToyConfig, ToyTier, kvbm_backends

from kvbm_core import ByteSize, Completion, Op, Outcome, Reason, Region, TierContext, TierOpenError, Transfer
from kvbm_core.testing.suite import TierSuite


class TestToy(TierSuite):
    backend = "toy"

    def settings(self, folder):
        return {"path": str(folder / "kv"), "capacity": "2MiB"}


# What is this tier's own.

CAPACITY_BYTES = 4 << 20
BLOCK_BYTES = 100_000


def open_tier(folder, capacity_bytes=CAPACITY_BYTES):
    config = ToyConfig(path=str(folder / "kv"), capacity=ByteSize(capacity_bytes))
    return ToyTier(config, TierContext(b"n" * 16, BLOCK_BYTES))


def key_of(number):
    return hashlib.sha256(str(number).encode()).digest()


def run(tier, op, number, nbytes=BLOCK_BYTES):
    memory = mmap.mmap(-1, nbytes)
    memory[:] = (number.to_bytes(4, "big") * (nbytes // 4 + 1))[:nbytes]
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    tier.submit([Transfer(number, op, key_of(number), Region(address, nbytes, owner=memory))])
    give_up_s = time.monotonic() + 60
    while not (done := tier.poll()):
        assert time.monotonic() < give_up_s
        time.sleep(0.001)
    [completion] = done
    return completion


def disk_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


LENGTHS = {
    "longest": lambda chance: BLOCK_BYTES,
    "any": lambda chance: chance.randint(1, BLOCK_BYTES),
    "short": lambda chance: chance.randint(1, 500),
    # Their rows are too long for two to share a page of the tree, so they leave the most of it empty.
    "half a page": lambda chance: 2000 + chance.randrange(60),
    "half a page beside whole ones": lambda chance: 2060 + 2 * 4092 - 62,
}


@pytest.mark.parametrize("lengths", LENGTHS)
def test_it_holds_what_the_charges_permit_and_the_folder_stays_within_its_capacity(tmp_path, lengths):
    tier, chance, held, used_bytes = open_tier(tmp_path), random.Random(1), {}, 0
    charge, room = tier.capabilities.charge, tier.capabilities.capacity_bytes
    if lengths == "longest":
        assert room // charge(BLOCK_BYTES) * BLOCK_BYTES > CAPACITY_BYTES * 0.85
    for number in range(1500):
        nbytes = LENGTHS[lengths](chance)
        while used_bytes + charge(nbytes) > room:
            gone = chance.choice(list(held))
            tier.discard([key_of(gone)])
            used_bytes -= charge(held.pop(gone))
        assert run(tier, Op.STORE, number, nbytes) == Completion(number, Outcome.DONE, nbytes=nbytes)
        held[number] = nbytes
        used_bytes += charge(nbytes)
        assert disk_bytes(tmp_path) <= CAPACITY_BYTES
    tier.close()
    tier = open_tier(tmp_path)
    assert list(tier.inventory()) == [(key_of(number), nbytes) for number, nbytes in held.items()]
    tier.close()


def test_an_object_longer_than_the_region_is_corrupt(tmp_path):
    tier = open_tier(tmp_path)
    run(tier, Op.STORE, 1, 5000)
    assert run(tier, Op.LOAD, 1, 4999) == Completion(1, Outcome.FAILED, Reason.CORRUPT)
    assert run(tier, Op.LOAD, 1, 5001) == Completion(1, Outcome.DONE, nbytes=5000)
    tier.close()


def test_a_directory_in_use_is_refused_by_name(tmp_path):
    tier = open_tier(tmp_path)
    with pytest.raises(TierOpenError, match=r"path: .*kv/rank0 is used by another engine"):
        open_tier(tmp_path)
    tier.close()
    open_tier(tmp_path).close()


def test_files_are_private(tmp_path):
    open_tier(tmp_path).close()
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*")}
    assert {name: modes[name] for name in ("rank0", "lock", "blocks.sqlite")} == {
        "rank0": 0o700,
        "lock": 0o600,
        "blocks.sqlite": 0o600,
    }


def test_a_file_that_is_no_database_is_refused_by_name(tmp_path):
    open_tier(tmp_path).close()
    file = tmp_path / "kv" / "rank0" / "blocks.sqlite"
    file.write_bytes(b"x" * 100_000)
    with pytest.raises(TierOpenError, match=r"kv/rank0: file is not a database; .* delete it"):
        open_tier(tmp_path)
    file.unlink()
    open_tier(tmp_path).close()


def test_a_file_larger_than_a_smaller_capacity_is_dropped(tmp_path, caplog):
    tier = open_tier(tmp_path)
    for number in range(30):
        run(tier, Op.STORE, number)
    tier.close()
    tier = open_tier(tmp_path, CAPACITY_BYTES // 2)
    assert "larger than its capacity" in caplog.text
    assert list(tier.inventory()) == []
    tier.close()


def test_what_it_offers_for_a_capacity_too_small_is_enough(tmp_path):
    with pytest.raises(TierOpenError, match="capacity: 100000 holds no object") as refused:
        open_tier(tmp_path, 100_000)
    tier = open_tier(tmp_path, int(str(refused.value).split()[-1]))
    assert run(tier, Op.STORE, 1).outcome is Outcome.DONE
    tier.close()


def test_its_state_is_one_line(tmp_path):
    tier = open_tier(tmp_path)
    run(tier, Op.STORE, 1)
    assert repr(tier).endswith("kv/rank0 103072/3879216 bytes, 0 in flight>")
    tier.close()
    assert repr(tier).endswith("kv/rank0 103072/3879216 bytes, closed>")


def test_check_names_a_path_that_cannot_be_a_directory(tmp_path):
    [backend] = kvbm_backends()
    (tmp_path / "file").touch()
    with pytest.raises(TierOpenError, match="file is no directory you may write to"):
        backend.check(ToyConfig(path=str(tmp_path / "file" / "kv"), capacity=ByteSize(1)))
