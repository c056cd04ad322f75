"""What `kvbm clear` deletes, and how that is chosen."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

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


@dataclass(frozen=True, slots=True)
class Choice:
    """Which objects are deleted."""

    digits: str
    """Only of namespaces that begin so."""
    older_s: float | None
    """Only what was stored, or whose namespace was last used, longer ago."""
    down_to: int | None
    """The oldest, until so many bytes are left in a place."""

    def of(
        self, objects: Sequence[Found], most_bytes: float | None, ages_s: Mapping[Namespace, float] | None
    ) -> set[int]:
        """Choose among the objects of one part, by their positions.

        Args:
            objects: All of them.
            most_bytes: The part's share of what may be left.
            ages_s: Of namespaces; None: each object's order is its time.
        """
        mine = [at for at, each in enumerate(objects) if each.namespace.hex().startswith(self.digits)]
        doomed = {*mine} if self.older_s is None and most_bytes is None else set()
        if self.older_s is not None:
            doomed |= {at for at in mine if _age(objects[at], ages_s) > self.older_s}
        if most_bytes is not None:
            left = [at for at in mine if at not in doomed]
            excess = sum(objects[at].nbytes for at in left) - most_bytes
            for at in sorted(left, key=lambda at: objects[at].order):
                if excess <= 0:
                    break
                doomed.add(at)
                excess -= objects[at].nbytes
        return doomed


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
                _clear(place, contents, choice, len(parts), answer, really=really)
        finally:
            for contents in parts:
                contents.close()
    return answer


def _clear(
    place: Place, contents: Contents, choice: Choice, parts: int, answer: Cleared, *, really: bool
) -> None:
    # What cannot be read is for `kvbm verify --remove`.
    objects = [found for found in contents.objects() if not found.broken]
    most_bytes = None if choice.down_to is None else choice.down_to / parts
    doomed = choice.of(objects, most_bytes, _ages(place, contents, objects, choice))
    found: dict[tuple[Namespace, int], ClearedPart] = {}
    for at, each in enumerate(objects):
        name = each.namespace, each.rank
        if name not in found:
            found[name] = ClearedPart(
                tier=place.tier, where=contents.where, rank=each.rank, namespace=each.namespace.hex()
            )
        part = found[name]
        if at in doomed:
            part.objects, part.nbytes = part.objects + 1, part.nbytes + each.nbytes
        else:
            part.left_objects, part.left_bytes = part.left_objects + 1, part.left_bytes + each.nbytes
    answer.parts += found.values()
    if answer.removed is not None:
        chosen = [objects[at] for at in sorted(doomed)]
        for start in range(0, len(chosen), _AT_ONCE):
            answer.removed += contents.remove(chosen[start : start + _AT_ONCE])


def _age(found: Found, ages_s: Mapping[Namespace, float] | None) -> float:
    return time.time() - found.order if ages_s is None else ages_s.get(found.namespace, 0.0)


def _ages(
    place: Place, contents: Contents, objects: Sequence[Found], choice: Choice
) -> Mapping[Namespace, float] | None:
    """Give the ages of a local part's namespaces: since an engine last started with them."""
    if contents.timed or choice.older_s is None or not objects:
        return None
    rank, now_s = objects[0].rank, time.time()
    return {
        stored.namespace: now_s - stored.latest_s
        for stored in place.stored() or ()
        if stored.rank == rank and stored.latest_s is not None
    }
