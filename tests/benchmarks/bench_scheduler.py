"""What the connector costs vLLM's scheduler in a step: it runs in the same thread, before the step can begin.

    python tests/benchmarks/bench_scheduler.py [--brief] [--cell TOKENS RUNNING WAITING]

A step here: vLLM asks for every waiting request, tells what it has scheduled (each running request computes
one token; in every sixteenth step a request completes a block, which is stored), and brings the outcome of
the step before. Median CPU time of the thread. Waiting requests have found their prompt in the tiers and are
answered "ask again", because other loads hold all blocks that may be parked. "full": both tiers, of 262,144
blocks, are full, so that each block stored evicts another; "empty": they hold the waiting prompt alone.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from kvbm_core import Capabilities, Planner, Report, TierStatus, load_config
from kvbm_core.groups import KvGroup
from kvbm_vllm._keys import request_keys
from kvbm_vllm._scheduler import SchedulerHalf
from kvbm_vllm._values import Handshake, Outcomes
from kvbm_vllm._weights import AdapterDigests

BLOCK_TOKENS = 16
TIER_BLOCKS = 1 << 18
ENGINE_BLOCKS = 1 << 14


class FullAttentionSpec:
    block_size = BLOCK_TOKENS


@dataclass(eq=False)
class Request:
    """As vLLM's; what is in `salt` makes its keys its own."""

    request_id: str
    all_token_ids: list[int]
    num_tokens: int
    cache_salt: str | None = None
    num_computed_tokens: int = 0
    lora_request: None = None
    prompt_embeds: None = None
    mm_features: tuple[()] = ()
    skip_reading_prefix_cache: bool = False
    kv_transfer_params: dict[str, Any] | None = None
    max_tokens: int = 16
    resumable: bool = False
    blocks: list[int] = field(default_factory=list)


def make_half(inventory: list[bytes]) -> SchedulerHalf:
    """Make the scheduler's half over two tiers that hold these blocks."""
    half = SchedulerHalf(
        load_config({"tiers": [{"backend": "cpu", "capacity": "1MiB"}], "only_faster": False}),
        SimpleNamespace(
            model_config=None, parallel_config=SimpleNamespace(world_size=1), use_v2_model_runner=False,
            observability_config=SimpleNamespace(otlp_traces_endpoint=None),
        ),
        SimpleNamespace(
            num_blocks=ENGINE_BLOCKS, kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec())]
        ),
    )  # fmt: skip
    found = [(key, 1) for key in inventory]
    status = [
        TierStatus("host", Capabilities(capacity_bytes=TIER_BLOCKS, addressable=True), found),
        TierStatus("disk", Capabilities(capacity_bytes=TIER_BLOCKS), found),
    ]
    half.start([Handshake(0, status, {})])
    return half


class Engine:
    """So many requests that run and wait, of so many tokens."""

    def __init__(self, running: int, waiting: int, tokens: int, *, full: bool) -> None:
        self.book = list(range(tokens + 4096))
        blocks = tokens // BLOCK_TOKENS
        found = request_keys(self.request("probe", tokens), (KvGroup(BLOCK_TOKENS),), AdapterDigests()).slice(
            0, blocks
        )
        others = [hashlib.sha256(b"%d" % at).digest() for at in range(TIER_BLOCKS - blocks if full else 0)]
        self.half = half = make_half([*others, *reversed(found)])
        self.running = [self.request(f"running {at}", tokens, salt=str(at)) for at in range(running)]
        for at, request in enumerate(self.running):
            request.num_tokens = request.num_computed_tokens = tokens + at % BLOCK_TOKENS
            request.num_tokens += 1
            state = half.ledger.state(request)
            state.keys.slice(0, blocks)
            state.blocks = [list(range(blocks + 1))]
            state.computed_tokens = request.num_computed_tokens
            state.offered, state.noted_units = [blocks], blocks
        # A request that loads holds all blocks that may be parked.
        half.ledger.parked.add("loads", ENGINE_BLOCKS)
        self.waiting = [self.request(f"waiting {at}", tokens) for at in range(waiting)]
        for request in self.waiting:
            assert half.match(request, 0) == (None, False)

    def request(self, name: str, tokens: int, salt: str | None = None) -> Request:
        return Request(name, self.book, tokens + 1, salt)

    def step(self) -> None:
        half = self.half
        for request in self.waiting:
            half.match(request, 0)
        scheduled = {request.request_id: 1 for request in self.running}
        given: list[Any] = []
        for request in self.running:
            crosses = request.num_computed_tokens % BLOCK_TOKENS == 0
            given.append(([1],) if crosses else None)
        told = half.step(
            SimpleNamespace(
                scheduled_new_reqs=[],
                scheduled_cached_reqs=SimpleNamespace(
                    req_ids=list(scheduled),
                    num_computed_tokens=[request.num_computed_tokens for request in self.running],
                    new_block_ids=given,
                    resumed_req_ids=(),
                ),
                num_scheduled_tokens=scheduled,
                total_num_scheduled_tokens=len(scheduled),
                preempted_req_ids=(),
            )
        )
        for request in self.running:
            request.num_computed_tokens += 1
            request.num_tokens += 1
        reports = [Report(op.op, tier) for op in [*told.plan.stores, *told.plan.fills] for tier in op.tiers]
        half.outcomes(Outcomes(reports, told.number))

    def measure(self, steps: int) -> tuple[float, float]:
        """Give the median of the steps' milliseconds, and the longest."""
        for _ in range(3):
            self.step()
        gc.collect()
        taken = []
        for _ in range(steps):
            began_s = time.thread_time()
            self.step()
            taken.append((time.thread_time() - began_s) * 1e3)
        return statistics.median(taken), max(taken)


def cells(*, brief: bool) -> Iterator[tuple[int, int, int]]:
    for tokens in (2_048, 32_768) if brief else (2_048, 32_768, 131_072):
        for running in (1, 8) if brief else (1, 64, 512):
            for waiting in (0, 16) if brief else (0, 256, 1_024):
                yield tokens, running, waiting


def print_steps(table: Iterable[tuple[int, int, int]], steps: int) -> None:
    print(f"\n{'':27}{'tiers empty':>16}{'tiers full':>22}")
    print(f"{'tokens':>9}{'running':>9}{'waiting':>9}" + f"{'ms':>8}{'longest':>10}{'us/ask':>9}" * 2)
    alone: dict[tuple[int, int, bool], float] = {}
    for tokens, running, waiting in table:
        row = f"{tokens:>9,}{running:>9}{waiting:>9,}"
        for full in (False, True):
            median, longest = Engine(running, waiting, tokens, full=full).measure(steps)
            if not waiting:
                alone[tokens, running, full] = median
            asks = (median - alone.get((tokens, running, full), 0.0)) / waiting * 1e3 if waiting else 0.0
            row += f"{median:>8.3f}{longest:>10.2f}" + (f"{asks:>9.2f}" if waiting else f"{'-':>9}")
        print(row, flush=True)


def print_growth(requests: int) -> None:
    """Run requests of one block through the half, and see what stays."""
    half = make_half([])
    book = list(range(64))

    def run(count: int, first: int) -> None:
        for at in range(first, first + count):
            request = Request(str(at), book, 20, str(at))
            half.arrived(request)
            half.match(request, 0)
            half.allocated(request, ([1, 2],), 0)
            new = SimpleNamespace(req_id=request.request_id, num_computed_tokens=0, block_ids=([1, 2],))
            told = half.step(
                SimpleNamespace(
                    scheduled_new_reqs=[new],
                    scheduled_cached_reqs=SimpleNamespace(
                        req_ids=[], num_computed_tokens=[], new_block_ids=[], resumed_req_ids=()
                    ),
                    num_scheduled_tokens={request.request_id: 20}, total_num_scheduled_tokens=20,
                    preempted_req_ids=(),
                )
            )  # fmt: skip
            request.num_computed_tokens, request.num_tokens = 20, 21
            half.finished(request)
            reports = [
                Report(op.op, tier) for op in [*told.plan.stores, *told.plan.fills] for tier in op.tiers
            ]
            half.outcomes(Outcomes(reports, told.number))
            half.take_stats()

    run(TIER_BLOCKS + 1000, 0)  # Until both tiers are full: the index grows so far and no farther.
    gc.collect()
    before, objects = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(gc.get_objects())
    began_s = time.thread_time()
    run(requests, TIER_BLOCKS + 1000)
    each_us = (time.thread_time() - began_s) / requests * 1e6
    gc.collect()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"\n{requests:,} requests after the tiers are full: {each_us:.0f} us each; the process's largest "
        f"resident set grew by {grown:,} KiB, objects of the garbage collector by "
        f"{len(gc.get_objects()) - objects:,}; {half!r}"
    )


def print_collections() -> None:
    """Say what a full collection takes with a million blocks in the index."""
    count = 1_000_000
    keys = [hashlib.sha256(b"%d" % at).digest() for at in range(count)]
    gc.collect()
    began_s = time.thread_time()
    gc.collect()
    without_ms = (time.thread_time() - began_s) * 1e3
    status = [
        TierStatus("host", Capabilities(capacity_bytes=count, addressable=True), [(key, 1) for key in keys])
    ]
    planner = Planner([status])
    del keys, status
    gc.collect()
    began_s = time.thread_time()
    gc.collect()
    with_ms = (time.thread_time() - began_s) * 1e3
    gc.freeze()
    began_s = time.thread_time()
    gc.collect()
    frozen_ms = (time.thread_time() - began_s) * 1e3
    gc.unfreeze()
    print(
        f"\na full garbage collection: {without_ms:.1f} ms without an index (a list of its keys), "
        f"{with_ms:.1f} ms with {count:,} blocks in it, {frozen_ms:.1f} ms once the heap of the start is "
        f"frozen, as vLLM's engine core does; {planner!r}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brief", action="store_true", help="few and small: does it run at all?")
    parser.add_argument(
        "--cell", nargs=3, type=int, action="append", metavar=("TOKENS", "RUNNING", "WAITING"),
        help="this row alone; may be repeated",
    )  # fmt: skip
    options = parser.parse_args()
    brief = options.brief
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, {platform.machine()}; no I/O, no model")
    print_steps(options.cell or cells(brief=brief), steps=10 if brief else 50)
    if options.cell:
        return 0
    print_growth(20_000 if brief else 1_000_000)
    print_collections()
    return 0


if __name__ == "__main__":
    sys.exit(main())
