"""The seam to an engine's memory: blocks by number, copied to and from contiguous regions.

    engine's tensors (many pages a block)  ──gather──►  region (one block, contiguous)
                                           ◄──scatter──

One implementation copies in host memory; another enqueues kernels and DMA. Both keep the same order
rules, which is all the rest of the system relies on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from kvbm_core.tier import Region

__all__ = ["Device", "Fence", "Stageable", "Work"]

Fence: TypeAlias = Any
"""A place in the engine's order of work, as `Device.claim` gives it. None: now."""


class Work(ABC):
    """A copy that was started."""

    @abstractmethod
    def done(self) -> bool:
        """Say whether the regions (gather) or the blocks (scatter) hold the data. Called until it is true.

        Raises:
            Exception: If the copy failed. The transfer engine turns it into an outcome.
        """

    @property
    @abstractmethod
    def given_up(self) -> frozenset[int]:
        """Positions that were not copied, because the engine claimed their blocks first. Known when done."""


class Device(ABC):
    """The KV blocks of one worker, as the engine laid them out."""

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one block: all pages of all layers of this rank."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks the engine has; block numbers are 0 to this, exclusive."""

    @property
    @abstractmethod
    def deferred(self) -> bool:
        """Whether a gather may read its blocks after it has returned, until they are claimed."""

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
    def gather(self, blocks: Sequence[int], regions: Sequence[Region], fence: Fence = None) -> Work:
        """Copy blocks into regions, one each.

        Behaviour:
            - Sees everything the engine had started to write to the blocks before the fence.
            - The engine may overwrite the blocks once it has claimed them; where the device is not
              `deferred`, as soon as this has returned.
        """

    @abstractmethod
    def scatter(self, regions: Sequence[Region], blocks: Sequence[int], fence: Fence = None) -> Work:
        """Copy regions into blocks, one each. The engine must not use the blocks until it is done, or joined.

        The regions of a call are all in host memory, or all from `Stageable.stage`. What the engine had
        started before the fence still sees the blocks as they were.
        """

    @property
    def joins(self) -> bool:
        """Whether there is `join`, so that the engine may use blocks in the step that loads them."""
        return False

    def join(self, work: Work) -> None:
        """Have whatever the engine starts from here on wait for a scatter. Nobody waits on the host.

        Called by the engine's thread, only where the device `joins`.
        """
        raise NotImplementedError

    @abstractmethod
    def pinner(self) -> Callable[[int, int], Callable[[], None]] | None:
        """Give what page-locks ``(address, nbytes)`` for fast copies, or None if nothing does."""

    @property
    @abstractmethod
    def cpus(self) -> frozenset[int] | None:
        """Processor cores near the device, whose memory it reaches fastest. None: all, or nobody knows."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the engine's memory. May be called twice."""


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
