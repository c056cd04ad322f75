"""Small sound tiers: what the broken ones are made from, and models to read."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from kvbm_core.block import BlockKey
from kvbm_core.config import ByteSize
from kvbm_core.errors import QueueFullError, TierError, TransitionError
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

__all__ = ["FolderConfig", "FolderTier", "LendingTier", "SharedFolder"]


class FolderConfig(TierConfig, frozen=True):
    """Settings of a `FolderTier`."""

    path: str
    capacity: ByteSize


class FolderTier(Tier):
    """A file a block, read and written in `submit`: simple, sound and durable."""

    durable: bool = True
    shared: bool = False

    def __init__(self, config: FolderConfig, context: TierContext) -> None:
        self.context = context
        self.folder = self.place(Path(config.path))
        self.folder.mkdir(parents=True, exist_ok=True)
        share = config.capacity // context.world_size // context.block_bytes
        self.capacity_blocks = None if self.shared else share
        self.done: list[Completion] = []
        self.closed = False
        self.found = [] if self.shared else [bytes.fromhex(file.name) for file in self.files()]

    def place(self, path: Path) -> Path:
        """Say where this rank's blocks of this namespace are."""
        return path / self.context.namespace.hex() / str(self.context.rank)

    def files(self) -> list[Path]:
        """List the blocks, oldest first."""
        files = [file for file in self.folder.iterdir() if not file.suffix]
        return sorted(files, key=lambda file: file.stat().st_mtime_ns)

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return Capabilities(
            capacity_blocks=self.capacity_blocks,
            queue_depth=8,
            durable=self.durable,
            shared=self.shared,
            remote_lookup=self.shared,
        )

    def inventory(self) -> Iterable[BlockKey]:
        """See `Tier.inventory`."""
        return self.found

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        if self.closed:
            raise TierError("the tier is closed")
        if len(self.done) + len(transfers) > self.capabilities.queue_depth:
            raise QueueFullError("poll first")
        for transfer in transfers:
            self.done.append(Completion(transfer.ticket, *self.end(transfer)))
            self.context.wake()

    def end(self, transfer: Transfer) -> tuple[Outcome, Reason]:
        """Carry a transfer out."""
        file, region = self.folder / transfer.key.hex(), transfer.region
        if transfer.op is Op.STORE and not file.exists():
            if self.capacity_blocks is not None and len(self.files()) >= self.capacity_blocks:
                return Outcome.FAILED, Reason.FULL
            assert region is not None
            self.write(file, region)
        if not file.exists():
            return Outcome.MISSING, Reason.MISSING
        if transfer.op is Op.LOAD:
            assert region is not None
            content = file.read_bytes()
            if len(content) != region.nbytes:
                return Outcome.FAILED, Reason.CORRUPT
            region.view()[:] = content
        return Outcome.DONE, Reason.NONE

    def write(self, file: Path, region: Region) -> None:
        """Write a block so that nobody ever sees half of it."""
        part = file.with_suffix(f".{id(self)}")
        part.write_bytes(region.view())
        part.rename(file)

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        done, self.done = self.done, []
        return done

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        for key in keys:
            (self.folder / key.hex()).unlink(missing_ok=True)

    def close(self) -> None:
        """See `Tier.close`."""
        self.closed = True


class LendingTier(MemoryTier, Addressable):
    """A memory tier that can be a host pool; sound."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        super().__init__(config, context)
        self.step = -(-context.block_bytes // PAGE_BYTES) * PAGE_BYTES
        count = super().capabilities.capacity_blocks or 0
        self.arena = mmap.mmap(-1, max(1, count) * self.step)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.arena))
        self.free = [base + at * self.step for at in range(count)]
        self.reserved: dict[BlockKey, int] = {}
        self.published: dict[BlockKey, int] = {}

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return replace(super().capabilities, addressable=True)

    def _run(self, transfer: Transfer) -> Completion:
        key, region = transfer.key, transfer.region
        if transfer.op is Op.STORE and key not in self.published:
            lent = self.reserve(key)
            if lent is None:
                reason = Reason.BUSY if key in self.reserved else Reason.FULL
                return Completion(transfer.ticket, Outcome.FAILED, reason)
            assert region is not None
            lent.view()[:] = region.view()
            self.publish(key)
        elif transfer.op is not Op.STORE and key not in self.published:
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        elif transfer.op is Op.LOAD:
            assert region is not None
            region.view()[:] = self.region(self.published[key]).view()
        return Completion(transfer.ticket, Outcome.DONE)

    def region(self, address: int) -> Region:
        """Make the region of a slot."""
        return Region(address, self._context.block_bytes, owner=self.arena)

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        self.free += [self.published.pop(key) for key in keys if key in self.published]

    def reserve(self, key: BlockKey) -> Region | None:
        """See `Addressable.reserve`."""
        if key in self.reserved or key in self.published or not self.free:
            return None
        self.reserved[key] = self.free.pop()
        return self.region(self.reserved[key])

    def publish(self, key: BlockKey) -> None:
        """See `Addressable.publish`."""
        if key not in self.reserved:
            raise TransitionError("not reserved")
        self.published[key] = self.reserved.pop(key)

    def abandon(self, key: BlockKey) -> None:
        """See `Addressable.abandon`."""
        if key not in self.reserved:
            raise TransitionError("not reserved")
        self.free.append(self.reserved.pop(key))

    def view(self, key: BlockKey) -> Region | None:
        """See `Addressable.view`."""
        return self.region(self.published[key]) if key in self.published else None


class SharedFolder(FolderTier):
    """Several engines use one folder; sound."""

    shared = True
