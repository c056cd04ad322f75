"""Two tiers with each movement between them, against one of the same size: hits, bytes written, first tokens.

    python tests/benchmarks/bench_movement.py [--brief] [--admission] [TRACE ...] [--generate LOAD ...]

Replays through the real planner (`kvbm replay`'s machine: an 8B model on an H100, host memory, NVMe disks;
writes take their time). A row is a movement; dropped are blocks that were evicted above before they were
copied, or too many at once. With `--admission` each admission policy of the disk stands beside each movement;
the budget of `write-budget` is a quarter of the pace at which that movement writes without one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvbm_core.registry import Registry
from kvbm_replay._driver import replay
from kvbm_replay._layout import Layout, read_layout
from kvbm_replay._machine import Machine
from kvbm_replay._outcome import Outcome
from kvbm_replay._reader import read_trace
from kvbm_replay.generators import generate
from kvbm_replay.trace import Keys, Trace

MOVEMENTS: Final[dict[str, dict[str, Any]]] = {
    "write_through": {},
    "write_through, promotion measured": {"promotion": "measured"},
    "demotion": {"stores": "demotion"},
    "demotion, promotion measured": {"stores": "demotion", "promotion": "measured"},
    "demotion, promotion never": {"stores": "demotion", "promotion": "never"},
    "demotion, exclusive": {"stores": "demotion", "copies": "exclusive"},
    "demotion, exclusive, measured": {"stores": "demotion", "copies": "exclusive", "promotion": "measured"},
}
ADMISSIONS: Final = ("always", "second-touch", "prompts-only", "write-budget")
ADMITTED: Final = ("write_through", "demotion", "demotion, exclusive")
"""Movements that are shown with each admission policy."""
SIZES: Final = ((1, 2), (2, 3), (1, 5), (1, 20))
"""Millions of tokens in host memory and on disk."""
LOADS: Final = (
    "zipf:seed=1", "loop:seed=1", "phases:seed=1", "chat:seed=1,requests=4000", "agents:seed=1,requests=4000",
    "chat:seed=2,requests=2000+scan:seed=2,requests=2000",
)  # fmt: skip


def layout_of(
    blocks: list[int], movement: dict[str, Any], admission: Any, machine: Machine, block_tokens: int
) -> Layout:
    """Give a stack of host memory, and a disk if there are two sizes."""
    disk = {"backend": "gds", "path": "/", "capacity": "1TiB", "movement": movement, "admission": admission}
    tiers = [{"backend": "cpu", "capacity": "1TiB"}, disk][: len(blocks)]
    layout = read_layout({"tiers": tiers}, block_tokens * machine.token_bytes, Registry())
    for position, count in enumerate(blocks):
        layout = layout.with_blocks(position, count)
    return layout


def run(
    trace: Trace, keys: Keys, blocks: list[int], movement: dict[str, Any], admission: Any = "always"
) -> Outcome:
    machine = Machine()
    layout = layout_of(blocks, movement, admission, machine, trace.block_tokens)
    return replay(trace, layout, machine, keys=keys, paced=True)


def row(name: str, outcome: Outcome) -> str:
    host, *lower = outcome.tiers
    disk_gib = sum(tier.stored_bytes for tier in lower) / 2**30
    return (
        f"{name:<36} {outcome.hit_ratio:>7.4f} {host.hits / outcome.accesses:>9.4f} "
        f"{host.stored_bytes / 2**30:>9,.0f} {disk_gib:>9,.0f} {outcome.mean_first_token_s * 1e3:>9,.1f} "
        f"{outcome.percentile_s(0.95) * 1e3:>9,.0f} {sum(tier.dropped for tier in lower):>7,}"
    )


def settings_of(admission: str, always: Outcome) -> Any:
    """Give an admission policy as it is configured, for a disk that gets what it gets without one."""
    if admission != "write-budget":
        return admission
    days = always.duration_s / 86_400
    return {"name": admission, "bytes_per_day": max(1, int(always.tiers[-1].stored_bytes / days / 4))}


def table(trace: Trace, sizes: Sequence[tuple[float, float]], *, with_admission: bool) -> None:
    keys = Keys()
    for memory, disk in sizes:
        blocks = [int(each * 1e6) // trace.block_tokens for each in (memory, disk)]
        print(f"\n{trace.name}, {memory:g} M tokens in memory and {disk:g} M on disk")
        print(
            f"{'':<36} {'hits':>7} {'in memory':>9} {'GiB to':>9} {'GiB to':>9} {'mean ms':>9} {'p95 ms':>9}"
            f"\n{'':<36} {'':>7} {'':>9} {'memory':>9} {'disk':>9} {'to first token':>19} {'dropped':>7}"
        )
        for name in ADMITTED if with_admission else MOVEMENTS:
            movement = MOVEMENTS[name]
            always = run(trace, keys, blocks, movement)
            print(row(name, always), flush=True)
            for admission in ADMISSIONS[1:] if with_admission else ():
                outcome = run(trace, keys, blocks, movement, settings_of(admission, always))
                print(row(f"  {admission}", outcome), flush=True)
        print(row("one tier of memory, as large as both", run(trace, keys, [sum(blocks)], {})), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="*", type=Path, help="in Mooncake's format")
    parser.add_argument("--generate", action="append", help=f"default: {' '.join(LOADS)}")
    parser.add_argument("--admission", action="store_true", help="policies of what is written to the disk")
    parser.add_argument("--brief", action="store_true", help="few requests: does it run at all?")
    options = parser.parse_args()
    machine = Machine()
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"machine: {machine.prefill_tokens_per_s:,.0f} tokens/s, {machine.token_bytes >> 10} KiB a token; "
        f"memory {machine.speed('', 'cpu').text()}; disk {machine.speed('', 'gds').text()}"
    )
    if options.brief:
        table(generate("chat:seed=1,requests=100"), ((0.1, 0.2),), with_admission=options.admission)
        return 0
    for path in options.traces:
        sizes = SIZES[1:2] if options.admission else SIZES
        table(read_trace([path]), sizes, with_admission=options.admission)
    for load in options.generate or (() if options.traces and options.admission else LOADS):
        trace = generate(load)
        part = trace.unique * trace.block_tokens / 1e6  # Sizes as parts of what the load has.
        sizes = tuple((round(a * part, 2), round(b * part, 2)) for a, b in ((0.1, 0.2), (0.05, 0.5)))
        table(trace, sizes, with_admission=options.admission)
    return 0


if __name__ == "__main__":
    sys.exit(main())
