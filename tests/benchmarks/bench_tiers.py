"""The cpu and lmdb tiers against their bare media: a memory copy, and py-lmdb itself.

    python tests/benchmarks/bench_tiers.py [--brief] [--path DIRECTORY]

Bare and tier alternate in one run, on the same data; medians. The page cache is warm.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import lmdb
import numpy as np
from bench_gds import MIB, SIZES, Memory

from kvbm_core.config import ByteSize
from kvbm_core.tier import Op, Outcome, Region, TierContext, Transfer
from kvbm_cpu import CpuConfig, CpuTier
from kvbm_lmdb import LmdbConfig, LmdbTier
from kvbm_lmdb._directory import plan_sizing, slot_bytes


def drive(tier, wake: threading.Event, op: Op, keys: list[bytes], regions: list[Region]) -> float:
    """Submit as the transfer engine does, 32 blocks ahead, and give the seconds until all are done."""
    transfers = [Transfer(n, op, keys[n], region) for n, region in enumerate(regions)]
    sent = done = 0
    start_s = time.perf_counter()
    while done < len(transfers):
        while sent < len(transfers) and sent - done <= 16:
            batch = transfers[sent : sent + 16]
            tier.submit(batch)
            sent += len(batch)
        wake.wait(1)
        wake.clear()
        for completion in tier.poll():
            assert completion.outcome is Outcome.DONE, completion
            done += 1
    return time.perf_counter() - start_s


def bench_cpu(nbytes: int, total_bytes: int, repeats: int) -> list[tuple]:
    count = total_bytes // nbytes
    source, target, arena = (Memory(count, nbytes) for _ in range(3))
    wake = threading.Event()
    context = TierContext(b"n" * 16, nbytes, wake=wake.set)
    tier = CpuTier(CpuConfig(capacity=ByteSize(total_bytes)), context)
    seconds = {name: [] for name in ("bare store", "tier store", "bare load", "tier load")}
    keys = [os.urandom(32) for _ in range(count)]
    for _ in range(repeats + 1):
        seconds["bare store"].append(bare_copy(source, arena, nbytes))
        tier.discard(keys)
        seconds["tier store"].append(drive(tier, wake, Op.STORE, keys, source.regions))
        seconds["bare load"].append(bare_copy(arena, target, nbytes))
        seconds["tier load"].append(drive(tier, wake, Op.LOAD, keys, target.regions))
    tier.close()
    return rows("cpu", "memmove", nbytes, total_bytes, seconds)


def bare_copy(source: Memory, target: Memory, nbytes: int) -> float:
    start_s = time.perf_counter()
    for a, b in zip(source.regions, target.regions, strict=True):
        ctypes.memmove(b.address, a.address, nbytes)
    return time.perf_counter() - start_s


def bench_lmdb(nbytes: int, total_bytes: int, repeats: int, root: Path) -> list[tuple]:
    count, capacity = total_bytes // nbytes, 3 * total_bytes
    source, target = Memory(count, nbytes), Memory(count, nbytes)
    wake = threading.Event()
    context = TierContext(b"n" * 16, nbytes, wake=wake.set)
    # A flush in the middle would measure the disk; bare py-lmdb is not flushed either.
    config = LmdbConfig(path=str(root / "tier"), capacity=ByteSize(capacity), sync_interval_s=3600.0)
    tier = LmdbTier(config, context)
    sizing = plan_sizing(capacity, nbytes)
    batch = min(sizing.most_stored, sizing.half_bytes // slot_bytes(nbytes))
    env = lmdb.open(str(root / "bare"), map_size=capacity, sync=False)
    names = ("bare16 store", "bare store", "tier store", "bare load", "tier load")
    seconds = {name: [] for name in names}
    keys = [os.urandom(32) for _ in range(count)]
    for _ in range(repeats + 1):
        seconds["bare16 store"].append(bare_put(env, keys, source, 16))
        seconds["bare store"].append(bare_put(env, keys, source, batch))
        tier.discard(keys)
        time.sleep(0.1)
        seconds["tier store"].append(drive(tier, wake, Op.STORE, keys, source.regions))
        seconds["bare load"].append(bare_get(env, keys, target))
        seconds["tier load"].append(drive(tier, wake, Op.LOAD, keys, target.regions))
    env.close()
    tier.close()
    shutil.rmtree(root / "tier")
    shutil.rmtree(root / "bare")
    extra = {"bare store": seconds.pop("bare16 store"), "tier store": seconds["tier store"]}
    table = rows("lmdb", f"py-lmdb, {batch}/txn", nbytes, total_bytes, seconds)
    return table + rows("lmdb", "py-lmdb, 16/txn", nbytes, total_bytes, extra)


def bare_put(env, keys: list[bytes], source: Memory, per_transaction: int) -> float:
    with env.begin(write=True) as txn:
        for key in keys:
            txn.delete(key)
    for _ in range(3):
        with env.begin(write=True) as txn:
            txn.put(b"tick", os.urandom(8))
    start_s = time.perf_counter()
    for at in range(0, len(keys), per_transaction):
        with env.begin(write=True) as txn:
            for n in range(at, min(at + per_transaction, len(keys))):
                txn.put(keys[n], source.views[n])
    return time.perf_counter() - start_s


def bare_get(env, keys: list[bytes], target: Memory) -> float:
    start_s = time.perf_counter()
    for at in range(0, len(keys), 16):
        with env.begin(buffers=True) as txn:
            for n in range(at, min(at + 16, len(keys))):
                np.copyto(np.frombuffer(target.views[n], np.uint8), np.frombuffer(txn.get(keys[n]), np.uint8))
    return time.perf_counter() - start_s


def rows(tier: str, medium: str, nbytes: int, total_bytes: int, seconds: dict) -> list[tuple]:
    table = []
    for op in ("store", "load"):
        if f"bare {op}" in seconds:
            # The first round warms up: files grow, pages fault in.
            bare_s, tier_s = (statistics.median(seconds[f"{who} {op}"][1:]) for who in ("bare", "tier"))
            table.append(
                (tier, medium, nbytes >> 10, op, total_bytes / bare_s / 1e9, total_bytes / tier_s / 1e9)
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--brief", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--path", type=Path, help="where the LMDB files go; by default a temporary directory")
    arguments = parser.parse_args()
    total_bytes, repeats = (16 * MIB, 2) if arguments.brief else (128 * MIB, 9)
    root = Path(tempfile.mkdtemp(prefix="kvbm-bench-", dir=arguments.path))
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, py-lmdb {lmdb.__version__}, LMDB {lmdb.version()}, ", end="")
    print(f"numpy {np.__version__}, Linux {platform.release()}, {os.cpu_count()} CPUs, files in {root}")
    print(f"{total_bytes >> 20} MiB a pass, median of {repeats}, page cache warm, nothing flushed in between")
    print(f"{'tier':5} {'bare medium':18} {'KiB':>5} {'op':6} {'bare GB/s':>9} {'tier GB/s':>9} {'ratio':>6}")
    try:
        for nbytes in SIZES:
            for row in bench_cpu(nbytes, total_bytes, repeats) + bench_lmdb(
                nbytes, total_bytes, repeats, root
            ):
                print(
                    "{:5} {:18} {:5} {:6} {:9.2f} {:9.2f} {:6.2f}".format(*row, row[5] / row[4]), flush=True
                )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
