"""The objects in a directory of slabs, read slot by slot, also beside an engine."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from kvbm_core.block import Namespace
from kvbm_core.contents import Contents, Found
from kvbm_core.errors import KvbmError, TierError
from kvbm_core.localdir import HeldFolder, LocalDirectory
from kvbm_core.stored import facts_in
from kvbm_core.trust import open_direct, open_file, open_folder
from kvbm_gds._config import GdsConfig
from kvbm_gds._layout import ENTRY, ENTRY_BYTES, FORMAT_VERSION, HEADER, HEADER_BYTES, MAGIC, in_pages
from kvbm_gds._slab import SLAB, directory_of, read_entries, sound_fields

__all__ = ["contents"]

_EMPTY: Final = bytes(ENTRY_BYTES)


def contents(config: GdsConfig) -> Sequence[Contents]:
    """See `Backend.contents`."""
    directory = directory_of(config)
    return [_Folder(directory, rank, folder) for rank, folder in directory.ranks()]


class _Folder(Contents):
    """A rank's folder. A place is the slot and its entry as it was read: no two stores have equal ones."""

    def __init__(self, directory: LocalDirectory, rank: int, folder: Path) -> None:
        self.where = str(folder)
        self._directory = directory
        self._rank = rank
        self._folder = folder
        self._fds: dict[int, int] = {}
        """By number, the slab files."""
        self._slot_bytes = self._slots_per_file = 0
        self._index = -1
        self._open()

    def __repr__(self) -> str:
        return f"<contents of {self.where}>"

    def holder(self) -> str:
        """See `Contents.holder`."""
        return self._directory.owner(self._rank)

    def facts(self) -> Mapping[tuple[Namespace, int], Mapping[str, Any] | None]:
        """See `Contents.facts`."""
        return {(name, self._rank): facts for name, (_, facts) in facts_in(self._folder).items()}

    def objects(self) -> Iterator[Found]:
        """See `Contents.objects`. In the order of slots."""
        if self._slot_bytes:
            yield from (self._found(slot, raw) for slot, raw in read_entries(self._index) if raw != _EMPTY)

    def problems(self) -> Sequence[str]:
        """See `Contents.problems`."""
        if self._index < 0 and not self._fds:
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
            got = os.preadv(self._fds[number], [buffer[: in_pages(found.nbytes)]], at * self._slot_bytes)
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
        held, removed = HeldFolder(self._folder, "gds"), 0
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

    def tidy(self, kept: Collection[tuple[Namespace, int]], *, really: bool) -> int:
        """See `Contents.tidy`. An engine does it at its start."""
        return 0

    def close(self) -> None:
        """See `Contents.close`."""
        for fd in (*self._fds.values(), self._index):
            if fd >= 0:
                os.close(fd)
        self._fds, self._index = {}, -1

    def _open(self) -> None:
        folder_fd = open_folder(self._folder, "gds", tighten=False)
        try:
            names = os.listdir(folder_fd)
            if "index" in names:
                self._index = open_file(self._folder, folder_fd, "index", os.O_RDONLY, "gds")
            for name in names:
                if match := SLAB.fullmatch(name):
                    self._fds[int(match[1])], _ = open_direct(
                        partial(open_file, self._folder, folder_fd, name, tier="gds"), os.O_RDONLY
                    )
            self._read_header()
        except (OSError, KvbmError) as error:
            self.close()
            if isinstance(error, KvbmError):
                raise
            raise TierError(f"{self.where} cannot be read: {error.strerror}", tier="gds") from error
        finally:
            os.close(folder_fd)

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
        elif slot // self._slots_per_file not in self._fds:
            broken = f"slab.{slot // self._slots_per_file:03d} is gone"
        return Found(namespace, self._rank, key, nbytes, sequence, (slot, raw), broken)
