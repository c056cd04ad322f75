"""A stack that is filled and refilled with objects of many contents: in the test's process, or in a child's.

As a program it is given its job as JSON, prints a line for each prompt that is stored, and is killed.
"""

import json
import os
import random
import sys
from pathlib import Path

from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.testing import MemoryDevice

PROMPT = 8
"""Blocks of a prompt, stored together."""
_POOL = random.Random(0).randbytes(4 << 20)
_TEXT = b"what repeats is compressed " * 64
_TOKENS = 16


def keys_of(prompt):
    """Give the keys of a numbered prompt's blocks."""
    return chain_keys(root_key(), range(prompt << 20, (prompt << 20) + PROMPT * _TOKENS), _TOKENS)


def content_of(prompt, at, nbytes):
    """Give a block's bytes: a random part of it does not compress; of one in eight it is all."""
    rng = random.Random(f"{prompt} {at}")
    random_bytes = nbytes if rng.random() < 1 / 8 else int(nbytes * rng.uniform(0.28, 1.0))
    start = rng.randrange(len(_POOL))
    chance = _POOL[start : start + random_bytes]
    while len(chance) < random_bytes:
        chance += _POOL[: random_bytes - len(chance)]
    head = prompt.to_bytes(8, "big") + bytes([at])
    rest = nbytes - random_bytes
    return (head + chance[len(head) :] + _TEXT * (1 + rest // len(_TEXT)))[:nbytes]


def du_bytes(path):
    """Count what files take on the disk, like ``du``."""
    total = 0
    for file in (Path(path), *Path(path).rglob("*")):
        try:
            total += file.lstat().st_blocks * 512
        except FileNotFoundError:  # Renamed, or deleted, meanwhile.
            continue
    return total


def resident_bytes():
    """Say how much memory this process has: RSS."""
    words = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(words[0]) * 1024


class Churn:
    """Stores prompt after prompt in the last tier of a stack, and loads what is there.

    Args:
        tiers: As an operator writes them.
        block_bytes: Of a block.
    """

    def __init__(self, tiers, block_bytes):
        self.block_bytes = block_bytes
        self.device = MemoryDevice(PROMPT, block_bytes)
        config = {"tiers": tiers, "load_deadline_s": 60.0, "store_deadline_s": 60.0, "staging": "32MiB"}
        self.stack = Stack.open(config, self.device, make_namespace({"model": "churn"}))
        self.name = list(self.stack.occupancy)[-1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()

    @property
    def counts(self):
        return self.stack.counts[self.name]

    @property
    def objects(self):
        """In the last tier."""
        return self.stack.occupancy[self.name]

    @property
    def fullness(self):
        """The part of the tier's capacity that the leader counts as used."""
        [*_, tier] = self.stack._planner._tiers
        if tier.capabilities.capacity_bytes is None:
            return 0.0
        assert tier.index.used_bytes <= tier.capabilities.capacity_bytes
        return tier.index.used_bytes / tier.capabilities.capacity_bytes

    @property
    def used_bytes(self):
        """Of the tier's capacity."""
        return self.stack._planner._tiers[-1].index.used_bytes

    def store(self, prompt):
        """Store a numbered prompt, and wait for the end."""
        for at in range(PROMPT):
            self.device.write(at, content_of(prompt, at, self.block_bytes))
        self.stack.store(keys_of(prompt), range(PROMPT))
        self.stack.wait()

    def serve(self, prompt):
        """Load what there is of a prompt; each block must have its bytes. Give how many there were."""
        keys, served, at = keys_of(prompt), 0, 0
        while at < PROMPT:
            for block in range(PROMPT):
                self.device.write(block, bytes(self.block_bytes))
            count = self.stack.load(keys[at:], range(PROMPT - at))
            for block in range(count):
                right = content_of(prompt, at + block, self.block_bytes)
                assert self.device.read(block) == right, f"block {at + block} of prompt {prompt} is wrong"
            served += count
            at += count + 1  # Behind the first that is not there.
        return served


def main():
    """Be the child: store prompts until killed, or until `turns` capacities have gone through."""
    job = json.loads(sys.argv[1])
    out = os.dup(1)
    os.dup2(2, 1)
    before_bytes = resident_bytes()
    with Churn(job["tiers"], job["block_bytes"]) as churn:
        parent = os.getppid()
        for prompt in range(job.get("first", 0), 1 << 30):
            if os.getppid() != parent:  # The test was killed: nobody would end this process.
                return
            churn.store(prompt)
            said = {
                "prompt": prompt,
                "objects": churn.objects,
                "turns": churn.counts.evicted / churn.objects,
                "used": churn.used_bytes,
                "fullness": churn.fullness,
                "failed": sum(churn.counts.failed.values()),
                "du": du_bytes(job["path"]) if "path" in job else 0,
                "rss": resident_bytes() - before_bytes,
            }
            os.write(out, json.dumps(said).encode() + b"\n")
            if job.get("turns") and said["turns"] >= job["turns"]:
                break
        if job.get("turns"):  # Memory does not outlive the process: it is proved here.
            served = sum(churn.serve(number) for number in range(prompt + 1))
            assert served == churn.objects > 0, (served, churn.objects)


if __name__ == "__main__":
    main()
