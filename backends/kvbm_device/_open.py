"""From an engine's tensors to the device that copies them."""

from __future__ import annotations

import logging
from typing import Final

from kvbm_core.config import size_text
from kvbm_core.device import Device
from kvbm_core.errors import ConfigError, KvbmError
from kvbm_device._host import HostDevice
from kvbm_device._layout import Groups, Layout, layout_of
from kvbm_device._link import Way

__all__ = ["check_copy", "open_device"]

logger = logging.getLogger("kvbm_device")

_COPIES: Final = ("auto", *(way.value for way in Way))

_MIN_STAGING_BYTES: Final = 4 << 20


def check_copy(copy: str) -> None:
    """Look at a choice of how bytes cross the link before anything starts.

    Raises:
        ConfigError: If there is no such way.
    """
    if copy not in _COPIES:
        raise ConfigError(f"device_copy: {copy!r}; write one of {', '.join(_COPIES)}")


def open_device(
    tensors: Groups,
    num_blocks: int,
    *,
    copy: str = "auto",
    staging_bytes: int = 256 << 20,
) -> Device:
    """Open the engine's KV tensors with the implementation for the memory they lie in.

    Args:
        tensors: By layer, in the engine's order; of an engine with several KV groups one such mapping for
            each, in the order of their numbers, empty where this rank has no layer of a group.
        num_blocks: Blocks the engine has, counted as its scheduler counts them, for all groups together.
        copy: How bytes cross the link of an accelerator: ``staged``, ``dma``, ``kernel``, or ``auto`` for
            the fastest, found by a measurement of a fraction of a second.
        staging_bytes: Memory of the accelerator for blocks on their way; less where there is not so much.

    Raises:
        ConfigError: If a tensor's blocks cannot be told apart, or share bytes with another block, or `copy`
            is none of these.
        KvbmError: If the tensors are in memory that is not supported.
    """
    check_copy(copy)
    layout = layout_of(tensors, num_blocks)
    first, kinds = layout.tensors[0].device, {str(tensor.device) for tensor in layout.tensors}
    if len(kinds) != 1:
        raise KvbmError(
            f"the KV tensors are in several places: {', '.join(sorted(kinds))}; register one kind",
            operation="open",
        )
    if first.type == "cpu":
        return HostDevice(layout)
    if first.type != "cuda":
        raise KvbmError(
            f"KV tensors on {kinds.pop()!r} are not supported; run on CUDA or on CPU", operation="open"
        )
    return _open_cuda(first.index or 0, layout, copy, staging_bytes)


def _open_cuda(index: int, layout: Layout, copy: str, staging_bytes: int) -> Device:
    from kvbm_device._calibration import calibrate
    from kvbm_device._cuda import open_cuda
    from kvbm_device._staged import StagedDevice

    gpu = open_cuda(index)
    while True:
        try:
            device = StagedDevice(gpu, layout, staging_bytes)
            break
        except MemoryError:
            if staging_bytes <= _MIN_STAGING_BYTES:
                raise KvbmError(
                    "the accelerator has no memory for blocks on their way: lower gpu_memory_utilization",
                    operation="open",
                ) from None
            staging_bytes //= 2
            logger.warning(
                "little memory is left on the accelerator: %s of staging", size_text(staging_bytes)
            )
    calibrate(gpu, device, copy)
    return device
