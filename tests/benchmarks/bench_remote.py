"""The remote tier against the bare libraries: fsspec on a directory, obstore and s3fs on a real S3 server.

    python tests/benchmarks/bench_remote.py [--brief] [--path DIRECTORY] [--at-once 16]

Bare and tier alternate in one run, with as many requests at once; medians. The S3 server (SeaweedFS)
runs on the same processors as its clients, so both share what is measured. A last part times lookups,
listings and objects of several sizes, which is why the tier asks by HEAD and does not pack blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import fsspec
import obstore
import s3fs
from bench_tiers import MIB, SIZES, Memory, drive, rows

sys.path.insert(0, str(Path(__file__).parents[1]))
from servers import S3Server

from kvbm_core.tier import Op, TierContext
from kvbm_remote import RemoteConfig, RemoteTier
from kvbm_remote._async_stores import ObjectStore


class BareFiles:
    """fsspec's local file system in a thread pool."""

    medium = "fsspec file"

    def __init__(self, root: Path, at_once: int) -> None:
        self._fs, self._root = fsspec.filesystem("file"), str(root)
        os.makedirs(root)
        self._pool = concurrent.futures.ThreadPoolExecutor(at_once)

    def store(self, keys: list[bytes], memory: Memory) -> None:
        jobs = zip(keys, memory.views, strict=True)
        list(self._pool.map(lambda job: self._fs.pipe_file(f"{self._root}/{job[0].hex()}", job[1]), jobs))

    def load(self, keys: list[bytes]) -> None:
        list(self._pool.map(lambda key: self._fs.cat_file(f"{self._root}/{key.hex()}"), keys))

    def close(self) -> None:
        self._pool.shutdown()


class BareLoop:
    """An asynchronous library on a loop in this thread, so many calls at once."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._loop = asyncio.new_event_loop()

    def store(self, keys: list[bytes], memory: Memory) -> None:
        self._all(self._put, list(zip(keys, memory.views, strict=True)))

    def load(self, keys: list[bytes]) -> None:
        self._all(self._get, [(key,) for key in keys])

    def _all(self, call, jobs: list[tuple]) -> None:
        jobs = iter(jobs)

        async def work() -> None:
            for job in jobs:
                await call(*job)

        async def together() -> None:
            await asyncio.gather(*(work() for _ in range(self._at_once)))

        self._loop.run_until_complete(together())

    def close(self) -> None:
        self._loop.close()


class BareObstore(BareLoop):
    medium = "obstore"

    def __init__(self, server: S3Server, at_once: int) -> None:
        super().__init__(at_once)
        self._store = ObjectStore(server.bucket, "bare", {"endpoint": server.endpoint}, 5.0, 60.0)._store

    async def _put(self, key: bytes, view: memoryview) -> None:
        await obstore.put_async(self._store, key.hex(), view, use_multipart=False)

    async def _get(self, key: bytes) -> None:
        await (await obstore.get_async(self._store, key.hex())).bytes_async()


class BareS3fs(BareLoop):
    medium = "s3fs"

    def __init__(self, server: S3Server, at_once: int) -> None:
        super().__init__(at_once)
        self._bucket = server.bucket
        self._loop.run_until_complete(self._open(server.endpoint))

    async def _open(self, endpoint: str) -> None:
        self._fs = s3fs.S3FileSystem(
            endpoint_url=endpoint,
            asynchronous=True,
            skip_instance_cache=True,
            config_kwargs={"max_pool_connections": self._at_once},
        )
        self._session = await self._fs.set_session()

    async def _put(self, key: bytes, view: memoryview) -> None:
        await self._fs._pipe_file(f"{self._bucket}/bare/{key.hex()}", bytes(view))

    async def _get(self, key: bytes) -> None:
        await self._fs._cat_file(f"{self._bucket}/bare/{key.hex()}")

    def close(self) -> None:
        self._loop.run_until_complete(self._session.close())
        super().close()


def bench(bare, config: RemoteConfig, nbytes: int, total_bytes: int, repeats: int) -> list[tuple]:
    count = total_bytes // nbytes
    source, target, wake = Memory(count, nbytes), Memory(count, nbytes), threading.Event()
    tier = RemoteTier(config, TierContext(b"n" * 16, nbytes, wake=wake.set))
    seconds = {name: [] for name in ("bare store", "tier store", "bare load", "tier load")}
    for _ in range(repeats + 1):
        # New keys each time: what is there is not stored again.
        keys = [os.urandom(32) for _ in range(count)]
        seconds["bare store"].append(timed(bare.store, keys, source))
        seconds["tier store"].append(drive(tier, wake, Op.STORE, keys, source.regions))
        seconds["bare load"].append(timed(bare.load, keys))
        seconds["tier load"].append(drive(tier, wake, Op.LOAD, keys, target.regions))
    tier.close()
    return rows(config.protocol, bare.medium, nbytes, total_bytes, seconds)


def timed(call, *arguments) -> float:
    start_s = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start_s


def bench_requests(server: S3Server, count: int, at_once: int) -> None:
    """Time what decides between HEAD and a listing, and whether packing would pay."""
    bare = BareObstore(server, at_once)
    keys, memory = [os.urandom(32) for _ in range(count)], Memory(count, 4096)
    bare.store(keys, memory)
    store = bare._store

    async def head(key: bytes) -> None:
        await obstore.head_async(store, key.hex())

    head_s = timed(bare._all, head, [(key,) for key in keys])
    listed = 0

    def list_all() -> None:
        nonlocal listed
        listed = sum(len(batch) for batch in obstore.list(store, chunk_size=1000))

    list_s = timed(list_all)
    print(
        f"HEAD {count} keys: {head_s / count * 1e6:.0f} us a key; a folder of {listed} listed: {list_s:.3f} s"
    )
    bare.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--brief", action="store_true", help="to see that it runs")
    parser.add_argument("--path", type=Path, help="where the files go; by default a temporary directory")
    parser.add_argument("--at-once", type=int, default=16, help="requests at once")
    arguments = parser.parse_args()
    total_bytes, repeats = (8 * MIB, 1) if arguments.brief else (64 * MIB, 5)
    at_once = arguments.at_once
    root = Path(tempfile.mkdtemp(prefix="kvbm-bench-", dir=arguments.path))
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"python {platform.python_version()}, fsspec {fsspec.__version__}, obstore {obstore.__version__}, ",
        end="",
    )
    print(
        f"s3fs {s3fs.__version__}, Linux {platform.release()}, {os.cpu_count()} CPUs, which the server shares"
    )
    print(
        f"{total_bytes >> 20} MiB a pass, {at_once} at once, median of {repeats}; files in {root}, cache warm"
    )
    print(f"{'tier':5} {'bare medium':12} {'KiB':>5} {'op':6} {'bare MB/s':>9} {'tier MB/s':>9} {'ratio':>6}")
    try:
        with S3Server() as server:
            os.environ.update(server.env)
            for nbytes in SIZES:
                table = bench_all(server, root / str(nbytes), nbytes, total_bytes, repeats, at_once)
                for row in table:
                    print(
                        "{:5} {:12} {:5} {:6} {:9.0f} {:9.0f} {:6.2f}".format(
                            *row[:4], 1e3 * row[4], 1e3 * row[5], row[5] / row[4]
                        ),
                        flush=True,
                    )
            bench_requests(server, 200 if arguments.brief else 5000, at_once)
    finally:
        shutil.rmtree(root)


def bench_all(
    server: S3Server, root: Path, nbytes: int, total_bytes: int, repeats: int, at_once: int
) -> list[tuple]:
    options, remote = {"endpoint_url": server.endpoint}, f"s3://{server.bucket}/tier"
    files = RemoteConfig(url=f"file://{root}/tier", max_in_flight=at_once)
    by_obstore = RemoteConfig(
        url=remote, storage_options=options, client="obstore", max_in_flight=at_once, timeout_s=60.0
    )
    by_fsspec = RemoteConfig(
        url=remote, storage_options=options, client="fsspec", max_in_flight=at_once, timeout_s=60.0
    )
    table = []
    for bare, config in (
        (BareFiles(root / "bare", at_once), files),
        (BareObstore(server, at_once), by_obstore),
        (BareS3fs(server, at_once), by_fsspec),
    ):
        table += bench(bare, config, nbytes, total_bytes, repeats)
        bare.close()
        shutil.rmtree(root, ignore_errors=True)
    return table


if __name__ == "__main__":
    main()
