"""Objects that are not there, remembered by their hashes: a table of a fixed size."""

from __future__ import annotations

from array import array
from typing import Final

import xxhash

__all__ = ["Ghosts"]

_LEAST: Final = 1 << 12
_MOST: Final = 1 << 22
"""Ghosts, of 8 bytes each."""
_MASK: Final = (1 << 32) - 1


class Ghosts:
    """Half of an object's hash, and the number of what it was of. A new one takes the place of an old one.

    Args:
        count: That shall be remembered, about.
    """

    def __init__(self, count: int) -> None:
        size = 1 << (max(_LEAST, min(_MOST, count)) - 1).bit_length()
        self._at = size - 1
        self._entries = array("Q", bytes(8 * size))

    def __repr__(self) -> str:
        return f"<Ghosts of {len(self._entries)} objects at most>"

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: bytes) -> int:
        """Give the number of an object's; 0 if it is not remembered."""
        digest = xxhash.xxh3_64_intdigest(key)
        entry = self._entries[digest & self._at]
        return entry & _MASK if entry >> 32 == digest >> 32 else 0

    def take(self, key: bytes) -> int:
        """Forget an object, and give the number of its; 0 if it was not remembered."""
        digest = xxhash.xxh3_64_intdigest(key)
        entry = self._entries[digest & self._at]
        if entry >> 32 != digest >> 32:
            return 0
        self._entries[digest & self._at] = 0
        return entry & _MASK

    def put(self, key: bytes, number: int) -> int:
        """Remember an object, and give the number of another in whose place it comes; 0 for none."""
        digest = xxhash.xxh3_64_intdigest(key)
        at = digest & self._at
        before = self._entries[at]
        self._entries[at] = digest >> 32 << 32 | number
        return before & _MASK if before >> 32 != digest >> 32 else 0
