"""What the planner costs with three full tiers and many running requests, for a block and for a step.

    python tests/benchmarks/bench_planner_full.py [--brief]

64 requests of 32,768 tokens, 2,048 blocks each: chunks of 512 blocks are stored while all tiers are full of
others, and each chunk ends before the next; then steps in which every request completes a block, and steps in
which four do. Medians of the rounds; every round starts from the same state. Processor time of the thread:
others may use the machine.
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
from collections.abc import Callable, Sequence
from typing import Any

from kvbm_core import Capabilities, Movement, Plan, Planner, Report, TierStatus

REQUESTS, REQUEST_BLOCKS, CHUNK_BLOCKS, STEP_BLOCKS = 64, 2048, 512, 4
TARGET_US = 2.0
DEMOTION = Movement(stores="demotion")
STACKS = {
    "write-through": (),
    "demotion": (Movement(), DEMOTION, DEMOTION),
    "demotion, exclusive": (Movement(), *2 * (Movement(stores="demotion", copies="exclusive"),)),
}


def keys_of(count: int, seed: int) -> list[bytes]:
    return [hashlib.sha256(b"%d %d" % (seed, index)).digest() for index in range(count)]


def full_planner(others: list[bytes], movements: Sequence[Movement]) -> Planner:
    """Three tiers that are full, the first of which lends its memory."""
    found = [(key, 1) for key in others]
    kinds = [Capabilities(capacity_bytes=len(others), addressable=at == 0) for at in range(3)]
    tiers = [TierStatus(name, kind, found) for name, kind in zip(("host", "disk", "far"), kinds, strict=True)]
    return Planner([tiers], movements=movements)


def reports_of(plan: Plan) -> list[Report]:
    """Everything of a plan has worked."""
    return [Report(op.op, tier) for op in [*plan.stores, *plan.fills, *plan.loads] for tier in op.tiers]


class Watch:
    """Adds up the time of each verb, over blocks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.blocks: dict[str, int] = defaultdict(int)

    def time(self, name: str, blocks: int, call: Callable[..., Any], *values: Any) -> Any:
        began_s = time.thread_time()
        result = call(*values)
        self.seconds[name] += time.thread_time() - began_s
        self.blocks[name] += blocks
        return result

    def us_a_block(self) -> dict[str, float]:
        return {name: 1e6 * self.seconds[name] / self.blocks[name] for name in self.seconds}


class Engine:
    """What the planner is asked by an engine with many requests."""

    def __init__(self, planner: Planner, requests: list[list[bytes]]) -> None:
        self.planner, self.requests = planner, requests
        self.prefixes = [set(keys) for keys in requests]
        self.watch, self.now_s = Watch(), 0.0

    def end_step(self, blocks: int, seconds: float, report: str = "report") -> None:
        planner, self.now_s = self.planner, self.now_s + seconds
        plan = self.watch.time("take", blocks, planner.take, self.now_s)
        self.watch.time(report, blocks, planner.report, reports_of(plan), self.now_s)

    def prefill(self) -> None:
        for keys, prefix in zip(self.requests, self.prefixes, strict=True):
            self.watch.time("match that finds nothing", len(keys), self.planner.match, keys, self.now_s)
            for start in range(0, len(keys), CHUNK_BLOCKS):
                chunk = keys[start : start + CHUNK_BLOCKS]
                blocks = list(range(len(chunk)))
                self.watch.time("store", len(chunk), self.planner.store, chunk, blocks, prefix, self.now_s)
                self.end_step(len(chunk), 0.1)

    def load(self) -> None:
        for keys in self.requests:
            found = self.watch.time("match, found", len(keys), self.planner.match, keys, self.now_s)
            if found:
                self.planner.load("r", keys[: len(found)], list(range(len(found))), found)
                self.end_step(len(found), 0.1, "report of a load")

    def decode_together(self) -> None:
        """Steps in which every request completes a block: each is a store of its own."""
        count = len(self.requests)
        for step in range(16):
            news = keys_of(count, seed=1000 + step)
            for key, prefix in zip(news, self.prefixes, strict=True):
                prefix.add(key)
            self.watch.time("store of single blocks", count, self._store_each, news)
            self.end_step(count, 0.02, "report of single blocks")

    def _store_each(self, news: list[bytes]) -> None:
        for at, (key, prefix) in enumerate(zip(news, self.prefixes, strict=True)):
            self.planner.store([key], [at], prefix, self.now_s)

    def decode(self) -> float:
        """Give the microseconds of a step."""
        steps = len(self.requests) * 16 // STEP_BLOCKS
        news = keys_of(steps * STEP_BLOCKS, seed=7)
        began_s = time.thread_time()
        for at, key in enumerate(news):
            prefix = self.prefixes[at % len(self.prefixes)]
            prefix.add(key)
            self.planner.store([key], [at], prefix, self.now_s)
            if at % STEP_BLOCKS == STEP_BLOCKS - 1:
                self.now_s += 0.02
                self.planner.report(reports_of(self.planner.take(self.now_s)), self.now_s)
        return 1e6 * (time.thread_time() - began_s) / steps


def one_round(planner: Planner, requests: list[list[bytes]]) -> dict[str, float]:
    engine = Engine(planner, requests)
    gc.collect()
    gc.disable()
    engine.prefill()
    engine.load()
    engine.decode_together()
    taken = engine.watch.us_a_block()
    taken["a step that decodes: 4 blocks"] = engine.decode()
    gc.enable()
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brief", action="store_true", help="a few requests, one round: does it run at all?")
    brief = parser.parse_args().brief
    rounds, count = (1, 4) if brief else (5, REQUESTS)
    others = keys_of(count * REQUEST_BLOCKS, seed=1)
    requests = [keys_of(REQUEST_BLOCKS, seed=100 + at) for at in range(count)]
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, {platform.machine()}, {rounds} rounds, median; no I/O")
    for name, movements in STACKS.items():
        taken = [one_round(full_planner(others, movements), requests) for _ in range(rounds)]
        print(f"\n{name + ', microseconds a block':<50} {'us':>8} {'target':>7}")
        for verb in taken[0]:
            target = f"{TARGET_US:>7.0f}" if "step" not in verb else ""
            print(f"{verb:<50} {statistics.median(each[verb] for each in taken):>8.3f} {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
