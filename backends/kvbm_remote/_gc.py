"""Deletes blocks that are old, or too many, oldest first. Safe while engines run: they miss a block.

The store is listed as a stream, once, and a second time if it is too large: how many bytes were
stored in which minute is all that is kept in memory.
"""

from __future__ import annotations

import asyncio
import math
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

from kvbm_remote._clients import make_store
from kvbm_remote._config import RemoteConfig
from kvbm_remote._facts import namespace_of
from kvbm_remote._faults import classify
from kvbm_remote._kinds import MISSING
from kvbm_remote._stores import LITTER_S, TOP, Entry, Store, is_temporary

__all__ = ["Summary", "collect"]

_BLOCK: Final = re.compile(rf"{TOP}/[0-9a-f]{{32}}/r\d+of\d+/([0-9a-f]{{2}})/\1[0-9a-f]{{62}}")
_MINUTE_S: Final = 60
_DELETE_AT_ONCE: Final = 32
_TELL_EVERY_S: Final = 5.0


@dataclass(slots=True)
class Summary:
    """What a collection found and did."""

    found_blocks: int = 0
    found_bytes: int = 0
    deleted_blocks: int = 0
    deleted_bytes: int = 0
    deleted_litter: int = 0
    """Files of writers that died."""
    deleted_facts: int = 0
    """What was written about namespaces without blocks."""
    failed: int = 0
    """Deletions that did not work."""
    dry_run: bool = False


class _Collection:
    """One run of the collector."""

    def __init__(self, store: Store, max_age_s: float, max_bytes: float, dry_run: bool, now_s: float) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._now_s = now_s
        self._oldest_s = now_s - max_age_s
        self._stored: Counter[int] = Counter()
        self._blocks: Counter[str] = Counter()
        """By namespace, how many are there still."""
        self._facts: list[Entry] = []
        self._doomed: list[Entry] = []
        self._told_s = time.monotonic()
        self.summary = Summary(dry_run=dry_run)

    async def run(self) -> None:
        async for entry in self._store.entries(TOP):
            self._tell()
            if _BLOCK.fullmatch(entry.path):
                await self._take_in(entry)
            elif namespace_of(entry.path):
                self._facts.append(entry)
            elif is_temporary(entry.path) and entry.modified_s < self._now_s - LITTER_S:
                await self._doom(entry)
        excess_bytes = self._stored.total() - self._max_bytes
        if excess_bytes > 0:
            await self._shrink(excess_bytes)
        await self._delete()
        for entry in self._facts:
            # Young ones were written ahead of the first block.
            if not self._blocks[namespace_of(entry.path)] and entry.modified_s < self._now_s - LITTER_S:
                await self._doom(entry)
        await self._delete()

    async def _take_in(self, entry: Entry) -> None:
        self._blocks[_namespace(entry)] += 1
        self.summary.found_blocks += 1
        self.summary.found_bytes += entry.nbytes
        if entry.modified_s < self._oldest_s:
            await self._doom(entry)
        else:
            self._stored[int(entry.modified_s // _MINUTE_S)] += entry.nbytes

    async def _shrink(self, excess_bytes: float) -> None:
        """Delete whole minutes, the oldest first, and of the last one as much as is needed."""
        last, left = 0, excess_bytes
        for last in sorted(self._stored):
            if left <= self._stored[last]:
                break
            left -= self._stored[last]
        async for entry in self._store.entries(TOP):
            self._tell()
            minute = int(entry.modified_s // _MINUTE_S)
            if minute > last or entry.modified_s < self._oldest_s or not _BLOCK.fullmatch(entry.path):
                continue
            if minute == last:
                if left <= 0:
                    continue
                left -= entry.nbytes
            await self._doom(entry)

    async def _doom(self, entry: Entry) -> None:
        self._doomed.append(entry)
        if len(self._doomed) >= _DELETE_AT_ONCE:
            await self._delete()

    async def _delete(self) -> None:
        doomed, self._doomed = self._doomed, []
        if self.summary.dry_run:
            failures: list[BaseException | None] = [None] * len(doomed)
        else:
            failures = await asyncio.gather(
                *(self._store.delete(entry.path) for entry in doomed), return_exceptions=True
            )
        for entry, failure in zip(doomed, failures, strict=True):
            if failure is not None and classify(failure).kind is not MISSING:
                self.summary.failed += 1
            elif is_temporary(entry.path):
                self.summary.deleted_litter += 1
            elif namespace_of(entry.path):
                self.summary.deleted_facts += 1
            else:
                self._blocks[_namespace(entry)] -= 1
                self.summary.deleted_blocks += 1
                self.summary.deleted_bytes += entry.nbytes

    def _tell(self) -> None:
        if time.monotonic() > self._told_s + _TELL_EVERY_S:
            self._told_s = time.monotonic()
            said = f"{self.summary.found_blocks} blocks found, {self.summary.deleted_blocks} deleted"
            print(said, file=sys.stderr, flush=True)


def _namespace(entry: Entry) -> str:
    """Give the namespace of a block, in digits."""
    return entry.path.split("/")[1]


async def collect(
    config: RemoteConfig, max_age_s: float = math.inf, max_bytes: float = math.inf, *, dry_run: bool = False
) -> Summary:
    """Delete blocks of all namespaces below a URL.

    Args:
        config: Where.
        max_age_s: Blocks stored longer ago are deleted.
        max_bytes: Then the oldest, until so much is left.
        dry_run: Only count.

    Raises:
        TierOpenError: If the store cannot be used, see `make_store`.
    """
    store = make_store(config)
    collection = _Collection(store, max_age_s, max_bytes, dry_run, time.time())
    try:
        await collection.run()
    finally:
        await store.close()
    return collection.summary
