"""The directory of one rank: what is in it, and how much fits.

    <path>/rank0/          0700
        engine.lock        flock held by the engine that uses the directory; holds its pid
        data.mdb           two databases, written in the same transactions:
                             blocks  namespace (16) + key (32) → the block's bytes
                             index   namespace (16) + key (32) → sequence (8) + length (8) + offset (8)
        data.mdb.damaged   what could not be used any more; data.mdb.damaged.txt says why

Numbers are little endian. The index exists because py-lmdb reads every value it passes, even when asked
for keys alone: listing 200 GiB by walking `blocks` would read 200 GiB. The offset is where the block's
bytes begin in the file. They lie in pages of their own, next to each other, which LMDB never moves.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from mmap import PAGESIZE
from typing import Final

from kvbm_core.localdir import LocalDirectory
from kvbm_lmdb._config import LmdbConfig

__all__ = [
    "ERASE_BLOCKS",
    "PAGE_BYTES",
    "Sizing",
    "check",
    "directory_of",
    "least_share_bytes",
    "pages_of",
    "plan_sizing",
    "share_bytes",
    "slot_bytes",
]

PAGE_BYTES: Final = 4096
_PAGE_HEADER_BYTES: Final = 16
"""Ahead of a large value, which lies in pages of its own, next to each other."""
_BATCH_BYTES: Final = 2 << 20
"""Written in one transaction. LMDB allocates the whole transaction before it writes; above about
2 MiB the C library gives that memory back and faults it in anew each time, and stores run at a
quarter of the speed (measured: 0.9 against 4 GB/s)."""
_BATCH_BLOCKS: Final = 64
ERASE_BLOCKS: Final = 256
"""Blocks erased in one transaction; bounds the list of free pages that the transaction writes."""
_LAG_TRANSACTIONS: Final = 6
"""Pages freed by a transaction are used again by the third after it (measured); and as many to spare."""
_FRAGMENTATION: Final = 1.03
"""Small pages (of trees and lists) break runs of free pages that a value would have fitted in."""
_TREE_PAGES_PER_BLOCK: Final = 0.08
"""Both trees, leaves half full: 66 + 82 bytes a block in pages of 4080, twice."""
_FIXED_PAGES: Final = 24
_OTHER_FILES_BYTES: Final = 64 << 10
"""The directory itself, its parent, the lock file, the text beside a damaged file."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """What fits into a rank's share of the capacity."""

    map_bytes: int
    """The data file never grows beyond it."""
    block_pages: int
    """Pages of 4096 bytes that one block takes."""
    capacity_blocks: int
    batch_blocks: int
    """Blocks stored in one transaction, at most."""

    @property
    def budget_pages(self) -> int:
        """Pages that blocks of all namespaces may take together."""
        return self.capacity_blocks * self.block_pages

    @property
    def growth_pages(self) -> int:
        """Pages by which one transaction may lengthen the file, at most."""
        touched = 2 * (ERASE_BLOCKS + self.batch_blocks) + _FIXED_PAGES
        return 2 * (self.batch_blocks * self.block_pages + touched)

    def needed_pages(self, blocks: int, batch_blocks: int) -> int:
        """Say how many pages hold so many blocks that come and go `batch_blocks` at a time."""
        return _needed_pages(blocks, self.block_pages, batch_blocks)


def pages_of(nbytes: int) -> int:
    """Say how many pages a value of `nbytes` takes."""
    return -(-(nbytes + _PAGE_HEADER_BYTES) // PAGE_BYTES)


def slot_bytes(block_bytes: int) -> int:
    """Say how many bytes of the window one block takes: whole pages."""
    return -(-block_bytes // PAGESIZE) * PAGESIZE


def plan_sizing(share_bytes: int, block_bytes: int) -> Sizing | None:
    """Work out what fits.

    Args:
        share_bytes: Of the capacity, for this rank: everything `du` counts.
        block_bytes: Of one value.

    Returns:
        None if not even one block fits.
    """
    map_bytes = _map_bytes(share_bytes)
    pages, block_pages = map_bytes // PAGE_BYTES, pages_of(block_bytes)
    batch_blocks = min(_BATCH_BLOCKS, _BATCH_BYTES // block_bytes, pages // (32 * block_pages))
    batch_blocks = max(1, batch_blocks)
    counts = range(max(0, pages // block_pages) + 1)
    fits = bisect.bisect_right(counts, pages, key=lambda n: _needed_pages(n, block_pages, batch_blocks))
    capacity = fits - 1
    return Sizing(map_bytes, block_pages, capacity, batch_blocks) if capacity > 0 else None


def least_share_bytes(block_bytes: int) -> int:
    """Say how many bytes a rank needs to hold one block."""
    return _share_bytes(_needed_pages(1, pages_of(block_bytes), 1))


def share_bytes(blocks: int, block_bytes: int) -> int:
    """Say how many bytes a rank needs to hold so many blocks."""
    # More than one block in a transaction needs more room, and `plan_sizing` allows at most so many.
    batch_blocks = max(1, min(_BATCH_BLOCKS, _BATCH_BYTES // block_bytes))
    return _share_bytes(_needed_pages(blocks, pages_of(block_bytes), batch_blocks))


def _share_bytes(pages: int) -> int:
    # The inverse of `_map_bytes`, rounded up generously.
    return (pages * PAGE_BYTES + _OTHER_FILES_BYTES + 2 * PAGE_BYTES) * 1024 // 1023 + PAGE_BYTES


def _map_bytes(share_bytes: int) -> int:
    # A file in many pieces has blocks of its own that list them; ext4 counts these as the file's.
    return max(0, share_bytes - share_bytes // 1024 - _OTHER_FILES_BYTES) // PAGE_BYTES * PAGE_BYTES


def _needed_pages(blocks: int, block_pages: int, batch_blocks: int) -> int:
    tree = int(blocks * _TREE_PAGES_PER_BLOCK) + _FIXED_PAGES
    # A transaction copies the tree pages it touches: at worst one in each tree for each block.
    touched = min(tree, 2 * (ERASE_BLOCKS + batch_blocks) + _FIXED_PAGES)
    lag = _LAG_TRANSACTIONS * (batch_blocks * block_pages + touched)
    return int(blocks * block_pages * _FRAGMENTATION) + tree + lag


def directory_of(config: LmdbConfig) -> LocalDirectory:
    """Give the directory that a configuration names."""
    return LocalDirectory(config.path, "lmdb")


def check(config: LmdbConfig) -> None:
    """Find what would keep an engine from opening its directories. Changes nothing.

    Raises:
        TierOpenError: If the path is no directory, cannot be written, is in use by another engine,
            or lies on a file system with too little room.
    """
    directory_of(config).check(config.capacity, "stored")
