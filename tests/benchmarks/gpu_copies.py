"""The copy engine on a GPU: blocks of many pages at random places, to and from host memory.

    python tests/benchmarks/gpu_copies.py [--peer] [--json FILE]

For each page size a device of 8 GiB, blocks of 2 MiB (so 512 pages of 4 KiB ... one of 2 MiB); 512 blocks
at random are gathered into host memory as the cpu tier lends it, and scattered back. Beside it each other
way over the link, with --peer vLLM's `swap_blocks_batch`, and the link itself: one contiguous copy of as
many bytes. Every round's bytes are compared. GB/s, median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from kvbm_core.tier import Region, TierContext
from kvbm_cpu import CpuConfig, CpuTier
from kvbm_device import StagedDevice, open_device
from kvbm_device._link import Method, Way

BLOCK = 2 << 20
DEVICE_BYTES = 8 << 30
BLOCKS = 512
PAGES = [4096 << at for at in (0, 1, 2, 3, 4, 6, 9)]
METHODS = [Method(Way.STAGED), Method(Way.DMA), *(Method(Way.KERNEL, n) for n in (8, 16, 32))]


def layers_of(page: int) -> dict[str, torch.Tensor]:
    """As many layers as a block has pages, each an allocation's slice, as vLLM lays them out."""
    views, count = BLOCK // page, DEVICE_BYTES // BLOCK
    memory = torch.empty(views, count, page // 4, dtype=torch.int32, device="cuda")
    for view in range(views):
        memory[view] = torch.arange(count, device="cuda", dtype=torch.int32)[:, None] * 1_000 + view
    return {f"layer.{at}": memory[at] for at in range(views)}


def host_memory(device, nbytes: int) -> CpuTier:
    """Host memory as an engine on this device would have it."""
    context = TierContext(b"n" * 16, BLOCK + 96, 0, 1, lambda: None, device.pin)
    return CpuTier(CpuConfig(capacity=nbytes), context)


def reserved(arena: CpuTier, count: int) -> list[Region]:
    """Room for so many blocks."""
    return [arena.reserve(bytes([at % 256, at // 256]) * 16, BLOCK + 96) for at in range(count)]


def timed(run) -> float:
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def wait(work) -> None:
    while not work.done():
        pass


def rate(seconds: list[float], nbytes: int) -> float:
    return round(nbytes / statistics.median(seconds) / 1e9, 1)


def link_rates(rounds: int) -> tuple[float, float]:
    """One contiguous copy each way."""
    nbytes = BLOCKS * BLOCK
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    out, into = [], []
    for _ in range(rounds):
        out.append(timed(lambda: (host.copy_(device, non_blocking=True), torch.cuda.synchronize())))
        into.append(timed(lambda: (device.copy_(host, non_blocking=True), torch.cuda.synchronize())))
    return rate(out, nbytes), rate(into, nbytes)


def ours(device: StagedDevice, method: Method, blocks, regions, rounds: int, check) -> tuple[float, float]:
    device.use(method, method)
    out, into = [], []
    for at in range(rounds + 1):
        out.append(timed(lambda: wait(device.gather(blocks, regions, device.claim(())))))
        check.scrub(blocks)
        into.append(timed(lambda: wait(device.scatter(regions, blocks, device.claim(blocks)))))
        if at == 0 or at == rounds:
            check.equal()
    return rate(out[1:], len(blocks) * BLOCK), rate(into[1:], len(blocks) * BLOCK)


class Check:
    """What every page must hold."""

    def __init__(self, layers) -> None:
        self.layers = list(layers.values())
        self.numbers = torch.arange(self.layers[0].shape[0], device="cuda", dtype=torch.int32) * 1_000

    def scrub(self, blocks) -> None:
        index = torch.tensor(blocks, device="cuda")
        for layer in self.layers:
            layer.index_fill_(0, index, -1)

    def equal(self) -> None:
        for view, layer in enumerate(self.layers):
            assert bool((layer == (self.numbers + view)[:, None]).all()), view


def vllms(layers, blocks, regions, page: int, rounds: int) -> tuple[float, float]:
    from vllm import _custom_ops as ops

    bases = np.array([layer.data_ptr() for layer in layers.values()], dtype=np.int64)
    pages = (bases[None, :] + np.array(blocks, dtype=np.int64)[:, None] * page).ravel()
    starts = np.array([r.address for r in regions], dtype=np.int64)
    flats = (starts[:, None] + np.arange(len(bases), dtype=np.int64)[None, :] * page).ravel()
    inside, outside = torch.from_numpy(pages), torch.from_numpy(flats)
    sizes = torch.full_like(inside, page)
    stream, out, into = torch.cuda.Stream(), [], []

    def copy(source, target, order_any):
        with torch.cuda.stream(stream):
            ops.swap_blocks_batch(source, target, sizes, is_src_access_order_any=order_any)
        stream.synchronize()

    for _ in range(rounds + 1):
        out.append(timed(lambda: copy(inside, outside, False)))
        into.append(timed(lambda: copy(outside, inside, True)))
    return rate(out[1:], len(blocks) * BLOCK), rate(into[1:], len(blocks) * BLOCK)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pages", type=int, nargs="+", default=[page >> 10 for page in PAGES], help="in KiB")
    arguments = parser.parse_args()
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, python {platform.python_version()}, ",
        end="",
    )
    print(f"Linux {platform.release()}, {os.cpu_count()} CPUs; transparent huge pages: ", end="")
    print(Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip())
    found, arena = [], None
    for page in [kib << 10 for kib in arguments.pages]:
        layers = layers_of(page)
        start_s = time.perf_counter()
        device = open_device(layers, DEVICE_BYTES // BLOCK)
        print(
            f"page {page >> 10} KiB: opened in {time.perf_counter() - start_s:.2f} s, {device!r}", flush=True
        )
        chosen = [link.method for link in device.links]
        start_s = time.perf_counter()
        arena = host_memory(device, 8 << 30)
        print(f"host memory of 8 GiB: {time.perf_counter() - start_s:.2f} s, {arena!r}", flush=True)
        link = link_rates(arguments.rounds)
        regions = reserved(arena, BLOCKS)
        blocks = random.Random(page).sample(range(DEVICE_BYTES // BLOCK), BLOCKS)
        check = Check(layers)
        rows = {str(m): ours(device, m, blocks, regions, arguments.rounds, check) for m in METHODS}
        shuffled = random.Random(1).sample(regions, BLOCKS)
        rows["staged, host blocks at random"] = ours(
            device, METHODS[0], blocks, shuffled, arguments.rounds, check
        )
        if arguments.peer:
            rows["vLLM swap_blocks_batch"] = vllms(layers, blocks, regions, page, arguments.rounds)
        best = [rows[str(method)][way] / link[way] for way, method in enumerate(chosen)]
        print(
            f"  link {link[0]}/{link[1]}; chosen {chosen[0]}, {chosen[1]}: {best[0]:.3f}/{best[1]:.3f} of it"
        )
        print("  " + ", ".join(f"{name} {out}/{into}" for name, (out, into) in rows.items()), flush=True)
        found.append(
            {"page": page, "link": link, "chosen": [str(m) for m in chosen], "of_link": best, "rows": rows}
        )
        device.close()
        arena.close()
        del layers, device, check
        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
