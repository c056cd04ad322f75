"""The CUDA driver's library, ``libcuda``: events, page-locking, and copies between addresses.

The functions used have kept their ABI since CUDA 4, the batched copy since 12.8.
"""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np

from kvbm_core.errors import KvbmError
from kvbm_device._pages import Addresses

__all__ = ["Driver"]

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


class Driver:
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


def _pointer(values: Addresses) -> ctypes.c_void_p:
    assert values.dtype == np.uint64
    assert values.flags.c_contiguous
    return ctypes.c_void_p(values.ctypes.data)
