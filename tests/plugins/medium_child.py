"""An engine whose disk fails, is full and is cut short while it serves, and then is well again.

    python tests/plugins/medium_child.py MODEL BACKEND FOLDER SWITCH

The parent preloads `faulty_medium.c`. Prints a line for each phase, and ends with status 0 if every answer
was the one without a cache and the tier came back after each fault.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

from engines import connector, drain, forget, generate, make_engine, make_prompts

PATIENCE_S = 180.0
"""A tier that has not come back by then does not."""
SETTINGS = {
    "lmdb": {"capacity": "64MiB"},
    "gds": {"capacity": "64MiB", "engine": "threads"},
    "remote": {},
}


class Service:
    """Prompts asked again and again; each answer is compared with its first, which nothing was loaded for."""

    def __init__(self, llm, tier):
        self.llm, self.tier = llm, tier
        self.rng = random.Random(1)
        self.answers = {}
        self.fresh = 0

    @property
    def counts(self):
        return connector(self.llm).counts[self.tier]

    def ask_anew(self):
        prompt = make_prompts(1, seed=1000 + self.fresh, longest=self.rng.randint(200, 900))[-1]
        self.fresh += 1
        forget(self.llm)
        self.answers[tuple(prompt)] = generate(self.llm, [prompt])[0]

    def ask_again(self):
        prompt = self.rng.choice(list(self.answers))
        forget(self.llm)
        assert generate(self.llm, [list(prompt)])[0] == self.answers[prompt], "a wrong answer"

    def serve(self, rounds):
        for _ in range(rounds):
            self.ask_anew()
            self.ask_again()
            self.ask_again()

    def until_well(self, phase):
        """Serve until blocks are stored and loaded again."""
        began_s = time.monotonic()
        drain(self.llm)
        loaded, stored = self.counts.loaded, self.counts.stored
        while self.counts.loaded <= loaded or self.counts.stored <= stored:
            assert time.monotonic() - began_s < PATIENCE_S, f"the tier did not come back after: {phase}"
            self.serve(1)
            drain(self.llm)
        print(f"{phase}: well again after {time.monotonic() - began_s:.1f} s", flush=True)


def turn(switch, byte):
    """Set the switch where it is: it is mapped, and must never be empty."""
    with open(switch, "r+b") as file:
        file.write(byte)


def main(model, backend, folder, switch):
    place = {"url": f"file://{folder}"} if backend == "remote" else {"path": folder}
    tiers = [{"backend": backend, **place, **SETTINGS[backend]}]
    llm = make_engine(Path(model), tiers, extra={"load_deadline_s": 2, "store_deadline_s": 5})
    service = Service(llm, backend)
    service.serve(4)
    service.until_well("start")
    for phase, byte in [
        ("reads fail", b"R"), ("writes fail", b"W"), ("both fail", b"E"), ("no space left", b"S"),
    ] * 2:  # fmt: skip
        turn(switch, byte)
        service.serve(5)
        turn(switch, b"-")
        service.until_well(phase)
    for part in (0.5, 0.0):
        for path in Path(folder).rglob("*"):
            if path.is_file() and path.stat().st_size > 4096:
                os.truncate(path, int(path.stat().st_size * part) // 4096 * 4096)
        service.serve(3)
        service.until_well(f"cut to {part:.0%}")
    print(f"{service.counts}", flush=True)
    assert service.counts.failed.total() > 0, "no fault was met"


if __name__ == "__main__":
    main(*sys.argv[1:])
