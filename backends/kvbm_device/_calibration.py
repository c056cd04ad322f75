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
"""Of blocks of all KV groups: several pieces either way, and they overlap."""
_ROUNDS: Final = 5
"""The first compiles and warms up; the best counts."""
_PROGRAMS: Final = (8, 16, 32)
_KERNEL_HANDICAP: Final = 0.9
"""A kernel that crosses the link itself takes multiprocessors from the engine."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """Blocks of one KV group, and where they go."""

    group: int
    blocks: Sequence[int]
    regions: Sequence[Region]


@dataclass(frozen=True, slots=True)
class Rate:
    """What one way was measured to move."""

    method: Method
    out_bytes_per_s: float
    in_bytes_per_s: float


def calibrate(gpu: Gpu, device: StagedDevice, copy: str) -> list[Rate]:
    """Measure every way, and have the device use the fastest out and in.

    Reads some of the engine's blocks and writes the same bytes back, so call it before the engine runs. Each
    KV group that has pages of its own has the same share of the bytes measured: nobody knows yet which of
    them an engine will move.

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
    samples, unpins = _samples(device)
    try:
        rates = [_measure(gpu, device.links, method, samples) for method in methods]
    finally:
        for unpin in unpins:
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


def _samples(device: StagedDevice) -> tuple[list[_Sample], list[Callable[[], None]]]:
    """Take page-locked memory for some blocks of each KV group. Give what undoes the lock, too."""
    traits, samples, unpins = device.traits, [], []
    held = [group for group in sorted(set(device.layout.alike)) if traits.block_bytes[group]]
    for group in held:
        nbytes = traits.block_bytes[group]
        count = max(1, min(traits.num_blocks, _SAMPLE_BYTES // len(held) // nbytes))
        blocks = random.Random(group).sample(range(traits.num_blocks), count)
        pitch = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        memory = mmap.mmap(-1, count * pitch)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        unpins += _page_lock(device, address, count * pitch)
        regions = [Region(address + at * pitch, nbytes, owner=memory) for at in range(count)]
        samples.append(_Sample(group, blocks, regions))
    return samples, unpins


def _page_lock(device: StagedDevice, address: int, nbytes: int) -> list[Callable[[], None]]:
    """Page-lock a sample. Where that cannot be, the tiers' memory is not locked either."""
    try:
        return [device.pin(address, nbytes)]
    except KvbmError as error:
        logger.warning("copies are measured with memory that is not page-locked: %s", error)
        return []


def _methods(gpu: Gpu) -> list[Method]:
    kernels = [Method(Way.KERNEL, programs) for programs in _PROGRAMS] if gpu.has_kernel else []
    return [Method(Way.STAGED), Method(Way.DMA), *kernels]


def _weight(method: Method) -> float:
    return _KERNEL_HANDICAP if method.way is Way.KERNEL else 1.0


def _measure(gpu: Gpu, links: tuple[Link, Link], method: Method, samples: Sequence[_Sample]) -> Rate:
    seconds = []
    for link, move in zip(links, (_store_all, _load_all), strict=True):
        before, link.method = link.method, method
        rounds = [move(gpu, link, samples) for _ in range(_ROUNDS)]
        seconds.append(min(rounds[1:]))
        link.method = before
    nbytes = sum(region.nbytes for sample in samples for region in sample.regions)
    return Rate(method, nbytes / seconds[0], nbytes / seconds[1])


def _store_all(gpu: Gpu, link: Link, samples: Sequence[_Sample]) -> float:
    start_s = time.perf_counter()
    fence = away = gpu.events.record(gpu.streams.engine_stream())
    for sample in samples:
        step = link.piece_blocks[sample.group]
        for first in range(0, len(sample.blocks), step):
            part = slice(first, first + step)
            _, away = link.store(sample.blocks[part], sample.regions[part], [fence], sample.group)
    gpu.events.wait_here(away)
    return time.perf_counter() - start_s


def _load_all(gpu: Gpu, link: Link, samples: Sequence[_Sample]) -> float:
    start_s = time.perf_counter()
    fence = there = gpu.events.record(gpu.streams.engine_stream())
    for sample in samples:
        there = link.load(sample.regions, sample.blocks, fence, sample.group)
    gpu.events.wait_here(there)
    return time.perf_counter() - start_s


def _log(rates: Sequence[Rate], device: StagedDevice, out: Method, into: Method) -> None:
    table = ", ".join(
        f"{rate.method} {rate.out_bytes_per_s / 1e9:.1f}/{rate.in_bytes_per_s / 1e9:.1f}" for rate in rates
    )
    logger.info(
        "copies of %s, out/in in GB/s: %s; blocks leave by %s and come by %s",
        device.layout, table, out, into,
    )  # fmt: skip
