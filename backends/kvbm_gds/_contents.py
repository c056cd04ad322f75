"""The objects in a directory of slabs, read slot by slot, also beside an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final

from kvbm_core.contents import Contents, FolderContents, Found
from kvbm_core.errors import TierError
from kvbm_core.localdir import HeldFolder
from kvbm_gds._config import GdsConfig
from kvbm_gds._layout import ENTRY, ENTRY_BYTES, FORMAT_VERSION, HEADER, HEADER_BYTES, MAGIC, in_pages
from kvbm_gds._slab import SLAB, directory_of, read_entries, sound_fields

__all__ = ["contents"]

_EMPTY: Final = bytes(ENTRY_BYTES)


def contents(config: GdsConfig) -> Sequence[Contents]:
    """See `Backend.contents`."""
    directory = directory_of(config)
    return [_Folder(directory, rank, folder, "gds") for rank, folder in directory.ranks()]


class _Folder(FolderContents):
    """A rank's folder. A place is the slot and its entry as it was read: no two stores have equal ones."""

    def open_files(self, names: Sequence[str]) -> None:
        """See `FolderContents.open_files`."""
        self._slot_bytes = self._slots_per_file = 0
        self._index = self.open_file("index") if "index" in names else -1
        slabs = [match for name in names if (match := SLAB.fullmatch(name))]
        self._slabs = {int(match[1]): self.open_file(match[0], direct=True) for match in slabs}
        self._read_header()

    def objects(self) -> Iterator[Found]:
        """See `Contents.objects`. In the order of slots."""
        if self._slot_bytes:
            yield from (self._found(slot, raw) for slot, raw in read_entries(self._index) if raw != _EMPTY)

    def problems(self) -> Sequence[str]:
        """See `Contents.problems`."""
        if self._index < 0 and not self._slabs:
            return []
        if not self._slot_bytes:
            return [f"{self.where}/index: its header is damaged or gone; an engine will start empty"]
        return []

    def room_bytes(self, nbytes: int) -> int:
        """See `Contents.room_bytes`."""
        return in_pages(nbytes)

    def read(self, found: Found, buffer: memoryview) -> memoryview | None:
        """See `Contents.read`."""
        number, at = divmod(found.place[0], self._slots_per_file)
        try:
            got = os.preadv(self._slabs[number], [buffer[: in_pages(found.nbytes)]], at * self._slot_bytes)
        except OSError as error:
            raise TierError(f"it cannot be read: {error.strerror}", tier="gds") from error
        return buffer[: min(got, found.nbytes)]

    def is_there(self, found: Found) -> bool:
        """See `Contents.is_there`."""
        slot: int
        raw: bytes
        slot, raw = found.place
        return os.pread(self._index, ENTRY_BYTES, HEADER_BYTES + slot * ENTRY_BYTES) == raw

    def remove(self, found: Sequence[Found]) -> int:
        """See `Contents.remove`."""
        held, removed = HeldFolder(self.folder, "gds"), 0
        try:
            index = held.open("index", os.O_RDWR)
            try:
                for each in found:
                    if self.is_there(each):
                        os.pwrite(index, _EMPTY, HEADER_BYTES + each.place[0] * ENTRY_BYTES)
                        removed += 1
                os.fsync(index)
            finally:
                os.close(index)
        except OSError as error:
            raise TierError(f"{self.where}/index cannot be written: {error.strerror}", tier="gds") from error
        finally:
            held.release()
        return removed

    def _read_header(self) -> None:
        header = os.pread(self._index, HEADER.size, 0) if self._index >= 0 else b""
        if len(header) < HEADER.size:
            return
        magic, version, entry_bytes, slot_bytes, slots_per_file = HEADER.unpack(header)
        if (magic, version, entry_bytes) == (MAGIC, FORMAT_VERSION, ENTRY_BYTES) and slots_per_file:
            self._slot_bytes, self._slots_per_file = slot_bytes, slots_per_file

    def _found(self, slot: int, raw: bytes) -> Found:
        fields = sound_fields(raw)
        # What is damaged is told by what it says.
        namespace, key, sequence, nbytes, _ = ENTRY.unpack(raw[: ENTRY.size])
        broken = ""
        if not fields:
            broken = f"the index entry of slot {slot} is damaged"
        elif not 0 < nbytes <= self._slot_bytes:
            broken = f"the index says {nbytes} bytes, and a slot has {self._slot_bytes}"
        elif slot // self._slots_per_file not in self._slabs:
            broken = f"slab.{slot // self._slots_per_file:03d} is gone"
        return Found(namespace, self.rank, key, nbytes, sequence, (slot, raw), broken)
