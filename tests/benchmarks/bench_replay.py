"""What a replay costs a block, and which part of that is the planner's; and what recording costs an engine.

    python tests/benchmarks/bench_replay.py [TRACE] [--brief]

Processor time, not the clock's: a replay waits for nothing. Without a trace it makes a load.
"""

from __future__ import annotations

import argparse
import cProfile
import platform
import pstats
import sys
import tempfile
import time
from pathlib import Path

from kvbm_core.groups import KvGroup
from kvbm_core.registry import Registry
from kvbm_engine import Recorder
from kvbm_replay import Keys, generate
from kvbm_replay._curve import curve_of
from kvbm_replay._driver import replay
from kvbm_replay._layout import read_layout
from kvbm_replay._machine import Machine
from kvbm_replay._reader import read_trace
from kvbm_replay._reference import belady_hits, lru_hits

LOAD = "chat:seed=1,requests=12000"
"""Without a file."""
BLOCKS = 9765
"""Five million tokens."""
HOST = {"backend": "cpu", "capacity": "1TiB"}
DISK = {"backend": "lmdb", "capacity": "4TiB", "path": "/not/opened"}


def replay_rows(brief: bool, file: Path | None) -> None:
    """Replay the trace through one tier and two, and profile the first."""
    trace = read_trace([file]) if file else generate(LOAD)
    machine, keys, registry = Machine(), Keys(), Registry()
    print(f"\n{file or LOAD}")
    if brief:
        trace.requests = trace.requests[::10]
    for request in trace.requests:
        keys.of(request.blocks)
    print(f"\n{'replay of ' + format(trace.accesses, ',') + ' blocks':<44} {'s':>7} {'µs a block':>11}")
    for name, tiers in (("cpu", [HOST]), ("cpu, lmdb", [HOST, DISK])):
        layout = read_layout({"tiers": tiers}, 512 * machine.token_bytes, registry).with_blocks(0, BLOCKS)
        began_s = time.process_time()
        replay(trace, layout, machine, registry=registry, keys=keys)
        show(f"planner, tiers {name}, the first {BLOCKS:,} blocks", began_s, trace.accesses)
    layout = read_layout({"tiers": [HOST]}, 512 * machine.token_bytes, registry).with_blocks(0, BLOCKS)
    profile = cProfile.Profile()
    profile.runcall(replay, trace, layout, machine, registry=registry, keys=keys)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    core = sum(each[2] for (file, *_), each in stats.items() if "kvbm_core" in file)
    ours = sum(each[2] for (file, *_), each in stats.items() if "kvbm_replay" in file)
    print(f"  of profiled Python the planner has {core / (core + ours):.0%}")
    for name, work in (("LRU", lru_hits), ("Belady", belady_hits)):
        began_s = time.process_time()
        work(trace.requests, BLOCKS)
        show(f"{name}, one size", began_s, trace.accesses)
    began_s = time.process_time()
    curve_of(trace)
    show("stack distances, all sizes", began_s, trace.accesses)


def show(name: str, began_s: float, blocks: int) -> None:
    took_s = time.process_time() - began_s
    print(f"{name:<44} {took_s:>7.2f} {took_s / blocks * 1e6:>11.2f}")


def record_rows(brief: bool) -> None:
    """Record requests of 2,048 blocks: the engine's thread alone, and all threads."""
    requests, keys = 100 if brief else 1000, [bytes([at % 256] * 32) for at in range(2048)]
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder) / "log", [KvGroup(16)], [16 * 131_072], 1 << 30)
        began_s, handed_s = time.process_time(), 0.0
        for at in range(requests):
            start_s = time.thread_time()
            recorder.looked(str(at), 0, 32_769, 0.0)
            recorder.offered(str(at), 32_769, 0.0)
            recorder.ended(str(at), 32_769, 32_868, keys[:], 0.0)
            recorder.settle()
            handed_s += time.thread_time() - start_s
        recorder.close()
        whole_s = time.process_time() - began_s
    print(f"\nrecording, {requests} requests of {len(keys):,} blocks")
    print(f"  the engine's thread: {handed_s / requests * 1e6:.1f} µs a request")
    print(f"  the recorder's: {(whole_s - handed_s) / requests * 1e3:.2f} ms a request")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brief", action="store_true", help="a tenth of the requests: does it run at all?")
    parser.add_argument("trace", nargs="?", type=Path, help=f"default: {LOAD}")
    options = parser.parse_args()
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, {platform.machine()}; processor time")
    replay_rows(options.brief, options.trace)
    record_rows(options.brief)
    return 0


if __name__ == "__main__":
    sys.exit(main())
