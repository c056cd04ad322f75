"""The files of one rank: preallocated slots, and the index that says what lies in them.

`_layout` draws them. An entry is cleared before its slot is written and set after every byte was: a slot
whose entry is sound holds a whole object. The index is read and written as a file, never mapped: a mapped
file that is cut short kills the process that touches it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import xxhash

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.config import size_text
from kvbm_core.errors import TierOpenError
from kvbm_core.localdir import LocalDirectory, free_bytes, unusable
from kvbm_core.log_limit import TierLog
from kvbm_core.namespace_facts import keep_facts, room_bytes
from kvbm_core.tier import PAGE_BYTES, TierContext
from kvbm_core.trust import open_direct
from kvbm_gds._config import GdsConfig
from kvbm_gds._layout import (
    ENTRY,
    ENTRY_BYTES,
    FORMAT_VERSION,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    Entry,
    Sizing,
)

__all__ = ["SLAB", "Slab", "directory_of", "read_entries", "sound_fields"]

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)
_READ_BYTES: Final = ENTRY_BYTES << 14
SLAB: Final = re.compile(r"slab\.([0-9]{3,})", re.ASCII)


def directory_of(config: GdsConfig) -> LocalDirectory:
    """Give the directory that a configuration names."""
    return LocalDirectory(config.path, "gds")


def sound_fields(entry: bytes) -> bytes:
    """Give the fields of an entry; nothing if it is empty, damaged or half written."""
    fields, checksum = entry[: ENTRY.size], entry[ENTRY.size :]
    return fields if any(checksum) and xxhash.xxh3_64_digest(fields) == checksum else b""


def read_entries(index: int) -> Iterator[tuple[int, bytes]]:
    """Read the entries of an index, in the order of slots, with the number of each; also beside an engine."""
    at, slot = HEADER_BYTES, 0
    while content := os.pread(index, _READ_BYTES, at):
        for start in range(0, len(content) - ENTRY_BYTES + 1, ENTRY_BYTES):
            yield slot, content[start : start + ENTRY_BYTES]
            slot += 1
        at += len(content)


class Slab:
    """A rank's files, held by this engine alone from construction to `close`.

    Raises:
        TierOpenError: If the directory cannot be used or its file system has too little room.
    """

    def __init__(self, config: GdsConfig, context: TierContext) -> None:
        self._context = context
        self.log = TierLog("kvbm_gds", context.name)
        """Where lines about it go."""
        self._folder = directory_of(config).hold(context.rank, self.log)
        self.path = self._folder.path
        self._capacity = config.capacity
        self._fds: list[int] = []
        self._index = -1
        self.direct = True
        self._sizing = Sizing(PAGE_BYTES, 0, 0)

    def open(self, sizing: Sizing) -> list[Entry]:
        """Bring the files to their size and give what lies in them, oldest first."""
        self._sizing = sizing
        try:
            # An engine that was killed while it probed left it behind.
            self._folder.drop("probe".__eq__)
            entries = self._read_index()
            self._open_files()
            held = [os.fstat(fd).st_size // sizing.slot_bytes * sizing.slot_bytes for fd in self._fds]
            sound = [entry for entry in entries if self._lies_in(entry, held)]
            # Before the files have their length again: from then on such an entry would look sound.
            for entry in entries:
                if not self._lies_in(entry, held):
                    self.clear(entry.slot)
            self._allocate(held)
        except OSError as error:
            raise self._why_not(error) from error
        if len(sound) < len(entries):
            self.log.warning(
                "%s: %d of %d objects lay in files that were cut short or deleted; they are forgotten",
                self.path, len(entries) - len(sound), len(entries),
            )  # fmt: skip
        return sound

    def keep_facts(self, *, starts_empty: bool) -> None:
        """Write what the namespace is made of, see `kvbm_core.namespace_facts.keep_facts`."""
        room = room_bytes(self._capacity // self._context.world_size)
        keep_facts(self._folder, self._context, room, self.log, starts_empty=starts_empty)

    @property
    def fds(self) -> list[int]:
        """File descriptors of the slab's files, in order."""
        return self._fds

    def place(self, slot: int) -> tuple[int, int]:
        """Say where a slot lies: file descriptor and offset."""
        number, offset = self._sizing.place(slot)
        return self._fds[number], offset

    def fill(self, slot: int, namespace: Namespace, key: BlockKey, sequence: int, nbytes: int) -> None:
        """Say that a slot holds a whole object of this length."""
        fields = ENTRY.pack(namespace, key, sequence, nbytes, 0)
        self._write_entry(slot, fields + xxhash.xxh3_64_digest(fields))

    def clear(self, slot: int) -> None:
        """Say that a slot holds nothing."""
        self._write_entry(slot, bytes(ENTRY_BYTES))

    def damage(self, slots: set[int]) -> str:
        """Say what became of the files that hold these slots; empty if they are as they should be."""
        numbers = {self._sizing.place(slot)[0] for slot in slots}
        files = [(f"slab.{each:03d}", self._fds[each], self._sizing.file_bytes(each)) for each in numbers]
        for name, fd, nbytes in [*files, ("the index", self._index, self._sizing.index_bytes)]:
            try:
                status = os.fstat(fd)
            except OSError as error:
                return f"{name} cannot be reached ({error.strerror})"
            if status.st_nlink == 0:
                return f"{name} was deleted by somebody else"
            if status.st_size < nbytes:
                return f"{name} was cut short by somebody else"
        return ""

    def is_elsewhere(self) -> bool:
        """Say whether the path leads to another folder now: a disk that was away may have come back."""
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(self._folder.folder_fd))
        except OSError:
            return False

    def is_full(self, code: int) -> bool:
        """Say whether it was for want of room that an object was not written.

        Args:
            code: The error's number; 0 if it is not known. Not all file systems that are full say so by
                their free bytes: a quota may be used up, or the disk below may have less than it seems.
        """
        if code:
            return code in _NO_ROOM
        try:
            # Not by its path: somebody may have deleted the directory.
            return free_bytes(self._folder.lock_fd) < self._sizing.slot_bytes
        except OSError:
            return False

    def close(self, *, files: bool = True) -> None:
        """Let another engine have the directory.

        Args:
            files: False if something still writes to the slab's files: then they stay open, and the
                directory stays locked.
        """
        if not files:
            return
        for fd in [*self._fds, self._index]:
            if fd >= 0:
                os.close(fd)
        self._fds, self._index = [], -1
        self._folder.release()

    def _read_index(self) -> list[Entry]:
        """Open the index; start anew where it is of another shape."""
        path, sizing = self.path / "index", self._sizing
        self._index = self._folder.open("index", os.O_RDWR | os.O_CREAT)
        content = _read_all(self._index)
        header = HEADER.pack(MAGIC, FORMAT_VERSION, ENTRY_BYTES, sizing.slot_bytes, sizing.slots_per_file)
        if content[: len(header)] != header:
            if self._folder.drop(SLAB.fullmatch) or content:
                self.log.warning(
                    "%s was made for slots of another size, or is damaged or gone: dropping what the "
                    "directory holds, starting empty", path,
                )  # fmt: skip
            os.ftruncate(self._index, 0)
            _write_all(self._index, header, 0)
            content = header
        os.ftruncate(self._index, self._sizing.index_bytes)
        # Its blocks on the disk now: what is full later cannot clear an entry.
        os.posix_fallocate(self._index, 0, self._sizing.index_bytes)
        return sorted(self._parse(content), key=lambda entry: entry.sequence)

    def _parse(self, content: bytes) -> list[Entry]:
        entries, lost = [], 0
        for slot, at in enumerate(range(HEADER_BYTES, len(content) - ENTRY_BYTES + 1, ENTRY_BYTES)):
            if not (fields := sound_fields(content[at : at + ENTRY_BYTES])):
                continue
            if slot >= self._sizing.slots:
                lost += 1
                continue
            namespace, key, sequence, nbytes, _ = ENTRY.unpack(fields)
            entries.append(Entry(slot, namespace, key, sequence, nbytes))
        if lost:
            self.log.warning("%s: the capacity was lowered; %d objects are forgotten", self.path, lost)
        return entries

    def _open_files(self) -> None:
        for number in range(self._sizing.files):
            name = f"slab.{number:03d}"
            fd, direct = open_direct(self._folder.open, name, os.O_RDWR | os.O_CREAT)
            self._fds.append(fd)
            self.direct = self.direct and direct
        kept = {f"slab.{number:03d}" for number in range(self._sizing.files)}
        self._folder.drop(lambda name: SLAB.fullmatch(name) and name not in kept)

    def _lies_in(self, entry: Entry, held: list[int]) -> bool:
        number, offset = self._sizing.place(entry.slot)
        return offset + self._sizing.slot_bytes <= held[number]

    def _allocate(self, held: list[int]) -> None:
        try:
            for number, fd in enumerate(self._fds):
                nbytes = self._sizing.file_bytes(number)
                os.ftruncate(fd, nbytes)
                os.posix_fallocate(fd, 0, nbytes)
        except OSError:
            self._give_back(held)
            raise

    def _give_back(self, held: list[int]) -> None:
        """Keep of the files only what they held before: the room is somebody else's."""
        for number, fd in enumerate(self._fds):
            with contextlib.suppress(OSError):
                os.ftruncate(fd, min(held[number], self._sizing.file_bytes(number)))
            if not held[number]:
                self._folder.drop(f"slab.{number:03d}".__eq__)
        if not any(held):
            self._folder.drop("index".__eq__)

    def _why_not(self, error: OSError) -> TierOpenError:
        full = error.errno in (*_NO_ROOM, errno.EFBIG)
        return _no_room(self.path, self._capacity, error) if full else unusable(self.path, error, "gds")

    def _write_entry(self, slot: int, raw: bytes) -> None:
        _write_all(self._index, raw, HEADER_BYTES + slot * ENTRY_BYTES)


def _read_all(fd: int) -> bytes:
    content, size = bytearray(), os.fstat(fd).st_size
    while len(content) < size:
        piece = os.pread(fd, size - len(content), len(content))
        if not piece:
            break
        content += piece
    return bytes(content)


def _write_all(fd: int, content: bytes, offset: int) -> None:
    if os.pwrite(fd, content, offset) < len(content):
        raise OSError(errno.EIO, "short write")


def _no_room(path: Path, capacity: int, error: OSError) -> TierOpenError:
    return TierOpenError(
        f"capacity: {size_text(capacity)} could not be taken in {path} ({os.strerror(error.errno or 0)}; "
        f"{size_text(free_bytes(path))} are free); write a smaller capacity or choose another path",
        operation="open", tier="gds",
    )  # fmt: skip
