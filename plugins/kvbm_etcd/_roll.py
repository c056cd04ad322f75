"""Who is registered: keys and values in etcd, and what must be true of an engine's members."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final
from urllib.parse import quote

import msgspec

from kvbm_core import CoordinatorError, Member
from kvbm_core.printable import printable

__all__ = [
    "Entry",
    "check_alike",
    "engine_prefix",
    "missing_ranks",
    "read_entries",
    "top_prefix",
]

_LAYOUT: Final = "v1"


class Entry(Member, frozen=True, kw_only=True):
    """A member as etcd has it."""

    instance: str
    """Made anew by each process that registers, so that two can be told apart."""
    since: Annotated[datetime, msgspec.Meta(tz=True)]
    """When it was first registered."""


def top_prefix(prefix: str) -> str:
    """Give what all keys begin with."""
    return f"{prefix}/{_LAYOUT}/"


def engine_prefix(prefix: str, engine: str) -> str:
    """Give what all keys of an engine begin with; after it comes ``leader`` or the rank."""
    return f"{top_prefix(prefix)}{quote(engine, safe='')}/"


def read_entries(values: Mapping[str, bytes]) -> list[Entry]:
    """Read what etcd has; leader first, then workers by rank. What is not ours is left out.

    Whoever may write there could otherwise write to the terminals and logs of those who read: every text is
    made `printable`.
    """
    entries = []
    for value in values.values():
        try:
            entries.append(msgspec.convert(_printable(msgspec.json.decode(value)), Entry))
        except (msgspec.DecodeError, RecursionError):
            continue
    return sorted(entries, key=lambda entry: (entry.engine, -1 if entry.rank is None else entry.rank))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [*map(_printable, value)]
    if isinstance(value, dict):
        return {_printable(key): _printable(each) for key, each in value.items()}
    return value


def missing_ranks(members: Iterable[Member], world_size: int) -> list[int]:
    """List the ranks that no worker is registered for."""
    return sorted(set(range(world_size)) - {member.rank for member in members})


def check_alike(members: Sequence[Member]) -> None:
    """Compare the members of an engine.

    Raises:
        CoordinatorError: If one differs from another in what must agree; names both, and both values.
    """
    for key in ("world_size", "shared_namespace", "stack", "versions"):
        # A leader has no namespace.
        known = [member for member in members if getattr(member, key)]
        for member in known:
            ours, theirs = getattr(known[0], key), getattr(member, key)
            if ours != theirs:
                raise CoordinatorError(
                    f"engine {member.engine}: {key} of {member} is {_shown(theirs)}, of {known[0]} it is "
                    f"{_shown(ours)}; start all of them with the same model, weights, settings and versions",
                    operation="gather",
                )


def _shown(value: object) -> str:
    return msgspec.json.encode(value).decode()
