"""One way over the link between the accelerator's memory and the host's: out or in.

    STAGED   kernel + DMA      a piece of staging memory holds the blocks contiguously; DMA sees large rows
    DMA      DMA               page by page, in one batched call; good where pages are large
    KERNEL   kernel            threads read or write host memory themselves; takes multiprocessors

A list of jobs (which block, which flat address) goes to the accelerator with each piece on the way out, and
once for all pieces of a load.
"""

from __future__ import annotations

import bisect
import enum
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvbm_core.tier import Region
from kvbm_device._gpu import Event, Gpu
from kvbm_device._jobs import JOB_BYTES, Jobs
from kvbm_device._pages import Addresses, PageTable

__all__ = ["Link", "Method", "PinnedMemory", "Way"]

_PIECE_BYTES: Final = 64 << 20
"""A millisecond on the link: what is said to the driver for each piece is not felt, and what that costs the
interpreter neither."""
_MIN_PIECES: Final = 2
_MOST_RUNS: Final = 2
"""Of rows, each a call to the driver; more are one call that names every block."""
_MAX_PITCH_BYTES: Final = (1 << 31) - 1
"""Of the driver's copy of rows."""
_WORD_BYTES: Final = 16
"""The longest word of a kernel: a piece begins at one, whatever group was in the piece before it."""


class Way(enum.Enum):
    """How bytes cross the link."""

    STAGED = "staged"
    DMA = "dma"
    KERNEL = "kernel"


@dataclass(frozen=True, slots=True)
class Method:
    """A way, and what it takes."""

    way: Way
    programs: int = 0
    """Of a KERNEL: blocks of threads at once, each on a multiprocessor."""

    def __str__(self) -> str:
        return f"{self.way.value}:{self.programs}" if self.programs else self.way.value


class Link:
    """Moves blocks one way. Not safe for two threads at once.

    Args:
        gpu: The accelerator.
        tables: Where the pages of each KV group lie.
        staging_bytes: Memory of the accelerator to take.
        pinned: What is page-locked: a kernel reaches no other memory, and DMA of rows stays in one range.
        gather: Out of the accelerator, or into it.
    """

    def __init__(
        self,
        gpu: Gpu,
        tables: Sequence[PageTable],
        staging_bytes: int,
        pinned: PinnedMemory,
        *,
        gather: bool,
    ) -> None:
        self._events = gpu.events
        self._mover = gpu.copies
        self._has_kernel = gpu.has_kernel
        self._pinned = pinned
        self._gather = gather
        self.method = Method(Way.STAGED)
        """Chosen by whoever opens the device."""
        self._block_bytes = sizes = [table.block_bytes for table in tables]
        longest = max(sizes)
        # A piece is of one table, and an engine may claim blocks of each.
        least = min(len({table for table in tables if table.sets}), staging_bytes // longest) if gather else 0
        self.pieces = max(_MIN_PIECES, least, staging_bytes // max(_PIECE_BYTES, longest))
        self.ahead = 2 * self.pieces
        """Pieces to be stored at once: those behind wait for staging, on the accelerator."""
        room = min(_PIECE_BYTES, staging_bytes // self.pieces)
        self.piece_blocks = tuple(max(1, room // nbytes) if nbytes else 0 for nbytes in sizes)
        """Blocks of each group that a piece has room for."""
        used = max(count * nbytes for count, nbytes in zip(self.piece_blocks, sizes, strict=True))
        self.piece_bytes = -(-used // _WORD_BYTES) * _WORD_BYTES
        self._staging, self._memory = gpu.memory.allocate(self.pieces * self.piece_bytes)
        # All that can be on its way at once: on the way in, each of the engine's blocks.
        self._jobs = Jobs(gpu, self.ahead * max(self.piece_blocks) if gather else tables[0].num_blocks)
        self._kernels = gpu.streams.stream(urgent=not gather)
        # Not urgent: the engine's own copies shall have their turn.
        self._copies = gpu.streams.stream(urgent=False)
        self._other_copies = gpu.streams.stream(urgent=False)
        self._copied = gpu.events.record(self._copies)
        """After the last copy."""
        self._free = [self._copied] * self.pieces
        """When each piece of staging is free again."""
        self._next = 0
        self.rebind(tables)

    def rebind(self, tables: Sequence[PageTable]) -> None:
        """Find the pages elsewhere from here on, of the same sizes. Nothing is on its way."""
        self._tables = tables
        self._views = [_view_columns(table) for table in tables]

    def store(
        self, blocks: Sequence[int], regions: Sequence[Region], fences: Sequence[Event], group: int
    ) -> tuple[Event, Event]:
        """Start to copy blocks of a KV group out behind all fences, as many as one piece has room for.

        Returns:
            When the blocks have been read, and when the regions are filled.
        """
        addresses = _addresses(regions)
        method = self._method(addresses)
        if method.way is Way.DMA:
            done = self._batch(blocks, addresses, group, *fences)
            return done, done
        staged, buffer = method.way is Way.STAGED, self._next
        for fence in (*fences, self._free[buffer]) if staged else fences:
            self._events.wait(self._kernels, fence)
        flats = self._flats(buffer, len(blocks), group) if staged else addresses
        self._run(self._jobs.send(self._kernels, blocks, flats), len(blocks), int(flats[0]), method, group)
        read = self._events.record(self._kernels)
        self._jobs.used_until(read)
        if not staged:
            return read, read
        self._next = (buffer + 1) % self.pieces
        self._free[buffer] = away = self._copy(addresses, int(flats[0]), group, read)
        return read, away

    def load(self, regions: Sequence[Region], blocks: Sequence[int], fence: Event, group: int) -> Event:
        """Start to copy blocks of a KV group in.

        Returns:
            When the blocks are there.
        """
        if not regions or not self._block_bytes[group]:
            return fence
        addresses, on_device = _addresses(regions), regions[0].on_device
        method = Method(Way.KERNEL) if on_device else self._method(addresses)
        if method.way is Way.DMA:
            return self._batch(blocks, addresses, group, fence)
        self._events.wait(self._kernels, fence)
        if method.way is Way.KERNEL:
            return self._load_directly(addresses, blocks, method, group)
        return self._load_staged(addresses, blocks, method, group)

    def measure(self, address: int, nbytes: int) -> float:
        """Copy between host memory and staging, and wait for it.

        Returns:
            Bytes a second.
        """
        nbytes = min(nbytes, self.pieces * self.piece_bytes)
        target, source = (address, self._staging) if self._gather else (self._staging, address)
        start_s = time.perf_counter()
        self._mover.copy_rows(self._copies, target, 0, source, 0, nbytes, 1, waits=True)
        self._events.wait_here(self._events.record(self._copies))
        return nbytes / (time.perf_counter() - start_s)

    def close(self) -> None:
        """Give the staging memory up."""
        self._jobs.close()
        self._memory = None

    def _load_staged(
        self, addresses: npt.NDArray[np.int64], blocks: Sequence[int], method: Method, group: int
    ) -> Event:
        piece_blocks = self.piece_blocks[group]
        starts = range(0, len(blocks), piece_blocks)
        buffers = [(self._next + at) % self.pieces for at in range(len(starts))]
        self._next = (self._next + len(starts)) % self.pieces
        flats = np.concatenate([self._flats(each, piece_blocks, group) for each in buffers])[: len(blocks)]
        jobs = self._jobs.send(self._copies, blocks, flats)
        self._done()
        for start, buffer in zip(starts, buffers, strict=True):
            part = addresses[start : start + piece_blocks]
            self._events.wait(self._kernels, self._copy(part, int(flats[start]), group, self._free[buffer]))
            self._run(jobs + start * JOB_BYTES, len(part), int(flats[start]), method, group)
            self._free[buffer] = done = self._events.record(self._kernels)
        self._jobs.used_until(done)
        return done

    def _turn(self, *after: Event) -> None:
        """Go on with copies on the other stream, when those on this one are done.

        As long as a stream has a copy that could begin, the hardware may take none of other streams, such as
        what the engine sends for a step or the tokens that come out of it. So neither has one when its own is
        done.
        """
        self._copies, self._other_copies = self._other_copies, self._copies
        for event in (self._copied, *after):
            self._events.wait(self._copies, event)

    def _done(self) -> Event:
        """Give the end of the copies of this turn."""
        self._copied = done = self._events.record(self._copies)
        return done

    def _load_directly(
        self, addresses: npt.NDArray[np.int64], blocks: Sequence[int], method: Method, group: int
    ) -> Event:
        step = len(blocks) if self._has_kernel else 1
        jobs = self._jobs.send(self._kernels, blocks, addresses)
        for at in range(0, len(blocks), step):
            count = min(step, len(blocks) - at)
            self._run(jobs + at * JOB_BYTES, count, int(addresses[at]), method, group)
        done = self._events.record(self._kernels)
        self._jobs.used_until(done)
        return done

    def _method(self, addresses: npt.NDArray[np.int64]) -> Method:
        """Take the way that was chosen; a kernel reaches page-locked memory only."""
        if self.method.way is Way.KERNEL and not all(map(self._pinned.end_of, addresses.tolist())):
            return Method(Way.STAGED)
        return self.method

    def _flats(self, buffer: int, count: int, group: int) -> npt.NDArray[np.int64]:
        start = self._staging + buffer * self.piece_bytes
        return start + np.arange(count, dtype=np.int64) * self._block_bytes[group]

    def _run(self, jobs: int, count: int, flat: int, method: Method, group: int) -> None:
        table, programs = self._tables[group], method.programs
        self._mover.move_pages(
            self._kernels, table, jobs, count, flat, gather=self._gather, programs=programs
        )

    def _copy(self, addresses: npt.NDArray[np.int64], staged: int, group: int, after: Event) -> Event:
        """Copy between contiguous staging and host memory: as rows where addresses are at equal distances."""
        block_bytes = self._block_bytes[group]
        runs, waits = self._few_runs(addresses), not self._pinned.end_of(int(addresses[0]))
        if runs is None:
            places = np.uint64(staged) + np.arange(len(addresses), dtype=np.uint64) * np.uint64(block_bytes)
            flats, sizes = addresses.astype(np.uint64), np.full_like(places, block_bytes)
            return self._copy_all(flats, places, sizes, after)
        self._turn(after)
        for address, pitch, rows in runs:
            inside, outside = (staged, block_bytes), (address, pitch or block_bytes)
            target, source = (outside, inside) if self._gather else (inside, outside)
            self._mover.copy_rows(self._copies, *target, *source, block_bytes, rows, waits=waits)
            staged += rows * block_bytes
        return self._done()

    def _few_runs(self, addresses: npt.NDArray[np.int64]) -> list[tuple[int, int, int]] | None:
        """Give the runs of rows; None if they are so many that one call which names every block is better."""
        first, end_of = int(addresses[0]), self._pinned.end_of
        end = end_of(first)
        steps = np.diff(addresses)
        pitch = int(steps[0]) if len(steps) else 0
        alike = not len(steps) or (0 < pitch <= _MAX_PITCH_BYTES and bool((steps == pitch).all()))
        if alike and end_of(int(addresses[-1])) == end:
            return [(first, pitch, len(addresses))]
        # Between two runs the distance changes twice at most.
        if end and np.count_nonzero(np.diff(steps)) > 2 * _MOST_RUNS:
            return None
        runs = list(_runs(addresses.tolist(), end_of))
        return None if end and len(runs) > _MOST_RUNS else runs

    def _batch(
        self, blocks: Sequence[int], addresses: npt.NDArray[np.int64], group: int, *after: Event
    ) -> Event:
        """Copy page by page."""
        bases, strides, offsets, sizes = self._views[group]
        numbers = np.asarray(blocks, dtype=np.uint64)[:, None]
        pages = (bases + strides * numbers).ravel()
        flats = (addresses.astype(np.uint64)[:, None] + offsets).ravel()
        return self._copy_all(flats, pages, np.tile(sizes, len(blocks)), *after)

    def _copy_all(self, outside: Addresses, inside: Addresses, sizes: Addresses, *after: Event) -> Event:
        """Copy between addresses of the host and of the accelerator, in one call."""
        self._turn(*after)
        target, source = (outside, inside) if self._gather else (inside, outside)
        self._mover.copy_batch(self._copies, target, source, sizes)
        return self._done()


class PinnedMemory:
    """The ranges of host memory that are page-locked. They do not overlap, and a block lies in one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}

    def add(self, address: int, nbytes: int) -> None:
        """Note a range."""
        with self._lock:
            bisect.insort(self._starts, address)
            self._ends[address] = address + nbytes

    def __bool__(self) -> bool:
        return bool(self._starts)

    def remove(self, address: int) -> bool:
        """Forget the range that starts here. False if there is none."""
        with self._lock:
            if address not in self._ends:
                return False
            self._starts.remove(address)
            del self._ends[address]
            return True

    def end_of(self, address: int) -> int:
        """Give the end of the range that an address is in; 0 if it is in none."""
        with self._lock:
            at = bisect.bisect_right(self._starts, address) - 1
            end = self._ends[self._starts[at]] if at >= 0 else 0
        return end if address < end else 0


def _addresses(regions: Sequence[Region]) -> npt.NDArray[np.int64]:
    return np.array([region.address for region in regions], dtype=np.int64)


def _runs(addresses: Sequence[int], end_of: Callable[[int], int]) -> Iterator[tuple[int, int, int]]:
    """Find addresses at equal, positive distances in one range: first address, distance, how many."""
    at = 0
    while at < len(addresses):
        rows, pitch, end = 1, 0, end_of(addresses[at])
        while at + rows < len(addresses):
            step = addresses[at + rows] - addresses[at + rows - 1]
            if not 0 < step <= _MAX_PITCH_BYTES or (pitch and step != pitch):
                break
            if end_of(addresses[at + rows]) != end:
                break
            pitch = step
            rows += 1
        yield addresses[at], pitch, rows
        at += rows


def _view_columns(table: PageTable) -> tuple[npt.NDArray[np.uint64], ...]:
    """Give base, stride, offset and size of every view."""
    rows = [
        (base, pages.stride_bytes, offset, pages.page_bytes)
        for pages in table.sets
        for base, offset in zip(pages.bases, pages.offsets, strict=True)
    ]
    return tuple(np.array(rows, dtype=np.uint64).reshape(-1, 4).T.copy())
