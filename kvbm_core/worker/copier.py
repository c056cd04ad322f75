"""The device's copies that are under way, and their starts and ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Final

from kvbm_core.device import Device, Work
from kvbm_core.plan import Load, Store
from kvbm_core.tier import Region
from kvbm_core.worker.jobs import Copy, Failed

__all__ = ["Copier"]

logger = logging.getLogger("kvbm_core")

_SETTLE_S: Final = 10.0
"""Seconds that copies under way are waited for at the end."""


class Copier:
    """Starts copies of the device, and finds those that have ended.

    Args:
        device: The engine's blocks.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._copies: list[Copy] = []

    def __repr__(self) -> str:
        return f"<Copier {len(self._copies)} copies>"

    @property
    def pause_s(self) -> float | None:
        """Seconds between two looks at the copies under way. None if there are none."""
        return min((copy.job.pause_s for copy in list(self._copies)), default=None)

    @property
    def loading_bytes(self) -> int:
        """Bytes that the device is told to scatter, and has not."""
        loads = (copy for copy in self._copies if isinstance(copy.job.op, Load))
        return sum(len(copy.places) * copy.job.object_bytes for copy in loads)

    def start(self, copy: Copy, regions: Sequence[Region]) -> Copy:
        """Have the device gather into regions, or scatter from them. May be called under the lock."""
        op = copy.job.op
        assert isinstance(op, Store | Load)
        if not regions:
            return copy
        blocks = [op.blocks[at] for at in copy.places]
        try:
            if isinstance(op, Store):
                copy.work = self._device.gather(blocks, regions, copy.job.fence, op.group)
            else:
                copy.work = self._device.scatter(regions, blocks, copy.job.fence, op.group)
        except Exception:  # A device's error is as foreign as a tier's: it becomes an outcome.
            logger.exception("a copy could not be started")
        self._copies.append(copy)
        return copy

    def under_way(self) -> list[Copy]:
        """List the copies that have not been removed. Under the lock."""
        return list(self._copies)

    def ended(self, copies: Sequence[Copy]) -> list[tuple[Copy, bool]]:
        """Find those that have ended, each with True if it has worked. Outside the lock: it takes time."""
        return [(copy, done) for copy in copies if (done := self._is_done(copy.work)) is not None]

    def remove(self, copy: Copy) -> None:
        """Forget a copy that has ended. Under the lock."""
        self._copies.remove(copy)

    def settle(self) -> None:
        """Wait for the copies under way, but not for ever."""
        give_up_s = time.monotonic() + _SETTLE_S
        for copy in list(self._copies):
            while self._is_done(copy.work) is None and time.monotonic() < give_up_s:
                time.sleep(0.001)

    @staticmethod
    def _is_done(work: Work) -> bool | None:
        """True: copied. False: failed. None: not yet."""
        try:
            return True if work.done() else None
        except Exception:  # As in `start`.
            if not isinstance(work, Failed):
                logger.exception("a device copy failed")
            return False
