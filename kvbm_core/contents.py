"""The objects in a tier's place, read one by one without opening the tier: `Backend.contents`.

An engine may be using the place. For reading its lock is not taken, and nothing is written: so an object may
be replaced while it is read. Who finds one damaged asks `Contents.is_there` whether it still lies there as
it was listed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.field_docs import show_fields

__all__ = ["Contents", "Found"]


@dataclass(frozen=True, slots=True)
class Found:
    """An object that is listed."""

    namespace: Namespace
    """The tier's; with codecs that is not the engine's."""
    rank: int
    key: BlockKey
    nbytes: int
    """Its length, as listed."""
    order: float
    """Stored later: higher. Seconds since the epoch if `Contents.timed`."""
    place: Any
    """The backend's own, hashable: where it lies. Equal places mean the same object."""
    broken: str = ""
    """Why it cannot be read at all: what lists it is damaged. Then the fields above may be anything."""


show_fields([Found])


class Contents(ABC):
    """A part of a place: a rank's folder, or a whole store."""

    where: str
    """A path, or a URL without secrets."""
    timed: bool = False
    """`Found.order` is a time."""
    shared: bool = False
    """Anybody may change it at any time, and `holder` does not tell."""
    threads: int = 16
    """That read at once: some wait for the medium while others prove what they have read."""

    @abstractmethod
    def holder(self) -> str:
        """Say which process uses it now, by its id; empty if nobody does, or anybody may."""

    @abstractmethod
    def facts(self) -> Mapping[tuple[Namespace, int], Mapping[str, Any] | None]:
        """Read what namespaces are made of, by namespace and rank, see `kvbm_core.namespace_facts`."""

    @abstractmethod
    def objects(self) -> Iterator[Found]:
        """List the objects.

        Raises:
            KvbmError: They cannot be listed.
        """

    @abstractmethod
    def problems(self) -> Sequence[str]:
        """Say what is wrong with the part as a whole, once `objects` has ended."""

    @abstractmethod
    def room_bytes(self, nbytes: int) -> int:
        """Say how long a buffer `read` needs for an object of so many bytes."""

    @abstractmethod
    def read(self, found: Found, buffer: memoryview) -> memoryview | None:
        """Read an object. Called from several threads.

        Args:
            found: Not a broken one.
            buffer: Starts on a page, and is long enough.

        Returns:
            Its bytes, fewer if the medium has fewer; None if it is no longer there.

        Raises:
            KvbmError: The medium does not give it.
        """

    @abstractmethod
    def is_there(self, found: Found) -> bool:
        """Say whether it still lies there as it was listed. Called from several threads."""

    @abstractmethod
    def remove(self, found: Sequence[Found]) -> int:
        """Delete objects that lie there as they were listed, and say how many.

        Where anybody may store meanwhile, one that was stored anew may go: engines miss it.

        Raises:
            KvbmError: An engine uses the place, or it cannot be written.
        """

    @abstractmethod
    def tidy(self, kept: Collection[tuple[Namespace, int]], *, really: bool) -> int:
        """Delete what lies there and is no object: of writers that died, and of namespaces without objects.

        **Requires**: called once `objects` has ended.

        Args:
            kept: Namespaces and ranks that have objects.
            really: Otherwise only count.

        Returns:
            How many files or objects.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of files and connections."""
