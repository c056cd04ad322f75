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

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Final

from kvbm_core.device import Device, DeviceTraits, Fence, Pinnable, Stageable, Work
from kvbm_core.errors import KvbmError
from kvbm_core.tier import Region
from kvbm_device._counts import CopyCounts
from kvbm_device._gpu import Event, Events, Gpu
from kvbm_device._layout import Groups, Layout
from kvbm_device._link import Link, Method, PinnedMemory
from kvbm_device._pages import PageTable, page_table
from kvbm_device._places import Places

__all__ = ["StagedDevice"]

logger = logging.getLogger("kvbm_device")

_TRIAL_BYTES: Final = 32 << 20


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
    group: int
    """Number of the KV group that all are of, or are like."""

    def cut(self, count: int) -> tuple[_Wait, _Wait]:
        """Divide it after so many blocks."""
        head = (self.places[:count], self.blocks[:count], self.regions[:count])
        rest = (self.places[count:], self.blocks[count:], self.regions[count:])
        return (
            _Wait(self.work, *head, self.fence, self.group),
            _Wait(self.work, *rest, self.fence, self.group),
        )

    def divide(self, wanted: set[int]) -> tuple[_Wait, _Wait]:
        """Divide it into the blocks that are wanted and the others."""
        mask = [block in wanted for block in self.blocks]
        return self._part(mask), self._part([not each for each in mask])

    def _part(self, mask: Sequence[bool]) -> _Wait:
        places, blocks = [*compress(self.places, mask)], [*compress(self.blocks, mask)]
        regions = [*compress(self.regions, mask)]
        return _Wait(self.work, places, blocks, regions, self.fence, self.group)


@dataclass(slots=True, eq=False)
class _Piece:
    """Blocks of one KV group on their way out together."""

    waits: list[_Wait]
    read: Event
    """Their pages have been read: the engine may overwrite them."""
    away: Event
    """Their regions hold them."""


class StagedDevice(Device, Pinnable, Stageable):
    """An engine's KV blocks in the memory of an accelerator.

    Args:
        gpu: The accelerator.
        layout: Where the pages lie.
        staging_bytes: Memory of the accelerator to take for blocks on their way, both ways together.
    """

    def __init__(self, gpu: Gpu, layout: Layout, staging_bytes: int) -> None:
        self.counts = CopyCounts()
        self._gpu = gpu
        self._streams = gpu.streams
        self._events = gpu.events
        self._layout = layout
        self._block_bytes = layout.block_bytes
        self._traits = DeviceTraits(self._block_bytes, layout.num_blocks, async_gather=True, cpus=gpu.cpus)
        self._pinned = PinnedMemory()
        tables = _tables(layout)
        self._out = Link(gpu, tables, staging_bytes // 2, self._pinned, gather=True)
        try:
            self._in = Link(gpu, tables, staging_bytes // 2, self._pinned, gather=False)
        except BaseException:
            # Memory that is freed while it is page-locked cannot be locked again by who gets its address.
            self._out.close()
            raise
        self._lock = threading.Lock()
        self._waits: deque[_Wait] = deque()
        self._pieces: deque[_Piece] = deque()
        self._places = Places(gpu, self._block_bytes, staging_bytes)
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"out {self._out.method}, in {self._in.method}"
        return (
            f"<StagedDevice {self._layout}, {state}; "
            f"{sum(len(w.blocks) for w in self._waits)} waiting, {len(self._pieces)} pieces on their way>"
        )

    @property
    def traits(self) -> DeviceTraits:
        """See `Device.traits`."""
        return self._traits

    @property
    def layout(self) -> Layout:
        """Where the pages lie."""
        return self._layout

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

    def gather(
        self, blocks: Sequence[int], regions: Sequence[Region], fence: Fence = None, group: int = 0
    ) -> Work:
        """See `Device.gather`. Without a fence, whatever the calling thread's stream has enqueued is seen."""
        self._check("gather", blocks, regions, group)
        fence = fence or self._events.record(self._streams.engine_stream())
        work = _Stored(self, len(blocks) if self._block_bytes[group] else 0)
        if work.left:
            alike = self._layout.alike[group]
            with self._lock:
                self._waits.append(_Wait(work, range(len(blocks)), blocks, regions, fence, alike))
        return work

    def scatter(
        self, regions: Sequence[Region], blocks: Sequence[int], fence: Fence = None, group: int = 0
    ) -> Work:
        """See `Device.scatter`."""
        self._check("scatter", blocks, regions, group)
        fence = fence or self._events.record(self._streams.engine_stream())
        with self._lock:
            # What a `device_direct` tier has read did not come from host memory.
            from_host = sum(not region.on_device for region in regions)
            self.counts.scattered_bytes += from_host * self._block_bytes[group]
            try:
                return _Loaded(self._events, self._in.load(regions, blocks, fence, group))
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
        """See `Stageable.stage`. `nbytes` is at most a page more than the longest block."""
        return self._places.stage(nbytes)

    def unstage(self, region: Region) -> None:
        """See `Stageable.unstage`."""
        self._places.unstage(region)

    def read(self, region: Region) -> memoryview:
        """See `Stageable.read`. The view is the calling thread's until it calls again."""
        return self._places.read(region)

    def rebind(self, tensors: Groups) -> None:
        """Use the same layers' tensors at other addresses, as an engine has them that slept and woke.

        Behaviour:
            - Every gather must be done. Scatters that nobody has asked about are waited for.
            - The tensors before are kept until then.

        Raises:
            ConfigError: If a tensor is another one than before in anything but its address.
            KvbmError: If a gather is not done, or the device is closed.
        """
        layout = self._layout.moved(tensors)
        with self._lock:
            self._reap()
            if self._closed or self._waits or self._pieces:
                raise KvbmError(f"rebind of {self!r}; end what is under way first", operation="rebind")
            self._streams.finish()
            self._layout, tables = layout, _tables(layout)
            for link in self.links:
                link.rebind(tables)

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
        self._places.close()
        self._layout = replace(self._layout, tensors=())

    def _take(self, waits: deque[_Wait], *, mixed: bool) -> list[_Wait]:
        """Take as many blocks from the head of a queue as fit into one piece; not `mixed`: of one fence.

        All are of the head's KV group. Those of other groups that stand between them keep their places.
        """
        fence, group = waits[0].fence, waits[0].group
        taken: list[_Wait] = []
        others: list[_Wait] = []
        room = self._out.piece_blocks[group]
        while room and waits and (mixed or waits[0].fence is fence):
            wait = waits.popleft()
            if wait.group != group:
                others.append(wait)
                continue
            if len(wait.blocks) > room:
                wait, rest = wait.cut(room)
                waits.appendleft(rest)
            taken.append(wait)
            room -= len(wait.blocks)
        waits.extendleft(reversed(others))
        return taken

    def _read(self, waits: list[_Wait]) -> None:
        """Put one piece on its way, behind all of its fences: they need not be in the order of the queue."""
        fences = list({id(wait.fence): wait.fence for wait in waits}.values())
        blocks = [block for wait in waits for block in wait.blocks]
        regions = [region for wait in waits for region in wait.regions]
        try:
            read, away = self._out.store(blocks, regions, fences, waits[0].group)
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
                self.counts.gathered_bytes += len(wait.blocks) * self._block_bytes[wait.group]
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

    def _check(self, operation: str, blocks: Sequence[int], regions: Sequence[Region], group: int) -> None:
        if self._closed:
            raise KvbmError(f"{operation} on a closed device", operation=operation)
        self._layout.check(operation, blocks, regions, group, staged=operation == "scatter")


def _tables(layout: Layout) -> list[PageTable]:
    return [page_table(views, layout.num_blocks) for views in layout.groups]
