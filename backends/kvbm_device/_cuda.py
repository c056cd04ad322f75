"""An NVIDIA GPU: streams and memory by torch, which the engine brings along, the rest by the driver itself.

torch has no copy between two addresses, and gives the interpreter lock away for every event.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbm_device._driver import Driver
from kvbm_device._gpu import Copies, Event, Events, Gpu, Memory, Stream, Streams
from kvbm_device._pages import Addresses, PageMover, PageTable, make_page_mover

__all__ = ["open_cuda"]


def open_cuda(index: int, page_mover: PageMover | None = None) -> Gpu:
    """Open one NVIDIA GPU.

    Args:
        index: torch's number of the device.
        page_mover: Moves pages; None for the best that there is.

    Raises:
        KvbmError: If the driver's library has not what is needed.
    """
    card = _Card(index)
    mover = page_mover or make_page_mover()
    return Gpu(
        _Streams(card), _Events(card), _Memory(card), _Copies(card, mover), mover.reaches_host,
        card.cpus(),
    )  # fmt: skip


class _Card:
    """What the parts of one GPU share: torch, the driver, and the context of the calling thread."""

    def __init__(self, index: int) -> None:
        import torch

        self.torch = torch
        self.index = index
        torch.cuda.set_device(index)
        torch.cuda.current_stream().query()  # From here on the thread has a context.
        self.driver = Driver()
        self._context = self.driver.context()
        self._thread = threading.local()

    def __repr__(self) -> str:
        return f"<CUDA {self.index} {self.torch.cuda.get_device_name(self.index)}>"

    def bind(self) -> None:
        """Give the calling thread the device and its context, once."""
        if not getattr(self._thread, "bound", False):
            self.torch.cuda.set_device(self.index)
            self.driver.use(self._context)
            self._thread.bound = True

    def cpus(self) -> frozenset[int] | None:
        """Read which cores are near the card's slot, as the kernel has it."""
        card = self.torch.cuda.get_device_properties(self.index)
        slot = f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
        try:
            text = Path(f"/sys/bus/pci/devices/{slot}/local_cpulist").read_text()
        except OSError:
            return None
        return (_cpus(text) & os.sched_getaffinity(0)) or None


class _Streams(Streams):
    """Streams of torch."""

    def __init__(self, card: _Card) -> None:
        self._torch = card.torch
        self._index = card.index
        self._streams: list[Any] = []

    def engine_stream(self) -> Stream:
        """See `Streams.engine_stream`."""
        return self._torch.cuda.current_stream(self._index)

    def stream(self, *, urgent: bool) -> Stream:
        """See `Streams.stream`. Priority 0 is CUDA's lowest."""
        stream = self._torch.cuda.Stream(self._index, priority=-1 if urgent else 0)
        self._streams.append(stream)
        return stream

    def finish(self) -> None:
        """See `Streams.finish`."""
        for stream in self._streams:
            stream.synchronize()


class _Events(Events):
    """Events of the driver."""

    def __init__(self, card: _Card) -> None:
        self._bind = card.bind
        self._driver = card.driver
        self._idle: list[int] = []

    def record(self, stream: Stream) -> Event:
        """See `Events.record`."""
        self._bind()
        try:  # Without a question before: several threads may want the last.
            handle = self._idle.pop()
        except IndexError:
            handle = self._driver.event()
        event = _Event(handle, self._idle)
        self._driver.record(event.handle, stream.cuda_stream)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        """See `Events.wait`."""
        self._bind()
        self._driver.wait(stream.cuda_stream, event.handle)

    def passed(self, event: Event) -> bool:
        """See `Events.passed`."""
        self._bind()
        return self._driver.passed(event.handle)

    def wait_here(self, event: Event) -> None:
        """See `Events.wait_here`."""
        self._bind()
        self._driver.wait_here(event.handle)


class _Event:
    """An event of the driver's. Where nobody wants to know of it any more, it is used again."""

    __slots__ = ("_idle", "handle")

    def __init__(self, handle: int, idle: list[int]) -> None:
        self.handle = handle
        self._idle = idle

    def __del__(self) -> None:
        self._idle.append(self.handle)


class _Memory(Memory):
    """Memory of torch, and host memory that the driver locks."""

    def __init__(self, card: _Card) -> None:
        self._torch = card.torch
        self._index = card.index
        self._bind = card.bind
        self._driver = card.driver

    def allocate(self, nbytes: int) -> tuple[int, Any]:
        """See `Memory.allocate`."""
        torch = self._torch
        try:
            tensor = torch.empty(nbytes + mmap.PAGESIZE, dtype=torch.uint8, device=f"cuda:{self._index}")
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        return -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE, tensor

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """See `Memory.pin`."""
        self._bind()
        self._driver.pin(address, nbytes)

        def undo() -> None:
            self._bind()
            self._driver.unpin(address)

        return undo


class _Copies(Copies):
    """Copies of the driver, and a kernel."""

    def __init__(self, card: _Card, page_mover: PageMover) -> None:
        self._torch = card.torch
        self._bind = card.bind
        self._driver = card.driver
        self._page_mover = page_mover

    def copy_rows(
        self, stream: Stream, target: int, target_pitch: int, source: int, source_pitch: int,
        row_bytes: int, rows: int, *, waits: bool = False,
    ) -> None:  # fmt: skip
        """See `Copies.copy_rows`."""
        self._bind()
        self._driver.copy_rows(
            stream.cuda_stream, target, target_pitch, source, source_pitch, row_bytes, rows, waits=waits
        )

    def copy_batch(self, stream: Stream, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
        """See `Copies.copy_batch`."""
        self._bind()
        self._driver.copy_batch(stream.cuda_stream, targets, sources, sizes)

    def move_pages(
        self, stream: Stream, table: PageTable, jobs: int, count: int, flat: int,
        *, gather: bool, programs: int,
    ) -> None:  # fmt: skip
        """See `Copies.move_pages`."""
        self._bind()
        with self._torch.cuda.stream(stream):
            self._page_mover(table, jobs, count, flat, gather=gather, programs=programs)


def _cpus(text: str) -> frozenset[int]:
    """Read the kernel's list of cores, like ``0-3,8``."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)
