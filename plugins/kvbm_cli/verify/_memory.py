"""The memory that objects are read into: used again, and bounded however long objects are."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["ReadMemory"]

_MOST_BYTES: Final = 512 << 20


class ReadMemory:
    """Buffers of all threads that read.

    Behaviour:
        - Together they have `most_bytes`, or those of one object that is longer.
        - Who finds no room waits for it.

    Args:
        most_bytes: Of all buffers together.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._taken_bytes = 0
        self._free: list[mmap.mmap] = []
        self._change = threading.Condition()

    def __repr__(self) -> str:
        return f"<ReadMemory of {self._taken_bytes} bytes, {len(self._free)} free>"

    @contextmanager
    def take(self, nbytes: int, beside_bytes: int = 0) -> Iterator[memoryview]:
        """Lend a buffer. It starts on a page, as O_DIRECT has it.

        Args:
            nbytes: It has at least.
            beside_bytes: The borrower takes by himself meanwhile.
        """
        buffer = self._take(max(nbytes, mmap.PAGESIZE), beside_bytes)
        try:
            yield memoryview(buffer)
        finally:
            with self._change:
                self._free.append(buffer)
                self._taken_bytes -= beside_bytes
                self._change.notify_all()

    def _take(self, nbytes: int, beside_bytes: int) -> mmap.mmap:
        with self._change:
            while True:
                kept = next((each for each in self._free if len(each) >= nbytes), None)
                new_bytes = beside_bytes + (0 if kept else nbytes)
                if self._fits(new_bytes):
                    break
                # Those that nobody has make room.
                self._taken_bytes -= sum(map(len, self._free))
                self._free.clear()
                if self._fits(beside_bytes + nbytes):
                    kept, new_bytes = None, beside_bytes + nbytes
                    break
                self._change.wait()
            self._taken_bytes += new_bytes
            if kept is None:
                return mmap.mmap(-1, nbytes)
            self._free.remove(kept)
            return kept

    def _fits(self, nbytes: int) -> bool:
        return not self._taken_bytes or self._taken_bytes + nbytes <= self._most_bytes
