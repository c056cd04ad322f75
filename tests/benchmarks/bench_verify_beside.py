"""How fast a tier stores and evicts alone, and beside `kvbm verify` in another process.

    python tests/benchmarks/bench_verify_beside.py [--gib 2] [--block 2MiB] [--rounds 5] [--path DIRECTORY]

In each round as many objects are stored three times, in turning order: alone, beside a verify that yields
(`--gentle`, which is what it does where an engine holds the place), and beside one at full speed. The tier
holds half of a turn's objects, so that nearly each store evicts; `remote` never evicts, and what the turn
before stored is deleted. Ratios are taken within a round. Every object that verify calls damaged is a false
alarm. It runs in a checkout that is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import checkout  # noqa: F401 - ahead of what it lets be found
from bench_verify import AT_ONCE, FILES, entry_of

from kvbm_cli.inspect._places import find_places
from kvbm_cli.verify._answer import verify_places
from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.config import parse_size
from kvbm_core.testing import MemoryDevice

MODES = ("alone", "gentle", "full")


def verify_until(folder: Path, stop: Path, *, gentle: bool) -> None:
    """Verify again and again until a file is there, and print the findings. In a process of its own."""
    objects = nbytes = alarms = 0
    print("ready", flush=True)
    while not stop.exists():
        found = verify_places(
            "", find_places(str(folder), ()), lambda _: not stop.exists(), None, lambda _: None, gentle=gentle
        )
        objects += sum(part.objects for part in found.parts)
        nbytes += found.nbytes
        alarms += len(found.damage) + len(found.problems)
    print(json.dumps([objects, nbytes, alarms]), flush=True)


class Engine:
    """Stores blocks, all of them new."""

    def __init__(self, name: str, folder: Path, count: int, nbytes: int) -> None:
        self._device = MemoryDevice(AT_ONCE, nbytes)
        for block in range(AT_ONCE):
            self._device.write(block, os.urandom(nbytes))
        self.name, self._folder, self._count, self._nbytes = name, folder, count, nbytes
        entry = entry_of(name, folder, count * nbytes // 2)
        self.stack = Stack.open({"tiers": [entry]}, self._device, make_namespace({"bench": name}))
        self._stored = 0

    def turn(self) -> float:
        """Store as many as a turn has; give bytes a second."""
        first, self._stored = self._stored, self._stored + self._count
        keys = chain_keys(root_key(), range(first, self._stored), block_tokens=1)
        before = sorted(self._folder.glob(FILES["remote"])) if self.name == "remote" else []
        started_s = time.perf_counter()
        for at in range(0, len(keys), AT_ONCE):
            batch = keys[at : at + AT_ONCE]
            self.stack.store(batch, list(range(len(batch))))
            self.stack.wait()
        rate = self._count * self._nbytes / (time.perf_counter() - started_s)
        for file in before:
            file.unlink()
        return rate


def beside(engine: Engine, folder: Path, mode: str, said: dict[str, list[list[int]]]) -> float:
    """Store a turn in one of the modes."""
    if mode == "alone":
        return engine.turn()
    stop = Path(tempfile.mkdtemp(prefix="kvbm-stop-")) / "stop"
    command = [sys.executable, __file__, "--verify", str(folder), "--stop", str(stop), "--mode", mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        rate = engine.turn()
        stop.touch()
        said[mode].append(json.loads(process.stdout.readline()))
    shutil.rmtree(stop.parent)
    return rate


def measure(name: str, folder: Path, count: int, nbytes: int, rounds: int) -> None:
    """Store in all modes, and print the tier's row."""
    engine, order = Engine(name, folder, count, nbytes), list(MODES)
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    said: dict[str, list[list[int]]] = {mode: [] for mode in MODES}
    with engine.stack:
        engine.turn()
        for _ in range(rounds):
            for mode in order:
                rates[mode].append(beside(engine, folder, mode, said))
            order = [*order[1:], order[0]]
    cells = []
    for mode in MODES[1:]:
        ratios = [each / alone for each, alone in zip(rates[mode], rates["alone"], strict=True)]
        objects, _, alarms = map(sum, zip(*said[mode], strict=True))
        ratio = f"{statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        cells.append(f"{ratio}  {objects:7}  {alarms:6}")
    print(f"{name:8}  {statistics.median(rates['alone']) / 1e9:10.2f}  {'   '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="stored in a turn")
    parser.add_argument("--block", default="2MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiers", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--path", default=None, help="on the disk that is measured")
    for own in ("--verify", "--stop", "--mode"):
        parser.add_argument(own, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.verify:
        verify_until(Path(options.verify), Path(options.stop), gentle=options.mode == "gentle")
        return
    nbytes = int(parse_size(options.block))
    count = int(options.gib * (1 << 30)) // nbytes
    print(
        f"{count} objects of {options.block} a turn, {options.rounds} rounds; {os.cpu_count()} CPUs, Linux "
        f"{platform.release()}, python {platform.python_version()}"
    )
    head = "ratio (lowest to highest)  objects  alarms"
    print(f"{'tier':8}  {'alone GB/s':>10}  gentle: {head}   full speed: {head}")
    for name in options.tiers:
        folder = Path(tempfile.mkdtemp(prefix="kvbm-bench-", dir=options.path))
        try:
            measure(name, folder, count, nbytes, options.rounds)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
