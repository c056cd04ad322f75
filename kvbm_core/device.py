"""The seam to an engine's memory: blocks by number, copied to and from contiguous regions.

    engine's tensors (many pages a block)  ──gather──►  region (one block, contiguous)
                                           ◄──scatter──

One implementation copies in host memory; another enqueues kernels and DMA. Both keep the same order
rules, which is all the rest of the system relies on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from kvbm_core.tier import Region

__all__ = ["Device", "Stageable", "Work"]


class Work(ABC):
    """A copy that was started."""

    @abstractmethod
    def done(self) -> bool:
        """Say whether the regions (gather) or the blocks (scatter) hold the data.

        Raises:
            Exception: If the copy failed. The mover turns it into an outcome.
        """


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

    @abstractmethod
    def gather(self, blocks: Sequence[int], regions: Sequence[Region]) -> Work:
        """Copy blocks into regions, one each.

        Behaviour:
            - Sees everything the engine has written to the blocks before this call.
            - Once it has returned, the engine may overwrite the blocks: the copy is not disturbed.
        """

    @abstractmethod
    def scatter(self, regions: Sequence[Region], blocks: Sequence[int]) -> Work:
        """Copy regions into blocks, one each. The engine must not use the blocks until it is done.

        The regions of a call are all in host memory, or all from `Stageable.stage`.
        """

    @abstractmethod
    def pinner(self) -> Callable[[int, int], Callable[[], None]] | None:
        """Give what page-locks ``(address, nbytes)`` for fast copies, or None if nothing does."""

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
