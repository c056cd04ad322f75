"""How the files of one rank are laid out, and how many slots fit into its share of the capacity.

    <path>/rank0/          0700
        engine.lock        see `kvbm_core.localdir`
        namespaces/        see `kvbm_core.namespace_facts`
        index              header (4096 bytes), then one entry of 80 bytes for each slot
        slab.000 ...       slots of equal size, 8 GiB a file, the last one shorter

    entry  namespace (16)  key (32)  sequence (8)  length (8)  unused (8)  checksum (8)

An object of any length up to that of a slot takes one slot. What is asked of a share is found by the sizing
itself, so that the two cannot disagree.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.namespace_facts import room_bytes
from kvbm_core.tier import PAGE_BYTES

__all__ = [
    "ENTRY",
    "ENTRY_BYTES",
    "FORMAT_VERSION",
    "HEADER",
    "HEADER_BYTES",
    "MAGIC",
    "Entry",
    "Sizing",
    "in_pages",
    "plan_sizing",
    "share_bytes",
]

MAGIC: Final = b"KVBMGDS\0"
FORMAT_VERSION: Final = 1
HEADER: Final = struct.Struct("<8sIIQQ")
HEADER_BYTES: Final = PAGE_BYTES
ENTRY: Final = struct.Struct("<16s32sQQQ")
ENTRY_BYTES: Final = ENTRY.size + 8
_FILE_BYTES: Final = 8 << 30
_PROBE_BYTES: Final = 8 << 20
_OTHER_BYTES: Final = 64 << 10
"""The directory itself, its parent, the lock file, a header."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """What fits into a rank's share of the capacity."""

    slot_bytes: int
    slots: int
    probe_bytes: int
    """Room kept free for the probe's file."""

    @property
    def slots_per_file(self) -> int:
        """Slots in every file but the last."""
        return max(1, _FILE_BYTES // self.slot_bytes)

    @property
    def files(self) -> int:
        """Slab files."""
        return -(-self.slots // self.slots_per_file)

    @property
    def index_bytes(self) -> int:
        """Length of the index."""
        return HEADER_BYTES + self.slots * ENTRY_BYTES

    def file_bytes(self, number: int) -> int:
        """Say how long a slab file is."""
        return min(self.slots_per_file, self.slots - number * self.slots_per_file) * self.slot_bytes

    def place(self, slot: int) -> tuple[int, int]:
        """Say where a slot lies: number of the file, offset in it."""
        number, at = divmod(slot, self.slots_per_file)
        return number, at * self.slot_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """An object found at open."""

    slot: int
    namespace: Namespace
    key: BlockKey
    sequence: int
    """Stored later: higher."""
    nbytes: int
    """Length of the object."""


def plan_sizing(share_bytes: int, max_bytes: int) -> Sizing | None:
    """Work out what fits into everything that `du` counts; None if not even one object does.

    Args:
        share_bytes: Of the capacity, this rank's.
        max_bytes: Length of the longest object.
    """
    slot_bytes = in_pages(max_bytes)
    # A file in many pieces has blocks of its own that list them; ext4 counts these as the file's.
    usable = share_bytes - share_bytes // 1024 - room_bytes(share_bytes) - _OTHER_BYTES - HEADER_BYTES
    probe_bytes = min(_PROBE_BYTES, usable // 16) // PAGE_BYTES * PAGE_BYTES
    usable -= max(probe_bytes, PAGE_BYTES) + PAGE_BYTES
    slots = usable // (slot_bytes + ENTRY_BYTES)
    return Sizing(slot_bytes, slots, max(probe_bytes, PAGE_BYTES)) if slots > 0 else None


def share_bytes(blocks: int, block_bytes: int) -> int:
    """Say how many bytes a rank needs to hold so many blocks, none longer than `block_bytes`."""
    # Twice its slots is more than a share ever is: entries, the probe's file and the rest are less.
    low, high = 0, 2 * blocks * in_pages(block_bytes) + (1 << 20)
    while low < high:
        middle = (low + high) // 2
        sizing = plan_sizing(middle, block_bytes)
        low, high = (low, middle) if sizing and sizing.slots >= blocks else (middle + 1, high)
    return low


def in_pages(nbytes: int) -> int:
    """Round up to whole pages, as O_DIRECT moves them."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
