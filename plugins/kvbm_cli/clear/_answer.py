"""What `kvbm clear` deletes, and how that is chosen."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from kvbm_cli.clear._order import Order
from kvbm_cli.inspect._places import Place
from kvbm_core.block import Namespace
from kvbm_core.contents import Contents, Found
from kvbm_core.errors import TierError

__all__ = ["Choice", "Cleared", "ClearedPart", "clear_places"]

_AT_ONCE = 1024
"""Objects deleted before the next are."""


class ClearedPart(msgspec.Struct, kw_only=True):
    """The objects of one namespace and rank in one place."""

    tier: str
    where: str
    rank: int
    namespace: str
    """32 digits."""
    objects: int = 0
    """Chosen."""
    nbytes: int = 0
    left_objects: int = 0
    left_bytes: int = 0


class Cleared(msgspec.Struct, kw_only=True):
    """What `kvbm clear --json` writes."""

    source: str
    parts: list[ClearedPart]
    unknown: list[str]
    """Tiers whose backend cannot do it."""
    removed: int | None = None
    """Objects that were deleted; null without --yes."""
    tidied: int = 0
    """Of a store: files of writers that died, and what was written about namespaces without objects, that
    were deleted; without --yes: would be."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which objects are deleted."""

    digits: str
    """Only of namespaces that begin so."""
    older_s: float | None
    """Only what was stored, or whose namespace was last used, longer ago."""
    down_to: int | None
    """The oldest, until so many bytes are left in a place."""


def clear_places(source: str, places: Iterable[Place], choice: Choice, *, really: bool) -> Cleared:
    """Choose objects, and delete them if that is really meant.

    Raises:
        KvbmError: An engine holds a place, or it cannot be read or written.
    """
    answer = Cleared(source=source, parts=[], unknown=[], removed=0 if really else None)
    for place in places:
        parts = place.contents()
        if parts is None:
            answer.unknown.append(
                f"{place.tier}: backend {place.backend} cannot be cleared without an engine"
            )
            continue
        try:
            for contents in parts:
                if holder := contents.holder():
                    raise TierError(
                        f"{contents.where} is in use by another engine (pid {holder}); stop it first",
                        operation="clear", tier=place.tier,
                    )  # fmt: skip
            for contents in parts:
                most_bytes = None if choice.down_to is None else choice.down_to / len(parts)
                clearing = _Clearing(place, contents, choice, most_bytes, really=really)
                clearing.run()
                answer.parts += clearing.parts.values()
                answer.tidied += clearing.tidied
                if answer.removed is not None:
                    answer.removed += clearing.removed
        finally:
            for contents in parts:
                contents.close()
    return answer


class _Clearing:
    """One part of a place, listed as a stream: once, and a second time where the oldest of too many go.

    Args:
        place: What it is a part of.
        contents: The part.
        choice: What is deleted.
        most_bytes: The part's share of what may be left; None: that does not matter.
        really: Delete.
    """

    def __init__(
        self, place: Place, contents: Contents, choice: Choice, most_bytes: float | None, *, really: bool
    ) -> None:
        self._tier = place.tier
        self._contents = contents
        self._choice = choice
        self._most_bytes = most_bytes
        self._really = really
        self._now_s = time.time()
        self._used_s = _last_used(place, contents, choice)
        self._doomed: list[Found] = []
        self.parts: dict[tuple[Namespace, int], ClearedPart] = {}
        self.removed = 0
        self.tidied = 0

    def run(self) -> None:
        """Choose, and delete."""
        order = Order()
        for found in self._objects():
            part = self._part(found)
            part.left_objects, part.left_bytes = part.left_objects + 1, part.left_bytes + found.nbytes
            if not self._is_wanted(found):
                continue
            if self._is_old(found):
                self._doom(found)
            elif self._most_bytes is not None:
                order.add(found.order, found.nbytes)
        self._delete()
        if self._most_bytes is not None:
            order.cut(self._most_bytes)
            for found in self._objects():
                if (
                    self._is_wanted(found)
                    and not self._is_old(found)
                    and order.chosen(found.order, found.nbytes)
                ):
                    self._doom(found)
            self._delete()
        kept = {name for name, part in self.parts.items() if part.left_objects}
        self.tidied = self._contents.tidy(kept, really=self._really)

    def _objects(self) -> Iterator[Found]:
        # What cannot be read is for `kvbm verify --remove`.
        return (found for found in self._contents.objects() if not found.broken)

    def _is_wanted(self, found: Found) -> bool:
        return found.namespace.hex().startswith(self._choice.digits)

    def _is_old(self, found: Found) -> bool:
        """Say whether it goes whatever else there is."""
        if self._choice.older_s is None:
            return self._most_bytes is None
        used_s = found.order
        if self._used_s is not None:
            used_s = self._used_s.get((found.namespace, found.rank), self._now_s)
        return self._now_s - used_s > self._choice.older_s

    def _part(self, found: Found) -> ClearedPart:
        name = found.namespace, found.rank
        if name not in self.parts:
            self.parts[name] = ClearedPart(
                tier=self._tier, where=self._contents.where, rank=found.rank, namespace=found.namespace.hex()
            )
        return self.parts[name]

    def _doom(self, found: Found) -> None:
        part = self._part(found)
        part.objects, part.nbytes = part.objects + 1, part.nbytes + found.nbytes
        part.left_objects, part.left_bytes = part.left_objects - 1, part.left_bytes - found.nbytes
        if self._really:
            self._doomed.append(found)
            if len(self._doomed) >= _AT_ONCE:
                self._delete()

    def _delete(self) -> None:
        if self._doomed:
            self.removed += self._contents.remove(self._doomed)
            self._doomed = []


def _last_used(
    place: Place, contents: Contents, choice: Choice
) -> Mapping[tuple[Namespace, int], float] | None:
    """Give when an engine last started with a namespace of a local part. None: each object has its time."""
    if contents.timed or choice.older_s is None:
        return None
    return {
        (stored.namespace, stored.rank): stored.latest_s
        for stored in place.stored() or ()
        if stored.latest_s is not None
    }
