"""Host memory with no tier around it."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

from kvbm_core.bare import Bare
from kvbm_cpu._config import CpuConfig

__all__ = ["BareMemory"]


class BareMemory(Bare):
    """One thread that copies with ``memmove``. See `Backend.bare`."""

    says = "memmove, one thread"

    def __init__(self, config: CpuConfig, nbytes: int, objects: int, depth: int) -> None:
        self._nbytes = nbytes
        # Taken at open, as a tier does.
        self._kept = [mmap.mmap(-1, nbytes, flags=_FLAGS) for _ in range(objects)]

    def __repr__(self) -> str:
        return f"<BareMemory of {len(self._kept)} objects>"

    def store(self, contents: Sequence[memoryview]) -> None:
        """See `Bare.store`."""
        for kept, content in zip(self._kept, contents, strict=True):
            ctypes.memmove(_address(kept), _address(content), self._nbytes)

    def load(self, targets: Sequence[memoryview]) -> None:
        """See `Bare.load`."""
        for kept, target in zip(self._kept, targets, strict=True):
            ctypes.memmove(_address(target), _address(kept), self._nbytes)

    def close(self) -> None:
        """See `Bare.close`."""
        self._kept = []


_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE


def _address(buffer: memoryview | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
