"""LMDB's trees, read page by page from the file: no lock, no map, nothing written.

LMDB's own reading transaction is no choice beside a keeper, which writes without a table of readers: pages
that a reader still walks are written anew under it, and a reader in mapped memory may end by a signal. Here
each page is checked, and one that is not what led to it raises `TornError`. The keeper uses a freed page
again only some transactions later, so a walk from the root to one key, begun anew at such an error, soon
succeeds.

LMDB 0.9, data format 1. Numbers are little endian.

    page   number (8)  unused (2)  kind (2)  lower (2)  upper (2), then offsets of the nodes up to `lower`
    node   low (2)  high (2)  flags (2)  length of the key (2)  key  value
    meta   on pages 0 and 1; that with the higher transaction counts
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import PAGESIZE
from typing import Final

__all__ = ["Meta", "TornError", "Tree", "look_up", "read_meta"]

_PAGE: Final = struct.Struct("<QxxHHH")
_NODE: Final = struct.Struct("<HHHH")
_META: Final = struct.Struct("<IIQQ48s48sQQ")
_DATABASE: Final = struct.Struct("<IHHQQQQQ")
_NUMBER: Final = struct.Struct("<Q")
_MAGIC: Final = 0xBEEFC0DE
_VERSION: Final = 1
_BRANCH: Final = 1
_LEAF: Final = 2
_LONG: Final = 4
"""Kinds of pages; the last begins a long value."""
_BIG: Final = 1
"""Flag of a node: its value lies in pages of its own."""
_NONE: Final = 2**64 - 1
_DEEPEST: Final = 32
_TRIES: Final = 20


class TornError(Exception):
    """A page is not what led to it: damaged, or written anew meanwhile."""


@dataclass(frozen=True, slots=True)
class Meta:
    """Where a state of the file begins."""

    transaction: int
    map_bytes: int
    last_page: int
    root: int
    """Of the tree of databases."""


def read_meta(fd: int) -> Meta:
    """Read the latest state.

    Raises:
        TornError: The file is none of LMDB 0.9's.
    """
    metas = []
    for number in (0, 1):
        content = os.pread(fd, _META.size, number * PAGESIZE + _PAGE.size)
        if len(content) == _META.size:
            magic, version, _, map_bytes, free, main, last_page, transaction = _META.unpack(content)
            if (magic, version) == (_MAGIC, _VERSION) and _DATABASE.unpack(free)[0] == PAGESIZE:
                metas.append(Meta(transaction, map_bytes, last_page, _DATABASE.unpack(main)[-1]))
    if not metas:
        raise TornError("its first pages are damaged, or of another format")
    return max(metas, key=lambda meta: meta.transaction)


class Tree:
    """A database in a state of the file.

    Args:
        fd: Of the file.
        name: Of the database.

    Raises:
        TornError: It is not there.
    """

    def __init__(self, fd: int, name: bytes) -> None:
        self._fd = fd
        self.meta = read_meta(fd)
        value = self._get(self.meta.root, name)
        if value is None or len(value) != _DATABASE.size:
            raise TornError(f"it has no database {name.decode()!r}")
        *_, self.entries, self._root = _DATABASE.unpack(value)

    def rows(self) -> Iterator[tuple[bytes, bytes]]:
        """Walk all rows, in order of keys. A part that is torn is left out, see `entries`."""
        if self._root != _NONE:
            yield from self._walk(self._root, _DEEPEST)

    def get(self, key: bytes) -> bytes | None:
        """Give a row; None if there is none.

        Raises:
            TornError: A page on the way is not what it should be.
        """
        return self._get(self._root, key)

    def _walk(self, number: int, depth: int) -> Iterator[tuple[bytes, bytes]]:
        try:
            kind, nodes = self._nodes(number)
            if not depth:
                return
            for key, value in nodes:
                if kind == _LEAF:
                    yield key, self._value(value)
                else:
                    yield from self._walk(int.from_bytes(value[1], "little"), depth - 1)
        except TornError:
            return

    def _get(self, number: int, key: bytes) -> bytes | None:
        for _ in range(_DEEPEST):
            if number == _NONE:
                return None
            kind, nodes = self._nodes(number)
            if kind == _LEAF:
                return next((self._value(value) for found, value in nodes if found == key), None)
            # The first node of a branch has no key, and is for all that are below the second's.
            below = [value for at, (found, value) in enumerate(nodes) if not at or found <= key]
            number = int.from_bytes(below[-1][1], "little")
        raise TornError(f"the tree leads deeper than {_DEEPEST} pages")

    def _nodes(self, number: int) -> tuple[int, list[tuple[bytes, tuple[int, bytes]]]]:
        """Read a page: its kind, and of each node the key, and the flags and bytes of its value."""
        content = os.pread(self._fd, PAGESIZE, number * PAGESIZE) if number < 1 << 48 else b""
        if len(content) < PAGESIZE:
            raise TornError(f"page {number} is beyond the end of the file")
        found, kind, lower, upper = _PAGE.unpack_from(content)
        if found != number or kind not in (_BRANCH, _LEAF) or not _PAGE.size <= lower <= upper <= PAGESIZE:
            raise TornError(f"page {number} is none of a tree")
        count = (lower - _PAGE.size) // 2
        if not count:
            raise TornError(f"page {number} is empty")
        nodes = []
        for at in struct.unpack_from(f"<{count}H", content, _PAGE.size):
            if at + _NODE.size > PAGESIZE:
                raise TornError(f"a node of page {number} lies outside of it")
            low, high, flags, key_bytes = _NODE.unpack_from(content, at)
            start = at + _NODE.size + key_bytes
            nbytes = low | high << 16
            key = content[at + _NODE.size : start]
            if kind == _BRANCH:
                nodes.append((key, (0, (nbytes | flags << 32).to_bytes(8, "little"))))
            elif flags & _BIG:
                nodes.append((key, (flags, content[start : start + 8] + _NUMBER.pack(nbytes))))
            else:
                nodes.append((key, (flags, content[start : start + nbytes])))
        return kind, nodes

    def _value(self, value: tuple[int, bytes]) -> bytes:
        flags, content = value
        if not flags & _BIG:
            return content
        if len(content) != 2 * _NUMBER.size:
            raise TornError("a node lies outside of its page")
        number, nbytes = struct.unpack("<QQ", content)
        if number >= 1 << 48 or nbytes > PAGESIZE:
            raise TornError("a row is longer than rows are")
        run = os.pread(self._fd, _PAGE.size + nbytes, number * PAGESIZE)
        if len(run) < _PAGE.size + nbytes or _PAGE.unpack_from(run)[:2] != (number, _LONG):
            raise TornError(f"page {number} holds no long value")
        return run[_PAGE.size :]


def look_up(fd: int, name: bytes, key: bytes) -> bytes | None:
    """Give a row of the latest state, also while a keeper writes.

    Raises:
        TornError: The trees are damaged.
    """
    for left in reversed(range(_TRIES)):
        try:
            return Tree(fd, name).get(key)
        except TornError:
            if not left:
                raise
    raise AssertionError
