"""What the planner costs with three full tiers and many running requests, for a block and for a step.

    python tests/benchmarks/bench_planner_full.py [--brief] [--movement demotion]

64 requests of 32,768 tokens, 2,048 blocks each: chunks of 512 blocks are stored while all tiers are full of
others, and each chunk ends before the next; then steps in which four of the requests that decode complete a
block. Medians of the rounds; every round starts from the same state.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import platform
import statistics
import sys
import time
from collections import defaultdict

from kvbm_core import Capabilities, Plan, Planner, Report, TierStatus

REQUESTS, REQUEST_BLOCKS, CHUNK_BLOCKS, STEP_BLOCKS = 64, 2048, 512, 4
TARGET_US = 2.0


def keys_of(count: int, seed: int) -> list[bytes]:
    return [hashlib.sha256(b"%d %d" % (seed, index)).digest() for index in range(count)]


def full_planner(others: list[bytes], options: dict[str, object]) -> Planner:
    """Three tiers that are full, the first of which lends its memory."""
    found = [(key, 1) for key in others]
    kinds = [Capabilities(capacity_bytes=len(others), addressable=at == 0) for at in range(3)]
    tiers = [TierStatus(name, kind, found) for name, kind in zip(("host", "disk", "far"), kinds, strict=True)]
    return Planner([tiers], **options)  # type: ignore[arg-type]


def reports_of(plan: Plan) -> list[Report]:
    """Everything of a plan has worked."""
    return [Report(op.op, tier) for op in [*plan.stores, *plan.fills, *plan.loads] for tier in op.tiers]


class Watch:
    """Adds up the time of each verb, over blocks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.blocks: dict[str, int] = defaultdict(int)

    def time(self, name: str, blocks: int, call):  # type: ignore[no-untyped-def]
        began_s = time.thread_time()
        result = call()
        self.seconds[name] += time.thread_time() - began_s
        self.blocks[name] += blocks
        return result

    def us_a_block(self) -> dict[str, float]:
        return {name: 1e6 * self.seconds[name] / self.blocks[name] for name in self.seconds}


def one_round(others: list[bytes], requests: list[list[bytes]], options: dict[str, object]) -> dict[str, float]:
    planner, watch, now_s = full_planner(others, options), Watch(), 0.0
    gc.collect()
    gc.disable()
    prefixes = [set(keys) for keys in requests]
    for keys, prefix in zip(requests, prefixes, strict=True):
        watch.time("match that finds nothing", len(keys), lambda keys=keys: planner.match(keys, now_s))
        for start in range(0, len(keys), CHUNK_BLOCKS):
            chunk = keys[start : start + CHUNK_BLOCKS]
            blocks = list(range(len(chunk)))
            now_s += 0.1
            watch.time("store", len(chunk), lambda: planner.store(chunk, blocks, prefix, now_s))
            plan = watch.time("take", len(chunk), lambda: planner.take(now_s))
            reports = reports_of(plan)
            watch.time("report", len(chunk), lambda: planner.report(reports, now_s))
    for keys in requests:
        found = watch.time("match, found", len(keys), lambda keys=keys: planner.match(keys, now_s))
        if not found:
            continue
        now_s += 0.1
        planner.load("r", keys[: len(found)], list(range(len(found))), found)
        reports = reports_of(planner.take(now_s))
        watch.time("report of a load", len(found), lambda: planner.report(reports, now_s))
    result = watch.us_a_block()
    steps = len(requests) * 16 // STEP_BLOCKS
    news = keys_of(steps * STEP_BLOCKS, seed=7)
    began_s = time.thread_time()
    for step in range(steps):
        now_s += 0.02
        for at in range(STEP_BLOCKS):
            key, prefix = news[step * STEP_BLOCKS + at], prefixes[(step * STEP_BLOCKS + at) % len(prefixes)]
            prefix.add(key)
            planner.store([key], [at], prefix, now_s)
        planner.report(reports_of(planner.take(now_s)), now_s)
    result["a step that decodes: store 4 blocks one by one, take, report"] = (
        1e6 * (time.thread_time() - began_s) / steps
    )
    gc.enable()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brief", action="store_true", help="a few requests, one round: does it run at all?")
    brief = parser.parse_args().brief
    rounds, count = (1, 4) if brief else (5, REQUESTS)
    others = keys_of(count * REQUEST_BLOCKS, seed=1)
    requests = [keys_of(REQUEST_BLOCKS, seed=100 + at) for at in range(count)]
    taken = [one_round(others, requests, {}) for _ in range(rounds)]
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, {platform.machine()}, {rounds} rounds, median; no I/O")
    for name in taken[0]:
        print(f"{name:<64} {statistics.median(each[name] for each in taken):>8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
