"""Places of durable tiers, and faults to plant in them: each damages real bytes of files, rows or objects.

A fault is told the tier, its folder, an object, and chance; it may take another object that nobody else
damages. It says which keys `kvbm verify` must name.
"""

import itertools
import os
import random
import struct
from pathlib import Path

import lmdb
import xxhash

from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.config import convert
from kvbm_core.layers import SEAL_BYTES
from kvbm_core.registry import Registry
from kvbm_core.testing import MemoryDevice
from kvbm_gds._layout import ENTRY, ENTRY_BYTES, HEADER, HEADER_BYTES
from kvbm_lmdb._place import pieces_of

BLOCK_BYTES, AT_ONCE = 8192, 64
OBJECT_BYTES = BLOCK_BYTES + SEAL_BYTES
KEYS = chain_keys(root_key(), range(16 * 2500), block_tokens=16)
FACTS = {"models": [], "block_tokens": 16}
NAMESPACE = make_namespace(FACTS)
DURABLE = ["gds", "lmdb", "remote"]


def tier(name, folder, capacity="32MiB", **more):
    if name == "remote":
        return {"backend": name, "url": f"file://{folder}/{name}", **more}
    return {"backend": name, "capacity": capacity, "path": f"{folder}/{name}", **more}


def opened(entry, seed=1):
    device, rng = MemoryDevice(AT_ONCE, BLOCK_BYTES), random.Random(seed)
    for block in range(AT_ONCE):
        device.write(block, rng.randbytes(BLOCK_BYTES))
    return Stack.open({"tiers": [entry]}, device, NAMESPACE, facts=FACTS)


def batches(keys, count=AT_ONCE):
    return [keys[at : at + count] for at in range(0, len(keys), count)]


def fill(entry, keys):
    with opened(entry) as stack:
        for batch in batches(keys):
            stack.store(batch, list(range(len(batch))))
            stack.wait()
    drop_order(entry)


def drop_order(entry):
    """Delete what the stack keeps of the order of use: objects, that a test would have to count."""
    backend, blocks = Registry().backend(entry["backend"]), {*KEYS}
    if not backend.shared:
        own = {key: value for key, value in entry.items() if key in ("path", "capacity")}
        [part] = backend.contents(convert(own, backend.config_type, "tier"))
        part.remove([each for each in part.objects() if each.key not in blocks])
        part.close()


def contents_of(name, folder):
    entry = tier(name, folder)
    backend = Registry().backend(entry.pop("backend"))
    [part] = backend.contents(convert(entry, backend.config_type, name))
    return part


def listed(name, folder):
    part = contents_of(name, folder)
    try:
        return list(part.objects())
    finally:
        part.close()


def plant(name, folder, objects, count, rng):
    """Plant so many faults of all kinds in turn; take each one's objects from the list."""
    wrong = set()
    for fault in itertools.islice(itertools.cycle(KINDS), count):
        wrong |= fault(name, folder, objects.pop(), objects, rng)
    return wrong


# ---- where bytes lie


def flip(file, at, rng):
    """Change one byte of a file."""
    with Path(file).open("r+b") as content:
        content.seek(at)
        [byte] = content.read(1)
        content.seek(at)
        content.write(bytes([byte ^ rng.randrange(1, 256)]))


def place_bytes(name, folder, found):
    """Say where an object's bytes lie: file and offset."""
    if name == "gds":
        with (folder / "gds/rank0/index").open("rb") as index:
            *_, slot_bytes, per_file = HEADER.unpack(index.read(HEADER.size))
        number, at = divmod(found.place[0], per_file)
        return folder / f"gds/rank0/slab.{number:03d}", at * slot_bytes
    if name == "lmdb":
        [(page, _)] = pieces_of(found.place[8:])
        return folder / "lmdb/rank0/data.mdb", page * 4096 + 16
    return folder / "remote" / found.place.path, 0


def entry(folder, found, raw):
    """Write an entry of gds's index."""
    with (folder / "gds/rank0/index").open("r+b") as index:
        index.seek(HEADER_BYTES + found.place[0] * ENTRY_BYTES)
        index.write(raw)


def sound_entry(folder, found, key, nbytes):
    """Write an entry with a checksum that fits."""
    namespace, _, sequence, *_ = ENTRY.unpack(found.place[1][: ENTRY.size])
    fields = ENTRY.pack(namespace, key, sequence, nbytes, 0)
    entry(folder, found, fields + xxhash.xxh3_64_digest(fields))


def rows(folder, change):
    """Change rows of LMDB's index, as nothing but damage does."""
    file = folder / "lmdb/rank0/data.mdb"
    with lmdb.open(str(file), subdir=False, lock=False, max_dbs=2, map_size=32 << 20) as env:
        index = env.open_db(b"index", create=False)
        with env.begin(write=True, db=index) as txn:
            change(txn)


def raw_row(folder, found, at, rng):
    """Change a byte of an object's row of LMDB's index in the file, in each page that has or had it."""
    file = folder / "lmdb/rank0/data.mdb"
    content, row = file.read_bytes(), found.namespace + found.key + found.place
    byte, place = rng.randrange(1, 256), -1
    with file.open("r+b") as target:
        while (place := content.find(row, place + 1)) >= 0:
            target.seek(place + at)
            target.write(bytes([content[place + at] ^ byte]))


# ---- faults


def payload(name, folder, found, _others, rng):
    file, at = place_bytes(name, folder, found)
    flip(file, at + rng.randrange(found.nbytes - SEAL_BYTES), rng)
    return {found.key}


def seal(name, folder, found, _others, rng):
    # The last eight bytes of a seal are zero, and count as well. Behind a codec it is the signature's end.
    file, at = place_bytes(name, folder, found)
    flip(file, at + found.nbytes - SEAL_BYTES + rng.randrange(SEAL_BYTES), rng)
    return {found.key}


def torn(name, folder, found, _others, _rng):
    """The second half never came to the disk."""
    file, at = place_bytes(name, folder, found)
    half = found.nbytes // 2
    with file.open("r+b") as content:
        content.seek(at + half)
        content.write(bytes(found.nbytes - half))
    return {found.key}


def zeros(name, folder, found, _others, _rng):
    """A page of it is read as zeros."""
    file, at = place_bytes(name, folder, found)
    with file.open("r+b") as content:
        content.seek(at + 4096)
        content.write(bytes(min(4096, found.nbytes - 4096)))
    return {found.key}


def swap(name, folder, found, others, _rng):
    """Two whole objects lie in each other's places."""
    pair = found, others.pop()
    places = [place_bytes(name, folder, each) for each in pair]
    held = [file.read_bytes()[at : at + each.nbytes] for (file, at), each in zip(places, pair, strict=True)]
    for (file, at), content in zip(places, reversed(held), strict=True):
        with file.open("r+b") as target:
            target.seek(at)
            target.write(content)
    return {each.key for each in pair}


def misplaced(name, folder, found, others, _rng):
    """Another's bytes were written over it; the other is sound."""
    (file, at), (source, start) = (place_bytes(name, folder, each) for each in (found, others.pop()))
    content = source.read_bytes()[start : start + found.nbytes]
    with file.open("r+b") as target:
        target.seek(at)
        target.write(content)
    return {found.key}


def key(name, folder, found, _others, rng):
    """It is listed under another key."""
    wrong = rng.randbytes(32)
    if name == "gds":
        sound_entry(folder, found, wrong, found.nbytes)
    elif name == "lmdb":
        rows(folder, lambda txn: (txn.delete(found.namespace + found.key),
                                  txn.put(found.namespace + wrong, found.place)))  # fmt: skip
    else:
        file = folder / "remote" / found.place.path
        target = file.parent.parent / wrong.hex()[:2] / wrong.hex()
        target.parent.mkdir(exist_ok=True)
        file.rename(target)
    return {wrong}


def length(name, folder, found, _others, rng):
    """It is listed with another length; a file has another."""
    wrong = found.nbytes - rng.randrange(1, 60)
    if name == "gds":
        sound_entry(folder, found, found.key, wrong)
    elif name == "lmdb":
        row = found.place[:8] + struct.pack("<Q", wrong) + found.place[16:]
        rows(folder, lambda txn: txn.put(found.namespace + found.key, row))
    else:
        os.truncate(folder / "remote" / found.place.path, rng.choice([0, 50, wrong, found.nbytes + 9]))
    return {found.key}


def listing(name, folder, found, _others, rng):
    """A byte of what lists it is another, in the file itself."""
    if name == "gds":
        raw = bytearray(found.place[1])
        # Not the key, by which it is told here.
        raw[rng.choice([*range(16), *range(48, ENTRY_BYTES)])] ^= rng.randrange(1, 256)
        entry(folder, found, bytes(raw))
    elif name == "lmdb":
        raw_row(folder, found, 48 + rng.randrange(8, len(found.place)), rng)
    else:
        return payload(name, folder, found, _others, rng)
    return {found.key}


def astray(name, folder, found, _others, rng):
    """What lists it leads beyond the end of the file; a file has nothing in it."""
    if name == "gds":
        sound_entry(folder, found, found.key, rng.choice([0, 1 << 40]))
    elif name == "lmdb":
        row = found.place[:16] + struct.pack("<Q", 3 << 40 | 1 << 30)
        rows(folder, lambda txn: txn.put(found.namespace + found.key, row))
    else:
        os.truncate(folder / "remote" / found.place.path, 0)
    return {found.key}


KINDS = [payload, seal, torn, zeros, swap, misplaced, key, length, listing, astray]
