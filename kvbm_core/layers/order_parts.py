"""How the order of use of a tier's objects is written: cut into objects of the tier, two generations in turn.

    generation 6   part 0, part 1        whole, and discarded when 7 is
    generation 7   part 0, ...           written beside it, under keys of its own

    part   magic (8)  generation (8)  number of the part, parts, entries, CRC-32 of the entries (4 each)
           entries: the first 8 bytes of each key, used last: last    zeros, and room for a seal

All parts have one length. Numbers are little endian. A generation of which a part is missing, torn or
another's is none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.layers.seal import SEAL_BYTES
from kvbm_core.tier import PAGE_BYTES, Capabilities

__all__ = ["OrderShape", "entries_of", "read_generation", "sorted_by_use"]

_MOST_ENTRIES: Final = 1 << 20
"""Of the latest used; those before them are in the order of writing."""
_ROOM_PART: Final = 64
"""Of the capacity both generations take no more than this part. A tier of fewer slots keeps no order."""
_AT_ONCE: Final = 4096
"""Keys that are put into bytes before the interpreter's lock is given away: a third of a millisecond."""
_MAGIC: Final = b"KVBMORD\0"
_HEADER: Final = struct.Struct("<8sQIIII")
_ENTRY_BYTES: Final = 8


@dataclasses.dataclass(frozen=True, slots=True)
class OrderShape:
    """How a tier's order is cut into objects."""

    part_bytes: int
    """Length of each."""
    parts: int
    """Of a generation, at most."""
    room_bytes: int
    """Of the capacity, set aside for two generations."""

    @staticmethod
    def of(capabilities: Capabilities, max_bytes: int, charge: Callable[[int], int]) -> OrderShape | None:
        """Choose the shape; None if the tier keeps no order: it forgets, is shared, or is too small.

        Args:
            capabilities: Of the tier.
            max_bytes: Length of the longest object, as it is given to the layer that keeps the order.
            charge: Counts the bytes of the capacity that an object of such a length takes at most.
        """
        capacity_bytes = capabilities.capacity_bytes
        is_own = capabilities.durable and not (capabilities.shared or capabilities.read_only)
        if not is_own or capacity_bytes is None or capabilities.queue_depth < 2:
            return None
        # Objects may be shorter than the longest, and then they are more.
        wanted = min(_MOST_ENTRIES, 2 * capacity_bytes // charge(max_bytes))
        pages = -(-(_HEADER.size + wanted * _ENTRY_BYTES + SEAL_BYTES) // PAGE_BYTES)
        # In few steps, so that with another capacity the same keys are looked for.
        part_bytes = min(max_bytes, PAGE_BYTES << (pages - 1).bit_length())
        if part_bytes < _HEADER.size + _ENTRY_BYTES + SEAL_BYTES:
            return None
        pair_bytes = 2 * charge(part_bytes)
        needed = -(-wanted // OrderShape(part_bytes, 1, 0).part_entries)
        parts = min(needed, capacity_bytes // _ROOM_PART // pair_bytes)
        return OrderShape(part_bytes, parts, parts * pair_bytes) if parts else None

    @property
    def part_entries(self) -> int:
        """Entries in a part, at most."""
        return (self.part_bytes - _HEADER.size - SEAL_BYTES) // _ENTRY_BYTES

    @property
    def most_entries(self) -> int:
        """Entries in a generation, at most."""
        return self.parts * self.part_entries

    def key(self, generation: int, part: int) -> BlockKey:
        """Name a part. Every other generation has the same keys; no prompt has them."""
        name = f"kvbm-order-1 {self.part_bytes} {generation % 2} {part}"
        return hashlib.sha256(name.encode()).digest()

    def keys(self, generation: int) -> list[BlockKey]:
        """Name all parts of a generation that there may be."""
        return [self.key(generation, part) for part in range(self.parts)]

    def make_parts(self, generation: int, entries: bytes) -> list[bytes]:
        """Cut entries, of which the last are kept, into parts."""
        entries = entries[-self.most_entries * _ENTRY_BYTES :]
        nbytes = self.part_entries * _ENTRY_BYTES
        pieces = [entries[at : at + nbytes] for at in range(0, len(entries), nbytes)]
        return [
            _HEADER.pack(
                _MAGIC, generation, part, len(pieces), len(piece) // _ENTRY_BYTES, zlib.crc32(piece)
            ) + piece
            for part, piece in enumerate(pieces)
        ]  # fmt: skip


def read_generation(shape: OrderShape, load: Callable[[int], bytes]) -> tuple[int, bytes]:
    """Read a generation, as `OrderShape.make_parts` has cut it.

    Args:
        shape: Of the order.
        load: Gives a part by its number, at any length; nothing if it is not there.

    Returns:
        Its number, above 0, and its entries. 0 if it is none.
    """
    pieces: list[bytes] = []
    number, count = 0, 1
    while len(pieces) < min(count, shape.parts):
        content = load(len(pieces)).ljust(_HEADER.size, b"\0")
        magic, found, part, count, entries, crc = _HEADER.unpack_from(content)
        piece = content[_HEADER.size :][: entries * _ENTRY_BYTES]
        number = number or found
        if (magic, found, part, crc) != (_MAGIC, number, len(pieces), zlib.crc32(piece)):
            return 0, b""
        pieces.append(piece)
    return number, b"".join(pieces)


def entries_of(keys: Sequence[BlockKey], pause_s: float = 0.0) -> bytes:
    """Put keys into bytes, with a pause after each few, so that other threads have their turn."""
    entries = bytearray()
    for at in range(0, len(keys), _AT_ONCE):
        entries += b"".join([key[:_ENTRY_BYTES] for key in keys[at : at + _AT_ONCE]])
        if pause_s:
            time.sleep(pause_s)
    return bytes(entries)


def sorted_by_use(listed: Sequence[tuple[BlockKey, int]], entries: bytes) -> list[tuple[BlockKey, int]]:
    """Sort objects, given in the order of writing, by the order in which they were used."""
    order = {entries[at : at + _ENTRY_BYTES]: at for at in range(0, len(entries), _ENTRY_BYTES)}
    places = [order.get(key[:_ENTRY_BYTES], -1) for key, _ in listed]
    # The latest that was there when the order was written: what was written later is not in it.
    latest = max((at for at, place in enumerate(places) if place >= 0), default=-1)
    before = [at for at in range(latest + 1) if places[at] < 0]
    known = sorted((at for at in range(latest + 1) if places[at] >= 0), key=places.__getitem__)
    return [listed[at] for at in (*before, *known, *range(latest + 1, len(listed)))]
