"""`kvbm verify` against a bare reader of the same files, both with cold pages.

    python tests/benchmarks/bench_verify.py [--gib 1] [--block 2MiB] [--pairs 5] [--path DIRECTORY]

Bare is as many threads as verify has, that call `preadv` with O_DIRECT on the files of objects, from the
first to the last object, in pieces of a block, and look at nothing. Bare and verify alternate, which goes
first too; medians of pairs. It runs in a checkout that is not installed.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkout  # noqa: F401 - ahead of what it lets be found

from kvbm_cli.inspect._places import find_places
from kvbm_cli.verify._answer import verify_places
from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.config import parse_size
from kvbm_core.testing import MemoryDevice

FILES = {"gds": "rank0/slab.*", "lmdb": "rank0/data.mdb", "remote": "v1/*/*/*/*"}
AT_ONCE = 16


def entry_of(name: str, folder: Path, capacity: int) -> dict:
    """Configure a tier."""
    if name == "remote":
        return {"backend": name, "url": f"file://{folder}"}
    return {"backend": name, "path": str(folder), "capacity": capacity}


def fill(name: str, folder: Path, count: int, nbytes: int) -> None:
    keys = chain_keys(root_key(), range(count), block_tokens=1)
    device = MemoryDevice(AT_ONCE, nbytes)
    for block in range(AT_ONCE):
        device.write(block, os.urandom(nbytes))
    entry = entry_of(name, folder, int(count * nbytes * 1.2) + (64 << 20))
    with Stack.open({"tiers": [entry]}, device, make_namespace({"bench": name})) as stack:
        for at in range(0, count, AT_ONCE):
            batch = keys[at : at + AT_ONCE]
            stack.store(batch, list(range(len(batch))))
            stack.wait()


def cool(files: list[Path]) -> None:
    """Let the page cache forget the files."""
    for file in files:
        with file.open("rb") as content:
            os.fsync(content.fileno())
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bare(files: list[Path], nbytes: int, most: int, threads: int) -> float:
    """Read the files; give bytes a second."""
    own = threading.local()
    fds = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
    jobs = [
        (fd, at) for fd, file in zip(fds, files, strict=True) for at in range(0, file.stat().st_size, nbytes)
    ][: -(-most // nbytes)]

    def read(job: tuple[int, int]) -> int:
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(mmap.mmap(-1, nbytes))
        return os.preadv(job[0], [own.buffer], job[1])

    started_s = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(read, jobs))
    rate = done / (time.perf_counter() - started_s)
    for fd in fds:
        os.close(fd)
    return rate


def verify(folder: Path, count: int) -> float:
    """Verify a place; give bytes a second."""
    found = verify_places(str(folder), find_places(str(folder), ()), lambda _: True, None, lambda _: None)
    # And what the stack keeps of the order of use.
    assert sum(part.objects for part in found.parts) >= count, "something was evicted"
    assert not found.damage, found.damage[:3]
    return found.nbytes / found.seconds


def measure(name: str, folder: Path, count: int, nbytes: int, options: argparse.Namespace) -> None:
    """Fill a tier, read it in pairs, and print its row."""
    fill(name, folder, count, nbytes)
    files = sorted(folder.glob(FILES[name]))
    # In whole pages, as an object lies.
    piece = nbytes + 4096
    rates: dict[str, list[float]] = {"bare": [], "verify": []}
    for turn in range(options.pairs):
        for each in ("bare", "verify") if turn % 2 else ("verify", "bare"):
            cool(files)
            if each == "bare":
                rates[each].append(bare(files, piece, count * nbytes, options.threads))
            else:
                rates[each].append(verify(folder, count))
    ratios = [mine / its for mine, its in zip(rates["verify"], rates["bare"], strict=True)]
    proved, plain = (statistics.median(rates[each]) / 1e9 for each in ("verify", "bare"))
    print(
        f"{name:8}  {proved:11.2f}  {plain:9.2f}  {statistics.median(ratios):5.2f}   "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="in each tier")
    parser.add_argument("--block", default="2MiB")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=16, help="of the bare reader")
    parser.add_argument("--tiers", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--path", default=None, help="on the disk that is measured")
    options = parser.parse_args()
    nbytes = int(parse_size(options.block))
    count = int(options.gib * (1 << 30)) // nbytes
    print(
        f"{count} objects of {options.block} in each tier, cold, {options.pairs} pairs; {os.cpu_count()} "
        f"CPUs, Linux {platform.release()}, python {platform.python_version()}"
    )
    print(f"{'tier':8}  {'verify GB/s':>11}  {'bare GB/s':>9}  ratio   (lowest to highest)")
    for name in options.tiers:
        folder = Path(tempfile.mkdtemp(prefix="kvbm-bench-", dir=options.path))
        try:
            measure(name, folder, count, nbytes, options)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
