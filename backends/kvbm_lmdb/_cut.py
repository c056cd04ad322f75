"""Puts an object into the environment, in one piece or in several, and deletes it.

LMDB keeps a large value in neighbouring pages. Where none are left that are enough, a half of the object is
tried, and then a half of that: each attempt is a transaction within the transaction, which may fail alone.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import lmdb

from kvbm_lmdb._data_file import HEADER
from kvbm_lmdb._environment import PIECE, Store
from kvbm_lmdb._place import GIVEN_UP, SEQUENCE, Piece, pages_of, pieces_of, place_of, room_bytes

__all__ = ["STEP_PAGES", "Value", "delete", "put_cut", "put_whole"]

STEP_PAGES: Final = 400
"""LMDB lists the pages that a transaction frees, 8 bytes each. So many, with those of the trees, are a list
of one page: there need be no two neighbours that are free."""
_LEAST_BYTES: Final = room_bytes(1)
"""A shorter value would share a page with others, which LMDB moves."""
_MOST_PIECES: Final = 500
"""Then a row of the index takes one page at most."""

Value = tuple[bytes, memoryview]
"""An object's key, with its namespace, and its bytes."""


def put_whole(store: Store, txn: Any, sequence: int, value: Value) -> bytes:
    """Put an object in one piece.

    Returns:
        Its place.

    Raises:
        lmdb.MapFullError: If there are not enough neighbouring pages. Then the transaction can do no more.
    """
    key, source = value
    return _put_row(store, txn, sequence, key, len(source), [_put_piece(store, txn, sequence, 0, source)])


def put_cut(store: Store, txn: Any, sequence: int, value: Value) -> bytes:
    """Put an object in as few pieces as there is room for.

    Returns:
        Its place. Empty if there is not enough room; then the transaction is as it was.
    """
    key, source = value
    try:
        with store.env.begin(write=True, parent=txn, buffers=True) as inner:
            return _put_row(
                store, inner, sequence, key, len(source), _put_pieces(store, inner, sequence, source)
            )
    except lmdb.MapFullError:
        return b""


def delete(store: Store, txn: Any, key: bytes, most_pages: float = float("inf")) -> float:
    """Delete an object, or a part of it: of what is left only the row remains, and it is not served.

    Args:
        store: The environment.
        txn: In this transaction.
        key: With its namespace. May be absent.
        most_pages: Pages to free, 1 or more. One piece is deleted even if it has more.

    Returns:
        What is left of `most_pages`. Below 0 if something is left of the object.
    """
    row = txn.get(key, db=store.index)
    if row is None or len(row) <= SEQUENCE.size:
        return most_pages
    (sequence,), pieces = SEQUENCE.unpack_from(row), pieces_of(bytes(row[SEQUENCE.size :]))
    while pieces:
        if most_pages <= 0:
            txn.put(key, SEQUENCE.pack(sequence) + place_of(GIVEN_UP, pieces), db=store.index)
            return -1
        most_pages -= pieces.pop()[1]
        txn.delete(PIECE.pack(sequence, len(pieces)), db=store.blocks)
    txn.delete(key, db=store.index)
    return max(0, most_pages)


def _put_pieces(store: Store, txn: Any, sequence: int, source: memoryview) -> list[Piece]:
    pages = pages_of(len(source))
    least = -(-pages // _MOST_PIECES)
    pieces: list[Piece] = []
    at = 0
    while at < len(source) or not pieces:
        pages = min(pages, pages_of(len(source) - at))
        part = source[at : at + room_bytes(pages)]
        try:
            with store.env.begin(write=True, parent=txn, buffers=True) as attempt:
                pieces.append(_put_piece(store, attempt, sequence, len(pieces), part))
        except lmdb.MapFullError:
            if pages <= least:
                raise
            pages = max(least, pages // 2)
        else:
            at += len(part)
    return pieces


def _put_piece(store: Store, txn: Any, sequence: int, number: int, part: memoryview) -> Piece:
    key = PIECE.pack(sequence, number)
    value = part if len(part) >= _LEAST_BYTES else bytes(part).ljust(_LEAST_BYTES, b"\0")
    # Without `append` a page of the tree would be split in the middle when it is full.
    if not txn.put(key, value, db=store.blocks, append=True):
        raise lmdb.CorruptedError("a new piece is not the last one")
    return _piece_of(txn.get(key, db=store.blocks))


def _put_row(store: Store, txn: Any, sequence: int, key: bytes, nbytes: int, pieces: list[Piece]) -> bytes:
    place = place_of(nbytes, pieces)
    row = SEQUENCE.pack(sequence) + place
    if not txn.put(key, row, db=store.index, overwrite=False):
        # What an erasure that failed has left of this key.
        delete(store, txn, key)
        txn.put(key, row, db=store.index)
    return place


class _Buffer(ctypes.Structure):
    """Python's ``Py_buffer``, of which the address alone is read."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("owner", ctypes.c_void_p),
        ("numbers", ctypes.c_ssize_t * 3),
        ("pointers", ctypes.c_void_p * 5),
    )


def _piece_of(value: Any) -> Piece:
    """Say where a value put in this transaction will lie in the file: its first page bears its number."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(value), ctypes.byref(buffer), 0)
    try:
        header = ctypes.string_at((buffer.address or 0) - HEADER.size, HEADER.size)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    page, _, pages = HEADER.unpack(header)
    return page, pages
