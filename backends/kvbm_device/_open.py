"""From an engine's tensors to the device that copies them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from kvbm_core.device import Device
from kvbm_core.errors import ConfigError, KvbmError
from kvbm_device._host import HostDevice
from kvbm_device._link import Way
from kvbm_device._views import PageView, page_views

if TYPE_CHECKING:
    import torch

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
    tensors: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
    num_blocks: int,
    *,
    copy: str = "auto",
    staging_bytes: int = 256 << 20,
) -> Device:
    """Open the engine's KV tensors with the implementation for the memory they lie in.

    Args:
        tensors: By layer, in the engine's order.
        num_blocks: Blocks the engine has, counted as its scheduler counts them.
        copy: How bytes cross the link of an accelerator: ``staged``, ``dma``, ``kernel``, or ``auto`` for
            the fastest, found by a measurement of a fraction of a second.
        staging_bytes: Memory of the accelerator for blocks on their way; less where there is not so much.

    Raises:
        ConfigError: If a tensor's blocks cannot be told apart, or `copy` is none of these.
        KvbmError: If the tensors are in memory that is not supported.
    """
    check_copy(copy)
    views = page_views(tensors, num_blocks)
    flat = [t for value in tensors.values() for t in (value if isinstance(value, Sequence) else [value])]
    kinds = {str(tensor.device) for tensor in flat}
    if len(kinds) != 1:
        raise KvbmError(
            f"the KV tensors are in several places: {', '.join(sorted(kinds))}; register one kind",
            operation="open",
        )
    # The tensors, not the mapping: the caller may change that.
    if flat[0].device.type == "cpu":
        return HostDevice(views, num_blocks, owner=flat)
    if flat[0].device.type != "cuda":
        raise KvbmError(
            f"KV tensors on {kinds.pop()!r} are not supported; run on CUDA or on CPU", operation="open"
        )
    return _open_cuda(flat[0].device.index or 0, views, num_blocks, flat, copy, staging_bytes)


def _open_cuda(
    index: int, views: Sequence[PageView], num_blocks: int, owner: Any, copy: str, staging_bytes: int
) -> Device:
    from kvbm_device._calibration import calibrate
    from kvbm_device._cuda import open_cuda
    from kvbm_device._pages import page_table
    from kvbm_device._staged import StagedDevice

    gpu, table = open_cuda(index), page_table(views, num_blocks)
    while True:
        try:
            device = StagedDevice(gpu, table, owner, staging_bytes)
            break
        except MemoryError:
            if staging_bytes <= _MIN_STAGING_BYTES:
                raise KvbmError(
                    "the accelerator has no memory for blocks on their way: lower gpu_memory_utilization",
                    operation="open",
                ) from None
            staging_bytes //= 2
            logger.warning("little memory is left on the accelerator: %d bytes of staging", staging_bytes)
    calibrate(gpu, device, copy)
    return device
