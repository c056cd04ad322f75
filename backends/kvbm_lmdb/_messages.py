"""What the tier and its keeper say to each other: one packet of msgpack a message, over a pair of sockets."""

from __future__ import annotations

import socket
from typing import Final

import msgspec

from kvbm_lmdb._directory import Sizing

__all__ = [
    "Channel",
    "Commit",
    "Committed",
    "Ended",
    "Found",
    "Reply",
    "Request",
    "Settings",
    "Sync",
    "Synced",
]

_PACKET_BYTES: Final = 128 << 10
"""No message is longer: at most 256 keys to erase and 64 to store, 64 places, or what is in one `Found`."""
FOUND_KEYS: Final = 1024
FOUND_BYTES: Final = 64 << 10
"""Keys in one `Found`, and bytes of places; the last place may be longer."""


class Settings(msgspec.Struct, frozen=True):
    """The first message to a keeper."""

    folder: str
    engine_pid: int
    """The keeper ends when this process is its parent no more."""
    namespace: bytes
    max_bytes: int
    sizing: Sizing


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Erase, then store, in one transaction. Answered with `Committed`."""

    erase: list[bytes]
    stores: list[bytes]
    """Keys. Their objects lie in the window's half in this order, each in a slot of whole pages."""
    lengths: list[int]
    """Of the objects, in bytes."""
    half: int
    own_bytes: int
    """What objects of this namespace take of the capacity after it."""


class Sync(msgspec.Struct, frozen=True, tag=True):
    """Flush what was committed to the disk. Answered with `Synced`."""


class Found(msgspec.Struct, frozen=True, tag=True):
    """A part of what is served, oldest first; also a sign of life. The last one ends the opening."""

    keys: list[bytes]
    places: list[bytes]
    """Where each object lies in the file, see `_place`."""
    last: bool = False


class Committed(msgspec.Struct, frozen=True, tag=True):
    """How a `Commit` went: the first stores, as many as there are places, are committed."""

    erased: bool
    places: list[bytes]
    full: str = ""
    """Why the others found no room."""


class Synced(msgspec.Struct, frozen=True, tag=True):
    """The end of a `Sync`."""

    error: str = ""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The keeper ends: LMDB cannot go on."""

    damaged: bool
    """The file is not, or no longer, a sound environment. False: the medium failed, or something else."""
    detail: str
    too_small: bool = False
    """The file nearly fills the capacity, which was larger: there is no room even to give objects up."""


Request = Commit | Sync
Reply = Found | Committed | Synced | Ended


class Channel:
    """One end of the pair."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: msgspec.Struct) -> None:
        """Send a message.

        Raises:
            OSError: If the other end is gone.
        """
        self._end.send(msgspec.msgpack.encode(message))

    def receive(self, wait_s: float) -> bytes:
        """Wait for a packet. Empty if the other end is gone.

        Raises:
            TimeoutError: If none comes.
        """
        self._end.settimeout(wait_s)
        try:
            return self._end.recv(_PACKET_BYTES)
        except ConnectionError:
            return b""

    def close(self) -> None:
        """Let the other end read that this one is gone."""
        self._end.close()
