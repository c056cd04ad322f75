"""The files of one rank: preallocated slots, and the index that says what lies in them.

`_layout` draws them. An entry is cleared before its slot is written and set after every byte was: a slot
whose entry is sound holds a whole block. The index is read and written as a file, never mapped: a mapped
file that is cut short kills the process that touches it.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import xxhash

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.errors import TierOpenError
from kvbm_core.localdir import FILE_MODE, LocalDirectory, free_bytes, unusable
from kvbm_core.tier import PAGE_BYTES
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
from kvbm_gds._machine import open_direct

__all__ = ["Slab", "directory_of"]

_log = logging.getLogger("kvbm_gds")


def directory_of(config: GdsConfig) -> LocalDirectory:
    """Give the directory that a configuration names."""
    return LocalDirectory(config.path, "gds")


class Slab:
    """A rank's files, held by this engine alone from construction to `close`.

    Raises:
        TierOpenError: If the directory cannot be used or its file system has too little room.
    """

    def __init__(self, config: GdsConfig, rank: int) -> None:
        self._folder = directory_of(config).hold(rank)
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
            (self.path / "probe").unlink(missing_ok=True)
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
            _log.warning(
                "%s: %d of %d blocks lay in files that were cut short or deleted; they are forgotten",
                self.path, len(entries) - len(sound), len(entries),
            )  # fmt: skip
        return sound

    @property
    def fds(self) -> list[int]:
        """File descriptors of the slab's files, in order."""
        return self._fds

    def place(self, slot: int) -> tuple[int, int]:
        """Say where a slot lies: file descriptor and offset."""
        number, offset = self._sizing.place(slot)
        return self._fds[number], offset

    def fill(self, slot: int, namespace: Namespace, key: BlockKey, sequence: int, nbytes: int) -> None:
        """Say that a slot holds a whole block."""
        fields = ENTRY.pack(namespace, key, sequence, nbytes, 0)
        self._write_entry(slot, fields + xxhash.xxh3_64_digest(fields))

    def clear(self, slot: int) -> None:
        """Say that a slot holds nothing."""
        self._write_entry(slot, bytes(ENTRY_BYTES))

    def damage(self, slots: set[int]) -> str:
        """Say what somebody else did to the files that hold these slots; empty if nothing."""
        numbers = {self._sizing.place(slot)[0] for slot in slots}
        for number in numbers:
            status = os.fstat(self._fds[number])
            if status.st_nlink == 0:
                return f"slab.{number:03d} was deleted"
            if status.st_size < self._sizing.file_bytes(number):
                return f"slab.{number:03d} was cut short"
        status = os.fstat(self._index)
        if status.st_nlink == 0:
            return "the index was deleted"
        return "the index was cut short" if status.st_size < self._sizing.index_bytes else ""

    def disk_is_full(self) -> bool:
        """Say whether the file system has no room for a block: engines do not tell this from other errors."""
        # Not by its path: somebody may have deleted the directory.
        return free_bytes(self._folder.lock_fd) < self._sizing.slot_bytes

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
        self._index = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        content = _read_all(self._index)
        header = HEADER.pack(MAGIC, FORMAT_VERSION, ENTRY_BYTES, sizing.slot_bytes, sizing.slots_per_file)
        if content[: len(header)] != header:
            files = list(self.path.glob("slab.*"))
            if content or files:
                _log.warning(
                    "%s was made for other blocks, or is damaged or gone: dropping what the directory holds, "
                    "starting empty", path,
                )  # fmt: skip
            for file in files:
                file.unlink()
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
            raw = content[at : at + ENTRY_BYTES]
            fields, checksum = raw[: ENTRY.size], raw[ENTRY.size :]
            if not any(checksum) or xxhash.xxh3_64_digest(fields) != checksum:
                continue
            if slot >= self._sizing.slots:
                lost += 1
                continue
            namespace, key, sequence, nbytes, _ = ENTRY.unpack(fields)
            entries.append(Entry(slot, namespace, key, sequence, nbytes))
        if lost:
            _log.warning("%s: the capacity was lowered; %d blocks are forgotten", self.path, lost)
        return entries

    def _open_files(self) -> None:
        for number in range(self._sizing.files):
            fd, direct = open_direct(self.path / f"slab.{number:03d}")
            self._fds.append(fd)
            self.direct = self.direct and direct
        for file in self.path.glob("slab.*"):
            if not file.suffix[1:].isdigit() or int(file.suffix[1:]) >= self._sizing.files:
                file.unlink()

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
            if held[number]:
                os.ftruncate(fd, min(held[number], self._sizing.file_bytes(number)))
            else:
                (self.path / f"slab.{number:03d}").unlink(missing_ok=True)
        if not any(held):
            (self.path / "index").unlink(missing_ok=True)

    def _why_not(self, error: OSError) -> TierOpenError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
        f"capacity: {int(capacity)} bytes could not be taken in {path} ({os.strerror(error.errno or 0)}; "
        f"{free_bytes(path)} bytes are free); write a smaller capacity or choose another path",
        operation="open", tier="gds",
    )  # fmt: skip
