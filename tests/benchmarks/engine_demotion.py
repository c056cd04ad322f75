"""Time to first token with demotion into a tier that is slower than computing, against no connector at all.

    python tests/benchmarks/engine_demotion.py [--requests 100] [--capacity 24MiB]

Two engines with SmolLM2, one after the other for each request, so that others who use the machine disturb
both. In one of them a small host memory stands above a tier whose loads take a second each while it is slow:
it is fast at first, then slow for so many requests, then fast again. vLLM's own cache is emptied before each.
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
FIRST, LAST = 24, 60
"""Requests before the tier is slow, and at most until blocks come from it again."""


def engine(pipe: Connection, capacity: str | None) -> None:
    """Answer requests: how long the first token took, and what came from below so far."""
    sys.path[:0] = [str(TESTS / "plugins"), str(TESTS)]
    from conftest import _FAULTY, install
    from engines import connector, forget, generate, make_engine, story_tokens

    site = Path(tempfile.mkdtemp())
    sys.path.insert(0, str(site))
    faulty = install(site, "faulty", _FAULTY)
    model, tokens = story_tokens()
    movement = {"stores": "demotion", "low_watermark": 0.5, "high_watermark": 0.9}
    tiers = [
        {"backend": "cpu", "capacity": capacity},
        {"backend": "faulty", "capacity": "1GiB", "movement": movement},
    ]
    options: dict[str, Any] = {"num_gpu_blocks_override": 300, "max_model_len": 2048, "dtype": "float32"}
    llm = make_engine(model, tiers if capacity else None, extra={"only_faster": True}, **options)
    while (request := pipe.recv()) is not None:
        number, is_slow = request
        faulty.fault = lambda transfer, is_slow=is_slow: (
            "late" if is_slow and transfer.op.value == "load" else None
        )
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
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--capacity", default="40MiB", help="of the host memory; a block has 1.4 MiB")
    options = parser.parse_args()
    print(f"command: python {' '.join(sys.argv)}")
    pair, rng = Pair(options.capacity), random.Random(1)
    phases = (("fast", FIRST, False), ("slow", options.requests, True), ("fast again", LAST, False))
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
