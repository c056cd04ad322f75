"""What the planner costs the engine's scheduler: it runs in the same thread.

    python tests/benchmarks/bench_planner.py [--brief]

Medians of the runs; every run starts from the same state. A prefix of 8,192 blocks is 131,072 tokens in
blocks of 16. Memory is what the process's resident set grows by, after a full collection, over blocks
that are in one tier.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kvbm_core import Capabilities, Plan, Planner, Report, TierStatus

PREFIX_BLOCKS = 8192
TARGET_MS = 10.0
SINGLE_TARGET_MS = 0.02


def keys_of(count: int, seed: int = 0) -> list[bytes]:
    return [hashlib.sha256(b"%d %d" % (seed, index)).digest() for index in range(count)]


def planner_of(host: list[bytes], disk: list[bytes], host_blocks: int, disk_blocks: int) -> Planner:
    """Two tiers, the first of which lends its memory; the blocks given are in them."""
    tiers = [
        TierStatus(
            "host", Capabilities(capacity_bytes=host_blocks, addressable=True), [(key, 1) for key in host]
        ),
        TierStatus("disk", Capabilities(capacity_bytes=disk_blocks), [(key, 1) for key in disk]),
    ]
    return Planner([tiers])


def settle(planner: Planner, plan: Plan) -> None:
    """Report everything of a plan as done."""
    reports = [Report(store.op, tier) for store in [*plan.stores, *plan.fills] for tier in store.tiers]
    for load in plan.loads:
        reports += [Report(load.op, tier) for tier in {load.tier, load.fill} - {-1}]
    planner.report(reports, 0.0)


def timed(runs: int, prepare: Callable[[], Planner], work: Callable[[Planner], object]) -> float:
    """Milliseconds, the median."""
    taken = []
    for _ in range(runs):
        planner = prepare()
        gc.collect()
        began_s = time.perf_counter()
        work(planner)
        taken.append((time.perf_counter() - began_s) * 1e3)
    return statistics.median(taken)


def time_loads(runs: int) -> list[tuple[str, float]]:
    keys = keys_of(PREFIX_BLOCKS)
    blocks = list(range(PREFIX_BLOCKS))
    half = PREFIX_BLOCKS // 2
    absent = keys_of(PREFIX_BLOCKS, seed=1)

    def load(planner: Planner) -> Plan:
        tiers = planner.match(keys, 0.0)
        assert len(tiers) == PREFIX_BLOCKS
        planner.load("request", keys, blocks, tiers)
        return planner.take(0.0)

    def in_host() -> Planner:
        return planner_of(keys, [], PREFIX_BLOCKS, PREFIX_BLOCKS)

    def half_below() -> Planner:
        return planner_of(keys[:half], keys, PREFIX_BLOCKS, PREFIX_BLOCKS)

    def half_below_full() -> Planner:
        return planner_of([*absent[:half], *keys[:half]], keys, PREFIX_BLOCKS, PREFIX_BLOCKS)

    def loaded() -> tuple[Planner, Plan]:
        planner = in_host()
        return planner, load(planner)

    ends = []
    for _ in range(runs):
        planner, plan = loaded()
        began_s = time.perf_counter()
        settle(planner, plan)
        ends.append((time.perf_counter() - began_s) * 1e3)
    return [
        ("match + load + take, all in the host tier", timed(runs, in_host, load)),
        ("match + load + take, half one tier down: 4,096 fills", timed(runs, half_below, load)),
        ("the same, the host tier full: 4,096 evictions too", timed(runs, half_below_full, load)),
        ("report that the load is done", statistics.median(ends)),
        ("match, all in the host tier", timed(runs, in_host, lambda p: p.match(keys, 0.0))),
        ("match that misses at once", timed(runs, in_host, lambda p: p.match(absent, 0.0))),
    ]


def time_stores(runs: int) -> list[tuple[str, float]]:
    others, keys = keys_of(PREFIX_BLOCKS), keys_of(64, seed=2)
    blocks = list(range(64))

    def full() -> Planner:
        return planner_of(others, others, PREFIX_BLOCKS, PREFIX_BLOCKS)

    def store(ancestors: list[bytes]) -> Callable[[Planner], object]:
        prefix = {*ancestors, *keys}

        def run(planner: Planner) -> Plan:
            planner.store(keys, blocks, prefix, 0.0)
            return planner.take(0.0)

        return run

    return [
        ("store 64 blocks, both tiers full", timed(runs, full, store([]))),
        ("store 64 blocks, both full, 4,096 ancestors", timed(runs, full, store(others[:4096]))),
    ]


def time_single_stores(*, brief: bool) -> list[tuple[str, float]]:
    """As a request does that decodes: one block after the other behind a long prefix, both tiers full."""
    rows, count = [], 200
    for length in (512, 8_192) if brief else (512, 8_192, 65_536):
        ancestors, others = keys_of(length), keys_of(length, seed=1)
        planner = planner_of([*others, *ancestors], [*others, *ancestors], 2 * length, 2 * length)
        prefix, taken = set(ancestors), []
        for at, key in enumerate(keys_of(count, seed=2)):
            prefix.add(key)
            began_s = time.perf_counter()
            planner.store([key], [at], prefix, 0.0)
            taken.append((time.perf_counter() - began_s) * 1e3)
            settle(planner, planner.take(0.0))
        rows.append((f"store one block, both full, {length:,} ancestors", statistics.mean(taken)))
    return rows


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def memory_per_block(count: int) -> float:
    """Bytes a block, the 65 bytes of the key's own object included."""
    gc.collect()
    before = resident_bytes()
    planner = planner_of(keys_of(count), [], count, 1)
    gc.collect()
    used = resident_bytes() - before
    assert planner.occupancy["host"] == count
    return used / count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--brief", action="store_true", help="few runs, a tenth of the blocks: does it run at all?"
    )
    brief = parser.parse_args().brief
    runs, indexed = (3, 100_000) if brief else (31, 1_000_000)
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, {platform.machine()}, {runs} runs, median; no I/O")
    print(f"\n{f'{PREFIX_BLOCKS:,} blocks':<54} {'ms':>8} {'target ms':>10}")
    # First, because the memory that other runs have given back would be taken again unseen.
    per_block = memory_per_block(indexed)
    for name, taken_ms in time_loads(runs) + time_stores(runs):
        print(f"{name:<54} {taken_ms:>8.2f} {TARGET_MS:>10.0f}")
    for name, taken_ms in time_single_stores(brief=brief):
        print(f"{name:<54} {taken_ms:>8.4f} {SINGLE_TARGET_MS:>10.2f}")
    print(
        f"\n{per_block:.0f} bytes of memory (resident set) a block, "
        f"{indexed:,} blocks in one tier, keys included"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
