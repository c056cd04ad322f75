"""Damages the files of a durable tier, one case after the other, and says what the tier made of each.

    python tests/backends/damage.py BACKEND FOLDER FIRST_SEED CASES

A process of its own: a tier that takes its engine with it must fail a test, not end it. One line of JSON
for each case, written before the next begins; a case that has no line is the one that ended the process.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbm_core import KvbmError, Stack, chain_keys, root_key
from kvbm_core.testing import MemoryDevice

BLOCK_BYTES = 20_000
OLD, NEW = range(24), range(24, 36)
"""Blocks stored before the damage, and after it."""
PATIENCE_S = 60.0
"""A tier that has not come back by then does not."""
NAMESPACE = b"damaged medium .."
KEYS = chain_keys(root_key(), list(range(len(OLD) + len(NEW))), 1)
CONTENT = [random.Random(at).randbytes(BLOCK_BYTES) for at in range(len(KEYS))]

SETTINGS: dict[str, dict[str, Any]] = {
    "lmdb": {"capacity": "8MiB", "path": "{folder}"},
    "gds": {"capacity": "8MiB", "path": "{folder}", "engine": "threads"},
    "remote": {"url": "file://{folder}"},
}


def open_stack(backend: str, folder: Path) -> tuple[Stack, MemoryDevice]:
    """Open the tier alone, over a device with a place for each block."""
    device = MemoryDevice(len(KEYS), BLOCK_BYTES)
    settings = {name: value.format(folder=folder) for name, value in SETTINGS[backend].items()}
    config = {"tiers": [{"backend": backend, **settings}], "load_deadline_s": 20, "store_deadline_s": 20}
    return Stack.open(config, device, NAMESPACE[:16]), device


def store(stack: Stack, device: MemoryDevice, blocks: range) -> None:
    for at in blocks:
        device.write(at, CONTENT[at])
    stack.store([KEYS[at] for at in blocks], list(blocks))
    stack.wait()


def load(stack: Stack, device: MemoryDevice, blocks: range) -> tuple[int, int]:
    """Ask for each block alone: how many came, and how many of these hold other bytes."""
    came = wrong = 0
    for at in blocks:
        device.write(at, bytes(BLOCK_BYTES))
        if stack.load([KEYS[at]], [at]):
            came += 1
            wrong += device.read(at) != CONTENT[at]
    return came, wrong


def flip(content: bytearray, page: int, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 64) if content else 0):
        content[(page + rng.randrange(4096)) % len(content)] ^= 1 << rng.randrange(8)


def swap(content: bytearray, page: int, rng: random.Random) -> None:
    other = rng.randrange(max(1, len(content) // 4096)) * 4096
    first, second = content[page : page + 4096], content[other : other + 4096]
    if len(first) == len(second):
        content[page : page + 4096], content[other : other + 4096] = second, first


def fill(content: bytearray, page: int, byte: bytes) -> None:
    nbytes = len(content[page : page + 4096])
    content[page : page + nbytes] = byte[:1] * nbytes if len(byte) == 1 else byte[:nbytes]


def zero_many(content: bytearray, _page: int, rng: random.Random) -> None:
    pages = max(1, len(content) // 4096)
    for at in rng.sample(range(pages), min(pages, 16)):
        fill(content, at * 4096, b"\0")


BYTES: dict[str, Callable[[bytearray, int, random.Random], Any]] = {
    "zero page": lambda content, page, _rng: fill(content, page, b"\0"),
    "noise page": lambda content, page, rng: fill(content, page, rng.randbytes(4096)),
    "flip bits": flip,
    "swap pages": swap,
    "zero many": zero_many,
    "cut": lambda content, page, _rng: content.__delitem__(slice(page, None)),
    "cut within a page": lambda content, page, rng: content.__delitem__(
        slice(page + rng.randrange(4096), None)
    ),
    "empty": lambda content, _page, _rng: content.clear(),
    "longer": lambda content, _page, rng: content.extend(rng.randbytes(rng.randrange(1, 9000))),
}
"""Damages to a file's bytes: of the bytes, the page chosen, and chance."""

PLACES: dict[str, Callable[[Path], Any]] = {
    "gone": lambda path: None,
    "directory": lambda path: (path.mkdir(), (path / "somebody's").write_text("file")),
    "link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
}
"""Other things in the place of a file."""


def store_until_there(stack: Stack, device: MemoryDevice) -> tuple[int, int]:
    """Store as long as a tier needs to find out that its files are damaged: how often, and wrong blocks."""
    give_up_s = time.monotonic() + PATIENCE_S
    wrong = 0
    for tries in itertools.count(1):
        store(stack, device, NEW)
        came, bad = load(stack, device, NEW)
        wrong += bad
        if came == len(NEW) or time.monotonic() > give_up_s:
            return tries, wrong
        time.sleep(0.2)
    raise AssertionError


def damage(folder: Path, rng: random.Random) -> str:
    """Do one thing to one file, and say which."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    pages = max(1, len(content) // 4096)
    # The first pages are where a file keeps the description of itself.
    page = rng.choice([0, 1, rng.randrange(pages), rng.randrange(pages)]) % pages * 4096
    kind = rng.choice([*BYTES, *PLACES])
    path.unlink()
    if kind in PLACES:
        PLACES[kind](path)
    else:
        BYTES[kind](content, page, rng)
        path.write_bytes(content)
        path.chmod(0o600)
    return f"{kind} at {page} of {path.relative_to(folder)} ({pages} pages)"


def run_case(backend: str, sound: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Damage a copy; open, load all, store, load that; open again, load all."""
    rng = random.Random(f"{backend}{seed}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder, symlinks=True)
    result: dict[str, Any] = {"seed": seed, "damage": damage(folder, rng), "refused": ""}
    wrong = 0
    for attempt in ("first", "second"):
        try:
            stack, device = open_stack(backend, folder)
        except KvbmError as error:
            # In the way stands nothing that a tier has made, and it deletes nothing else.
            result["refused"] = str(error)
            break
        with stack:
            if attempt == "first":
                result["old"], bad = load(stack, device, OLD)
                wrong += bad
                result["tries"], bad = store_until_there(stack, device)
                wrong += bad
            result[f"new {attempt}"], bad = load(stack, device, NEW)
            wrong += bad
            result[f"old {attempt}"], bad = load(stack, device, OLD)
            wrong += bad
    result["wrong"] = wrong
    return result


def main(backend: str, work: Path, first: int, count: int) -> None:
    logging.basicConfig(filename=work / "log", level=logging.INFO)
    sound = work / "sound"
    stack, device = open_stack(backend, sound)
    with stack:
        store(stack, device, OLD)
    for seed in range(first, first + count):
        print(json.dumps({"begins": seed}), flush=True)
        logging.info("seed %d", seed)
        print(json.dumps(run_case(backend, sound, work / "case", seed)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
