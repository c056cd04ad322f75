"""Where an object lies in ``data.mdb``: how long it is, and the runs of pages that have its bytes.

    place   length (8), then for each piece: first page (40 bits) and number of pages (24 bits) in 8 bytes
    row     sequence (8), then the place

    piece   ┌ header, 16 ┬ bytes of the object, to the end of the last page ┐   all full but the last

Numbers are little endian. A place is kept as these bytes, in memory as in the index: an object in one
piece takes 16.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from mmap import PAGESIZE
from typing import Final

from kvbm_core.block import KEY_BYTES, NAMESPACE_BYTES

__all__ = [
    "FORMAT_KEY",
    "GIVEN_UP",
    "PIECE_HEADER_BYTES",
    "SEQUENCE",
    "TICK_KEY",
    "Piece",
    "is_given_up",
    "is_no_object",
    "is_sound",
    "is_whole",
    "nbytes_of",
    "pages_of",
    "pieces_of",
    "place_of",
    "room_bytes",
]

SEQUENCE: Final = struct.Struct("<Q")
"""Ahead of the place in a row of the index."""
GIVEN_UP: Final = 2**64 - 1
"""The length in the row of an object that is being erased, piece by piece."""
FORMAT_KEY: Final = b"format"
"""Of the row of the index that says which format the two databases have."""
TICK_KEY: Final = b"tick"
"""Of the row of the index that is rewritten to make LMDB count a transaction on."""
PIECE_HEADER_BYTES: Final = 16
"""LMDB's, ahead of a large value, which lies in pages of its own, next to each other."""
_NUMBER: Final = struct.Struct("<Q")
_ONE: Final = struct.Struct("<QQ")
"""The place of an object in one piece, as most are."""
_PAGE_BITS: Final = 40
_PAGE_MASK: Final = (1 << _PAGE_BITS) - 1
_FIRST_PAGE: Final = 2
"""Those before it describe the file."""

Piece = tuple[int, int]
"""The first page of a run, and how many there are."""


def is_given_up(place: bytes) -> bool:
    """Say whether the object is being erased, and this is what is left of its place."""
    return len(place) >= 8 and len(place) % 8 == 0 and nbytes_of(place) == GIVEN_UP


def is_no_object(full_key: bytes, row: bytes) -> bool:
    """Say whether a row of the index is of no object: one of its own, or of what is being erased."""
    return full_key in (FORMAT_KEY, TICK_KEY) or is_given_up(row[SEQUENCE.size :])


def is_whole(full_key: bytes, row: bytes, file_bytes: int) -> bool:
    """Say whether a row of the index is of an object that can be read in a file of `file_bytes`."""
    return (
        len(full_key) == NAMESPACE_BYTES + KEY_BYTES
        and not is_no_object(full_key, row)
        and is_sound(row[SEQUENCE.size :], file_bytes)
    )


def place_of(nbytes: int, pieces: Sequence[Piece]) -> bytes:
    """Make the place of an object of `nbytes`."""
    return struct.pack(
        f"<{1 + len(pieces)}Q", nbytes, *(pages << _PAGE_BITS | page for page, pages in pieces)
    )


def nbytes_of(place: bytes) -> int:
    """Say how long the object is."""
    return int(_NUMBER.unpack_from(place)[0])


def pieces_of(place: bytes) -> list[Piece]:
    """List its pieces, in the order of its bytes."""
    if len(place) == _ONE.size:
        number = _ONE.unpack(place)[1]
        return [(number & _PAGE_MASK, number >> _PAGE_BITS)]
    numbers = struct.unpack_from(f"<{len(place) // _NUMBER.size - 1}Q", place, _NUMBER.size)
    return [(number & _PAGE_MASK, number >> _PAGE_BITS) for number in numbers]


def room_bytes(pages: int) -> int:
    """Say how many bytes of an object a piece of so many pages takes."""
    return pages * PAGESIZE - PIECE_HEADER_BYTES


def pages_of(nbytes: int) -> int:
    """Say how many pages a piece with `nbytes` of an object takes; at least one."""
    return -(-(max(nbytes, 1) + PIECE_HEADER_BYTES) // PAGESIZE)


def is_sound(place: bytes, file_bytes: int) -> bool:
    """True if it can be a place in a file of `file_bytes`; damage may have made it something else."""
    if len(place) < 2 * _NUMBER.size or len(place) % _NUMBER.size:
        return False
    pieces = pieces_of(place)
    inside = all(
        page >= _FIRST_PAGE and pages and (page + pages) * PAGESIZE <= file_bytes for page, pages in pieces
    )
    last_bytes = nbytes_of(place) - sum(room_bytes(pages) for _, pages in pieces[:-1])
    return inside and (last_bytes > 0 or len(pieces) == 1) and pages_of(last_bytes) == pieces[-1][1]
