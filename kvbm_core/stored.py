"""What lies in a tier's place, found without opening the tier: `Backend.stored`, for `kvbm inspect`.

An engine may be using the place: nothing is changed, and what cannot be read beside it is not known.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbm_core.block import Namespace
from kvbm_core.field_docs import show_fields
from kvbm_core.localdir import FACTS_FOLDER, LocalDirectory
from kvbm_core.namespace_facts import MOST_BYTES, decode_facts

__all__ = ["Stored", "facts_in", "stored_in_directory"]


@dataclass(frozen=True, slots=True)
class Stored:
    """What lies there of one namespace and one rank."""

    namespace: Namespace
    rank: int
    world_size: int | None = None
    """Ranks that the rank is one of, where the place says so."""
    objects: int | None = None
    """None: not known while an engine uses the place."""
    nbytes: int | None = None
    """Of these objects. None: likewise."""
    latest_s: float | None = None
    """When it was last used, or something was stored: since the epoch."""
    facts: Mapping[str, Any] | None = None
    """What the namespace is made of; None: nobody wrote it, or it cannot be read."""
    owner: str = ""
    """The process that holds the place, by its id; empty if nobody does."""


show_fields([Stored])


def stored_in_directory(
    directory: LocalDirectory, count: Callable[[Path, bool], Mapping[Namespace, tuple[int, int]] | None]
) -> list[Stored]:
    """Look into a directory on a local disk.

    Args:
        directory: As configured.
        count: Gives, for a rank's folder, of each namespace the objects and their bytes; None if that cannot
            be known. Is told whether an engine uses the folder.

    Returns:
        In order of ranks, and of each the latest first.
    """
    found = []
    for rank, folder in directory.ranks():
        owner, facts = directory.owner(rank), facts_in(folder)
        counts = count(folder, bool(owner))
        here = []
        for namespace in facts.keys() | (counts or {}).keys():
            latest_s, told = facts.get(namespace, (None, None))
            objects, nbytes = (None, None) if counts is None else counts.get(namespace, (0, 0))
            here.append(Stored(namespace, rank, None, objects, nbytes, latest_s, told, owner))
        found += sorted(here, key=lambda each: (-(each.latest_s or 0), each.namespace))
    return found


def facts_in(folder: Path) -> dict[Namespace, tuple[float | None, dict[str, Any] | None]]:
    """Read what is written about namespaces, and when. Links are not followed."""
    found: dict[Namespace, tuple[float | None, dict[str, Any] | None]] = {}
    with contextlib.suppress(OSError):
        for file in (folder / FACTS_FOLDER).glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                namespace = bytes.fromhex(file.stem)
                fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                with open(fd, "rb") as source:
                    told = decode_facts(source.read(MOST_BYTES + 1))
                    found[namespace] = os.fstat(fd).st_mtime, told
    return found
