"""Real tiers find their blocks in the order of use, after a clean end and after a kill.

Run by itself this file is the engine that is killed.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvbm_cli._app import run as kvbm
from kvbm_core import Stack, chain_keys, root_key
from kvbm_core.layers import order_tier
from kvbm_core.testing import MemoryDevice

BLOCK_BYTES, PROMPT = 8000, 4
CAPACITY = "4MiB"
USED, LOADED = 3, 5
"""Prompts that are offered again, and loaded."""


def opened(backend, folder, policy="lru"):
    device = MemoryDevice(2 * PROMPT, BLOCK_BYTES)
    for block in range(PROMPT):
        device.write(block, bytes([block + 1]) * BLOCK_BYTES)
    tier = {"backend": backend, "path": str(folder), "capacity": CAPACITY, "policy": policy}
    if backend == "gds":
        tier["engine"] = "threads"
    return Stack.open({"tiers": [tier]}, device, b"n" * 16), device


def prompt(number):
    return chain_keys(root_key(salt=str(number)), range(16 * PROMPT), 16)


def store(stack, numbers):
    for number in numbers:
        stack.store(prompt(number), range(PROMPT))
        stack.wait()


def fill(stack):
    """Store until the first prompts have gone, then use two of the oldest."""
    [counts] = stack.counts.values()
    number = 0
    while not counts.evicted:
        store(stack, [number])
        number += 1
    store(stack, [USED])
    assert stack.load(prompt(LOADED), range(PROMPT, 2 * PROMPT)) == PROMPT
    return number


def order_of(stack):
    [tier] = stack._worker._tiers
    return tier.tier._inner


def killed(backend, folder, policy):
    command = [sys.executable, __file__, backend, str(folder), policy]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        stored = child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
    return int(stored)


def closed(backend, folder, policy):
    stack, _ = opened(backend, folder, policy)
    with stack:
        return fill(stack)


@pytest.mark.parametrize(
    ("backend", "end", "policy", "stays"),
    [
        ("gds", closed, "adaptive", True),
        ("gds", killed, "lru", True),
        ("gds", closed, "fifo", False),
        ("lmdb", closed, "lru", True),
        ("lmdb", killed, "adaptive", True),
    ],
)
def test_what_was_used_stays_when_more_is_stored_after_a_restart(tmp_path, backend, end, policy, stays):
    count = end(backend, tmp_path / "kv", policy)
    stack, device = opened(backend, tmp_path / "kv", policy)
    with stack:
        assert stack.counts[backend].evicted == 0
        store(stack, range(1000, 1000 + count // 2))
        there = {number: stack.match(prompt(number)) for number in range(1, count)}
        expected = PROMPT if stays else 0
        assert (there[USED], there[LOADED]) == (expected, expected)
        assert there[USED + 1] == there[LOADED + 1] == 0, "older ones went"
        assert there[count - 1] == PROMPT
        assert stack.load(prompt(count - 1), range(PROMPT, 2 * PROMPT)) == PROMPT
        assert device.read(PROMPT) == device.read(0)


@pytest.mark.parametrize("backend", ["gds", "lmdb"])
def test_a_torn_order_costs_an_order_and_verify_names_it(tmp_path, backend, capsys):
    count = closed(backend, tmp_path / "kv", "lru")
    assert kvbm(["verify", str(tmp_path / "kv")]) == 0
    [file] = (tmp_path / "kv/rank0").glob({"gds": "slab.000", "lmdb": "data.mdb"}[backend])
    content = file.read_bytes()
    at = content.rindex(b"KVBMORD\0")
    with file.open("r+b") as harmed:
        harmed.seek(at + 64)
        harmed.write(bytes([content[at + 64] ^ 1]))
    assert kvbm(["verify", str(tmp_path / "kv")]) == 1
    assert "its checksum does not fit" in capsys.readouterr().out
    stack, device = opened(backend, tmp_path / "kv")
    with stack:
        # Each block is there still, and is what was stored; the oldest by writing are the first to go.
        assert [stack.load(prompt(number), range(PROMPT, 2 * PROMPT)) for number in (USED, count - 1)] == [
            4,
            4,
        ]
        assert device.read(PROMPT) == device.read(0)
    assert kvbm(["verify", str(tmp_path / "kv")]) == 0, "the next order has replaced it"


def main(backend, folder, policy):
    order_tier._EVERY_S = 0.05
    stack, _ = opened(backend, Path(folder), policy)
    count = fill(stack)
    order = order_of(stack)
    while order._timer is not None or order._changed:
        signal.sigtimedwait([], 0.01)
    print(count, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
