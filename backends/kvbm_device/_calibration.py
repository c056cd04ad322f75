"""Finds out how bytes cross the link fastest: measures each way with the engine's own pages.

Machines differ by more than any constant could cover: in one, DMA of 4 KiB pages moves 1.5 GB/s where a
kernel and staging move 49.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvbm_core.errors import ConfigError, KvbmError
from kvbm_core.tier import PAGE_BYTES, Region
from kvbm_device._gpu import Gpu
from kvbm_device._link import Link, Method, Way
from kvbm_device._staged import StagedDevice

__all__ = ["Rate", "calibrate"]

logger = logging.getLogger("kvbm_device")

_SAMPLE_BYTES: Final = 192 << 20
"""Several pieces either way: they overlap."""
_ROUNDS: Final = 5
"""The first compiles and warms up; the best counts."""
_PROGRAMS: Final = (8, 16, 32)
_KERNEL_HANDICAP: Final = 0.9
"""A kernel that crosses the link itself takes multiprocessors from the engine."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What one way was measured to move."""

    method: Method
    out_bytes_per_s: float
    in_bytes_per_s: float


def calibrate(gpu: Gpu, device: StagedDevice, copy: str) -> list[Rate]:
    """Measure every way, and have the device use the fastest out and in.

    Reads some of the engine's blocks and writes the same bytes back, so call it before the engine runs.

    Args:
        gpu: The accelerator.
        device: The engine's blocks.
        copy: ``auto``, or the name of the way that shall be used.

    Returns:
        What was measured, also in the log and in the device's `counts`.

    Raises:
        ConfigError: If that way needs Triton, and it is not installed.
    """
    methods = [m for m in _methods(gpu) if copy in ("auto", m.way.value)]
    if not methods:
        raise ConfigError(f"device_copy: {copy!r} needs triton; install it, or write auto, staged or dma")
    traits = device.traits
    count = max(1, min(traits.num_blocks, _SAMPLE_BYTES // traits.block_bytes))
    blocks = random.Random(0).sample(range(traits.num_blocks), count)
    pitch = -(-traits.block_bytes // PAGE_BYTES) * PAGE_BYTES
    memory = mmap.mmap(-1, count * pitch)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    unpin = _page_lock(device, address, count * pitch)
    regions = [Region(address + at * pitch, traits.block_bytes, owner=memory) for at in range(count)]
    try:
        rates = [_measure(gpu, device.links, method, blocks, regions) for method in methods]
    finally:
        if unpin is not None:
            unpin()
    out = max(rates, key=lambda rate: rate.out_bytes_per_s * _weight(rate.method)).method
    into = max(rates, key=lambda rate: rate.in_bytes_per_s * _weight(rate.method)).method
    device.use(out, into)
    table = device.counts.bytes_per_s
    table.clear()
    for rate in rates:
        table[str(rate.method), "device_to_host", rate.method == out] = rate.out_bytes_per_s
        table[str(rate.method), "host_to_device", rate.method == into] = rate.in_bytes_per_s
    _log(rates, device, out, into)
    return rates


def _page_lock(device: StagedDevice, address: int, nbytes: int) -> Callable[[], None] | None:
    """Page-lock the sample. Where that cannot be, the tiers' memory is not locked either."""
    try:
        return device.pin(address, nbytes)
    except KvbmError as error:
        logger.warning("copies are measured with memory that is not page-locked: %s", error)
        return None


def _methods(gpu: Gpu) -> list[Method]:
    kernels = [Method(Way.KERNEL, programs) for programs in _PROGRAMS] if gpu.has_kernel else []
    return [Method(Way.STAGED), Method(Way.DMA), *kernels]


def _weight(method: Method) -> float:
    return _KERNEL_HANDICAP if method.way is Way.KERNEL else 1.0


def _measure(
    gpu: Gpu, links: tuple[Link, Link], method: Method, blocks: Sequence[int], regions: Sequence[Region]
) -> Rate:
    seconds = []
    for link, move in zip(links, (_store_all, _load_all), strict=True):
        before, link.method = link.method, method
        rounds = [move(gpu, link, blocks, regions) for _ in range(_ROUNDS)]
        seconds.append(min(rounds[1:]))
        link.method = before
    nbytes = len(blocks) * links[0].block_bytes
    return Rate(method, nbytes / seconds[0], nbytes / seconds[1])


def _store_all(gpu: Gpu, link: Link, blocks: Sequence[int], regions: Sequence[Region]) -> float:
    start_s = time.perf_counter()
    fence = away = gpu.events.record(gpu.streams.engine_stream())
    for first in range(0, len(blocks), link.piece_blocks):
        part = slice(first, first + link.piece_blocks)
        _, away = link.store(blocks[part], regions[part], [fence])
    gpu.events.wait_here(away)
    return time.perf_counter() - start_s


def _load_all(gpu: Gpu, link: Link, blocks: Sequence[int], regions: Sequence[Region]) -> float:
    start_s = time.perf_counter()
    gpu.events.wait_here(link.load(regions, blocks, gpu.events.record(gpu.streams.engine_stream())))
    return time.perf_counter() - start_s


def _log(rates: Sequence[Rate], device: StagedDevice, out: Method, into: Method) -> None:
    table = ", ".join(
        f"{rate.method} {rate.out_bytes_per_s / 1e9:.1f}/{rate.in_bytes_per_s / 1e9:.1f}" for rate in rates
    )
    logger.info(
        "copies of blocks of %d bytes, out/in in GB/s: %s; blocks leave by %s and come by %s",
        device.traits.block_bytes, table, out, into,
    )  # fmt: skip
