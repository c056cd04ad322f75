"""The objects in a store, listed once and read several at a time, also beside engines."""

from __future__ import annotations

import asyncio
import mmap
import re
import threading
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from kvbm_core.block import Namespace
from kvbm_core.contents import Contents, Found
from kvbm_core.errors import KvbmError, TierError
from kvbm_core.namespace_facts import MOST_BYTES, decode_facts
from kvbm_core.tier import whole_pages
from kvbm_remote._clients import make_store
from kvbm_remote._config import RemoteConfig, shown_url
from kvbm_remote._facts import namespace_of
from kvbm_remote._faults import Fault, classify
from kvbm_remote._kinds import CORRUPT, MISSING
from kvbm_remote._runners import run_through
from kvbm_remote._stores import FACTS, LITTER_S, TOP, Entry, Store, is_temporary

__all__ = ["contents"]

T = TypeVar("T")

_BLOCK: Final = re.compile(
    rf"{TOP}/([0-9a-f]{{32}})/r(\d+)of(\d+)/([0-9a-f]{{2}})/(\4[0-9a-f]{{62}})", re.ASCII
)
_RANK: Final = re.compile(r"/r(\d+)/", re.ASCII)


def contents(config: RemoteConfig) -> Sequence[Contents]:
    """See `Backend.contents`.

    Raises:
        TierError: The store cannot be used.
    """
    return [_Whole(config)]


class _Whole(Contents):
    """A whole store. A place is the path, the length and the time of the last change."""

    timed = True
    shared = True

    def __init__(self, config: RemoteConfig) -> None:
        self.where = shown_url(config.url)
        self.threads = max(1, config.max_in_flight)
        self._beside: list[Entry] = []
        """What was listed and is no block, but ours."""
        self._patience_s = config.timeout_s * config.attempts
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._store: Store = make_store(config, direct=True)
        if self._store.asynchronous:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="kvbm-contents", daemon=True)
            self._thread.start()

    def __repr__(self) -> str:
        return f"<contents of {self.where}>"

    def holder(self) -> str:
        """See `Contents.holder`. Anybody may use a store at any time."""
        return ""

    def facts(self) -> Mapping[tuple[Namespace, int], Mapping[str, Any] | None]:
        """See `Contents.facts`."""
        found: dict[tuple[Namespace, int], Mapping[str, Any] | None] = {}
        for entry in self._entries(FACTS):
            if (namespace := namespace_of(entry.path)) and (rank := _RANK.search(entry.path)):
                try:
                    content = self._get(entry.path, memoryview(mmap.mmap(-1, MOST_BYTES)))
                except TierError:
                    content = None
                told = None if content is None else decode_facts(bytes(content))
                found[bytes.fromhex(namespace), int(rank[1])] = told
        return found

    def objects(self) -> Iterator[Found]:
        """See `Contents.objects`."""
        self._beside = []
        for entry in self._entries(TOP):
            if match := _BLOCK.fullmatch(entry.path):
                namespace, key = bytes.fromhex(match[1]), bytes.fromhex(match[5])
                broken = "" if entry.nbytes else "it is empty"
                yield Found(namespace, int(match[2]), key, entry.nbytes, entry.modified_s, entry, broken)
            elif is_temporary(entry.path) or namespace_of(entry.path):
                self._beside.append(entry)

    def problems(self) -> Sequence[str]:
        """See `Contents.problems`."""
        return ()

    def room_bytes(self, nbytes: int) -> int:
        """See `Contents.room_bytes`."""
        return whole_pages(1, nbytes)

    def read(self, found: Found, buffer: memoryview) -> memoryview | None:
        """See `Contents.read`."""
        return self._get(found.place.path, buffer)

    def is_there(self, found: Found) -> bool:
        """See `Contents.is_there`. A listing of the object alone tells its time, too."""
        entry: Entry = found.place
        folder = entry.path.rpartition("/")[0]
        try:
            return any(each == entry for each in self._entries(folder))
        except TierError:
            return True

    def remove(self, found: Sequence[Found]) -> int:
        """See `Contents.remove`. Several at once; what cannot be deleted is left.

        Raises:
            TierError: Not one could be deleted.
        """
        return self._delete([each.place for each in found])

    def tidy(self, kept: Collection[tuple[Namespace, int]], *, really: bool) -> int:
        """See `Contents.tidy`. What is young may be a writer's at work, or facts ahead of the first block."""
        names = {namespace.hex() for namespace, _ in kept}
        old_s = time.time() - LITTER_S
        doomed = [
            entry
            for entry in self._beside
            if entry.modified_s < old_s and namespace_of(entry.path) not in names
        ]
        return self._delete(doomed) if really else len(doomed)

    def close(self) -> None:
        """See `Contents.close`."""
        self._run(self._store.close())
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _delete(self, entries: Sequence[Entry]) -> int:
        """Delete, and say how many were there."""

        def delete(entry: Entry) -> Fault | None:
            try:
                self._run(self._store.delete(entry.path))
            except Exception as error:  # noqa: BLE001 - a client's error may quote a password
                return classify(error)
            return None

        with ThreadPoolExecutor(self.threads) as pool:
            faults = [fault for fault in pool.map(delete, entries) if fault]
        failed = [fault for fault in faults if fault.kind is not MISSING]
        if failed and len(failed) == len(entries):
            raise TierError(f"{self.where}: {failed[0]}", tier="remote")
        return len(entries) - len(faults)

    def _get(self, path: str, buffer: memoryview) -> memoryview | None:
        """Read an object; none if it is gone, nothing if it cannot be one of ours."""
        try:
            content = self._run(self._store.get(path, buffer))
        except Exception as error:  # noqa: BLE001 - a client's error may quote a password, so it is not chained
            fault = classify(error)
            if fault.kind is MISSING:
                return None
            if fault.kind is CORRUPT:
                return memoryview(b"")
            raise TierError(f"it cannot be read: {fault}", tier="remote") from None
        return memoryview(content)

    def _entries(self, folder: str) -> Iterator[Entry]:
        entries = self._store.entries(folder)
        while True:
            try:
                entry = self._run(_next(entries))
            except KvbmError:
                raise
            except Exception as error:  # noqa: BLE001 - as above
                raise TierError(f"{self.where}: {classify(error)}", tier="remote") from None
            if entry is None:
                return
            yield entry

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the store: on its loop, or to the end in this thread."""
        if self._loop is not None:
            limited = asyncio.wait_for(coroutine, self._patience_s)
            return asyncio.run_coroutine_threadsafe(limited, self._loop).result()
        ended: list[T] = []

        async def keep() -> None:
            ended.append(await coroutine)

        run_through(keep())
        return ended[0]


async def _next(entries: AsyncIterator[Entry]) -> Entry | None:
    return await anext(entries, None)
