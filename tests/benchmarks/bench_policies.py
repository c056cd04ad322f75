"""What the eviction policies hit, beside LRU and Belady, and what each call of theirs takes.

    python tests/benchmarks/bench_policies.py [--brief] [--trace FILE] [--seeds 3] [--objects 1000000]

Hits: one tier of equal objects, asked as the planner asks it (`Tier`), from empty; a request's hits are its
longest leading run that is there. Loads are generated, six families from each seed; rooms are parts of all
the blocks that a load has. With `--trace` also a trace in Mooncake's format at 1 to 20 million tokens.
``gain`` is the part of what Belady has over LRU. Times: CPU time of this process, a call on average over
prompts of 512 blocks in a full tier, half of them new; LRU's beside them, because it is the same machine.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvbm_core import EvictionPolicy, Lru, Origin, PolicyContext
from kvbm_eviction import Adaptive, S3Fifo
from kvbm_replay._reader import read_trace
from kvbm_replay._reference import belady_hits, lru_hits
from kvbm_replay.generators import generate
from kvbm_replay.trace import Keys, Trace

POLICIES: dict[str, Callable[[PolicyContext], EvictionPolicy]] = {
    "lru": lambda context: Lru(),
    "s3fifo": S3Fifo,
    "adaptive": Adaptive,
}
FAMILIES = ("zipf", "loop", "scan", "phases", "chat", "agents")
PARTS = (0.05, 0.15, 0.4)
MILLIONS = (1, 2, 3, 5, 10, 20)
PROMPT = 512
LEAST_GAP = 0.005
"""Loads of which Belady has less over LRU have nothing to gain."""


class Tier:
    """Equal objects under a policy."""

    def __init__(self, policy: EvictionPolicy, room: int) -> None:
        self.policy, self.room = policy, room
        self.there: set[bytes] = set()

    def request(self, keys: list[bytes]) -> int:
        """Ask for a prompt, store what is not there, and count the leading blocks that were."""
        policy, there = self.policy, self.there
        hits = next((at for at, key in enumerate(keys) if key not in there), len(keys))
        if type(policy).offered is not EvictionPolicy.offered:
            policy.offered(keys, Origin(0, len(keys)))
        else:
            for key in reversed(keys):
                if key in there:
                    policy.touch(key)
        wanted = [key for key in keys if key not in there]
        room = self.room - len(there)
        if len(wanted) > room:
            refused = (at for at in range(room, len(wanted)) if not policy.admits(wanted[at], 1))
            del wanted[next(refused, len(wanted)) :]
            if len(wanted) > room:
                there.difference_update(policy.evict(len(wanted) - room, set(keys)))
                del wanted[self.room - len(there) :]
        for key in reversed(wanted):
            policy.insert(key, 1)
        there.update(wanted)
        return hits


def ratios(trace: Trace, keys: Keys, room: int, names: Sequence[str]) -> dict[str, float]:
    """Give the hit ratio of each policy, and of Belady."""
    asked = trace.accesses
    found = {}
    for name in names:
        tier = Tier(POLICIES[name](PolicyContext(room, 1, "bench")), room)
        hits = sum(min(request.asked, tier.request(keys.of(request.blocks))) for request in trace.requests)
        found[name] = hits / asked
    # What a policy is measured against is LRU as it is defined, not as it is built here.
    found["lru"] = lru_hits(trace.requests, room) / asked
    found["belady"] = belady_hits(trace.requests, room) / asked
    return found


def row(name: str, room: int, found: dict[str, float]) -> str:
    gap = found["belady"] - found["lru"]
    gain = f"{(found['adaptive'] - found['lru']) / gap:7.2f}" if gap > LEAST_GAP else "      -"
    cells = "".join(f"{found[each]:10.4f}" for each in ("lru", "s3fifo", "adaptive", "belady"))
    return f"{name:24s}{room:8d}{cells}{gain}"


def hits(traces: Sequence[tuple[Trace, Sequence[int]]]) -> None:
    print(
        f"{'load':24s}{'blocks':>8s}{'lru':>10s}{'s3fifo':>10s}{'adaptive':>10s}{'belady':>10s}{'gain':>7s}"
    )
    differences, gains = [], []
    for trace, rooms in traces:
        keys = Keys()
        for room in rooms:
            found = ratios(trace, keys, room, ("s3fifo", "adaptive"))
            differences.append(found["adaptive"] - found["lru"])
            if (gap := found["belady"] - found["lru"]) > LEAST_GAP:
                gains.append(differences[-1] / gap)
            print(row(trace.name, room, found), flush=True)
    print(f"adaptive over lru: {100 * min(differences):+.2f} points at worst; "
          f"gain {sum(gains) / max(1, len(gains)):.2f} on average")  # fmt: skip


def drawn(seed: int, count: int = PROMPT) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(32) for _ in range(count)]


def times(objects: int, rounds: int) -> None:
    print(f"\nmicroseconds a block, {objects} objects in the tier\n{'':10s}", end="")
    print("".join(f"{call:>10s}" for call in ("offered", "touch", "admits", "evict", "insert")))
    for name, make in POLICIES.items():
        policy = make(PolicyContext(objects, 1, "bench"))
        tier = Tier(policy, objects)
        for seed in range(objects // PROMPT):
            tier.request(drawn(seed))
        clock = Clock(policy)
        for at in range(rounds):
            seed = at + objects if at % 2 else random.Random(at).randrange(objects // PROMPT)
            clock.request(drawn(seed), tier.there)
        print(f"{name:10s}" + "".join(f"{each:>10s}" for each in clock.means()), flush=True)


class Clock:
    """Takes the time of each kind of call."""

    CALLS = ("offered", "touch", "admits", "evict", "insert")

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.taken_s = dict.fromkeys(self.CALLS, 0.0)
        self.blocks = dict.fromkeys(self.CALLS, 0)

    def request(self, keys: list[bytes], there: set[bytes]) -> None:
        policy = self.policy
        if type(policy).offered is not EvictionPolicy.offered:
            self.time("offered", len(keys), lambda: policy.offered(keys, Origin(0, len(keys))))
        old, new = [key for key in keys if key in there], [key for key in keys if key not in there]
        self.time("touch", len(old), lambda: [policy.touch(key) for key in reversed(old)])
        self.time("admits", len(new), lambda: [policy.admits(key, 1) for key in new])
        if new:
            gone = self.time("evict", len(new), lambda: policy.evict(len(new), ()))
            there.difference_update(gone)
        self.time("insert", len(new), lambda: [policy.insert(key, 1) for key in reversed(new)])
        there.update(new)

    def time(self, call: str, blocks: int, work: Callable[[], Sequence[bytes]]) -> Sequence[bytes]:
        began_s = time.process_time()
        result = work()
        self.taken_s[call] += time.process_time() - began_s
        self.blocks[call] += blocks
        return result

    def means(self) -> list[str]:
        return [
            f"{1e6 * self.taken_s[call] / self.blocks[call]:.2f}" if self.blocks[call] else "-"
            for call in self.CALLS
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--brief", action="store_true", help="short loads, few objects")
    parser.add_argument("--trace", type=Path, help="in Mooncake's format")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--objects", type=int, default=1_000_000)
    options = parser.parse_args()
    print(f"python {sys.version.split()[0]}")
    requests = 300 if options.brief else 2000
    loads = []
    if options.trace:
        trace = read_trace([options.trace])
        loads.append((trace, [int(each * 1e6) // trace.block_tokens for each in MILLIONS]))
    for seed in range(1 if options.brief else options.seeds):
        for family in FAMILIES:
            trace = generate(f"{family}:seed={seed + 100},requests={requests}")
            loads.append((trace, [max(32, int(trace.unique * part)) for part in PARTS]))
    hits(loads)
    times(20_000 if options.brief else options.objects, 40 if options.brief else 400)


if __name__ == "__main__":
    main()
