"""NVMe to GPU memory: the gds tier on a machine with a GPU. Never run in CI.

    python tests/benchmarks/gpu_gds.py DIRECTORY [--blocks 512] [--nbytes 2097152] [--compat]

What the probe finds; the tier against bare preadv and pwritev; and a stack of host memory above
this tier, whose blocks go from the disk to the GPU past host memory, against the same stack without
device memory to read into, and against reads of bare pages. Every byte is compared.

--compat tells cuFile where its file system is, as udev would, and allows its compatibility mode: for
a container without udev and a kernel without nvidia-fs.
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
from importlib import metadata
from pathlib import Path

import torch
from bench_gds import SIZES, Memory, bench

from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.log_limit import TierLog
from kvbm_device import open_device
from kvbm_gds._probe import DIRECT, HOST, run_probe

PAGE = 4096


def allow_compatibility_mode(folder: Path) -> None:
    status = os.stat(folder)
    database = Path("/run/udev/data")
    database.mkdir(parents=True, exist_ok=True)
    entry = database / f"b{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    entry.write_text("E:ID_FS_TYPE=ext4\nE:ID_FS_USAGE=filesystem\n")
    settings = folder / "cufile.json"
    settings.write_text(
        json.dumps({"logging": {"dir": str(folder)}, "properties": {"allow_compat_mode": True}})
    )
    os.environ["CUFILE_ENV_PATH_JSON"] = str(settings)


def measure(name: str, engine: str, folder: Path, count: int, nbytes: int) -> None:
    """Store blocks, start again with an empty host tier, and load them from the disk."""
    tiers = [
        {"backend": "cpu", "capacity": 4 * (nbytes + PAGE)},
        {
            "backend": "gds",
            "capacity": 2 * count * (nbytes + PAGE) + (64 << 20),
            "path": str(folder / "stack"),
            "engine": engine,
        },
    ]
    keys, namespace = chain_keys(root_key(), range(count), 1), make_namespace({"run": name, "n": count})
    options = {"tiers": tiers, "load_deadline_s": 60, "store_deadline_s": 60, "max_store_blocks": count}
    blocks = torch.zeros((count, nbytes), dtype=torch.uint8, device="cuda")
    content = torch.frombuffer(bytearray(random.Random(1).randbytes(nbytes)), dtype=torch.uint8).cuda()
    for at in range(count):
        blocks[at] = content.roll(at * 97)
    expected = blocks.clone()
    with Stack.open(options, open_device({"blocks": blocks}, count), namespace) as stack:
        for at in range(0, count, 32):
            stack.store(keys[at : at + 32], range(at, at + 32), keys[:at])
            stack.wait()
        assert stack.counts["gds"].stored == count, stack.counts
    seconds = []
    for _ in range(4):
        blocks.zero_()
        with Stack.open(options, open_device({"blocks": blocks}, count), namespace) as stack:
            torch.cuda.synchronize()
            start_s = time.perf_counter()
            loaded = stack.load(keys, range(count))
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start_s)
            assert loaded == count, stack.counts
            detail = [tier.capabilities.detail for tier in stack._worker._tiers if tier.capabilities.detail]
        assert torch.equal(blocks, expected), "other bytes came back"
    rate = count * nbytes / statistics.median(seconds[1:]) / 1e9
    print(
        f"{name:28} {nbytes >> 10:5} KiB x {count}: {rate:5.2f} GB/s, bytes equal; {detail}",
        flush=True,
    )


def bare_reads(folder: Path, count: int, nbytes: int) -> None:
    """Eight threads read pages into pinned memory, copied to the GPU as they come."""
    from concurrent.futures import ThreadPoolExecutor

    path = folder / "bare"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    memory = Memory(count, nbytes)
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(memory.address, count * nbytes, 0)) == 0
    pinned = torch.frombuffer(memory.arena, dtype=torch.uint8).view(count, nbytes)
    views = memory.views
    for at in range(count):
        os.pwritev(fd, [views[at]], at * nbytes)
    target = torch.zeros((count, nbytes), dtype=torch.uint8, device="cuda")
    seconds = []
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            torch.cuda.synchronize()
            start_s = time.perf_counter()
            for at, _ in enumerate(
                pool.map(lambda at: os.preadv(fd, [views[at]], at * nbytes), range(count))
            ):
                target[at].copy_(pinned[at], non_blocking=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start_s)
    os.close(fd)
    path.unlink()
    runtime.cudaHostUnregister(memory.address)
    rate = count * nbytes / statistics.median(seconds[1:]) / 1e9
    print(f"{'bare preadv + copy to GPU':28} {nbytes >> 10:5} KiB x {count}: {rate:5.2f} GB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--nbytes", type=int, default=2 << 20)
    parser.add_argument("--compat", action="store_true")
    parser.add_argument("--stack-only", action="store_true", help="leave the tier's own figures out")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.compat:
        allow_compatibility_mode(folder)
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, nixl {metadata.version('nixl-cu13')}, ",
        end="",
    )
    print(f"python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} CPUs")
    print(f"nvidia-fs: {'loaded' if Path('/proc/driver/nvidia-fs').exists() else 'not loaded'}")
    for piece in () if arguments.stack_only else (256 << 10, 2 << 20):
        for finding in run_probe(
            folder / "probe", [*HOST, *DIRECT], piece, (64 << 20) // piece, 60, TierLog("kvbm_gds")
        ):
            print(f"probe {piece >> 10} KiB: {finding}", flush=True)
    for nbytes in () if arguments.stack_only else SIZES:
        for depth in (8, 32):
            detail, medians = bench(nbytes, 1 << 30, 5, folder, depth, "auto")
            for op in ("store", "load"):
                bare, tier = ((1 << 30) / medians[f"{who} {op}"] / 1e9 for who in ("bare", "tier"))
                print(
                    f"{nbytes >> 10:5} KiB depth {depth:3} {op:5}: bare {bare:.2f}, tier {tier:.2f} GB/s, ",
                    end="",
                )
                print(f"ratio {tier / bare:.2f}, {detail}", flush=True)
    bare_reads(folder, arguments.blocks, arguments.nbytes)
    measure("through host memory", "posix", folder, arguments.blocks, arguments.nbytes)
    measure("straight to the GPU", "gds", folder, arguments.blocks, arguments.nbytes)
    measure("through host memory", "posix", folder, 4 * arguments.blocks, 256 << 10)
    measure("straight to the GPU", "gds", folder, 4 * arguments.blocks, 256 << 10)


if __name__ == "__main__":
    main()
