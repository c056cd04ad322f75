"""What several KV groups, a million objects and policies cost the engine's scheduler.

    python tests/benchmarks/bench_groups.py [--brief] [--only match|memory|policies]

A match is over 8,192 blocks in each group, 131,072 tokens in blocks of 16, whose keys are made; two tiers, of
which the first has every other block and the second all that are there. Times are processor time:
milliseconds are the median of the runs, microseconds that of the runs' means over a thousand. Memory is what
the resident set of a fresh process grows by, after a full collection.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import hashlib
import multiprocessing
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from bench_planner import PREFIX_BLOCKS, TARGET_MS, keys_of, resident_bytes

from kvbm_core import BlockKey, Capabilities, Fifo, Lru, Planner, TierStatus
from kvbm_core.groups import Coverage, KvGroup, Rule, group_keys, group_tag
from kvbm_core.leader.ground.guarded_policies import GuardedPolicy
from kvbm_core.leader.ground.tier_index import TierIndex

sys.path.append(str(Path(__file__).parents[1] / "third_party" / "kvbm_arc"))
from kvbm_arc import Arc

BLOCK_TOKENS = 16
AGAIN_TARGET_US = 2.0
OBJECT_TARGET_BYTES, FURTHER_TARGET_BYTES = 250, 60
CHARGE = 2 << 20

COVERAGES = {
    1: [Coverage()],
    3: [Coverage(), Coverage(Rule.WINDOW, 1024), Coverage(Rule.STATE)],
    7: [
        Coverage(), Coverage(), Coverage(Rule.WINDOW, 512), Coverage(Rule.WINDOW, 1024),
        Coverage(Rule.WINDOW, 4096), Coverage(Rule.CHUNK, 8192), Coverage(Rule.STATE),
    ],
}  # fmt: skip
"""Of an engine with so many groups."""


class Prompt:
    """The keys of a prompt in each group, as an engine has them."""

    def __init__(self, groups: list[KvGroup]) -> None:
        digests = keys_of(PREFIX_BLOCKS)
        self.keys = [group_keys(digests, group.tag) for group in groups]
        self._members = {key for keys in self.keys for key in keys}

    def __contains__(self, key: object) -> bool:
        return key in self._members

    def __getitem__(self, at: int) -> BlockKey:
        return self.keys[0][at]

    def slice(self, start: int, stop: int, group: int = 0) -> list[BlockKey]:
        return self.keys[group][start:stop]


def groups_of(count: int) -> list[KvGroup]:
    return [
        KvGroup(BLOCK_TOKENS, coverage, group_tag({"number": number}))
        for number, coverage in enumerate(COVERAGES[count])
    ]


def holes(group: KvGroup, blocks: list[BlockKey], every: int) -> list[BlockKey]:
    """Give the blocks that are there if one in `every` of a sparse group is not, at random."""
    if group.coverage.rule is Rule.ALL:
        return blocks
    chance = random.Random(every)
    return [key for key in blocks if chance.randrange(every)]


def held(case: str, groups: list[KvGroup], prompt: Prompt) -> list[BlockKey]:
    """List what the tiers have."""
    there: list[BlockKey] = []
    for number, (group, keys) in enumerate(zip(groups, prompt.keys, strict=True)):
        is_full = group.coverage.rule is Rule.ALL
        if case == "all found":
            there += keys
        elif case == "one block in 64 of each window missing":
            there += holes(group, keys, 64)
        elif case == "one block in two of each window missing":
            there += holes(group, keys, 2)
        elif case == "full groups there, nothing of the others":
            there += keys if is_full else []
        elif case == "all there but one group, which has nothing":
            there += keys if number < len(groups) - 1 else []
    return there


CASES = [
    "all found",
    "one block in 64 of each window missing",
    "one block in two of each window missing",
    "full groups there, nothing of the others",
    "all there but one group, which has nothing",
    "nothing found",
]


def planner_of(groups: list[KvGroup], there: list[BlockKey]) -> Planner:
    room, charges = 1 << 40, (1,) * len(groups)
    tiers = [
        ("host", Capabilities(capacity_bytes=room, addressable=True), there[::2]),
        ("disk", Capabilities(capacity_bytes=room), there),
    ]
    return Planner(
        [
            [
                TierStatus(name, traits, [(key, 1) for key in keys], charges, charges)
                for name, traits, keys in tiers
            ]
        ],
        groups=groups,
    )


def time_matches(runs: int, again: int) -> Iterable[tuple[str, float, float, int]]:
    """Give for each case its name, milliseconds at first, microseconds again, and blocks or boundaries."""
    for count in COVERAGES:
        groups = groups_of(count)
        prompt = Prompt(groups)
        for case in ("all found", "nothing found") if count == 1 else CASES:
            planner = planner_of(groups, held(case, groups, prompt))
            find, stop = planner.find_boundaries, PREFIX_BLOCKS * BLOCK_TOKENS
            if count == 1:
                find, stop = planner.find, PREFIX_BLOCKS
            taken = []
            for _ in range(runs):
                began_s = time.thread_time()
                match = find(prompt, 0, stop, 0.0)
                taken.append((time.thread_time() - began_s) * 1e3)
            repeats = []
            for _ in range(runs):
                began_s = time.thread_time()
                for _ in range(again):
                    assert find(prompt, 0, stop, 0.0, match) is match
                repeats.append((time.thread_time() - began_s) / again * 1e6)
            again_us = statistics.median(repeats)
            found = match.tiers if count == 1 else match.tokens
            yield f"{count} of {case}", statistics.median(taken), again_us, len(found)


def batches(count: int, seed: int = 0) -> Iterable[list[BlockKey]]:
    """Make keys as engines do, those of one step at a time, so that none is left over."""
    for at in range(0, count, 512):
        yield [hashlib.sha256(b"%d %d" % (seed, at + n)).digest() for n in range(min(512, count - at))]


def fill(tiers: Sequence[TierIndex], keys: Iterable[list[BlockKey]], mixed: bool) -> None:
    """Store objects in every tier. What a rank reports comes over a wire, each number for itself."""
    chance = random.Random(1)
    for batch in keys:
        for tier in tiers:
            lengths = [chance.randrange(CHARGE * 3 // 10, CHARGE) if mixed else CHARGE for _ in batch]
            wire = msgspec.msgpack.encode(lengths)
            filling, _ = tier.reserve(batch, CHARGE)
            tier.stored(filling, msgspec.msgpack.decode(wire)[: len(filling)])


def memory(tiers: int, objects: int, mixed: bool, churn: bool) -> float:
    """Give the bytes an object that is in so many tiers, the key's own among them.

    Args:
        tiers: That hold each object.
        objects: In each.
        mixed: Objects differ in length, as with codecs.
        churn: Half of them were used since, and half are new.
    """
    gc.collect()
    before = resident_bytes()
    indexes = [TierIndex(objects * CHARGE, Lru()) for _ in range(tiers)]
    fill(indexes, batches(objects), mixed)
    if churn:
        for batch in batches(objects):
            for index in indexes:
                index.touch(batch[::2])
        fill(indexes, batches(objects // 2, seed=1), mixed)
    gc.collect()
    held = min(len(index) for index in indexes)
    assert held >= objects, held
    return (resident_bytes() - before) / held


def print_memory(objects: int) -> None:
    print(f"\n{f'bytes an object, {objects:,} objects, by tiers that hold them':<58} {1:>7} {2:>7} {3:>7}")
    context = multiprocessing.get_context("spawn")
    for mixed, churn in ((False, False), (True, False), (False, True)):
        name = "each of its own length" if mixed else "equal lengths"
        name += ", half used and half replaced since" if churn else ""
        row = []
        for tiers in (1, 2, 3):
            with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
                row.append(pool.submit(memory, tiers, objects, mixed, churn).result())
        print(f"{name:<58} {row[0]:>7.0f} {row[1]:>7.0f} {row[2]:>7.0f}", flush=True)
    more = f"+{FURTHER_TARGET_BYTES}"
    print(f"{'target':<58} {OBJECT_TARGET_BYTES:>7} {more:>7} {more:>7}")


def time_policies(objects: int) -> Iterable[tuple[str, float, float, float]]:
    """Give for each policy the microseconds of a touch, an eviction, and an insertion, all of them mixed."""
    for name, made in (
        ("lru", Lru),
        ("fifo", Fifo),
        ("arc, a stranger's, watched", lambda: GuardedPolicy(Arc(objects), "tier", "arc")),
    ):
        keys = keys_of(objects)
        order = made()
        for key in keys:
            order.insert(key, 1)
        chance = random.Random(2)
        touched = [chance.choice(keys) for _ in range(objects)]
        fresh = keys_of(objects // 2, seed=1)
        gc.collect()
        began_s = time.thread_time()
        for key in touched:
            order.touch(key)
        touch_us = (time.thread_time() - began_s) / len(touched) * 1e6
        began_s = time.thread_time()
        for key in fresh:
            assert len(order.evict(1, ())) == 1
            order.insert(key, 1)
        replace_us = (time.thread_time() - began_s) / len(fresh) * 1e6
        worst_us = 0.0
        for key in touched[: objects // 2]:
            if key in order:
                began_s = time.thread_time()
                order.touch(key)
                worst_us = max(worst_us, (time.thread_time() - began_s) * 1e6)
        yield name, touch_us, replace_us, worst_us


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brief", action="store_true", help="few runs, few objects: does it run at all?")
    parser.add_argument("--only", choices=("match", "memory", "policies"), help="one table alone")
    arguments = parser.parse_args()
    brief, only = arguments.brief, arguments.only
    runs, again, objects = (3, 100, 20_000) if brief else (21, 1000, 1_000_000)
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, {platform.machine()}, {runs} runs; no I/O")
    if only in (None, "match"):
        head = f"KV groups of {PREFIX_BLOCKS:,} blocks"
        print(f"\n{head:<54} {'first ms':>9} {'again us':>9} {'found':>6}")
        for name, first_ms, again_us, found in time_matches(runs, again):
            print(f"{name:<54} {first_ms:>9.2f} {again_us:>9.2f} {found:>6}", flush=True)
        print(f"{'target':<54} {TARGET_MS:>9.0f} {AGAIN_TARGET_US:>9.0f}")
    if only in (None, "memory"):
        print_memory(objects)
    if only in (None, "policies"):
        head = f"policies, {objects:,} objects"
        print(f"\n{head:<54} {'touch us':>9} {'replace':>9} {'longest touch':>14}")
        for name, touch_us, replace_us, worst_us in time_policies(objects):
            print(f"{name:<54} {touch_us:>9.2f} {replace_us:>9.2f} {worst_us:>14.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
