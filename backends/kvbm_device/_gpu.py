"""What the copies ask of an accelerator: streams, events, memory, and three ways to move bytes.

`Gpu` is the parts of one accelerator together. `kvbm_device._cuda` has them for CUDA.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvbm_device._pages import Addresses, PageTable

__all__ = ["Copies", "Event", "Events", "Gpu", "Memory", "Stream", "Streams"]

Stream = Any
Event = Any


class Streams(ABC):
    """The streams of an accelerator. Work on a stream runs in order."""

    @abstractmethod
    def engine_stream(self) -> Stream:
        """Give the stream that the engine's computation of the calling thread runs on."""

    @abstractmethod
    def stream(self, *, urgent: bool) -> Stream:
        """Make a stream, of the lowest priority unless it is `urgent`."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all streams that were made are idle."""


class Events(ABC):
    """Marks in the order of work of streams."""

    @abstractmethod
    def record(self, stream: Stream) -> Event:
        """Mark the place behind everything that was put on a stream so far."""

    @abstractmethod
    def wait(self, stream: Stream, event: Event) -> None:
        """Have what comes on a stream from here on wait for an event. The caller does not wait."""

    @abstractmethod
    def passed(self, event: Event) -> bool:
        """Give True if everything before an event is done."""

    @abstractmethod
    def wait_here(self, event: Event) -> None:
        """Wait for an event, in the calling thread."""


class Memory(ABC):
    """Memory of the accelerator, and memory of the host that it reaches."""

    @abstractmethod
    def allocate(self, nbytes: int) -> tuple[int, Any]:
        """Take memory of the accelerator, on a page.

        Returns:
            Its address, and what must stay referenced.

        Raises:
            MemoryError: If there is not so much.
        """

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """Page-lock host memory, and say how to undo it."""


class Copies(ABC):
    """Ways to move bytes. Each puts its copy on a stream."""

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


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator."""

    streams: Streams
    events: Events
    memory: Memory
    copies: Copies
    has_kernel: bool
    """True if `Copies.move_pages` takes flat addresses in host memory and a number of programs."""
    cpus: frozenset[int] | None
    """See `kvbm_core.device.DeviceTraits.cpus`."""
