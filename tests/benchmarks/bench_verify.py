"""`kvbm verify` against a bare reader of the same files, both with cold pages.

    python tests/benchmarks/bench_verify.py [--size 1GiB] [--block 2MiB] [--pairs 5] [--path DIRECTORY]

Bare is as many threads that call `preadv` with O_DIRECT on the file of objects, from its first to its last
object, in pieces of a block, and look at nothing. Bare and verify alternate, which goes first too; medians
of pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from kvbm_cli._app import run as kvbm
from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.config import parse_size, size_text
from kvbm_core.testing import MemoryDevice

FILES = {"gds": "rank0/slab.*", "lmdb": "rank0/data.mdb", "remote": "v1/*/*/*/*"}
AT_ONCE = 16


def fill(name: str, folder: Path, count: int, nbytes: int) -> None:
    capacity = int(count * nbytes * 1.2) + (64 << 20)
    entry = {"backend": name, "path": str(folder), "capacity": capacity}
    if name == "remote":
        entry = {"backend": name, "url": f"file://{folder}"}
    keys = chain_keys(root_key(), range(count), block_tokens=1)
    device = MemoryDevice(AT_ONCE, nbytes)
    for block in range(AT_ONCE):
        device.write(block, os.urandom(nbytes))
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


def verify(folder: Path) -> float:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = kvbm(["verify", str(folder), "--json"])
    assert status == 0, output.getvalue()
    found = msgspec.json.decode(output.getvalue())
    return found["nbytes"] / found["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1GiB")
    parser.add_argument("--block", default="2MiB")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--path", default=None)
    options = parser.parse_args()
    size, block = int(parse_size(options.size)), int(parse_size(options.block))
    for name, pattern in FILES.items():
        folder = Path(tempfile.mkdtemp(dir=options.path))
        try:
            fill(name, folder, size // block, block)
            # In whole pages, as an object lies.
            piece = block + 4096
            threads = 16 if name == "remote" else 8
            files = sorted(folder.glob(pattern))
            rates: dict[str, list[float]] = {"bare": [], "verify": []}
            for turn in range(options.pairs):
                for each in ("bare", "verify") if turn % 2 else ("verify", "bare"):
                    cool(files)
                    rate = bare(files, piece, size, threads) if each == "bare" else verify(folder)
                    rates[each].append(rate)
            ratios = [mine / its for mine, its in zip(rates["verify"], rates["bare"], strict=True)]
            plain, proved = (size_text(int(statistics.median(rates[each]))) for each in ("bare", "verify"))
            print(
                f"{name}: verify {proved}/s, bare {plain}/s, ratio {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
