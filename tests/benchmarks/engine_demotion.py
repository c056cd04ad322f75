"""Time to first token with demotion into a tier that is slower than computing, against no connector at all.

    python tests/benchmarks/engine_demotion.py [--requests 100] [--others 24] [--capacity 40MiB]

Two engines with SmolLM2, one after the other for each request, so that others who use the machine disturb
both. In one of them a small host memory stands above a tier that is fast at first, then brings a block each
half second for so many requests, then is fast again. vLLM's own cache is emptied before each request.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

TESTS: Final = Path(__file__).parent.parent
PROMPTS, TOKENS = 12, 640
_SLOW: Final = """
import time
from kvbm_core import Backend, Op, hookimpl
from kvbm_core.memory import MemoryConfig, MemoryTier

seconds_a_block = 0.0

class SlowTier(MemoryTier):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.loads, self.held, self.free_s = set(), [], 0.0

    def submit(self, transfers):
        self.loads |= {each.ticket for each in transfers if each.op is Op.LOAD}
        super().submit(transfers)

    def poll(self):
        self.held += super().poll()
        ended, kept, now_s = [], [], time.monotonic()
        for each in self.held:
            if each.ticket not in self.loads or not seconds_a_block:
                ended.append(each)
            elif now_s >= self.free_s and not kept:
                self.free_s = now_s + seconds_a_block
                ended.append(each)
            else:
                kept.append(each)
        self.held = kept
        self.loads.difference_update(each.ticket for each in ended)
        return ended

@hookimpl
def kvbm_backends():
    return [Backend("slow", MemoryConfig, SlowTier)]
"""


def engine(pipe: Connection, capacity: str | None) -> None:
    """Answer requests: how long the first token took, and what came from below so far."""
    sys.path[:0] = [str(TESTS / "plugins"), str(TESTS)]
    from conftest import install
    from engines import connector, forget, generate, make_engine, story_tokens

    site = Path(tempfile.mkdtemp())
    sys.path.insert(0, str(site))
    slow = install(site, "slow", _SLOW)
    model, tokens = story_tokens()
    movement = {"stores": "demotion", "low_watermark": 0.5, "high_watermark": 0.9}
    tiers = [
        {"backend": "cpu", "capacity": capacity},
        {"backend": "slow", "capacity": "1GiB", "movement": movement},
    ]
    options: dict[str, Any] = {"num_gpu_blocks_override": 300, "max_model_len": 2048, "dtype": "float32"}
    extra = {"only_faster": True, "load_deadline_s": 60}
    llm = make_engine(model, tiers if capacity else None, extra=extra, **options)
    while (request := pipe.recv()) is not None:
        number, is_slow = request
        slow.seconds_a_block = 0.5 if is_slow else 0.0
        forget(llm)
        began_s = time.perf_counter()
        [answer] = generate(llm, [tokens[number * 40 : number * 40 + TOKENS]], max_tokens=1)
        took_s = time.perf_counter() - began_s
        counts = connector(llm).counts if capacity else {}
        pipe.send((took_s, answer, {name: each.loaded for name, each in counts.items()}))
    pipe.close()


class Pair:
    """Both engines."""

    def __init__(self, capacity: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        for each in (capacity, None):
            ours, theirs = context.Pipe()
            context.Process(target=engine, args=(theirs, each), daemon=True).start()
            self.pipes.append(ours)
        self.loaded: dict[str, int] = {}

    def ask(self, number: int, *, is_slow: bool) -> tuple[float, float]:
        """Give the seconds with tiers and without."""
        taken, answers = [], []
        for pipe in self.pipes:
            pipe.send((number, is_slow))
            took_s, answer, loaded = pipe.recv()
            self.loaded = loaded or self.loaded
            taken.append(took_s)
            answers.append(answer)
        assert answers[0] == answers[1], "another answer"
        return taken[0], taken[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=100, help="while the tier is slow")
    parser.add_argument("--others", type=int, default=24, help="before that, and as many after it")
    parser.add_argument("--capacity", default="40MiB", help="of the host memory; a block has 1.4 MiB")
    options = parser.parse_args()
    print(f"command: python {' '.join(sys.argv)}")
    pair, rng = Pair(options.capacity), random.Random(1)
    others = options.others
    phases = (("fast", others, False), ("slow", options.requests, True), ("fast again", others, False))
    for name, count, is_slow in phases:
        before, taken = dict(pair.loaded), []
        for _ in range(count):
            taken.append(pair.ask(rng.randrange(PROMPTS), is_slow=is_slow))
        loaded = {tier: number - before.get(tier, 0) for tier, number in pair.loaded.items()}
        ratios = [first / second for first, second in taken]
        total = sum(first for first, _ in taken) / sum(second for _, second in taken)
        print(
            f"{name}: {count} requests, first token after {total:.3f} of the time without a connector, "
            f"median of the pairs {statistics.median(ratios):.3f}, worst {max(ratios):.2f}; loaded {loaded}",
            flush=True,
        )
    for pipe in pair.pipes:
        pipe.send(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
