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
    """Blocks as ``bytes`` in a dictionary; every transfer is complete at the next poll."""

    def __init__(self, config: MemoryConfig, context: TierContext) -> None:
        share = config.capacity // context.world_size
        self._capabilities = Capabilities(
            capacity_blocks=share // context.block_bytes, queue_depth=_QUEUE_DEPTH
        )
        self._context = context
        self._blocks: dict[BlockKey, bytes] = {}
        self._done: list[Completion] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<MemoryTier {len(self._blocks)}/{self._capabilities.capacity_blocks} blocks>"

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[BlockKey]:
        """See `Tier.inventory`."""
        return ()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        if self._closed:
            raise TierError("the tier is closed", operation="submit", tier="memory")
        if len(self._done) + len(transfers) > _QUEUE_DEPTH:
            raise QueueFullError("poll first", operation="submit", tier="memory")
        self._done += [self._run(transfer) for transfer in transfers]
        self._context.wake()

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        done, self._done = self._done, []
        return done

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        for key in keys:
            self._blocks.pop(key, None)

    def close(self) -> None:
        """See `Tier.close`."""
        self._closed = True
        self._blocks.clear()

    def _run(self, transfer: Transfer) -> Completion:
        ticket, key, region = transfer.ticket, transfer.key, transfer.region
        if transfer.op is Op.STORE:
            if key not in self._blocks:
                capacity = self._capabilities.capacity_blocks
                assert region is not None
                assert capacity is not None
                if len(self._blocks) >= capacity:
                    return Completion(ticket, Outcome.FAILED, Reason.FULL)
                self._blocks[key] = bytes(region.view())
            return Completion(ticket, Outcome.DONE)
        if key not in self._blocks:
            return Completion(ticket, Outcome.MISSING, Reason.MISSING)
        if transfer.op is Op.LOAD:
            assert region is not None
            region.view()[:] = self._blocks[key]
        return Completion(ticket, Outcome.DONE)


@hookimpl
def kvbm_backends() -> Sequence[Backend]:
    """Offer the backend ``memory``."""
    return [Backend("memory", MemoryConfig, MemoryTier)]
