"""What the tier needs of a store, and the stores whose calls return when they are done.

    Store ─┬─ ObjectStore     s3, by obstore                       on an event loop
           ├─ AsyncStore      any asynchronous fsspec file system  on an event loop
           ├─ LocalStore      file://, by the operating system     in threads
           └─ ThreadStore     any other fsspec file system         in threads

All methods are coroutines. Those of a store that is not `asynchronous` never suspend: they block the
thread that runs them.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = [
    "FACTS",
    "LITTER_S",
    "TEMPORARY",
    "TOP",
    "UNFINISHED",
    "UNSAID",
    "Buffer",
    "Entry",
    "Store",
    "ThreadStore",
    "entry_of",
    "is_temporary",
]

TOP: Final = "v1"
"""Everything of ours lies below it; it names the version of the layout."""
TEMPORARY: Final = f"{TOP}/tmp"
"""Files lie here until they are whole; in a local directory they lie beside the others, see `UNFINISHED`."""
FACTS: Final = f"{TOP}/facts"
"""What namespaces are made of lies here, see `_facts`."""
UNFINISHED: Final = r"\.kvbm-[0-9a-f]{32}\.tmp"
"""What a file in a local directory is called until it is whole: a name that nobody else gives."""
_LITTER: Final = re.compile(
    rf"{TEMPORARY}/[0-9a-f]{{32}}|({TOP}/[0-9a-f]{{32}}/r\d+of\d+/[0-9a-f]{{2}}|{FACTS}/r\d+)/{UNFINISHED}",
    re.ASCII,
)
LITTER_S: Final = 3600.0
"""A temporary file of this age was left by a writer that died."""
UNSAID: Final = -1

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Entry:
    """An object found in a store."""

    path: str
    """Below the store's root."""
    nbytes: int
    modified_s: float
    """Since the epoch."""


class Store(ABC):
    """Whole objects by path, below a root. A path that is absent raises FileNotFoundError.

    Behaviour:
        - Nobody ever reads a part of what `put` writes.
        - Nothing is retried; what a client library raises comes out as it is.
    """

    client: str = ""
    """The library that does it, for the log."""
    asynchronous: bool = False
    """It needs an event loop, and its operations can be cancelled."""
    abandonable: bool = True
    """An operation that was given up touches nothing it was given: loads return bytes of their own, and
    stores are given a copy."""

    @abstractmethod
    async def get(self, path: str, target: memoryview) -> Buffer:
        """Give an object: bytes of its own, or the first bytes of `target`, filled.

        Raises:
            WrongLengthError: If it knows that the object is longer than the target, or empty. Of a longer
                one it reads a byte more than the target has, at most.
        """

    @abstractmethod
    async def put(self, path: str, content: Buffer, *, overwrite: bool) -> None:
        """Write an object. Unless told to overwrite, leave one that is there, if that is cheap.

        **Requires**: `content` does not change until it returns; if the store is `abandonable`, ever.
        """

    @abstractmethod
    async def nbytes(self, path: str) -> int:
        """Say how long an object is; `UNSAID` if it is there and the store does not say."""

    @abstractmethod
    async def delete(self, path: str) -> None:
        """Delete an object."""

    @abstractmethod
    def entries(self, folder: str) -> AsyncIterator[Entry]:
        """List all objects below a folder, a part at a time, in any order. None if it is not there."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of connections."""


class ThreadStore(Store):
    """A synchronous fsspec file system, connected when it is first used and again after a break.

    Each thread has a connection of its own: those of SFTP, FTP and the like mix up the answers when
    threads share one.
    """

    def __init__(self, connect: Callable[[], Any], root: str, *, atomic: bool) -> None:
        """Make a store.

        Args:
            connect: Makes the file system; may block, and fail.
            root: The directory, as the file system writes it.
            atomic: A file that is written appears whole.
        """
        self.client = "fsspec, threads"
        self._connect = connect
        self._root = root.rstrip("/")
        self._atomic = atomic
        self._own = threading.local()
        self._lock = threading.Lock()
        self._all: list[Any] = []
        self._made: set[str] = set()

    async def get(self, path: str, target: memoryview) -> Buffer:
        """See `Store.get`."""
        with self._connected() as fs:
            # A byte more shows that an object is longer, whatever its length.
            content: bytes = fs.cat_file(self._at(path), start=0, end=len(target) + 1)
            return content

    async def put(self, path: str, content: Buffer, *, overwrite: bool) -> None:
        """See `Store.put`. Written under a temporary name, then renamed, where that is needed."""
        final = self._at(path)
        with self._connected() as fs:
            if not overwrite and fs.exists(final):
                return
            if self._atomic:
                fs.pipe_file(final, content)
                return
            temporary = self._at(f"{TEMPORARY}/{secrets.token_hex(16)}")
            for name in (final, temporary):
                self._make(fs, name.rpartition("/")[0])
            try:
                fs.pipe_file(temporary, content)
                fs.mv(temporary, final)
            except BaseException:
                self._made.clear()
                # What cannot be deleted now is litter, and collected later.
                with contextlib.suppress(Exception):
                    fs.rm_file(temporary)
                raise

    async def nbytes(self, path: str) -> int:
        """See `Store.nbytes`."""
        with self._connected() as fs:
            return int(fs.info(self._at(path))["size"])

    async def delete(self, path: str) -> None:
        """See `Store.delete`."""
        with self._connected() as fs:
            fs.rm_file(self._at(path))

    async def entries(self, folder: str) -> AsyncIterator[Entry]:
        """See `Store.entries`."""
        folders = [self._at(folder)]
        while folders:
            with self._connected() as fs, contextlib.suppress(FileNotFoundError):
                for facts in fs.ls(folders.pop(), detail=True):
                    if facts["type"] == "directory":
                        folders.append(facts["name"])
                    else:
                        yield entry_of(facts, self._root)

    async def close(self) -> None:
        """See `Store.close`."""
        with self._lock:
            connected, self._all = self._all, []
        for fs in connected:
            _disconnect(fs)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _make(self, fs: Any, folder: str) -> None:
        if folder in self._made:
            return
        try:
            fs.makedirs(folder, exist_ok=True)
        except OSError:
            # Somebody else made it just now, and not every file system says so.
            if not fs.isdir(folder):
                raise
        self._made.add(folder)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        fs = getattr(self._own, "fs", None)
        if fs is None:
            fs = self._own.fs = self._connect()
            with self._lock:
                self._all.append(fs)
        try:
            yield fs
        except FileNotFoundError:
            raise
        except Exception:
            # A broken connection does not mend: the next operation makes a new one.
            self._own.fs = None
            with self._lock, contextlib.suppress(ValueError):
                self._all.remove(fs)
            _disconnect(fs)
            raise


def _disconnect(fs: Any) -> None:
    client: Any = getattr(fs, "client", None)
    if hasattr(client, "close"):
        client.close()


def is_temporary(path: str) -> bool:
    """Say whether a path, below the root, is a file's that was not whole when it was written."""
    return _LITTER.fullmatch(path) is not None


def entry_of(facts: Mapping[str, Any], root: str) -> Entry:
    """Turn what a file system says about a file into an entry."""
    names = ("LastModified", "last_modified", "mtime", "updated", "modified", "timeModified", "created")
    when: Any = next((facts[name] for name in names if facts.get(name) is not None), time.time())
    if isinstance(when, str):
        when = datetime.datetime.fromisoformat(when)
    if isinstance(when, datetime.datetime):
        when = when.timestamp()
    path = str(facts["name"])[len(root) :].lstrip("/")
    return Entry(path, int(facts["size"] or 0), float(when))
