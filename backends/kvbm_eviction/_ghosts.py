"""Objects that are not there, remembered by their hashes: a table of a fixed size."""

from __future__ import annotations

from array import array
from typing import Final

__all__ = ["Ghosts"]

_LEAST: Final = 1 << 12
_MOST: Final = 1 << 22
"""Ghosts, of 8 bytes each."""
_MASK: Final = (1 << 32) - 1
_PRIME: Final = (1 << 61) - 1
_FACTOR: Final = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: what is multiplied by it is spread."""


class Ghosts:
    """Half of an object's hash, and the number of what it was of. A new one takes the place of an old one.

    Args:
        count: That shall be remembered, about.
    """

    def __init__(self, count: int) -> None:
        size = 1 << (max(_LEAST, min(_MOST, count)) - 1).bit_length()
        self._last = size - 1
        self._entries = array("Q", bytes(8 * size))

    def __repr__(self) -> str:
        return f"<Ghosts of {len(self._entries)} objects at most>"

    def __len__(self) -> int:
        return len(self._entries)

    def place(self, key: bytes) -> tuple[int, int]:
        """Give the place of an object, and what tells it from others there: for `at` and `put`."""
        spread = int.from_bytes(key, "little") % _PRIME * _FACTOR
        return spread >> 40 & self._last, spread & _MASK

    def at(self, place: tuple[int, int]) -> int:
        """Give the number of an object's; 0 if it is not remembered."""
        entry = self._entries[place[0]]
        return entry & _MASK if entry >> 32 == place[1] else 0

    def find(self, key: bytes) -> int:
        """Give the number of an object's; 0 if it is not remembered."""
        return self.at(self.place(key))

    def take(self, key: bytes) -> int:
        """Forget an object, and give the number of its; 0 if it was not remembered."""
        place = self.place(key)
        number = self.at(place)
        if number:
            self._entries[place[0]] = 0
        return number

    def put(self, place: tuple[int, int], number: int) -> int:
        """Remember an object, and give the number of another in whose place it comes; 0 for none."""
        at, mark = place
        before = self._entries[at]
        self._entries[at] = mark << 32 | number
        return before & _MASK if before >> 32 != mark else 0
