"""The seam to an engine's memory: blocks by number, copied to and from contiguous regions.

    engine's tensors (many pages a block)  ──gather──►  region (one block of one KV group, contiguous)
                                           ◄──scatter──

A KV group is a set of layers that share one block table. The engine draws the blocks of all groups from one
pool, so that a block's number says which pages it has, and the group says which layers they are of.

One implementation copies in host memory; another enqueues kernels and DMA. Both keep the same order
rules, which is all the rest of the system relies on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvbm_core.tier import Region

__all__ = ["Device", "DeviceTraits", "Fence", "Pinnable", "Stageable", "Work"]

Fence: TypeAlias = Any
"""A place in the engine's order of work, as `Device.claim` gives it. None: now."""


class Work(ABC):
    """A copy that was started."""

    @abstractmethod
    def done(self) -> bool:
        """Give True if the regions (gather) or the blocks (scatter) hold the data. Called until it is true.

        Raises:
            Exception: If the copy failed. The transfer engine turns it into an outcome.
        """

    @property
    @abstractmethod
    def given_up(self) -> frozenset[int]:
        """Positions that were not copied, because the engine claimed their blocks first. Known when done."""


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """What a device is and what it can do. Constant from open to close, except `stream_wait`."""

    block_bytes: tuple[int, ...]
    """Bytes of one block of each KV group: all its pages in the group's layers on this rank. 0 where this
    rank has no layer of the group."""
    num_blocks: int
    """Number of the engine's blocks. Block numbers are 0 to this, exclusive."""
    async_gather: bool = False
    """True if a gather may read its blocks after it has returned, until they are claimed."""
    stream_wait: bool = False
    """True if the engine may use blocks in the step that loads them, behind `Device.stream_wait`.

    It may change while host memory is page-locked. Read it when all tiers are open.
    """
    cpus: frozenset[int] | None = None
    """Numbers of the processor cores that reach the device's memory fastest. None: all, or unknown."""


class Device(ABC):
    """The KV blocks of one worker, as the engine laid them out."""

    @property
    @abstractmethod
    def traits(self) -> DeviceTraits:
        """What the device is and what it can do. Cheap: loops read it."""

    @abstractmethod
    def claim(self, blocks: Iterable[int], *, wait: bool = False) -> Fence:
        """Say that the engine, or a scatter, will overwrite blocks from here on.

        Args:
            blocks: Their numbers.
            wait: Return when nothing reads them any more, for a writer who does not keep the engine's order.

        Behaviour:
            - Called by the engine's thread, before whatever overwrites the blocks is started.
            - What a gather still has to read of them is read first, or given up.
            - The fence stands behind all that the engine has started, and behind those reads.
        """

    @abstractmethod
    def gather(
        self, blocks: Sequence[int], regions: Sequence[Region], fence: Fence = None, group: int = 0
    ) -> Work:
        """Copy blocks of a KV group into regions, one each.

        Behaviour:
            - Fills the first ``block_bytes[group]`` bytes of each region.
            - Sees everything the engine had started to write to the blocks before the fence.
            - The engine may overwrite the blocks once it has claimed them; where the traits do not say
              `async_gather`, as soon as this has returned.
        """

    @abstractmethod
    def scatter(
        self, regions: Sequence[Region], blocks: Sequence[int], fence: Fence = None, group: int = 0
    ) -> Work:
        """Copy regions into blocks of a KV group, one each.

        Behaviour:
            - The engine must not use the blocks before the copy is done, or `stream_wait` has returned.
            - The regions of a call are all in host memory, or all from `Stageable.stage`.
            - What the engine had started before the fence still sees the blocks as they were.
        """

    @abstractmethod
    def stream_wait(self, work: Work) -> None:
        """Have whatever the engine starts from here on wait for a scatter. Nobody waits on the host.

        Called by the engine's thread, only where the traits say `stream_wait`.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the engine's memory. May be called twice."""


class Pinnable(ABC):
    """What a device adds when it copies page-locked host memory faster than other memory."""

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> Callable[[], None]:
        """Page-lock host memory. Called from several threads.

        Args:
            address: Of the first byte, a multiple of the page size.
            nbytes: Length, a multiple of the page size. No block lies across two ranges.

        Returns:
            What undoes it.

        Raises:
            KvbmError: If the memory cannot be locked. Copies of it are correct, but slower.
        """


class Stageable(ABC):
    """What a device adds when a `device_direct` tier can read straight into its memory.

    disk ──► staged region, in device memory ──scatter──► blocks        (no copy in host memory)
    """

    @abstractmethod
    def stage(self, nbytes: int) -> Region | None:
        """Set device memory aside for one block on its way. None if all that there is is in use."""

    @abstractmethod
    def unstage(self, region: Region) -> None:
        """Take staged memory back: nobody reads or writes it any more."""

    @abstractmethod
    def read(self, region: Region) -> memoryview:
        """Copy staged memory to the host, and wait for it: for a checksum. Called from any thread."""
