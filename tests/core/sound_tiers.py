"""Small sound tiers: what the broken ones are made from, and models to read."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from kvbm_core import folderlock
from kvbm_core.block import BlockKey, Namespace
from kvbm_core.config import ByteSize
from kvbm_core.errors import QueueFullError, TierError, TierOpenError, TransitionError
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.tier import (
    PAGE_BYTES,
    Addressable,
    Capabilities,
    Completion,
    Op,
    Outcome,
    Reason,
    Region,
    Tier,
    TierConfig,
    TierContext,
    Transfer,
)

__all__ = ["FolderConfig", "FolderTier", "LendingTier", "ReadOnlyFolder", "SharedFolder", "fill_folder"]


class FolderConfig(TierConfig, frozen=True):
    """Settings of a `FolderTier`."""

    path: str
    capacity: ByteSize


_NAME: Final = re.compile("[0-9a-f]{64}")


def is_object(file: Path) -> bool:
    """Say whether there is an object.

    Raises:
        OSError: If the medium does not say.
    """
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:
        return False


class FolderTier(Tier):
    """A file an object, read and written in `submit`: simple, sound and durable."""

    durable: bool = True
    shared: bool = False
    read_only: bool = False

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        self.context = context
        self.path = Path(config.path)
        self.folder = self.place(self.path)
        self.lock_fd: int | None = None
        self.capacity_bytes = None if self.shared else config.capacity // context.world_size
        self.done: list[Completion] = []
        self.closed = False
        try:
            self.open()
        except OSError as error:
            self.close()
            raise TierOpenError(f"path: {self.path} cannot be used ({error}); write another") from error

    def open(self) -> None:
        """Find what is there, and keep others out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        if not self.shared and not self.read_only:
            self.lock_fd = self.lock()
            self.tidy()
        files = [] if self.shared else self.files()
        self.found = [(bytes.fromhex(file.name), file.stat().st_size) for file in files]
        self.used_bytes = sum(self.capabilities.charge(nbytes) for _, nbytes in self.found)
        self.shrink()

    def place(self, path: Path) -> Path:
        """Say where this rank's objects of this namespace are."""
        return path / str(self.context.rank) / self.context.namespace.hex()

    def tidy(self) -> None:
        """Delete what other namespaces, ranks that are gone, and a kill have left."""
        others = [other for other in self.folder.parent.iterdir() if other.is_dir() and other != self.folder]
        if self.context.rank == 0:
            ranks = [rank for rank in self.path.iterdir() if rank.name.isdecimal()]
            others += [rank for rank in ranks if int(rank.name) >= self.context.world_size]
        for folder in others:
            shutil.rmtree(folder)
        for part in self.folder.glob("*.part"):
            part.unlink()

    def shrink(self) -> None:
        """Let the oldest go where the capacity is smaller than it was."""
        while self.capacity_bytes is not None and self.used_bytes > self.capacity_bytes:
            self.discard([self.found.pop(0)[0]])

    def lock(self) -> int:
        """Keep other engines out."""
        fd = os.open(self.folder.parent / "engine.lock", os.O_RDWR | os.O_CREAT, 0o600)
        if not folderlock.lock(fd, 0):
            folderlock.unlock(fd)
            raise TierOpenError(f"path: {self.folder} is in use; write another")
        return fd

    def files(self) -> list[Path]:
        """List the objects, oldest first. What strangers have put there is none."""
        files = [file for file in self.folder.iterdir() if _NAME.fullmatch(file.name) and is_object(file)]
        return sorted(files, key=lambda file: file.stat().st_mtime_ns)

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`. An object takes whole blocks of the file system."""
        return Capabilities(
            capacity_bytes=self.capacity_bytes,
            queue_depth=8,
            durable=self.durable,
            shared=self.shared,
            remote_lookup=self.shared,
            unit_bytes=PAGE_BYTES,
            read_only=self.read_only,
        )

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        """See `Tier.inventory`."""
        return self.found

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        if self.closed:
            raise TierError("the tier is closed")
        if len(self.done) + len(transfers) > self.capabilities.queue_depth:
            raise QueueFullError("poll first")
        for transfer in transfers:
            try:
                self.done.append(self.end(transfer))
            except OSError as error:
                why = f"{error.strerror}: {self.path}"
                self.done.append(Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, why))
            self.context.wake()

    def end(self, transfer: Transfer) -> Completion:
        """Carry a transfer out."""
        file, region = self.folder / transfer.key.hex(), transfer.region
        there = is_object(file)
        if transfer.op is Op.STORE and not there:
            assert region is not None
            charge = self.capabilities.charge(region.nbytes)
            if self.capacity_bytes is not None and self.used_bytes + charge > self.capacity_bytes:
                return Completion(transfer.ticket, Outcome.FAILED, Reason.FULL)
            self.write(file, region)
            self.used_bytes += charge
            return Completion(transfer.ticket, Outcome.DONE, nbytes=region.nbytes)
        if not there:
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        if transfer.op is Op.LOAD:
            assert region is not None
            return self.read(file, region, transfer.ticket)
        return Completion(transfer.ticket, Outcome.DONE, nbytes=file.stat().st_size)

    def read(self, file: Path, region: Region, ticket: int) -> Completion:
        """Load an object, unless it is longer than the region."""
        content = file.read_bytes()
        if len(content) > region.nbytes:
            return Completion(ticket, Outcome.FAILED, Reason.CORRUPT, "it is longer than the region")
        region.view()[: len(content)] = content
        return Completion(ticket, Outcome.DONE, nbytes=len(content))

    def write(self, file: Path, region: Region) -> None:
        """Write an object so that nobody ever sees half of it."""
        part = file.with_suffix(f".{id(self)}.part")
        try:
            part.write_bytes(region.view())
            part.rename(file)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        done, self.done = self.done, []
        return done

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        for key in keys:
            file = self.folder / key.hex()
            with contextlib.suppress(OSError):
                nbytes = file.stat().st_size
                file.unlink()
                self.used_bytes -= self.capabilities.charge(nbytes)

    def close(self) -> None:
        """See `Tier.close`."""
        self.closed = True
        if self.lock_fd is not None:
            folderlock.unlock(self.lock_fd)
            self.lock_fd = None


class SharedFolder(FolderTier):
    """Several engines use one folder; sound."""

    shared = True


class ReadOnlyFolder(FolderTier):
    """Serves what others have put into its folder; sound."""

    read_only = True


def fill_folder(path: Path, namespace: Namespace, objects: Mapping[BlockKey, bytes]) -> None:
    """Be the others: put objects where a `ReadOnlyFolder` of rank 0 finds them."""
    folder = path / "0" / namespace.hex()
    folder.mkdir(parents=True, exist_ok=True)
    for key, content in objects.items():
        (folder / key.hex()).write_bytes(content)


class LendingTier(MemoryTier, Addressable):
    """A memory tier that can be a host pool: each object on pages of its own; sound."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self._capabilities = replace(self._capabilities, addressable=True, unit_bytes=PAGE_BYTES)
        self.reserved: dict[BlockKey, Region] = {}
        self.published: dict[BlockKey, Region] = {}

    def _run(self, transfer: Transfer) -> Completion:
        key, region = transfer.key, transfer.region
        if transfer.op is Op.STORE and key not in self.published:
            assert region is not None
            lent = self.reserve(key, region.nbytes)
            if lent is None:
                reason = Reason.BUSY if key in self.reserved else Reason.FULL
                return Completion(transfer.ticket, Outcome.FAILED, reason)
            lent.view()[: region.nbytes] = region.view()
            self.publish(key)
        known = self.published.get(key)
        if known is None:
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        if transfer.op is Op.LOAD:
            assert region is not None
            if known.nbytes > region.nbytes:
                return Completion(transfer.ticket, Outcome.FAILED, Reason.CORRUPT)
            region.view()[: known.nbytes] = known.view()
        return Completion(transfer.ticket, Outcome.DONE, nbytes=known.nbytes)

    def take(self, nbytes: int) -> Region:
        """Take pages of its own for an object."""
        pages = mmap.mmap(-1, self._capabilities.charge(nbytes))
        return Region(ctypes.addressof(ctypes.c_char.from_buffer(pages)), nbytes, owner=pages)

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        for key in keys:
            if key in self.published:
                self._used_bytes -= self._capabilities.charge(self.published.pop(key).nbytes)

    def reserve(self, key: BlockKey, nbytes: int) -> Region | None:
        """See `Addressable.reserve`."""
        used_bytes = self._used_bytes + self._capabilities.charge(nbytes)
        if (
            key in self.reserved
            or key in self.published
            or used_bytes > (self._capabilities.capacity_bytes or 0)
        ):
            return None
        self._used_bytes = used_bytes
        self.reserved[key] = self.take(nbytes)
        return self.reserved[key]

    def publish(self, key: BlockKey) -> None:
        """See `Addressable.publish`."""
        if key not in self.reserved:
            raise TransitionError("not reserved")
        self.published[key] = self.reserved.pop(key)

    def abandon(self, key: BlockKey) -> None:
        """See `Addressable.abandon`."""
        if key not in self.reserved:
            raise TransitionError("not reserved")
        self._used_bytes -= self._capabilities.charge(self.reserved.pop(key).nbytes)

    def view(self, key: BlockKey) -> Region | None:
        """See `Addressable.view`."""
        return self.published.get(key)
