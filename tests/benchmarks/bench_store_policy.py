"""What a store policy for sparse KV groups gains in hits and costs in bytes: a simulation, no engine.

    python tests/benchmarks/bench_store_policy.py [--brief] [--scale 0.1] [--seeds 2] [--model NAME]
        [--trace FILE] [--requests 1200] [--json FILE]

The loads are those of `store_loads.py`; with `--trace` also the first requests of the Mooncake paper's
conversation trace (one JSON object a line: `hash_ids` of 512 tokens, `input_length`, `output_length`). Each
prompt takes the longest boundary that `BoundaryFinder` finds in one tier. What is computed then is stored as
`SparseStores` chooses, into a `TierIndex` under LRU. The engine's own cache holds nothing: every hit is the
tier's. Capacities are parts of the bytes that `dense` stores without a limit. Groups of equal coverage are
taken as one.

    hits      tokens found, of those that `dense` finds without a limit
    sparse    bytes written of the sparse groups, of those that `dense` writes without a limit
    all       the same of all groups
    KiB/hit   bytes written for each token found
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store_loads import LOADS, Turn, trace

from kvbm_core import BlockKey, Lru, load_config
from kvbm_core.groups import Coverage, KvGroup, Rule, group_tag
from kvbm_core.leader.finding.boundaries import BoundaryFinder
from kvbm_core.leader.finding.matches import scan
from kvbm_core.leader.ground.tier_index import TierIndex
from kvbm_engine._sparse import prompt_ends, sparse_stores

KIB = 1 << 10


def group(block_tokens: int, rule: Rule = Rule.ALL, tokens: int = 0) -> KvGroup:
    return KvGroup(block_tokens, Coverage(rule, tokens), group_tag({"rule": rule.value}))


MODELS: dict[str, tuple[tuple[KvGroup, ...], tuple[int, ...]]] = {
    "gpt-oss-120b": ((group(16), group(16, Rule.WINDOW, 127)), (18 * 32 * KIB, 18 * 32 * KIB)),
    "Gemma-3-27B": ((group(16), group(16, Rule.WINDOW, 1023)), (10 * 128 * KIB, 52 * 128 * KIB)),
    "Llama-4-Scout": ((group(16), group(16, Rule.CHUNK, 8192)), (12 * 64 * KIB, 36 * 64 * KIB)),
    "MiMo-V2-like": ((group(32), group(16, Rule.WINDOW, 127)), (8 * 96 * KIB, 40 * 96 * KIB)),
}
"""The full and the sparse group of a model, and the bytes of a block of each, all layers."""

CAPACITIES = (None, 1 / 4, 1 / 16)

POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"sparse_stores": "dense"},
    "0": {"sparse_stores_every_tokens": 0},
    **{str(tokens): {"sparse_stores_every_tokens": tokens} for tokens in (256, 512, 1024, 2048, 4096, 8192)},
    "default": {},
}
"""What the configuration says."""
LESS = {"default, one end of the prompt": "one end", "default, without junctions": "no junctions"}


class Tree:
    """Keys of blocks: numbers of prefixes, made once for all policies."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int, int], int] = {}

    def ends(self, turn: Turn) -> list[tuple[int, int]]:
        """For each piece of a prompt and its answer where it ends, and a number for what it follows."""
        node = tokens = cut = 0
        found = []
        for content, length in (*turn.prompt, turn.answer):
            node = self._nodes.setdefault((node, cut, content), len(self._nodes) + 1)
            cut = length
            found.append((tokens := tokens + length, node << 32))
        return found


def keys_of(ends: list[tuple[int, int]], size: int, number: int) -> list[int]:
    """The keys of the blocks of a group; that of a block is of all tokens up to its end."""
    keys: list[int] = []
    for stop, node in ends:
        first = (len(keys) + 1) * size
        keys.extend(range(node + first * 4 + number, node + stop * 4 + 4, size * 4))
    return keys


class Prompt:
    """The keys of a prompt and its answer."""

    def __init__(self, keys: list[list[int]]) -> None:
        self.keys = keys
        self._members: set[int] = set()

    def __contains__(self, key: object) -> bool:
        if not self._members:
            self._members = set(itertools.chain.from_iterable(self.keys))
        return key in self._members

    def slice(self, start: int, stop: int, group: int = 0) -> list[int]:
        return self.keys[group][start:stop]


class Tier:
    """One tier, and what it has: `Holdings`."""

    def __init__(self, capacity_bytes: int | None) -> None:
        self.index = TierIndex(capacity_bytes, Lru())

    def scan(self, keys: Sequence[BlockKey]) -> list[int]:
        return scan(keys, [(0, self.index.ready)])

    def last(self, keys: Sequence[BlockKey]) -> int:
        return next((at for at in range(len(keys) - 1, -1, -1) if keys[at] in self.index), -1)

    def store(self, keys: Sequence[BlockKey], nbytes: int, prompt: Prompt) -> int:
        """Store what is not there; return its bytes."""
        self.index.touch(reversed(keys))
        filling, _ = self.index.reserve(keys, nbytes, prompt)
        self.index.stored(filling)
        return len(filling) * nbytes


@dataclass(slots=True)
class Result:
    """What runs have come to."""

    hit_tokens: int = 0
    prompt_tokens: int = 0
    full_bytes: int = 0
    sparse_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        return self.full_bytes + self.sparse_bytes

    @property
    def kib_per_hit(self) -> float:
        return self.stored_bytes / max(1, self.hit_tokens) / KIB

    def add(self, other: Result) -> None:
        self.hit_tokens += other.hit_tokens
        self.prompt_tokens += other.prompt_tokens
        self.full_bytes += other.full_bytes
        self.sparse_bytes += other.sparse_bytes


class Run:
    """One policy over one load."""

    def __init__(self, model: str, policy: str, capacity_bytes: int | None) -> None:
        self.groups, self.nbytes = MODELS[model]
        self.finder = BoundaryFinder(self.groups)
        self.less = LESS.get(policy)
        keys = POLICIES["default" if self.less else policy]
        config = load_config({"tiers": [{"backend": "cpu", "capacity": "1GiB"}], **keys})
        self.stores = sparse_stores(config, self.groups)
        self.tier = Tier(capacity_bytes)
        self.result = Result()

    def turn(self, turn: Turn, prompt: Prompt) -> None:
        """Answer a prompt: load its longest boundary, and store what is computed."""
        result, tier, tokens = self.result, self.tier, turn.prompt_tokens
        found = self.finder.find(prompt, 0, tokens - 1, tier)
        boundary = found.tokens[0] if found.tokens else 0
        result.hit_tokens += boundary
        result.prompt_tokens += tokens
        for part in found.parts(boundary, self.groups) if boundary else ():
            keys = prompt.slice(part.first, part.first + len(part.tiers), part.group)
            tier.index.touch(reversed(keys))
        computed = tokens + turn.answer[1] - 1
        ends = prompt_ends(tokens, self.finder.alignment)
        marks = [*ends[: 1 if self.less == "one end" else 2], computed]
        if self.less != "no junctions":
            marks.append(found.reach)
        for start, stop in ((boundary, tokens), (tokens, computed)):
            full, sparse = (
                range(start // group.block_tokens, stop // group.block_tokens) for group in self.groups
            )
            result.full_bytes += tier.store(prompt.slice(full.start, full.stop), self.nbytes[0], prompt)
            wanted = self.stores.wanted(
                self.groups[1], sparse.start, sparse.stop, marks, self.finder.alignment
            )
            result.sparse_bytes += tier.store([prompt.keys[1][at] for at in wanted], self.nbytes[1], prompt)


def run_all(turns: list[Turn], model: str) -> Iterator[tuple[str, float | None, Result]]:
    """Give for each policy and capacity what it comes to."""
    tree = Tree()
    groups, _ = MODELS[model]
    prompts = [
        Prompt([keys_of(ends, group.block_tokens, number) for number, group in enumerate(groups)])
        for ends in map(tree.ends, turns)
    ]
    total = 0
    for part, policy in itertools.product(CAPACITIES, (*POLICIES, *LESS)):
        run = Run(model, policy, None if part is None else int(total * part))
        for turn, prompt in zip(turns, prompts, strict=True):
            run.turn(turn, prompt)
        total = total or run.result.stored_bytes
        yield policy, part, run.result


def measure(load: Callable[[int], Iterator[Turn]], seeds: int, model: str, name: str) -> list[list[Result]]:
    """Give for each capacity the results by policy, over all seeds."""
    policies = [*POLICIES, *LESS]
    table = [[Result() for _ in policies] for _ in CAPACITIES]
    for seed in range(1, seeds + 1):
        for policy, part, result in run_all(list(load(seed)), model):
            table[CAPACITIES.index(part)][policies.index(policy)].add(result)
            print(
                f"  {name}, {model}, seed {seed}: {part or 'no limit'}, {policy}",
                end="\x1b[K\r",
                file=sys.stderr,
                flush=True,
            )
    return table


def show(name: str, model: str, table: list[list[Result]]) -> list[dict[str, Any]]:
    """Print a table, and give its rows."""
    top = table[0][0]
    print(f"\n{name}, {model}: {top.prompt_tokens / 1e6:.1f}M tokens of prompts, dense finds "
          f"{top.hit_tokens / top.prompt_tokens:.1%}")  # fmt: skip
    heads = ["no limit", *(f"room for {part:.3g}" for part in CAPACITIES[1:])]
    print(f"{'':<31}" + "".join(f" | {head:^30}" for head in heads))
    print(f"{'policy':<31}" + f" | {'hits':>6} {'sparse':>6} {'all':>6} {'KiB/hit':>9}" * len(heads))
    rows = []
    for at, policy in enumerate((*POLICIES, *LESS)):
        line = f"{policy:<31}"
        for part, results in zip(CAPACITIES, table, strict=True):
            result = results[at]
            shares = [
                result.hit_tokens / max(1, top.hit_tokens),
                result.sparse_bytes / top.sparse_bytes,
                result.stored_bytes / top.stored_bytes,
            ]
            line += (
                " | " + " ".join(f"{100 * share:>6.1f}" for share in shares) + f" {result.kib_per_hit:>9.1f}"
            )
            row = {"load": name, "model": model, "policy": policy, "room": part}
            rows.append(row | dict(zip(("hits", "sparse", "all"), shares, strict=True)))
        print(line, flush=True)
    return rows


def show_means(rows: list[dict[str, Any]]) -> None:
    """Print the means over all loads."""
    print(f"\nmean over the loads{'':<28}" + f" | {'hits':>6} {'sparse':>6} {'all':>6}" * len(CAPACITIES))
    for model in dict.fromkeys(row["model"] for row in rows):
        for policy in (*POLICIES, *LESS):
            line = f"{model:<15} {policy:<31}"
            for part in CAPACITIES:
                mine = [r for r in rows if (r["model"], r["policy"], r["room"]) == (model, policy, part)]
                means = [statistics.mean(row[key] for row in mine) for key in ("hits", "sparse", "all")]
                line += " | " + " ".join(f"{100 * mean:>6.1f}" for mean in means)
            print(line)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brief", action="store_true", help="one model, few prompts: does it run at all?")
    parser.add_argument("--scale", type=float, default=0.1, help="length of the loads; 1: 2,500 prompts each")
    parser.add_argument("--seeds", type=int, default=2, help="how often, each time with another load")
    parser.add_argument("--model", choices=MODELS, action="append", help="one model alone; may be repeated")
    parser.add_argument("--trace", type=Path, help="the conversation trace, *.jsonl")
    parser.add_argument("--requests", type=int, default=1200, help="of the trace")
    parser.add_argument("--json", type=Path, help="where to write the rows, for draw_store_policy.py")
    arguments = parser.parse_args()
    scale, seeds = (0.02, 1) if arguments.brief else (arguments.scale, arguments.seeds)
    loads = {name: functools.partial(load, scale=scale) for name, load in LOADS.items()}
    if arguments.trace:
        loads["trace"] = functools.partial(trace, arguments.trace, requests=arguments.requests)
    print(f"command: python {' '.join(sys.argv)}")
    rows = []
    for model in ["gpt-oss-120b"] if arguments.brief else arguments.model or MODELS:
        for name, load in loads.items():
            rows += show(name, model, measure(load, 1 if name == "trace" else seeds, model, name))
            if arguments.json:
                arguments.json.write_text(json.dumps(rows))
    show_means(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
