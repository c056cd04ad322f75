"""What copies of many blocks cost the interpreter: the engine's thread, and the transfer engine's beside it.

    python tests/benchmarks/bench_host_work.py [--blocks 2048] [--times 20]

Needs no GPU: in its place is one that takes every order at once and only keeps the time, copies at 55 GB/s
each way. So this is our Python alone; with a GPU each piece costs the driver's calls and the launch of a
kernel on top. The best of all, in ms of processor time of the thread named:

  in-step load   the engine's thread, until all is on the streams
  first piece    until the first piece of that is, on the clock
  load           the transfer engine's thread, of a load that the engine's stream does not wait for
  store          the transfer engine's thread, and the engine's
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import platform
import sys
import time
from dataclasses import dataclass

from kvbm_core import Planner, Worker, chain_keys, load_config, make_namespace, root_key
from kvbm_device import Layout, PageView, StagedDevice
from kvbm_device._gpu import Copies, Events, Memory, Streams

SHAPES = {"Llama 3.1 8B": (32, 64 << 10), "Llama 3 70B, a rank of 8": (80, 8 << 10)}
"""Views, and bytes of a page."""
LINK_BYTES_PER_S = 55e9
SMALL_BYTES = 64 << 10
"""Smaller copies go with the command."""


@dataclass
class Stream:
    idle_s: float = 0.0
    """When it has done what was put on it."""


class ClockGpu(Streams, Events, Memory, Copies):
    """A `Gpu` that moves nothing, all of its parts itself. An event is the time at which it passes."""

    streams = events = memory = copies = property(lambda gpu: gpu)
    has_kernel = True
    cpus = None

    def __init__(self) -> None:
        self._engine = Stream()
        self._link_idle_s = 0.0
        self.first_copy_s = 0.0

    def engine_stream(self) -> Stream:
        return self._engine

    def stream(self, *, urgent: bool) -> Stream:
        return Stream()

    def record(self, stream: Stream) -> float:
        return max(stream.idle_s, time.perf_counter())

    def wait(self, stream: Stream, event: float) -> None:
        stream.idle_s = max(stream.idle_s, event)

    def passed(self, event: float) -> bool:
        return time.perf_counter() >= event

    def wait_here(self, event: float) -> None:
        time.sleep(max(0.0, event - time.perf_counter()))

    def allocate(self, nbytes: int) -> tuple[int, object]:
        memory = mmap.mmap(-1, nbytes)
        return ctypes.addressof(ctypes.c_char.from_buffer(memory)), memory

    def copy_rows(self, stream, target, target_pitch, source, source_pitch, row_bytes, rows, *, waits=False):
        nbytes = row_bytes * rows
        if nbytes > SMALL_BYTES:
            self.first_copy_s = self.first_copy_s or time.perf_counter()
            begin_s = max(time.perf_counter(), stream.idle_s, self._link_idle_s)
            self._link_idle_s = stream.idle_s = begin_s + nbytes / LINK_BYTES_PER_S

    def copy_batch(self, stream, targets, sources, sizes):
        self.copy_rows(stream, 0, 0, 0, 0, int(sizes.sum()), 1)

    def move_pages(self, stream, table, jobs, count, flat, *, gather, programs):
        stream.idle_s = max(stream.idle_s, time.perf_counter()) + 50e-6

    def pin(self, address, nbytes):
        return lambda: None

    def finish(self) -> None:
        pass


class Bench:
    """A worker over host memory, whose transfer engine this thread drives."""

    def __init__(self, views: int, page_bytes: int, blocks: int) -> None:
        bases = ((1 << 44) + (at << 36) for at in range(views))
        pages = tuple(PageView(base, page_bytes, page_bytes, on_device=True) for base in bases)
        self.gpu, self.blocks = ClockGpu(), blocks
        slot_bytes = views * page_bytes + 4096
        tier = {"backend": "cpu", "capacity": (blocks + 1) * slot_bytes}
        device = StagedDevice(self.gpu, Layout((pages,), 2 * blocks), 256 << 20)
        self.worker = Worker(load_config({"tiers": [tier]}), device, make_namespace({}))
        self.engine = self.worker.take_over()
        self.planner = Planner([self.worker.status()])

    def submit(self) -> float:
        plan = self.planner.take(time.monotonic())
        return spent(lambda: self.worker.submit(plan))

    def finish(self) -> float:
        """Poll as the transfer engine's thread does, until all has ended."""
        took_s = 0.0
        while self.engine.active:
            took_s += spent(self.engine.poll)
            time.sleep(self.engine.pause_s or 0)
        self.planner.report(self.worker.reports(), time.monotonic())
        return took_s

    def run(self, keys) -> dict[str, float]:
        """Store blocks, load them both ways, and forget them."""
        found = {}
        self.planner.store(keys, range(len(keys)), [], time.monotonic())
        found["store, engine"], found["store, mover"] = self.submit(), self.finish()
        for in_step in (True, False):
            tiers = self.planner.match(keys, time.monotonic())
            assert len(tiers) == len(keys)
            self.planner.load("r", keys, range(len(keys)), tiers, in_step=in_step)
            self.gpu.first_copy_s, begin_s = 0.0, time.perf_counter()
            engine_s = self.submit()
            first_s = self.gpu.first_copy_s - begin_s
            mover_s = self.finish()
            if in_step:
                found["in-step load, engine"], found["first piece"] = engine_s, first_s
            else:
                found["load, mover"] = mover_s
        self.planner.reset()
        self.submit()
        self.finish()
        return found


def spent(call) -> float:
    begin_s = time.thread_time()
    call()
    return time.thread_time() - begin_s


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=2048)
    parser.add_argument("--times", type=int, default=20)
    arguments = parser.parse_args()
    print(f"command: python {' '.join(sys.argv)}")
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} CPUs")
    keys = chain_keys(root_key(), range(arguments.blocks), 1)
    for name, (views, page_bytes) in SHAPES.items():
        bench = Bench(views, page_bytes, arguments.blocks)
        rounds = [bench.run(keys) for _ in range(arguments.times + 1)][1:]
        bench.worker.close()
        print(f"{name}, {arguments.blocks} blocks of {views * page_bytes >> 10} KiB")
        for what in rounds[0]:
            print(f"  {what:22} {min(each[what] for each in rounds) * 1e3:7.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
