"""The objects in a tier's place, read one by one without opening the tier: `Backend.contents`.

An engine may be using the place. For reading its lock is not taken, and nothing is written: so an object may
be replaced while it is read. Who finds one damaged asks `Contents.is_there` whether it still lies there as
it was listed.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.errors import KvbmError, TierError
from kvbm_core.field_docs import show_fields
from kvbm_core.localdir import LocalDirectory
from kvbm_core.stored import facts_in
from kvbm_core.trust import open_direct, open_file, open_folder

__all__ = ["Contents", "FolderContents", "Found"]


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


class FolderContents(Contents):
    """A rank's folder on a local disk. A backend adds what its files say.

    Args:
        directory: As configured.
        rank: Whose folder.
        folder: The folder.
        tier: The backend's name, for messages.

    Raises:
        KvbmError: The folder or a file of it cannot be read or trusted. What was opened is closed again.
    """

    def __init__(self, directory: LocalDirectory, rank: int, folder: Path, tier: str) -> None:
        self.where = str(folder)
        self.rank = rank
        self.folder = folder
        self._directory = directory
        self._tier = tier
        self._fds: list[int] = []
        try:
            self._folder_fd = open_folder(folder, tier, tighten=False)
            try:
                self.open_files(os.listdir(self._folder_fd))
            finally:
                os.close(self._folder_fd)
        except (OSError, KvbmError) as error:
            self.close()
            if isinstance(error, KvbmError):
                raise
            raise TierError(f"{self.where} cannot be read: {error.strerror}", tier=tier) from error

    def __repr__(self) -> str:
        return f"<contents of {self.where}>"

    @abstractmethod
    def open_files(self, names: Sequence[str]) -> None:
        """Open what is needed with `open_file`; `names` are those in the folder. Called once, at first."""

    def open_file(self, name: str, *, direct: bool = False) -> int:
        """Open a file of the folder for reading, until `close`.

        Args:
            name: Of the file.
            direct: Past the page cache, where the file system can.
        """
        if direct:
            fd, _ = open_direct(self._open, name, os.O_RDONLY)
        else:
            fd = self._open(name, os.O_RDONLY)
        self._fds.append(fd)
        return fd

    def holder(self) -> str:
        """See `Contents.holder`."""
        return self._directory.owner(self.rank)

    def facts(self) -> Mapping[tuple[Namespace, int], Mapping[str, Any] | None]:
        """See `Contents.facts`."""
        return {(name, self.rank): facts for name, (_, facts) in facts_in(self.folder).items()}

    def tidy(self, kept: Collection[tuple[Namespace, int]], *, really: bool) -> int:
        """See `Contents.tidy`. An engine does it at its start."""
        return 0

    def close(self) -> None:
        """See `Contents.close`."""
        while self._fds:
            os.close(self._fds.pop())

    def _open(self, name: str, flags: int) -> int:
        return open_file(self.folder, self._folder_fd, name, flags, self._tier)
