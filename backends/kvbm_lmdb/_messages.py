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
"""No message is longer: at most 256 keys to erase and 64 to store, or 1,024 keys found."""
FOUND_KEYS: Final = 1024
"""Keys in one `Found`."""


class Settings(msgspec.Struct, frozen=True):
    """The first message to a keeper."""

    folder: str
    engine_pid: int
    """The keeper ends when this process is its parent no more."""
    namespace: bytes
    block_bytes: int
    sizing: Sizing


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Erase, then store, in one transaction. Answered with `Committed`."""

    erase: list[bytes]
    stores: list[bytes]
    """Keys; the bytes of the nth are in the nth slot of the window's half."""
    half: int
    own_blocks: int
    """Blocks of this namespace there are after it."""


class Sync(msgspec.Struct, frozen=True, tag=True):
    """Flush what was committed to the disk. Answered with `Synced`."""


class Found(msgspec.Struct, frozen=True, tag=True):
    """A part of what is served, oldest first; also a sign of life. The last one ends the opening."""

    keys: list[bytes]
    offsets: list[int]
    """Where each block's bytes begin in the file."""
    last: bool = False


class Committed(msgspec.Struct, frozen=True, tag=True):
    """How a `Commit` went: the first stores, as many as there are offsets, are committed."""

    erased: bool
    offsets: list[int]
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
