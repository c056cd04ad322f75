"""What lies in a store, by one listing of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvbm_core.errors import KvbmError, TierError
from kvbm_core.namespace_facts import MOST_BYTES, decode_facts
from kvbm_core.stored import Stored
from kvbm_remote._clients import make_store
from kvbm_remote._config import RemoteConfig, shown_url
from kvbm_remote._facts import namespace_of
from kvbm_remote._faults import classify
from kvbm_remote._kinds import CORRUPT, MISSING
from kvbm_remote._stores import TOP, Store

__all__ = ["stored"]

_BLOCK: Final = re.compile(
    rf"{TOP}/([0-9a-f]{{32}})/r(\d+)of(\d+)/([0-9a-f]{{2}})/\4[0-9a-f]{{62}}", re.ASCII
)
_RANK: Final = re.compile(r"/r(\d+)/", re.ASCII)


@dataclass(slots=True)
class _Listing:
    """What a listing found, by namespace and rank."""

    blocks: dict[tuple[str, int, int], tuple[int, int, float]] = field(default_factory=dict)
    facts: dict[tuple[str, int], dict[str, Any] | None] = field(default_factory=dict)


def stored(config: RemoteConfig) -> Sequence[Stored]:
    """See `Backend.stored`.

    Raises:
        TierError: If the store cannot be used.
    """
    try:
        listing = asyncio.run(_list(config))
    except KvbmError:
        raise
    except Exception as error:  # noqa: BLE001 - a client's error may quote a password, so it is not chained
        raise TierError(f"{shown_url(config.url)}: {classify(error)}") from None
    found = [
        Stored(
            bytes.fromhex(namespace), rank, ranks, objects, nbytes, latest_s,
            listing.facts.get((namespace, rank)),
        )
        for (namespace, rank, ranks), (objects, nbytes, latest_s) in listing.blocks.items()
    ]  # fmt: skip
    known = {(each.namespace.hex(), each.rank) for each in found}
    found += [
        Stored(bytes.fromhex(namespace), rank, None, 0, 0, None, facts)
        for (namespace, rank), facts in listing.facts.items()
        if (namespace, rank) not in known
    ]
    return sorted(found, key=lambda each: (each.rank, -(each.latest_s or 0), each.namespace))


async def _list(config: RemoteConfig) -> _Listing:
    store, listing = make_store(config), _Listing()
    try:
        async for entry in store.entries(TOP):
            if match := _BLOCK.fullmatch(entry.path):
                key = match[1], int(match[2]), int(match[3])
                objects, nbytes, latest_s = listing.blocks.get(key, (0, 0, 0.0))
                listing.blocks[key] = objects + 1, nbytes + entry.nbytes, max(latest_s, entry.modified_s)
            elif (namespace := namespace_of(entry.path)) and (rank := _RANK.search(entry.path)):
                listing.facts[namespace, int(rank[1])] = await _facts(store, entry.path)
    finally:
        await store.close()
    return listing


async def _facts(store: Store, path: str) -> dict[str, Any] | None:
    """Read facts; None if they have gone meanwhile, or can be none."""
    try:
        return decode_facts(bytes(await store.get(path, memoryview(bytearray(MOST_BYTES)))))
    except Exception as error:
        if classify(error).kind in (CORRUPT, MISSING):
            return None
        raise
