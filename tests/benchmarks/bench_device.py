"""Gather and scatter in host memory, against a bare copy of the same bytes.

    python tests/benchmarks/bench_device.py [--brief]

Two bare copies, both ``numpy.copyto`` in the same thread: all bytes as one contiguous piece, and the
same bytes in contiguous pieces of a block, which is all that a copy to regions of a block could reach.
Medians of the runs, taken in turn.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvbm_core.tier import Region
from kvbm_device import open_device

MOVED_BLOCKS = 64


@dataclass(frozen=True)
class Case:
    name: str
    order: str
    layers: int
    page_bytes: int
    blocks: int
    allocations: bool = False
    """One allocation a layer, as engines before 0.29 have it."""


CASES = [
    Case("SmolLM2", "LBHNC", 30, 24_576, 360),
    Case("Llama-8B", "LBHNC", 32, 65_536, 128),
    Case("Llama-8B", "BLHNC", 32, 65_536, 128),
    Case("Llama-8B", "LBHNC, one allocation a layer", 32, 65_536, 128, allocations=True),
]


def layers_of(case: Case) -> dict[str, torch.Tensor]:
    """Layers ``(B, H=1, N=1, C=page_bytes)`` of bytes."""
    shape = (case.blocks, 1, 1, case.page_bytes)
    if case.allocations:
        return {f"layer.{i}": torch.randint(0, 256, shape, dtype=torch.uint8) for i in range(case.layers)}
    outer = (case.layers, case.blocks) if case.order[0] == "L" else (case.blocks, case.layers)
    whole = torch.randint(0, 256, (*outer, 1, 1, case.page_bytes), dtype=torch.uint8)
    return {f"layer.{i}": whole.select(case.order.index("L"), i) for i in range(case.layers)}


def medians_s(runs: int, calls: list[Callable[[], object]]) -> list[float]:
    """Time the calls in turn, so that a busy neighbour slows all of them alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for run in range(runs + 1):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if run:  # The first run touches the pages.
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def measure(case: Case, runs: int) -> None:
    device = open_device(layers_of(case), case.blocks)
    [block_bytes] = device.traits.block_bytes
    nbytes = MOVED_BLOCKS * block_bytes
    memory = np.zeros(nbytes, dtype=np.uint8)
    start = memory.ctypes.data
    regions = [Region(start + i * block_bytes, block_bytes) for i in range(MOVED_BLOCKS)]
    # Random, and allocated as the engine's: zeros never written would all be read from one cached page.
    other = torch.randint(0, 256, (case.blocks * block_bytes,), dtype=torch.uint8).numpy()
    offsets = random.Random(1)
    blocks = random.Random(2).sample(range(case.blocks), MOVED_BLOCKS)

    def bare() -> None:
        first = offsets.randrange(0, other.nbytes - nbytes)
        np.copyto(memory, other[first : first + nbytes])

    def by_block() -> None:
        for target, source in zip(pieces, (others[block] for block in blocks), strict=True):
            np.copyto(target, source)

    pieces, others = memory.reshape(MOVED_BLOCKS, -1), other.reshape(case.blocks, -1)
    gather, scatter = lambda: device.gather(blocks, regions), lambda: device.scatter(regions, blocks)
    bare_s, by_block_s, gather_s, scatter_s = medians_s(runs, [bare, by_block, gather, scatter])
    beside_s = busy(lambda: medians_s(max(runs // 5, 1), [gather]))[0]
    print(f"{case.name}, {case.order}: {device!r}, {nbytes / 1e6:.0f} MB moved")
    results = {
        "bare copy, one piece": bare_s,
        "bare copy, block by block": by_block_s,
        "gather": gather_s,
        "scatter": scatter_s,
        "gather beside a busy Python thread": beside_s,
    }
    for what, seconds in results.items():
        ratios = f"{seconds / bare_s:5.2f} x one piece {seconds / by_block_s:5.2f} x block by block"
        print(f"  {what:35} {seconds * 1e3:8.2f} ms {nbytes / seconds / 1e9:6.2f} GB/s {ratios}")


def busy(call: Callable[[], list[float]]) -> list[float]:
    """Call while another Python thread never waits: what passing the interpreter lock about costs."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        return call()
    finally:
        stop.set()
        thread.join()


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--brief", action="store_true", help="a few runs, for a test")
    brief = parser.parse_args().brief
    print(f"$ python {' '.join(sys.argv)}")
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    print(f"{cpu_name()}, {versions}")
    for case in CASES[: 2 if brief else None]:
        measure(case, runs=5 if brief else 15)


if __name__ == "__main__":
    main()
