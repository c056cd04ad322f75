"""The directory of one rank: what is in it, and how much fits.

    <path>/rank0/          0700
        engine.lock        flock held by the engine that uses the directory; holds its pid
        data.mdb           two databases, written in the same transactions:
                             blocks  sequence (8) + number of the piece (2), big endian → bytes of an object
                             index   namespace (16) + key (32) → sequence (8) + place, see `_place`
        namespaces/        see `kvbm_core.namespace_facts`
        data.mdb.damaged   what could not be used any more; data.mdb.damaged.txt says why

Numbers are little endian where nothing else is said. The index exists because py-lmdb reads every value it
passes, even when asked for keys alone: listing 200 GiB by walking `blocks` would read 200 GiB. The place says
where the object's bytes lie in the file. They lie in pages of their own, which LMDB never moves: in one run
of neighbouring pages, or in several pieces if there is no run that is long enough.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from mmap import PAGESIZE
from typing import Final

from kvbm_core.localdir import LocalDirectory
from kvbm_core.namespace_facts import room_bytes
from kvbm_lmdb._config import LmdbConfig
from kvbm_lmdb._place import PIECE_HEADER_BYTES

__all__ = [
    "OVERHEAD_BYTES",
    "PAGE_BYTES",
    "Sizing",
    "check",
    "directory_of",
    "least_share_bytes",
    "plan_sizing",
    "share_bytes",
    "slot_bytes",
]

PAGE_BYTES: Final = 4096
_TREE_BYTES: Final = 329
"""Both trees, leaves half full: 82 + 28 bytes an object in pages of 4080, and the branches above them."""
OVERHEAD_BYTES: Final = PIECE_HEADER_BYTES + PAGE_BYTES - 1 + _TREE_BYTES
"""What an object takes beside its own bytes, at most, so that any mix of lengths fits: its last page is full
only by chance."""
_HALF_PAGES: Final = 512
"""Of objects, written in one transaction (2 MiB). LMDB allocates the whole transaction before it writes;
above that the C library gives the memory back and faults it in anew each time, and stores run at a quarter
of the speed (measured: 0.9 against 4 GB/s)."""
_HALF_PART: Final = 64
"""Of a small file no transaction writes more than this part, so that what waits to be used again is small."""
_STORED: Final = 64
_ERASED: Final = 256
"""Objects stored and erased in one transaction, at most; it bounds the tree pages that one copies."""
_TOUCHED_PART: Final = 128
"""In a small file no more than one object is stored, and one erased, for so many pages."""
_LAG_TRANSACTIONS: Final = 4
"""Pages freed by a transaction are used again by the third after it (measured); and one to spare."""
_CUTS: Final = 0.01
"""The part of the file for headers, rows and keys of pieces, if objects are in many."""
_FIXED_PAGES: Final = 24
_OTHER_FILES_BYTES: Final = 64 << 10
"""The directory itself, its parent, the lock file, the text beside a damaged file."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """What fits into a rank's share of the capacity."""

    map_bytes: int
    """The data file never grows beyond it."""
    capacity_bytes: int
    """Of objects of all namespaces together, each with its `OVERHEAD_BYTES`."""
    half_bytes: int
    """Of objects in one transaction, each in whole pages: a half of the window."""
    most_stored: int
    """Objects stored in one transaction."""
    most_erased: int
    """Objects erased in one transaction."""

    @property
    def growth_bytes(self) -> int:
        """Bytes by which one transaction may lengthen the file, at most."""
        touched = 2 * self.most_erased + 2 * self.most_stored + _FIXED_PAGES
        return 2 * (self.half_bytes + touched * PAGE_BYTES)


def slot_bytes(nbytes: int) -> int:
    """Say how many bytes of the window an object takes: whole pages."""
    return max(1, -(-nbytes // PAGESIZE)) * PAGESIZE


def plan_sizing(share_bytes: int, max_bytes: int) -> Sizing | None:
    """Work out what fits.

    Args:
        share_bytes: Of the capacity, for this rank: everything `du` counts.
        max_bytes: Of the longest object.

    Returns:
        None if not even one such object fits.
    """
    map_bytes = _map_bytes(share_bytes)
    pages = map_bytes // PAGE_BYTES
    half_pages = max(slot_bytes(max_bytes) // PAGE_BYTES, min(_HALF_PAGES, pages // _HALF_PART))
    stored, erased = (min(most, pages / _TOUCHED_PART) for most in (_STORED, _ERASED))
    # A transaction writes its objects, each up to a page longer than in the window, and copies the pages of
    # the trees that it touches: at worst one in each tree for each object, but the newest are side by side.
    lag = _LAG_TRANSACTIONS * (half_pages + 2 * stored + 2 * erased + _FIXED_PAGES)
    capacity_bytes = int((pages - _FIXED_PAGES - lag) * (1 - _CUTS)) * PAGE_BYTES
    if capacity_bytes < max_bytes + OVERHEAD_BYTES:
        return None
    half_bytes = half_pages * PAGE_BYTES
    return Sizing(map_bytes, capacity_bytes, half_bytes, max(1, int(stored)), max(1, int(erased)))


def least_share_bytes(max_bytes: int) -> int:
    """Say how many bytes a rank needs to hold one of the longest objects."""
    return share_bytes(1, max_bytes)


def share_bytes(blocks: int, block_bytes: int) -> int:
    """Say how many bytes a rank needs to hold so many objects of one length."""
    need_bytes = blocks * (block_bytes + OVERHEAD_BYTES)

    def holds(share_bytes: int) -> bool:
        sizing = plan_sizing(share_bytes, block_bytes)
        return sizing is not None and sizing.capacity_bytes >= need_bytes

    most_bytes = need_bytes
    while not holds(most_bytes):
        most_bytes *= 2
    return bisect.bisect_left(range(most_bytes), True, key=holds)


def _map_bytes(share_bytes: int) -> int:
    # A file in many pieces has blocks of its own that list them; ext4 counts these as the file's.
    others_bytes = share_bytes // 1024 + room_bytes(share_bytes) + _OTHER_FILES_BYTES
    return max(0, share_bytes - others_bytes) // PAGE_BYTES * PAGE_BYTES


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
