"""What the copies ask of an accelerator: streams, events, memory, and three ways to move bytes.

`Gpu` is that list, `CudaGpu` is CUDA: streams and memory by torch, which the engine brings along, copies and
events by the driver itself (``libcuda``): torch has no copy between two addresses, and gives the interpreter
lock away for every event. The functions used have kept their ABI since CUDA 4, the batched copy since 12.8.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvbm_core.errors import KvbmError
from kvbm_device._pages import Addresses, PageMover, PageTable, make_page_mover

__all__ = ["Addresses", "CudaGpu", "Event", "Gpu", "Stream"]

Stream = Any
Event = Any


class Gpu(ABC):
    """One accelerator. Work on a stream runs in order; an event marks a place in it."""

    @abstractmethod
    def engine_stream(self) -> Stream:
        """Give the stream that the engine's computation of the calling thread runs on."""

    @abstractmethod
    def stream(self, *, urgent: bool) -> Stream:
        """Make a stream, of the lowest priority unless it is `urgent`."""

    @abstractmethod
    def record(self, stream: Stream) -> Event:
        """Mark the place behind everything that was put on a stream so far."""

    @abstractmethod
    def wait(self, stream: Stream, event: Event) -> None:
        """Have what comes on a stream from here on wait for an event. The caller does not wait."""

    @abstractmethod
    def passed(self, event: Event) -> bool:
        """Say whether everything before an event is done."""

    @abstractmethod
    def wait_here(self, event: Event) -> None:
        """Wait for an event, in the calling thread."""

    @abstractmethod
    def memory(self, nbytes: int) -> tuple[int, Any]:
        """Take memory of the accelerator, on a page.

        Returns:
            Its address, and what must stay referenced.

        Raises:
            MemoryError: If there is not so much.
        """

    @abstractmethod
    def copy_rows(
        self, stream: Stream, target: int, target_pitch: int, source: int, source_pitch: int,
        row_bytes: int, rows: int, *, waits: bool = False,
    ) -> None:  # fmt: skip
        """Copy `rows` rows of `row_bytes` bytes, each `pitch` bytes after the one before.

        `waits`: the host memory is not page-locked, so that the call may wait for the copy.
        """

    @abstractmethod
    def copy_batch(self, stream: Stream, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
        """Copy many pieces, of any sizes, in one call."""

    @abstractmethod
    def move_pages(
        self, stream: Stream, table: PageTable, jobs: int, count: int, flat: int,
        *, gather: bool, programs: int,
    ) -> None:  # fmt: skip
        """Copy pages by a kernel.

        Args:
            stream: To run on.
            table: Where the pages of a block lie.
            jobs: Address, on the accelerator, of `count` pairs of 8-byte integers: block, flat address.
            count: Blocks.
            flat: The first flat address; where there is no kernel, the others must follow without a gap.
            gather: From the pages to the flat addresses, or back.
            programs: Blocks of threads at once; 0 for as many as it takes.
        """

    @property
    @abstractmethod
    def has_kernel(self) -> bool:
        """Whether `move_pages` may have flat addresses in host memory and a number of programs."""

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """Page-lock host memory, and say how to undo it."""

    @property
    @abstractmethod
    def cpus(self) -> frozenset[int] | None:
        """See `kvbm_core.device.Device.cpus`."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all streams are idle."""


class CudaGpu(Gpu):
    """One NVIDIA GPU.

    Args:
        index: torch's number of the device.

    Raises:
        KvbmError: If the driver's library has not what is needed.
    """

    def __init__(self, index: int) -> None:
        import torch

        self._torch = torch
        self.index = index
        torch.cuda.set_device(index)
        torch.cuda.current_stream().query()  # From here on the thread has a context.
        self._driver = _Driver()
        self._context = self._driver.context()
        self._thread = threading.local()
        self._page_mover: PageMover = make_page_mover()
        self._streams: list[Any] = []
        self._idle_events: list[int] = []

    def __repr__(self) -> str:
        return f"<CudaGpu {self.index} {self._torch.cuda.get_device_name(self.index)}>"

    def engine_stream(self) -> Stream:
        """See `Gpu.engine_stream`."""
        return self._torch.cuda.current_stream(self.index)

    def stream(self, *, urgent: bool) -> Stream:
        """See `Gpu.stream`. Priority 0 is CUDA's lowest."""
        stream = self._torch.cuda.Stream(self.index, priority=-1 if urgent else 0)
        self._streams.append(stream)
        return stream

    def record(self, stream: Stream) -> Event:
        """See `Gpu.record`."""
        self._bind()
        try:  # Without a question before: several threads may want the last.
            handle = self._idle_events.pop()
        except IndexError:
            handle = self._driver.event()
        event = _Event(handle, self._idle_events)
        self._driver.record(event.handle, stream.cuda_stream)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        """See `Gpu.wait`."""
        self._bind()
        self._driver.wait(stream.cuda_stream, event.handle)

    def passed(self, event: Event) -> bool:
        """See `Gpu.passed`."""
        self._bind()
        return self._driver.passed(event.handle)

    def wait_here(self, event: Event) -> None:
        """See `Gpu.wait_here`."""
        self._bind()
        self._driver.wait_here(event.handle)

    def memory(self, nbytes: int) -> tuple[int, Any]:
        """See `Gpu.memory`."""
        torch = self._torch
        try:
            tensor = torch.empty(nbytes + mmap.PAGESIZE, dtype=torch.uint8, device=f"cuda:{self.index}")
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        return -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE, tensor

    def copy_rows(
        self, stream: Stream, target: int, target_pitch: int, source: int, source_pitch: int,
        row_bytes: int, rows: int, *, waits: bool = False,
    ) -> None:  # fmt: skip
        """See `Gpu.copy_rows`."""
        self._bind()
        self._driver.copy_rows(
            stream.cuda_stream, target, target_pitch, source, source_pitch, row_bytes, rows, waits=waits
        )

    def copy_batch(self, stream: Stream, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
        """See `Gpu.copy_batch`."""
        self._bind()
        self._driver.copy_batch(stream.cuda_stream, targets, sources, sizes)

    def move_pages(
        self, stream: Stream, table: PageTable, jobs: int, count: int, flat: int,
        *, gather: bool, programs: int,
    ) -> None:  # fmt: skip
        """See `Gpu.move_pages`."""
        self._bind()
        with self._torch.cuda.stream(stream):
            self._page_mover(table, jobs, count, flat, gather=gather, programs=programs)

    @property
    def has_kernel(self) -> bool:
        """See `Gpu.has_kernel`."""
        return self._page_mover.reaches_host

    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """See `Gpu.pin`."""
        self._bind()
        self._driver.pin(address, nbytes)

        def undo() -> None:
            self._bind()
            self._driver.unpin(address)

        return undo

    @property
    def cpus(self) -> frozenset[int] | None:
        """See `Gpu.cpus`. As the kernel has it of the card's slot."""
        card = self._torch.cuda.get_device_properties(self.index)
        slot = f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
        try:
            text = Path(f"/sys/bus/pci/devices/{slot}/local_cpulist").read_text()
        except OSError:
            return None
        return (_cpus(text) & os.sched_getaffinity(0)) or None

    def finish(self) -> None:
        """See `Gpu.finish`."""
        for stream in self._streams:
            stream.synchronize()

    def _bind(self) -> None:
        """Give the calling thread the device and its context, once."""
        if not getattr(self._thread, "bound", False):
            self._torch.cuda.set_device(self.index)
            self._driver.use(self._context)
            self._thread.bound = True


_PORTABLE_AND_MAPPED: Final = 0x01 | 0x02
_HOST_OR_DEVICE: Final = 4
"""CU_MEMORYTYPE_UNIFIED: the address says which."""


_NO_TIMING: Final = 2
"""CU_EVENT_DISABLE_TIMING."""
_NOT_READY: Final = 600
"""CUDA_ERROR_NOT_READY."""
_QUICK: Final = {
    "cuEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
    "cuStreamWaitEvent": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
    "cuEventQuery": (ctypes.c_void_p,),
}


class _Rows(ctypes.Structure):
    """CUDA_MEMCPY2D of the driver's header."""

    _fields_ = (
        ("srcXInBytes", ctypes.c_size_t), ("srcY", ctypes.c_size_t), ("srcMemoryType", ctypes.c_int),
        ("srcHost", ctypes.c_void_p), ("srcDevice", ctypes.c_uint64), ("srcArray", ctypes.c_void_p),
        ("srcPitch", ctypes.c_size_t),
        ("dstXInBytes", ctypes.c_size_t), ("dstY", ctypes.c_size_t), ("dstMemoryType", ctypes.c_int),
        ("dstHost", ctypes.c_void_p), ("dstDevice", ctypes.c_uint64), ("dstArray", ctypes.c_void_p),
        ("dstPitch", ctypes.c_size_t),
        ("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t),
    )  # fmt: skip


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes of the driver's header."""

    _fields_ = (
        ("srcAccessOrder", ctypes.c_int), ("srcType", ctypes.c_int), ("srcId", ctypes.c_int),
        ("dstType", ctypes.c_int), ("dstId", ctypes.c_int), ("flags", ctypes.c_uint),
    )  # fmt: skip


class _Event:
    """An event of the driver's. Where nobody wants to know of it any more, it is used again."""

    __slots__ = ("_idle", "handle")

    def __init__(self, handle: int, idle: list[int]) -> None:
        self.handle = handle
        self._idle = idle

    def __del__(self) -> None:
        self._idle.append(self.handle)


class _Driver:
    """The driver's library, as far as it is used.

    Calls that only note something on a stream are made with the interpreter lock kept. To give it away costs
    far more than such a call where another thread, the engine's, wants it all the time.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
            self._quick = ctypes.PyDLL("libcuda.so.1")
        except OSError as error:
            raise KvbmError(f"the CUDA driver's library: {error}", operation="open") from error
        for call, types in _QUICK.items():
            getattr(self._quick, call).argtypes = types
        # CUDA 12.8 and newer.
        self._batch = getattr(self._library, "cuMemcpyBatchAsync", None)

    def context(self) -> ctypes.c_void_p:
        context = ctypes.c_void_p()
        self._check("cuCtxGetCurrent", self._library.cuCtxGetCurrent(ctypes.byref(context)))
        return context

    def use(self, context: ctypes.c_void_p) -> None:
        self._check("cuCtxSetCurrent", self._library.cuCtxSetCurrent(context))

    def pin(self, address: int, nbytes: int) -> None:
        status = self._library.cuMemHostRegister_v2(
            ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(_PORTABLE_AND_MAPPED)
        )
        self._check("cuMemHostRegister", status)

    def unpin(self, address: int) -> None:
        self._check("cuMemHostUnregister", self._library.cuMemHostUnregister(ctypes.c_void_p(address)))

    def event(self) -> int:
        handle = ctypes.c_void_p()
        self._check("cuEventCreate", self._library.cuEventCreate(ctypes.byref(handle), _NO_TIMING))
        assert handle.value is not None
        return handle.value

    def record(self, event: int, stream: int) -> None:
        self._check("cuEventRecord", self._quick.cuEventRecord(event, stream))

    def wait(self, stream: int, event: int) -> None:
        self._check("cuStreamWaitEvent", self._quick.cuStreamWaitEvent(stream, event, 0))

    def passed(self, event: int) -> bool:
        status: int = self._quick.cuEventQuery(event)
        if status != _NOT_READY:
            self._check("cuEventQuery", status)
        return status == 0

    def wait_here(self, event: int) -> None:
        self._check("cuEventSynchronize", self._library.cuEventSynchronize(ctypes.c_void_p(event)))

    def copy_rows(
        self, stream: int, target: int, target_pitch: int, source: int, source_pitch: int,
        row_bytes: int, rows: int, *, waits: bool,
    ) -> None:  # fmt: skip
        library = self._library if waits else self._quick
        if rows == 1 or target_pitch == source_pitch == row_bytes:
            status = library.cuMemcpyAsync(
                ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(row_bytes * rows),
                ctypes.c_void_p(stream),
            )  # fmt: skip
            self._check("cuMemcpyAsync", status)
            return
        copy = _Rows(
            srcMemoryType=_HOST_OR_DEVICE, srcDevice=source, srcPitch=source_pitch,
            dstMemoryType=_HOST_OR_DEVICE, dstDevice=target, dstPitch=target_pitch,
            WidthInBytes=row_bytes, Height=rows,
        )  # fmt: skip
        status = library.cuMemcpy2DAsync_v2(ctypes.byref(copy), ctypes.c_void_p(stream))
        self._check("cuMemcpy2DAsync", status)

    def copy_batch(self, stream: int, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
        if self._batch is None:
            for target, source, nbytes in zip(targets, sources, sizes, strict=True):
                self.copy_rows(stream, int(target), 0, int(source), 0, int(nbytes), 1, waits=True)
            return
        attributes, first, failed = _Attributes(srcAccessOrder=1), ctypes.c_size_t(0), ctypes.c_size_t()
        status = self._batch(
            _pointer(targets), _pointer(sources), _pointer(sizes), ctypes.c_size_t(len(sizes)),
            ctypes.byref(attributes), ctypes.byref(first), ctypes.c_size_t(1), ctypes.byref(failed),
            ctypes.c_void_p(stream),
        )  # fmt: skip
        self._check("cuMemcpyBatchAsync", status)

    def _check(self, call: str, status: int) -> None:
        if status:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(name))
            text = (name.value or b"unknown").decode()
            raise KvbmError(f"{call} failed: {text} ({status})", operation="copy")


def _cpus(text: str) -> frozenset[int]:
    """Read the kernel's list of cores, like ``0-3,8``."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def _pointer(values: Addresses) -> ctypes.c_void_p:
    assert values.dtype == np.uint64
    assert values.flags.c_contiguous
    return ctypes.c_void_p(values.ctypes.data)
