"""What an engine feels of copies under way: its own small copies, small kernels and large ones beside them.

    python tests/benchmarks/gpu_beside.py [--page 64] [--json FILE]

For each way of copying, blocks of 2 MiB go out of or into the GPU; meanwhile, on a stream of its own, what an
engine does in each step is timed until the GPU has done it. Milliseconds, median and worst; `alone` is the
same with no copy under way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path

import torch
from gpu_copies import host_memory, layers_of, reserved

from kvbm_device import open_device
from kvbm_device._link import Method, Way

_BLOCKS = 1024
_MOVES = 4
"""Times all blocks, in one direction: 8 GiB, 160 ms."""


def engine_work():
    """What is timed: name and a function that puts it on the current stream."""
    small = torch.zeros(1024, dtype=torch.int32, pin_memory=True)
    there = torch.zeros(1024, dtype=torch.int32, device="cuda")
    some = torch.zeros(1 << 20, dtype=torch.uint8, pin_memory=True)
    some_there = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    large = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    return {
        "4 KiB in": lambda: there.copy_(small, non_blocking=True),
        "4 KiB out": lambda: small.copy_(there, non_blocking=True),
        "1 MiB in": lambda: some_there.copy_(some, non_blocking=True),
        "1 MiB out": lambda: some.copy_(some_there, non_blocking=True),
        "kernel": lambda: there.add_(1),
        "20 matmuls": lambda: [large @ large for _ in range(20)],
    }


def felt(work, busy) -> dict[str, tuple[float, float]]:
    """Time each as long as copies are under way, in turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        while busy(sum(map(len, times.values()))):
            for name, put in work.items():
                start_s = time.perf_counter()
                put()
                stream.synchronize()
                times[name].append((time.perf_counter() - start_s) * 1e3)
    return {
        name: (round(statistics.median(found), 3), round(max(found), 3))
        for name, found in times.items()
        if found
    }


def beside(device, blocks, regions, work, way: str) -> dict[str, tuple[float, float]]:
    """Copy from a thread of its own, as the transfer engine does, and time the engine's work meanwhile."""

    def move() -> None:
        fence = device.claim(())
        ask = device.gather if way == "out" else device.scatter
        pairs = (blocks, regions) if way == "out" else (regions, blocks)
        works = [ask(*pairs, fence) for _ in range(_MOVES)]
        while not all(each.done() for each in works):
            time.sleep(0.0005)

    thread = threading.Thread(target=move)
    thread.start()
    start_s = time.perf_counter()
    found = felt(work, lambda count: thread.is_alive())
    thread.join()
    found["seconds"] = (round(time.perf_counter() - start_s, 3), 0.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--page", type=int, default=64, help="in KiB")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = open_device(layers_of(arguments.page << 10), 4096)
    arena = host_memory(device, 3 << 30)
    regions = reserved(arena, _BLOCKS)
    work, blocks = engine_work(), list(range(0, 2 * _BLOCKS, 2))
    felt(work, lambda count: count < 80)  # The first loads kernels.
    rows = {"alone": felt(work, lambda count: count < 80)}
    methods = [Method(Way.STAGED), Method(Way.DMA), Method(Way.KERNEL, 8), Method(Way.KERNEL, 32)]
    for method in methods:
        device.use(method, method)
        for way in ("out", "in"):
            rows[f"{method} {way}"] = beside(device, blocks, regions, work, way)
    for name, found in rows.items():
        print(
            f"{name:16}", "  ".join(f"{what} {typical}/{worst}" for what, (typical, worst) in found.items())
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows))
    device.close()
    arena.close()


if __name__ == "__main__":
    main()
