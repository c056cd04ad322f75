"""Host regions in use: the host pool's own memory, or the staging pool's.

A region may be read by several transfers at once, and a tier that was given up on may still write
to it. It is given back, or forgotten by the host pool, when the last user has let go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from kvbm_core.block import BlockKey
from kvbm_core.device import Stageable
from kvbm_core.staging import Staging
from kvbm_core.tier import Capabilities, Region

__all__ = ["BatchLease", "HostBuffers", "Lease"]

_SHARES: Final = 4


@dataclass(slots=True, eq=False)
class Lease:
    """A region and its users."""

    region: Region
    users: int = 1
    key: BlockKey | None = None
    """Of a block in the host pool's memory."""
    when_free: list[Callable[[], object]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class BatchLease:
    """Blocks in the host pool's memory used together. There are thousands, so none has a lease of its own."""

    regions: dict[int, Region]
    """By position among the blocks asked for, of those that could be had."""
    keys: frozenset[BlockKey]
    """Of the same, so that none is forgotten meanwhile."""
    when_free: list[Callable[[], object]] = field(default_factory=list)


class HostBuffers:
    """Finds regions and counts their users.

    Args:
        host_pool: The tier that is both a `Tier` and `Addressable`, if there is one.
        staging: The pool for blocks that pass through no host pool.
        longest_bytes: Length of the longest object.
    """

    def __init__(self, host_pool: Any, staging: Staging | None, longest_bytes: int) -> None:
        self._host_pool = host_pool
        self._staging = staging
        self._longest_bytes = longest_bytes
        self._lent: dict[BlockKey, Lease] = {}
        self._batches: set[BatchLease] = set()

    def __repr__(self) -> str:
        return f"<HostBuffers {len(self._lent)} leases, {len(self._batches)} batches, {self._staging!r}>"

    @property
    def tier_share(self) -> int | None:
        """Regions that one of several tiers may hold: it may hang, and the others need some. None: all."""
        if self._host_pool is not None:
            pool: Capabilities = self._host_pool.capabilities
            capacity_bytes = pool.capacity_bytes
            count = None if capacity_bytes is None else capacity_bytes // pool.charge(self._longest_bytes)
        else:
            count = self._staging.count if self._staging else None
        return None if count is None else max(1, count // _SHARES)

    def reserve(self, key: BlockKey, nbytes: int) -> Lease | None:
        """Use memory of the host pool that is about to be filled. None if it has none, or has the block."""
        if self._host_pool is None or key in self._lent:
            return None
        return self._use_lent(key, self._host_pool.reserve(key, nbytes))

    def borrow(self, key: BlockKey) -> Lease | None:
        """Use the memory of a block that the host pool has. None if it has it not."""
        if key in self._lent:
            return self.share(self._lent[key])
        return None if self._host_pool is None else self._use_lent(key, self._host_pool.view(key))

    def lease_batch(self, keys: Sequence[BlockKey], *, fill_bytes: int = 0) -> BatchLease:
        """Use the memory of those of some blocks that the host pool has, until `end_batch`.

        `fill_bytes`: of those it has not, as far as it has room for objects so long; each is to be published
        or abandoned.
        """
        pool = self._host_pool
        if fill_bytes:
            regions = {at: region for at, key in enumerate(keys) if (region := pool.reserve(key, fill_bytes))}
        else:
            regions = {at: region for at, key in enumerate(keys) if (region := pool.view(key))}
        batch = BatchLease(regions, frozenset(keys[at] for at in regions))
        if regions:  # Else there is no copy that would end it.
            self._batches.add(batch)
        return batch

    def end_batch(self, batch: BatchLease) -> None:
        """End a batch."""
        self._batches.remove(batch)
        for action in batch.when_free:
            action()

    def stage(self, nbytes: int) -> Lease | None:
        """Use memory of the staging pool. None if all is in use."""
        region = self._staging.take() if self._staging else None
        if self._staging is None or region is None:
            return None
        return Lease(region.part(0, nbytes), when_free=[partial(self._staging.give_back, region)])

    def stage_on(self, device: Stageable, nbytes: int) -> Lease | None:
        """Use memory of the device. None if all that it sets aside is in use."""
        region = device.stage(nbytes)
        return None if region is None else Lease(region, when_free=[partial(device.unstage, region)])

    def for_load(self, key: BlockKey, nbytes: int, *, keep: bool) -> tuple[Lease | None, bool]:
        """Use memory for a block that a load brings. True: the host pool's, which may keep it."""
        lease = self.reserve(key, nbytes) if keep else None
        return (lease, True) if lease else (self.stage(nbytes), False)

    def share(self, lease: Lease) -> Lease:
        """Add a user."""
        lease.users += 1
        return lease

    def release(self, lease: Lease) -> None:
        """Take a user away."""
        lease.users -= 1
        if lease.users == 0:
            if lease.key is not None:
                del self._lent[lease.key]
            for action in lease.when_free:
                action()

    def publish(self, key: BlockKey) -> None:
        """Say that a reserved block is complete."""
        self._host_pool.publish(key)

    def abandon(self, user: Lease | BatchLease, key: BlockKey) -> None:
        """Have the host pool take reserved memory back when it is free."""
        user.when_free.append(partial(self._host_pool.abandon, key))

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """Have the host pool forget blocks, at once or when nobody uses them."""
        unused = set(keys).difference(self._lent)
        for key in set(keys) - unused:
            self._lent[key].when_free.append(partial(self.drop, [key]))
        for batch in self._batches:
            if held := unused & batch.keys:
                batch.when_free.append(partial(self.drop, list(held)))
                unused -= held
        self._host_pool.discard([key for key in keys if key in unused])

    def close(self) -> None:
        """Give the staging memory up."""
        if self._staging:
            self._staging.close()

    def _use_lent(self, key: BlockKey, region: Region | None) -> Lease | None:
        if region is None:
            return None
        lease = self._lent[key] = Lease(region, key=key)
        return lease
