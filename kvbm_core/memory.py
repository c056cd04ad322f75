"""The simplest tier: a dictionary. The oracle that every other tier is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvbm_core.block import BlockKey
from kvbm_core.config import ByteSize
from kvbm_core.errors import QueueFullError, TierError
from kvbm_core.hookspecs import hookimpl
from kvbm_core.tier import (
    Backend,
    Capabilities,
    Completion,
    Op,
    Outcome,
    Reason,
    Tier,
    TierConfig,
    TierContext,
    Transfer,
)

__all__ = ["MemoryConfig", "MemoryTier", "kvbm_backends"]

_QUEUE_DEPTH = 64


class MemoryConfig(TierConfig, frozen=True):
    """Settings of a `MemoryTier`."""

    capacity: ByteSize
    """Bytes, over all ranks."""


class MemoryTier(Tier):
    """Objects as ``bytes`` in a dictionary; every transfer is complete at the next poll."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        self._capabilities = Capabilities(config.capacity // context.world_size, queue_depth=_QUEUE_DEPTH)
        self._context = context
        self._objects: dict[BlockKey, bytes] = {}
        self._used_bytes = 0
        self._done: list[Completion] = []
        self._closed = False

    def __repr__(self) -> str:
        capacity_bytes = self._capabilities.capacity_bytes
        return f"<MemoryTier {len(self._objects)} objects, {self._used_bytes}/{capacity_bytes} bytes>"

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        """See `Tier.inventory`."""
        return ()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        if self._closed:
            raise TierError("the tier is closed", operation="submit", tier=self._context.name or "memory")
        if len(self._done) + len(transfers) > _QUEUE_DEPTH:
            raise QueueFullError("poll first", operation="submit", tier=self._context.name or "memory")
        self._done += [self._run(transfer) for transfer in transfers]
        self._context.wake()

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        done, self._done = self._done, []
        return done

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        for key in keys:
            self._used_bytes -= len(self._objects.pop(key, b""))

    def close(self) -> None:
        """See `Tier.close`."""
        self._closed = True
        self._objects.clear()
        self._used_bytes = 0

    def _run(self, transfer: Transfer) -> Completion:
        ticket, key, region = transfer.ticket, transfer.key, transfer.region
        if transfer.op is Op.STORE and key not in self._objects:
            assert region is not None
            if self._used_bytes + region.nbytes > (self._capabilities.capacity_bytes or 0):
                return Completion(ticket, Outcome.FAILED, Reason.FULL)
            self._objects[key] = bytes(region.view())
            self._used_bytes += region.nbytes
        content = self._objects.get(key)
        if content is None:
            return Completion(ticket, Outcome.MISSING, Reason.MISSING)
        if transfer.op is Op.LOAD:
            assert region is not None
            if len(content) > region.nbytes:
                why = f"the object has {len(content)} bytes, its region {region.nbytes}"
                return Completion(ticket, Outcome.FAILED, Reason.CORRUPT, why)
            region.view()[: len(content)] = content
        return Completion(ticket, Outcome.DONE, nbytes=len(content))


@hookimpl
def kvbm_backends() -> Sequence[Backend]:
    """Offer the backend ``memory``."""
    return [Backend("memory", MemoryConfig, MemoryTier)]
