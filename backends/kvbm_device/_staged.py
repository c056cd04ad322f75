"""Blocks in the memory of an accelerator: gathered and scattered beside the engine's computation.

    store   pages ──gather kernel──► staging piece ──DMA──► regions      a few pieces at once
    load    regions ──DMA──► staging piece ──scatter kernel──► pages     all at once, streams keep order

Nothing here waits for the accelerator. A store is queued; its pages are read when few pieces are before it,
after everything the engine had enqueued when it was asked for (its *fence*). Until that happens the engine
leaves the blocks alone, except where it `claim`s them: then what is queued is read first as far as there is
staging, the rest is given up, and the engine's stream waits for the reads that have begun.

`Method` says how bytes cross the link; a calibration chooses (`kvbm_device._calibration`).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, Final

import numpy as np

from kvbm_core.device import Device, DeviceTraits, Fence, Pinnable, Stageable, Work
from kvbm_core.errors import KvbmError
from kvbm_core.tier import PAGE_BYTES, Region
from kvbm_device._counts import CopyCounts
from kvbm_device._gpu import Event, Events, Gpu
from kvbm_device._link import Link, Method, PinnedMemory
from kvbm_device._pages import PageTable

__all__ = ["StagedDevice"]

logger = logging.getLogger("kvbm_device")

_TRIAL_BYTES: Final = 32 << 20
_DIRECT_PLACES: Final = 64
"""Blocks that a `device_direct` tier may be reading at once."""


@dataclass(slots=True, eq=False)
class _Loaded(Work):
    """A scatter: all of it is on its way."""

    events: Events
    event: Event

    def done(self) -> bool:
        return self.events.passed(self.event)

    @property
    def given_up(self) -> frozenset[int]:
        return frozenset()


@dataclass(slots=True, eq=False)
class _Stored(Work):
    """A gather: its blocks wait, are on their way, or were given up."""

    device: StagedDevice
    left: int
    """Blocks not yet away."""
    lost: set[int] = field(default_factory=set)
    error: Exception | None = None

    def done(self) -> bool:
        self.device.advance()
        if self.error is not None and self.left == 0:
            raise self.error
        return self.left == 0

    @property
    def given_up(self) -> frozenset[int]:
        return frozenset(self.lost)


@dataclass(slots=True, eq=False)
class _Wait:
    """Blocks of one gather that wait together, or are on their way."""

    work: _Stored
    places: Sequence[int]
    """Among the blocks of the gather."""
    blocks: Sequence[int]
    regions: Sequence[Region]
    fence: Event

    def cut(self, count: int) -> tuple[_Wait, _Wait]:
        """Divide it after so many blocks."""
        head = (self.places[:count], self.blocks[:count], self.regions[:count])
        rest = (self.places[count:], self.blocks[count:], self.regions[count:])
        return _Wait(self.work, *head, self.fence), _Wait(self.work, *rest, self.fence)

    def divide(self, wanted: set[int]) -> tuple[_Wait, _Wait]:
        """Divide it into the blocks that are wanted and the others."""
        mask = [block in wanted for block in self.blocks]
        return self._part(mask), self._part([not each for each in mask])

    def _part(self, mask: Sequence[bool]) -> _Wait:
        places, blocks = [*compress(self.places, mask)], [*compress(self.blocks, mask)]
        return _Wait(self.work, places, blocks, [*compress(self.regions, mask)], self.fence)


@dataclass(slots=True, eq=False)
class _Piece:
    """Blocks on their way out together."""

    waits: list[_Wait]
    read: Event
    """Their pages have been read: the engine may overwrite them."""
    away: Event
    """Their regions hold them."""


class StagedDevice(Device, Pinnable, Stageable):
    """An engine's KV blocks in the memory of an accelerator.

    Args:
        gpu: The accelerator.
        table: Where the pages lie.
        owner: Keeps the engine's tensors alive.
        staging_bytes: Memory of the accelerator to take for blocks on their way, both ways together.
    """

    def __init__(self, gpu: Gpu, table: PageTable, owner: Any, staging_bytes: int) -> None:
        self.counts = CopyCounts()
        self._gpu = gpu
        self._streams = gpu.streams
        self._events = gpu.events
        self._traits = DeviceTraits(table.block_bytes, table.num_blocks, async_gather=True, cpus=gpu.cpus)
        self._table = table
        self._owner = owner
        self._pinned = PinnedMemory()
        self._out = Link(gpu, table, staging_bytes // 2, self._pinned, gather=True)
        try:
            self._in = Link(gpu, table, staging_bytes // 2, self._pinned, gather=False)
        except BaseException:
            # Memory that is freed while it is page-locked cannot be locked again by who gets its address.
            self._out.close()
            raise
        self._lock = threading.Lock()
        self._waits: deque[_Wait] = deque()
        self._pieces: deque[_Piece] = deque()
        self._reading = gpu.streams.stream(urgent=True)
        self._bounce = threading.local()
        self._places: list[int] | None = None
        self._place_bytes = 0
        self._direct: Any = None
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"out {self._out.method}, in {self._in.method}"
        return (
            f"<StagedDevice {self._table.num_blocks} blocks of {self._table.block_bytes} bytes, {state}; "
            f"{sum(len(w.blocks) for w in self._waits)} waiting, {len(self._pieces)} pieces on their way>"
        )

    @property
    def traits(self) -> DeviceTraits:
        """See `Device.traits`."""
        return self._traits

    @property
    def links(self) -> tuple[Link, Link]:
        """The way out and the way in."""
        return self._out, self._in

    def use(self, out: Method, into: Method) -> None:
        """Choose how bytes leave and enter."""
        self._out.method, self._in.method = out, into

    def claim(self, blocks: Iterable[int], *, wait: bool = False) -> Fence:
        """See `Device.claim`."""
        stream = self._streams.engine_stream()
        wanted = set(blocks)
        with self._lock:
            if wanted and (self._waits or self._pieces):
                self._reap()
                self._read_or_give_up(wanted)
                for piece in self._pieces:
                    if not all(wanted.isdisjoint(wait.blocks) for wait in piece.waits):
                        self._events.wait_here(piece.read) if wait else self._events.wait(stream, piece.read)
            return self._events.record(stream)

    def gather(self, blocks: Sequence[int], regions: Sequence[Region], fence: Fence = None) -> Work:
        """See `Device.gather`. Without a fence, whatever the calling thread's stream has enqueued is seen."""
        self._check("gather", blocks, regions)
        fence = fence or self._events.record(self._streams.engine_stream())
        work = _Stored(self, len(blocks))
        if blocks:
            with self._lock:
                self._waits.append(_Wait(work, range(len(blocks)), blocks, regions, fence))
        return work

    def scatter(self, regions: Sequence[Region], blocks: Sequence[int], fence: Fence = None) -> Work:
        """See `Device.scatter`."""
        self._check("scatter", blocks, regions)
        fence = fence or self._events.record(self._streams.engine_stream())
        with self._lock:
            # What a `device_direct` tier has read did not come from host memory.
            self.counts.scattered_blocks += sum(not region.on_device for region in regions)
            try:
                return _Loaded(self._events, self._in.load(regions, blocks, fence))
            except Exception:
                self._halt()
                raise

    def stream_wait(self, work: Work) -> None:
        """See `Device.stream_wait`."""
        assert isinstance(work, _Loaded)
        self._events.wait(self._streams.engine_stream(), work.event)

    def advance(self) -> None:
        """Read what waits while few pieces are on their way, and see what has arrived. Waits for nothing."""
        more = True
        while more:
            with self._lock:  # Given back between pieces: the engine may want to claim.
                self._reap()
                more = bool(self._waits) and len(self._pieces) < self._out.ahead
                if more:
                    self._read(self._take(self._waits, mixed=False))

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """See `Pinnable.pin`. What it raises says what copies of memory that is not page-locked cost."""
        try:
            unpin = self._gpu.memory.pin(address, nbytes)
        except KvbmError as error:
            rates = [link.measure(address, min(nbytes, _TRIAL_BYTES)) / 1e9 for link in self.links]
            raise KvbmError(
                f"{error}; copies of such memory run at {rates[0]:.1f} GB/s out and {rates[1]:.1f} GB/s in",
                operation="pin",
            ) from error
        self._pinned.add(address, nbytes)
        self._note_pinned()

        def undo() -> None:
            if self._pinned.remove(address):
                self._note_pinned()
                unpin()

        return undo

    def _note_pinned(self) -> None:
        """Keep the traits true. The driver waits for copies of memory that is not page-locked."""
        with self._lock:  # Tiers page-lock in several threads.
            self._traits = replace(self._traits, stream_wait=bool(self._pinned))

    def stage(self, nbytes: int) -> Region | None:
        """See `Stageable.stage`."""
        with self._lock:
            if self._places is None:
                self._place_bytes = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
                self._places = self._make_places()
            assert nbytes <= self._place_bytes, "a device stages blocks of one size"
            return Region(self._places.pop(), nbytes, on_device=True) if self._places else None

    def _make_places(self) -> list[int]:
        """Take memory for as many places as there is memory for."""
        count = _DIRECT_PLACES
        while count:
            try:
                start, self._direct = self._gpu.memory.allocate(count * self._place_bytes)
            except MemoryError:
                count //= 2
            else:
                return [start + at * self._place_bytes for at in range(count)]
        logger.error(
            "the accelerator has no memory for a block of %d bytes on its way from a disk: lower "
            "gpu_memory_utilization", self._place_bytes,
        )  # fmt: skip
        return []

    def unstage(self, region: Region) -> None:
        """See `Stageable.unstage`."""
        with self._lock:
            assert self._places is not None
            self._places.append(region.address)

    def read(self, region: Region) -> memoryview:
        """See `Stageable.read`. The view is the calling thread's until it calls again."""
        memory = getattr(self._bounce, "memory", None)
        if memory is None or len(memory) < region.nbytes:
            memory = self._bounce.memory = mmap.mmap(-1, region.nbytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._gpu.copies.copy_rows(self._reading, address, 0, region.address, 0, region.nbytes, 1, waits=True)
        self._events.wait_here(self._events.record(self._reading))
        return memoryview(memory)[: region.nbytes]

    def close(self) -> None:
        """Finish what is on its way, give up what waits, and let go of the engine's memory."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for wait in self._waits:
                self._lose(wait)
            self._waits.clear()
        self._streams.finish()
        with self._lock:
            self._reap()
        self._out.close()
        self._in.close()
        self._owner = self._direct = None

    def _take(self, waits: deque[_Wait], *, mixed: bool) -> list[_Wait]:
        """Take as many blocks from the head of a queue as fit into one piece; not `mixed`: of one fence."""
        taken: list[_Wait] = []
        room = self._out.piece_blocks
        while room and waits and (mixed or not taken or waits[0].fence is taken[0].fence):
            wait = waits.popleft()
            if len(wait.blocks) > room:
                wait, rest = wait.cut(room)
                waits.appendleft(rest)
            taken.append(wait)
            room -= len(wait.blocks)
        return taken

    def _read(self, waits: list[_Wait]) -> None:
        """Put one piece on its way, behind all of its fences: they need not be in the order of the queue."""
        fences = list({id(wait.fence): wait.fence for wait in waits}.values())
        blocks = [block for wait in waits for block in wait.blocks]
        regions = [region for wait in waits for region in wait.regions]
        try:
            read, away = self._out.store(blocks, regions, fences)
        except Exception as error:  # noqa: BLE001 - the accelerator's own error is not ours to know
            self._halt()
            for wait in waits:
                wait.work.error = error
                wait.work.left -= len(wait.blocks)
            return
        self._pieces.append(_Piece(waits, read, away))

    def _halt(self) -> None:
        """Wait for what was begun of a copy that failed: its regions and blocks will be used for others."""
        try:
            self._streams.finish()
        except Exception:  # An accelerator that fails runs nothing any more.
            logger.exception("the accelerator fails")

    def _reap(self) -> None:
        """Take back the pieces that have arrived; they arrive in order."""
        while self._pieces and self._events.passed(self._pieces[0].away):
            piece = self._pieces.popleft()
            for wait in piece.waits:
                self.counts.gathered_blocks += len(wait.blocks)
                wait.work.left -= len(wait.blocks)

    def _read_or_give_up(self, wanted: set[int]) -> None:
        """Read now what waits in blocks that the engine wants, as far as there is staging."""
        hit, others = deque[_Wait](), deque[_Wait]()
        for wait in self._waits:
            if wanted.isdisjoint(wait.blocks):
                others.append(wait)
                continue
            inside, outside = wait.divide(wanted)
            hit.append(inside)
            if outside.blocks:
                others.append(outside)
        self._waits = others
        # Beyond that a piece would wait for the link, and the engine for the piece.
        while hit and len(self._pieces) < self._out.pieces:
            self._read(self._take(hit, mixed=True))
        for wait in hit:
            self._lose(wait)

    def _lose(self, wait: _Wait) -> None:
        self.counts.staging_full_blocks += len(wait.blocks)
        wait.work.lost.update(wait.places)
        wait.work.left -= len(wait.blocks)

    def _check(self, operation: str, blocks: Sequence[int], regions: Sequence[Region]) -> None:
        if self._closed:
            raise KvbmError(f"{operation} on a closed device", operation=operation)
        if len(blocks) != len(regions):
            raise ValueError(f"{operation} of {len(blocks)} blocks and {len(regions)} regions")
        numbers, num_blocks = np.asarray(blocks, dtype=np.int64), self._table.num_blocks
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < num_blocks):
            worst = numbers.max() if numbers.min() >= 0 else numbers.min()
            raise IndexError(f"{operation} of block {worst}; there are {num_blocks}")
        block_bytes = self._table.block_bytes
        for region in regions:
            if region.nbytes < block_bytes or (region.on_device and operation == "gather"):
                raise ValueError(f"{operation} needs {block_bytes} bytes of host memory, got {region}")
