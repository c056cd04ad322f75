"""The directory of one rank: preallocated files of slots, and the index that says what lies in them.

    <path>/rank0/          0700
        engine.lock        flock held by the engine that uses the directory; holds its pid
        index              header (4096 bytes), then one entry of 80 bytes for each slot
        slab.000 ...       slots of equal size, 8 GiB a file, the last one shorter

    entry  namespace (16)  key (32)  sequence (8)  length (8)  unused (8)  checksum (8)

An entry is cleared before its slot is written and set after every byte was: a slot whose entry is
sound holds a whole block. The index is read and written as a file, never mapped: a mapped file that
is cut short kills the process that touches it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.errors import TierOpenError
from kvbm_core.tier import PAGE_BYTES
from kvbm_gds._config import GdsConfig

__all__ = [
    "Entry",
    "Sizing",
    "Slab",
    "check",
    "drop_other_ranks",
    "least_share_bytes",
    "open_direct",
    "plan_sizing",
]

_log = logging.getLogger("kvbm_gds")

_MAGIC: Final = b"KVBMGDS\0"
_FORMAT_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIIQQ")
_HEADER_BYTES: Final = PAGE_BYTES
_ENTRY: Final = struct.Struct("<16s32sQQQ")
_ENTRY_BYTES: Final = _ENTRY.size + 8
_FILE_BYTES: Final = 8 << 30
_PROBE_BYTES: Final = 8 << 20
_OTHER_BYTES: Final = 64 << 10
"""The directory itself, its parent, the lock file, a header."""
_LOCK_WAIT_S: Final = 2.0
"""An engine that is being restarted lets go within this time."""
_FILE_MODE: Final = 0o600
_DIRECTORY_MODE: Final = 0o700
"""A KV cache holds people's prompts."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """What fits into a rank's share of the capacity."""

    slot_bytes: int
    slots: int
    probe_bytes: int
    """Room kept free for the probe's file."""

    @property
    def slots_per_file(self) -> int:
        """Slots in every file but the last."""
        return max(1, _FILE_BYTES // self.slot_bytes)

    @property
    def files(self) -> int:
        """Slab files."""
        return -(-self.slots // self.slots_per_file)

    def file_bytes(self, number: int) -> int:
        """Say how long a slab file is."""
        return min(self.slots_per_file, self.slots - number * self.slots_per_file) * self.slot_bytes

    def place(self, slot: int) -> tuple[int, int]:
        """Say where a slot lies: number of the file, offset in it."""
        number, at = divmod(slot, self.slots_per_file)
        return number, at * self.slot_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """A block found at open."""

    slot: int
    namespace: Namespace
    key: BlockKey
    sequence: int
    """Stored later: higher."""
    nbytes: int


def plan_sizing(share_bytes: int, block_bytes: int) -> Sizing | None:
    """Work out what fits into everything that `du` counts; None if not even one block does."""
    slot_bytes = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
    # A file in many pieces has blocks of its own that list them; ext4 counts these as the file's.
    usable = share_bytes - share_bytes // 1024 - _OTHER_BYTES - _HEADER_BYTES
    probe_bytes = min(_PROBE_BYTES, usable // 16) // PAGE_BYTES * PAGE_BYTES
    usable -= max(probe_bytes, PAGE_BYTES) + PAGE_BYTES
    slots = usable // (slot_bytes + _ENTRY_BYTES)
    return Sizing(slot_bytes, slots, max(probe_bytes, PAGE_BYTES)) if slots > 0 else None


def least_share_bytes(block_bytes: int) -> int:
    """Say how many bytes a rank needs to hold one block."""
    low, high = 0, 2 * block_bytes + (1 << 20)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if plan_sizing(middle, block_bytes) else (middle + 1, high)
    return low


def open_direct(path: Path) -> tuple[int, bool]:
    """Open a file past the page cache where the file system can.

    Returns:
        The file descriptor, and whether it is past the page cache.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, _FILE_MODE), True
    except OSError:
        return os.open(path, flags, _FILE_MODE), False


class Slab:
    """A rank's files, held by this engine alone from construction to `close`.

    Raises:
        TierOpenError: If the directory cannot be used or its file system has too little room.
    """

    def __init__(self, config: GdsConfig, rank: int) -> None:
        self.path = _root(config) / f"rank{rank}"
        self._capacity = config.capacity
        self._fds: list[int] = []
        self._index = -1
        try:
            _make_directories(self.path)
            self._lock = os.open(self.path / "engine.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        except OSError as error:
            raise _unusable(self.path, error) from error
        try:
            self._acquire()
        except OSError as error:
            os.close(self._lock)
            raise _unusable(self.path, error) from error
        except BaseException:
            os.close(self._lock)
            raise
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
        fields = _ENTRY.pack(namespace, key, sequence, nbytes, 0)
        self._write_entry(slot, fields + xxhash.xxh3_64_digest(fields))

    def clear(self, slot: int) -> None:
        """Say that a slot holds nothing."""
        self._write_entry(slot, bytes(_ENTRY_BYTES))

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
        return "the index was cut short" if status.st_size < self._index_bytes else ""

    def disk_is_full(self) -> bool:
        """Say whether the file system has no room for a block: engines do not tell this from other errors."""
        # Not by its path: somebody may have deleted the directory.
        room = os.fstatvfs(self._lock)
        return room.f_bavail * room.f_frsize < self._sizing.slot_bytes

    def close(self, *, files: bool = True) -> None:
        """Let another engine have the directory.

        Args:
            files: False if something still writes to the slab's files: then they stay open, and the
                directory stays locked.
        """
        if not files:
            return
        for fd in [*self._fds, self._index, self._lock]:
            if fd >= 0:
                os.close(fd)
        self._fds, self._index, self._lock = [], -1, -1

    def _acquire(self) -> None:
        give_up_s = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > give_up_s:
                    raise _in_use(self.path) from error
            time.sleep(0.05)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _read_index(self) -> list[Entry]:
        """Open the index; start anew where it is of another shape."""
        path, sizing = self.path / "index", self._sizing
        self._index = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        content = _read_all(self._index)
        header = _HEADER.pack(_MAGIC, _FORMAT_VERSION, _ENTRY_BYTES, sizing.slot_bytes, sizing.slots_per_file)
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
        os.ftruncate(self._index, self._index_bytes)
        # Its blocks on the disk now: what is full later cannot clear an entry.
        os.posix_fallocate(self._index, 0, self._index_bytes)
        return sorted(self._parse(content), key=lambda entry: entry.sequence)

    def _parse(self, content: bytes) -> list[Entry]:
        entries, lost = [], 0
        for slot, at in enumerate(range(_HEADER_BYTES, len(content) - _ENTRY_BYTES + 1, _ENTRY_BYTES)):
            raw = content[at : at + _ENTRY_BYTES]
            fields, checksum = raw[: _ENTRY.size], raw[_ENTRY.size :]
            if not any(checksum) or xxhash.xxh3_64_digest(fields) != checksum:
                continue
            if slot >= self._sizing.slots:
                lost += 1
                continue
            namespace, key, sequence, nbytes, _ = _ENTRY.unpack(fields)
            entries.append(Entry(slot, namespace, key, sequence, nbytes))
        if lost:
            _log.warning("%s: the capacity was lowered; %d blocks are forgotten", self.path, lost)
        return entries

    @property
    def _index_bytes(self) -> int:
        return _HEADER_BYTES + self._sizing.slots * _ENTRY_BYTES

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
        return _no_room(self.path, self._capacity, error) if full else _unusable(self.path, error)

    def _write_entry(self, slot: int, raw: bytes) -> None:
        _write_all(self._index, raw, _HEADER_BYTES + slot * _ENTRY_BYTES)


def drop_other_ranks(config: GdsConfig, rank: int, world_size: int) -> None:
    """Delete what an engine of more ranks left: nobody uses it, and the capacity is for all together.

    Each rank deletes as much as its own share grows by, so the room is there before it is taken.

    Raises:
        TierOpenError: If another engine uses it.
    """
    for folder in _root(config).glob("rank*"):
        name = folder.name.removeprefix("rank")
        if name.isdigit() and int(name) >= world_size and int(name) % world_size == rank:
            _log.warning("%s: an engine of more ranks left it; dropping it", folder)
            left = Slab(config, int(name))
            shutil.rmtree(folder, ignore_errors=True)
            left.close()


def check(config: GdsConfig) -> None:
    """Find what would keep an engine from opening its directories. Changes nothing.

    Raises:
        TierOpenError: If the path is no directory, cannot be written, is in use by another engine,
            or lies on a file system with too little room; or if an engine is asked for that cannot work.
    """
    from kvbm_gds._io import load_nixl
    from kvbm_gds._probe import gds_is_thinkable

    if config.engine in ("gds", "posix"):
        load_nixl()
    if config.engine == "gds" and (why := gds_is_thinkable()):
        raise TierOpenError(
            f"engine: 'gds' cannot work here: {why}; write auto", operation="check", tier="gds"
        )
    root = _root(config)
    rank0 = root / "rank0"
    existing = next(folder for folder in (rank0, *rank0.parents) if os.path.lexists(folder))
    try:
        # Permission bits do not tell everything (read-only mounts, /proc): try it, and clean up.
        os.rmdir(tempfile.mkdtemp(prefix=".kvbm-check-", dir=existing))
    except OSError as error:
        raise _unusable(existing, error) from error
    _check_unlocked(rank0)
    used_bytes = sum(_du_bytes(folder) for folder in root.glob("rank*"))
    free_bytes = shutil.disk_usage(existing).free
    if config.capacity - used_bytes > free_bytes:
        raise TierOpenError(
            f"capacity: {int(config.capacity)} bytes, of which {used_bytes} are taken in {root} already, "
            f"but its file system has only {free_bytes} bytes free; write at most {used_bytes + free_bytes} "
            "or choose another path",
            operation="check", tier="gds",
        )  # fmt: skip


def _root(config: GdsConfig) -> Path:
    return Path(config.path).expanduser().absolute()


def _make_directories(path: Path) -> None:
    # Path.mkdir(parents=True) makes the parents with the default mode.
    for folder in reversed((path, *path.parents)):
        if not folder.exists():
            folder.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)


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


def _check_unlocked(rank_path: Path) -> None:
    try:
        lock = os.open(rank_path / "engine.lock", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _unusable(rank_path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(rank_path) from error
    finally:
        os.close(lock)


def _in_use(path: Path) -> TierOpenError:
    try:
        owner = (path / "engine.lock").read_text().strip() or "unknown"
    except OSError:
        owner = "unknown"
    return TierOpenError(
        f"path: {path} is in use by another engine (pid {owner}); give each engine its own 'path'",
        operation="open", tier="gds",
    )  # fmt: skip


def _unusable(path: Path, error: Exception) -> TierOpenError:
    return TierOpenError(
        f"path: {path} cannot be used by uid {os.getuid()} ({error}); write a directory on a local disk "
        "that this user may write",
        operation="open", tier="gds",
    )  # fmt: skip


def _no_room(path: Path, capacity: int, error: OSError) -> TierOpenError:
    free_bytes = shutil.disk_usage(path).free
    return TierOpenError(
        f"capacity: {int(capacity)} bytes could not be taken in {path} ({os.strerror(error.errno or 0)}; "
        f"{free_bytes} bytes are free); write a smaller capacity or choose another path",
        operation="open", tier="gds",
    )  # fmt: skip


def _du_bytes(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir()) if folder.is_dir() else 0
