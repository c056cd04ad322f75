"""The process that has LMDB: it may end at any time, by a signal, and the engine goes on.

    python -m kvbm_lmdb._keeper CHANNEL WINDOW DATA FOLDER

The first three are descriptors that it inherits; the folder is there for `ps`. LMDB maps its file, so a
page that the disk cannot give, or that somebody cut off, is a SIGBUS, and a damaged tree an abort. Here
that ends a process that nobody waits for.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import sys
import time
from typing import Final

import lmdb
import msgspec

from kvbm_lmdb._directory import slot_bytes
from kvbm_lmdb._environment import DAMAGE, open_store
from kvbm_lmdb._messages import (
    FOUND_BYTES,
    FOUND_KEYS,
    Channel,
    Commit,
    Committed,
    Ended,
    Found,
    Request,
    Settings,
    Sync,
    Synced,
)
from kvbm_lmdb._writer import Writer

__all__: list[str] = []

_PR_SET_NAME: Final = 15
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 64 << 20
"""LMDB allocates each transaction anew. The C library keeps so much of it, instead of giving it back to
the system and faulting it in again page by page, which takes longer than the copy."""
_ORPHAN_CHECK_S: Final = 1.0
"""A fork of the engine may have the other end of the channel, so that no end of file tells of its end."""
_LOCK_WAIT_S: Final = 5.0
"""The keeper of an engine that was killed lets go within this time."""


class _Keeper:
    """Answers one request after another."""

    def __init__(self, channel: Channel, window_fd: int, data_fd: int) -> None:
        self._channel = channel
        settings = msgspec.msgpack.decode(channel.receive(_LOCK_WAIT_S), type=Settings)
        self._settings = settings
        self._data = _lock(data_fd)
        self._window = memoryview(mmap.mmap(window_fd, 0, access=mmap.ACCESS_READ))
        store = open_store(self._data, settings.sizing.map_bytes, lambda: channel.send(Found([], [])))
        self._writer = Writer(store, settings.sizing, settings.folder, settings.namespace, settings.max_bytes)
        self._tell(self._writer.take_stock())

    def run(self) -> None:
        """Serve until the engine is gone."""
        while packet := self._next():
            request: Request = msgspec.msgpack.decode(packet, type=Request)
            if isinstance(request, Commit):
                self._channel.send(self._commit(request))
            elif isinstance(request, Sync):
                self._channel.send(self._sync())

    def _tell(self, found: list[tuple[bytes, bytes]]) -> None:
        keys: list[bytes] = []
        places: list[bytes] = []
        nbytes = 0
        for key, place in found:
            keys.append(key)
            places.append(place)
            nbytes += len(place)
            if len(keys) == FOUND_KEYS or nbytes >= FOUND_BYTES:
                self._channel.send(Found(keys, places))
                keys, places, nbytes = [], [], 0
        self._channel.send(Found(keys, places, last=True))

    def _next(self) -> bytes:
        while os.getppid() == self._settings.engine_pid:
            try:
                return self._channel.receive(_ORPHAN_CHECK_S)
            except TimeoutError:
                continue
        return b""

    def _commit(self, request: Commit) -> Committed:
        stores, at = [], request.half * self._settings.sizing.half_bytes
        for key, nbytes in zip(request.stores, request.lengths, strict=True):
            stores.append((key, self._window[at : at + nbytes]))
            at += slot_bytes(nbytes)
        return self._writer.write(request.erase, stores, request.own_bytes)

    def _sync(self) -> Synced:
        try:
            self._writer.sync()
        except lmdb.Error as error:
            return Synced(str(error))
        return Synced()


def _lock(data_fd: int) -> int:
    """Open the file once more, so that a lock is this process's own, and keep another keeper out."""
    fd = os.open(f"/proc/self/fd/{data_fd}", os.O_RDWR | os.O_CLOEXEC)
    give_up_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > give_up_s:
                raise OSError(errno.EBUSY, "another process has it locked") from error
            time.sleep(0.02)
        else:
            return fd


def main() -> int:
    """Run a keeper; see the module."""
    # Who ends the engine's group of processes ends the engine, which then closes its tiers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A dump of its memory would hold people's prompts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    library = ctypes.CDLL(None)
    library.prctl(_PR_SET_NAME, b"kvbm-lmdb", 0, 0, 0)
    if mallopt := getattr(library, "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES // 2)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    channel_fd, window_fd, data_fd = map(int, sys.argv[1:4])
    channel = Channel(socket.socket(fileno=channel_fd))
    try:
        _Keeper(channel, window_fd, data_fd).run()
    except ConnectionError:
        # The engine is gone.
        return 0
    except (lmdb.Error, OSError) as error:
        # Once it is open it makes do with the room that there is.
        channel.send(Ended(isinstance(error, DAMAGE), str(error), isinstance(error, lmdb.MapFullError)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
