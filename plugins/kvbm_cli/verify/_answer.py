"""What `kvbm verify` finds: every object is read by several threads, and proved."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Any, Final

import msgspec

from kvbm_cli.inspect._places import Place
from kvbm_cli.verify._judge import Judge, NotJudgedError
from kvbm_cli.verify._memory import ReadMemory
from kvbm_cli.verify._pace import Pace
from kvbm_core.block import BlockKey, Namespace
from kvbm_core.contents import Contents, Found
from kvbm_core.errors import KvbmError
from kvbm_core.layers import NO_SEAL

__all__ = ["Damage", "Verified", "VerifiedPart", "verify_places"]

_AHEAD: Final = 4
"""Objects that wait for each thread."""
_TORN_S: Final = 0.05
"""An entry of an index is written by then, if somebody was writing it."""
_UNSEALED: Final = (
    "not one object has a seal: stored with checked: false, or through codecs (then give the configuration)"
)


class VerifiedPart(msgspec.Struct, kw_only=True):
    """The objects of one namespace and rank in one place."""

    tier: str
    where: str
    rank: int
    namespace: str | None
    """32 digits; null where that is damaged itself."""
    objects: int = 0
    """Read, or found damaged in the index."""
    nbytes: int = 0
    damaged: int = 0
    replaced: int = 0
    """An engine deleted or replaced them while they were read."""
    unread: int = 0
    """The medium did not give them, or a codec lacks the key."""
    not_judged: str | None = None
    """Why it cannot be told of any of them whether it is damaged."""


class Damage(msgspec.Struct, kw_only=True):
    """One object that is not what was stored, or that could not be read."""

    tier: str
    where: str
    rank: int
    namespace: str | None
    key: str
    """64 digits."""
    what: str
    unread: bool = False
    """It may be sound: the medium did not give it."""
    removed: bool = False


class Verified(msgspec.Struct, kw_only=True):
    """What `kvbm verify --json` writes."""

    source: str
    parts: list[VerifiedPart]
    damage: list[Damage]
    problems: list[str]
    """Of places as a whole, and what was not removed."""
    held_by: list[str]
    """Processes that used a place meanwhile: what they store and evict may have been missed."""
    nbytes: int = 0
    seconds: float = 0.0


class _Verdict(Enum):
    SOUND = 1
    REPLACED = 2
    DAMAGED = 3
    UNREAD = 4
    NOT_JUDGED = 5


@dataclass(slots=True)
class _Tally:
    """What is kept of a namespace until its place is read to the end."""

    part: VerifiedPart
    found: list[tuple[Found, Damage]] = field(default_factory=list)
    not_judged: int = 0

    @property
    def sound(self) -> int:
        part = self.part
        return part.objects - part.damaged - part.replaced - part.unread - self.not_judged


def verify_places(
    source: str, places: Iterable[Place], wanted: Callable[[Found], bool], limit: int | None,
    told: Callable[[int], None], *, remove: bool = False, gentle: bool | None = None,
) -> Verified:  # fmt: skip
    """Read and prove objects.

    Args:
        source: As it was named.
        places: Where.
        wanted: Which objects.
        limit: How many of each part of a place at most; None: all.
        told: Called with the bytes of each object that was read.
        remove: Delete what is damaged, where no engine is.
        gentle: Read one object at a time and with pauses; None: where an engine is.

    Raises:
        KvbmError: A place cannot be read at all.
    """
    answer, started_s = (
        Verified(source=source, parts=[], damage=[], problems=[], held_by=[]),
        time.monotonic(),
    )
    for place in places:
        parts = place.contents()
        if parts is None:
            answer.problems.append(
                f"{place.tier}: backend {place.backend} cannot be read without an engine: "
                "it has no Backend.contents"
            )
            continue
        try:
            for contents in parts:
                _Verifying(place, contents, answer, told, gentle).run(wanted, limit, remove=remove)
        finally:
            for contents in parts:
                contents.close()
    answer.seconds = time.monotonic() - started_s
    return answer


class _Verifying:
    """One part of a place."""

    def __init__(
        self,
        place: Place,
        contents: Contents,
        answer: Verified,
        told: Callable[[int], None],
        gentle: bool | None,
    ) -> None:
        self._place = place
        self._contents = contents
        self._answer = answer
        self._told = told
        self._judge = Judge(place.entry, contents.facts())
        self._tallies: dict[tuple[str | None, int], _Tally] = {}
        self._memory = ReadMemory()
        self._pace = Pace(gentle, contents.holder)
        self._changes = contents.shared
        """Somebody has used the place meanwhile, or may have."""

    def run(self, wanted: Callable[[Found], bool], limit: int | None, *, remove: bool) -> None:
        holders = {self._contents.holder()}
        self._changes = self._changes or holders != {""}
        objects = islice(filter(wanted, self._contents.objects()), limit)
        for found, (verdict, what) in self._judged(objects):
            self._count(found, verdict, what)
        holders.add(self._contents.holder())
        self._answer.held_by += sorted((holders - {""}) - {*self._answer.held_by})
        self._answer.problems += self._contents.problems()
        for tally in self._tallies.values():
            self._close(tally)
            if remove:
                self._remove(tally)
            self._answer.parts.append(tally.part)
            self._answer.nbytes += tally.part.nbytes
            self._answer.damage += [damage for _, damage in tally.found]

    def _judged(self, objects: Iterator[Found]) -> Iterator[tuple[Found, tuple[_Verdict, str]]]:
        """Judge objects in threads, a few ahead; in order."""
        waiting: deque[tuple[Found, Future[tuple[_Verdict, str]]]] = deque()
        pool = ThreadPoolExecutor(self._contents.threads, thread_name_prefix="kvbm-verify")
        try:
            for found in objects:
                waiting.append((found, pool.submit(self._look, found)))
                if len(waiting) > _AHEAD * self._contents.threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _look(self, found: Found) -> tuple[_Verdict, str]:
        """Judge an object.

        One that seems damaged is looked for again and read once more where somebody may change it. Where
        nobody does, it would tell nothing: what leads to an object may be damaged itself.
        """
        with self._pace.turn():
            verdict, what = self._look_once(found)
        if verdict in (_Verdict.SOUND, _Verdict.NOT_JUDGED):
            return verdict, what
        self._changes = self._changes or bool(self._contents.holder())
        if not self._changes:
            return verdict, what
        if found.broken:
            time.sleep(_TORN_S)
        if verdict is not _Verdict.REPLACED and self._contents.is_there(found):
            verdict, what = self._look_once(found)
            if verdict is _Verdict.SOUND or self._contents.is_there(found):
                return verdict, what
        return _Verdict.REPLACED, ""

    def _look_once(self, found: Found) -> tuple[_Verdict, str]:
        if found.broken:
            return _Verdict.DAMAGED, found.broken
        try:
            room_bytes = self._contents.room_bytes(found.nbytes)
            with self._memory.take(room_bytes, self._judge.beside_bytes(found)) as buffer:
                content = self._contents.read(found, buffer)
                what = None if content is None else self._judge.why(found, content)
        except NotJudgedError as error:
            return _Verdict.NOT_JUDGED, str(error)
        except KvbmError as error:
            return _Verdict.UNREAD, str(error)
        if what is None:
            return _Verdict.REPLACED, ""
        return (_Verdict.DAMAGED, what) if what else (_Verdict.SOUND, "")

    def _count(self, found: Found, verdict: _Verdict, what: str) -> None:
        unknown = found.broken and not self._judge.knows(found.namespace)
        namespace = None if unknown else found.namespace.hex()
        name = namespace, found.rank
        if name not in self._tallies:
            part = VerifiedPart(
                tier=self._place.tier, where=self._contents.where, rank=found.rank, namespace=namespace
            )
            self._tallies[name] = _Tally(part)
        tally = self._tallies[name]
        part = tally.part
        part.objects += 1
        if not found.broken:
            part.nbytes += found.nbytes
            self._told(found.nbytes)
        part.replaced += verdict is _Verdict.REPLACED
        part.unread += verdict is _Verdict.UNREAD
        part.damaged += verdict is _Verdict.DAMAGED
        if verdict is _Verdict.NOT_JUDGED:
            tally.not_judged += 1
            part.not_judged = what
        elif verdict in (_Verdict.DAMAGED, _Verdict.UNREAD):
            damage = Damage(
                tier=part.tier, where=part.where, rank=found.rank, namespace=namespace, key=found.key.hex(),
                what=what, unread=verdict is _Verdict.UNREAD,
            )  # fmt: skip
            tally.found.append((found, damage))

    def _close(self, tally: _Tally) -> None:
        """Take back what was called damaged where no object has a seal: then none was ever made."""
        part, unsealed = tally.part, [each for each in tally.found if each[1].what == NO_SEAL]
        if len(unsealed) == part.damaged > 0 and not tally.sound:
            part.damaged, part.not_judged = 0, _UNSEALED
            tally.found = [each for each in tally.found if each[1].what != NO_SEAL]

    def _remove(self, tally: _Tally) -> None:
        doomed = [(found, damage) for found, damage in tally.found if not damage.unread]
        part = tally.part
        if not doomed:
            return
        if holder := self._contents.holder():
            self._answer.problems.append(f"{part.where}: nothing is removed, as pid {holder} uses it")
            return
        if not tally.sound and not all(found.broken for found, _ in doomed):
            self._answer.problems.append(
                f"{part.where}: nothing of namespace {part.namespace} is removed, as not one object of it is "
                "sound; look whether the configuration is the engine's, and use `kvbm clear`"
            )
            return
        self._contents.remove([found for found, _ in doomed])
        names = {_name(found) for found, _ in doomed}
        left = names.intersection(map(_name, self._contents.objects()))
        for found, damage in doomed:
            damage.removed = _name(found) not in left
        if left:
            self._answer.problems.append(
                f"{part.where}: {len(left)} that are damaged are still listed, as the index is damaged; "
                "delete the folder while no engine uses it"
            )


def _name(found: Found) -> tuple[Namespace, BlockKey, Any]:
    return found.namespace, found.key, found.place
