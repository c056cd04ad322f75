"""Stands for a GPU where there is none: streams whose work runs late, in any order that their rules allow.

It moves real bytes in host memory, one piece of work at a time, chosen at random among the heads of all
streams. Code that forgot to wait for an event therefore reads or writes at the wrong time sooner or
later, and the bytes show it.
"""

import ctypes
import mmap
import random
from collections import deque

import numpy as np

from kvbm_device._gpu import Copies, Events, Memory, Streams
from kvbm_device._pages import TorchMover


class SimulatedGpu(Streams, Events, Memory, Copies):
    """A `Gpu` that is all of its parts itself."""

    streams = events = memory = copies = property(lambda gpu: gpu)
    cpus = None

    def __init__(self, seed=0, *, has_kernel=True, eager=0.3):
        self.random = random.Random(seed)
        self.queues = []
        self.engine = self.stream(urgent=False)
        self.has_kernel = has_kernel
        self.eager = eager
        self.pinned = []
        self.mover = TorchMover("cpu")

    def engine_stream(self):
        return self.engine

    def stream(self, *, urgent):
        self.queues.append(deque())
        return self.queues[-1]

    def put(self, stream, action):
        stream.append(("run", action))

    def record(self, stream):
        event = {"passed": False}
        stream.append(("record", event))
        return event

    def wait(self, stream, event):
        stream.append(("wait", event))

    def passed(self, event):
        while self.random.random() < self.eager and self.step():
            pass
        return event["passed"]

    def wait_here(self, event):
        while not event["passed"]:
            assert self.step(), "nothing can run, and the event has not come"

    def finish(self):
        while self.step():
            pass
        assert not any(self.queues)

    def step(self):
        """Run one piece of work; False if none can run."""
        ready = [s for s in self.queues if s and not (s[0][0] == "wait" and not s[0][1]["passed"])]
        if not ready:
            return False
        kind, what = self.choose(ready).popleft()
        if kind == "run":
            what()
        elif kind == "record":
            what["passed"] = True
        return True

    def choose(self, ready):
        """Say which of the streams whose next piece of work can run goes on."""
        return self.random.choice(ready)

    def allocate(self, nbytes):
        memory = mmap.mmap(-1, nbytes)
        return ctypes.addressof(ctypes.c_char.from_buffer(memory)), memory

    def copy_rows(self, stream, target, target_pitch, source, source_pitch, row_bytes, rows, *, waits=False):
        def run():
            for row in range(rows):
                ctypes.memmove(target + row * target_pitch, source + row * source_pitch, row_bytes)

        self.put(stream, run)

    def copy_batch(self, stream, targets, sources, sizes):
        pieces = list(zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True))
        self.put(stream, lambda: [ctypes.memmove(*piece) for piece in pieces])

    def move_pages(self, stream, table, jobs, count, flat, *, gather, programs):
        self.put(stream, lambda: self._move(table, jobs, count, gather))

    def _move(self, table, jobs, count, gather):
        """One block after the other, since flat addresses may lie anywhere."""
        pairs = np.ctypeslib.as_array((ctypes.c_int64 * (2 * count)).from_address(jobs)).reshape(count, 2)
        for pair in pairs.copy():
            for pages in table.sets:  # A kernel faults at an address that is no multiple of its word.
                assert all((int(pair[1]) + offset) % pages.word_bytes == 0 for offset in pages.offsets)
            self.mover(table, pair.ctypes.data, 1, int(pair[1]), gather=gather, programs=0)

    def pin(self, address, nbytes):
        self.pinned.append((address, nbytes))
        return lambda: self.pinned.remove((address, nbytes))
