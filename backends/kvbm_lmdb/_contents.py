"""The objects in a directory of LMDB's, read by their places in the file, also beside an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from mmap import PAGESIZE
from typing import Final

from kvbm_core.block import KEY_BYTES, NAMESPACE_BYTES
from kvbm_core.contents import Contents, FolderContents, Found
from kvbm_core.errors import TierError
from kvbm_lmdb._config import LmdbConfig
from kvbm_lmdb._directory import directory_of
from kvbm_lmdb._place import (
    PIECE_HEADER_BYTES,
    SEQUENCE,
    is_no_object,
    is_whole,
    nbytes_of,
    pieces_of,
)
from kvbm_lmdb._tree import TornError, Tree, look_up

__all__ = ["contents"]

_DATA: Final = "data.mdb"
_INDEX: Final = b"index"
_MOST_ROOM_BYTES: Final = 1 << 32


def contents(config: LmdbConfig) -> Sequence[Contents]:
    """See `Backend.contents`."""
    directory = directory_of(config)
    return [_Folder(directory, rank, folder, "lmdb") for rank, folder in directory.ranks()]


class _Folder(FolderContents):
    """A rank's folder. A place is the row of the index: no two stores have equal ones."""

    def open_files(self, names: Sequence[str]) -> None:
        """See `FolderContents.open_files`."""
        self._problems: list[str] = []
        self._fd = self._tree_fd = -1
        if _DATA in names:
            self._tree_fd = self.open_file(_DATA)
            # An engine has it in the page cache; past that a look costs the cache nothing.
            self._fd = self.open_file(_DATA, direct=not self.holder())

    def objects(self) -> Iterator[Found]:
        """See `Contents.objects`. In the order of the file, as far as each object's first piece goes."""
        self._problems = []
        nbytes = os.fstat(self._tree_fd).st_size if self._tree_fd >= 0 else 0
        if not nbytes:
            return
        held = self.holder()
        try:
            tree = Tree(self._tree_fd, _INDEX)
        except TornError as error:
            if not held:
                self._problems.append(f"{self.where}/{_DATA}: {error}; an engine will put it aside")
            return
        if not held and (tree.meta.last_page + 1) * PAGESIZE > nbytes:
            self._problems.append(f"{self.where}/{_DATA} was cut short; an engine will put it aside")
        rows = list(tree.rows())
        if len(rows) != tree.entries and not (held or self.holder()):
            self._problems.append(
                f"{self.where}/{_DATA}: its index lists {tree.entries} rows, of which {len(rows)} can be "
                "reached: it is damaged"
            )
        found = [self._found(key, row, nbytes) for key, row in rows if not is_no_object(key, row)]
        yield from sorted(found, key=_first_page)

    def problems(self) -> Sequence[str]:
        """See `Contents.problems`."""
        return self._problems

    def room_bytes(self, nbytes: int) -> int:
        """See `Contents.room_bytes`."""
        # At worst each page is a piece: its header takes room as well.
        return min(_MOST_ROOM_BYTES, (nbytes // (PAGESIZE - PIECE_HEADER_BYTES) + 2) * PAGESIZE)

    def read(self, found: Found, buffer: memoryview) -> memoryview | None:
        """See `Contents.read`."""
        at = end = 0
        for page, pages in pieces_of(found.place[SEQUENCE.size :]):
            part = buffer[at : at + pages * PAGESIZE]
            try:
                got = os.preadv(self._fd, [part], page * PAGESIZE)
            except OSError as error:
                raise TierError(f"it cannot be read: {error.strerror}", tier="lmdb") from error
            nbytes = max(0, got - PIECE_HEADER_BYTES)
            if at:
                # Behind the piece before, without the header.
                buffer[end : end + nbytes] = part[PIECE_HEADER_BYTES : PIECE_HEADER_BYTES + nbytes]
            else:
                end = PIECE_HEADER_BYTES
            at, end = at + len(part), end + nbytes
        return buffer[PIECE_HEADER_BYTES : min(end, PIECE_HEADER_BYTES + found.nbytes)]

    def is_there(self, found: Found) -> bool:
        """See `Contents.is_there`."""
        try:
            row = look_up(self._tree_fd, _INDEX, found.namespace + found.key)
        except TornError:
            return True
        return row is not None and row == bytes(found.place)

    def remove(self, found: Sequence[Found]) -> int:
        """See `Contents.remove`."""
        # Here, because py-lmdb need not be installed where this module is imported.
        from kvbm_lmdb._removing import remove_rows

        rows = {each.namespace + each.key: each.place for each in found}
        return remove_rows(self.folder, rows)

    def _found(self, key: bytes, row: bytes, file_bytes: int) -> Found:
        place, broken, nbytes, sequence = row[SEQUENCE.size :], "", 0, 0
        if len(key) != NAMESPACE_BYTES + KEY_BYTES:
            broken = f"the index has a key of {len(key)} bytes"
        elif not is_whole(key, row, file_bytes):
            broken = "its row of the index is damaged, or leads beyond the end of the file"
        if not broken:
            (sequence,), nbytes = SEQUENCE.unpack_from(row), nbytes_of(place)
        return Found(key[:NAMESPACE_BYTES], self.rank, key[NAMESPACE_BYTES:], nbytes, sequence, row, broken)


def _first_page(found: Found) -> int:
    return 0 if found.broken else pieces_of(found.place[SEQUENCE.size :])[0][0]
