"""The gds tier against bare preadv and pwritev on the same file system, past the page cache.

    python tests/benchmarks/bench_gds.py [--brief] [--path DIRECTORY] [--engine auto]

Bare is threads that call `os.preadv` or `os.pwritev` with O_DIRECT on a preallocated file of their
own; as many blocks are on their way as in the tier. Bare and tier alternate in one run; medians.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import platform
import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

from kvbm_core.config import ByteSize
from kvbm_core.tier import Op, Outcome, Region, TierContext, Transfer
from kvbm_gds import GdsConfig, GdsTier

MIB = 1 << 20
SIZES = (256 << 10, MIB, 4 * MIB)


class Memory:
    """Blocks next to each other in memory that is all present."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.arena = mmap.mmap(-1, count * nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.arena))
        ctypes.memset(self.address, 1, count * nbytes)
        self.regions = [Region(self.address + n * nbytes, nbytes, owner=self.arena) for n in range(count)]
        self.views = [region.view() for region in self.regions]


class Bare:
    """A file, and threads that read and write it."""

    def __init__(self, path: Path, count: int, nbytes: int, threads: int) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(self.fd, 0, count * nbytes)
        self.nbytes = nbytes
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def _run(self) -> None:
        while (job := self.inbox.get()) is not None:
            call, view, at = job
            assert call(self.fd, [view], at * self.nbytes) == self.nbytes
            self.outbox.put(at)

    def drive(self, call, memory: Memory) -> float:
        start_s = time.perf_counter()
        for at, view in enumerate(memory.views):
            self.inbox.put((call, view, at))
        for _ in memory.views:
            self.outbox.get()
        return time.perf_counter() - start_s

    def close(self) -> None:
        for _ in self.threads:
            self.inbox.put(None)
        for thread in self.threads:
            thread.join()
        os.close(self.fd)


def drive(tier, wake: threading.Event, op: Op, keys: list[bytes], memory: Memory, depth: int) -> float:
    """Keep `depth` blocks on their way and give the seconds until all are done."""
    transfers = [Transfer(n, op, keys[n], region) for n, region in enumerate(memory.regions)]
    sent = done = 0
    start_s = time.perf_counter()
    while done < len(transfers):
        if sent < len(transfers) and sent - done < depth:
            batch = transfers[sent : done + depth]
            tier.submit(batch)
            sent += len(batch)
        wake.wait(1)
        wake.clear()
        for completion in tier.poll():
            assert completion.outcome is Outcome.DONE, completion
            done += 1
    return time.perf_counter() - start_s


def bench(nbytes: int, total_bytes: int, repeats: int, root: Path, depth: int, engine: str) -> tuple:
    count = total_bytes // nbytes
    source, target = Memory(count, nbytes), Memory(count, nbytes)
    wake = threading.Event()
    config = GdsConfig(
        path=str(root / "tier"), capacity=ByteSize(total_bytes * 5 // 4 + 16 * MIB), engine=engine,
        queue_depth=depth,
    )  # fmt: skip
    tier = GdsTier(config, TierContext(b"n" * 16, nbytes, wake=wake.set))
    bare = Bare(root / "bare", count, nbytes, depth)
    keys = [os.urandom(32) for _ in range(count)]
    seconds: dict = {name: [] for name in ("bare store", "tier store", "bare load", "tier load")}
    for _ in range(repeats + 1):
        seconds["bare store"].append(bare.drive(os.pwritev, source))
        tier.discard(keys)
        seconds["tier store"].append(drive(tier, wake, Op.STORE, keys, source, depth))
        seconds["bare load"].append(bare.drive(os.preadv, target))
        seconds["tier load"].append(drive(tier, wake, Op.LOAD, keys, target, depth))
    detail = tier.capabilities.detail
    tier.close()
    bare.close()
    shutil.rmtree(root / "tier")
    (root / "bare").unlink()
    # The first round warms up: extents are written for the first time, pages fault in.
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return detail, medians


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--brief", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--path", type=Path, help="where the files go; by default the user's cache")
    parser.add_argument("--engine", default="auto", help="the tier's engine (default: auto)")
    parser.add_argument("--depth", type=int, nargs="*", default=[8, 32], help="blocks on their way at once")
    arguments = parser.parse_args()
    total_bytes, repeats = (16 * MIB, 2) if arguments.brief else (256 * MIB, 7)
    folder = arguments.path or Path.home() / ".cache"
    folder.mkdir(exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="kvbm-bench-", dir=folder))
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} CPUs, ", end="")
    print(f"nixl {metadata.version('nixl-cu13')}, files in {root}")
    print(f"{total_bytes >> 20} MiB a pass, median of {repeats}, O_DIRECT, nothing flushed in between")
    print(f"{'KiB':>5} {'depth':>5} {'op':6} {'bare GB/s':>9} {'tier GB/s':>9} {'ratio':>6}  engine")
    try:
        for nbytes in SIZES:
            for depth in arguments.depth:
                detail, medians = bench(nbytes, total_bytes, repeats, root, depth, arguments.engine)
                for op in ("store", "load"):
                    bare, tier = (total_bytes / medians[f"{who} {op}"] / 1e9 for who in ("bare", "tier"))
                    ratio = f"{bare:9.2f} {tier:9.2f} {tier / bare:6.2f}"
                    print(f"{nbytes >> 10:5} {depth:5} {op:6} {ratio}  {detail}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
