"""What a codec is: a pure transformation of an object's bytes on their way to a tier and back.

    store:  object and seal ──encode──► first codec ──► second codec ──► tier
    load:   object and seal ◄──decode── first codec ◄── second codec ◄── tier

Compression and encryption are codecs. An operator names them on a tier, in the order in which they encode::

    - {backend: remote, url: s3://bucket, codecs: [{name: zstd}, {name: crypt, keys: [{file: /etc/k}]}]}

The core owns the buffers, the threads and the order; a codec sees one object at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.config import Settings
from kvbm_core.tier import CONTRACT_VERSION

__all__ = ["Codec", "CodecConfig", "CodecContext", "CodecKind"]


class Codec(ABC):
    """Transforms bytes, and back. Both methods may be called from several threads at once."""

    identity: bytes = b""
    """Beside the name, whatever `decode` depends on: the digest of a key. Objects are shared among codecs of
    equal names and identities only, and found again after a restart. No secret."""

    @abstractmethod
    def max_bytes(self, nbytes: int) -> int:
        """Give the length that `encode` makes at most of so many bytes. Grows with `nbytes`."""

    @abstractmethod
    def encode(self, key: BlockKey, source: memoryview, target: memoryview) -> int:
        """Transform an object.

        Args:
            key: Of the object.
            source: Its bytes. They are not changed: other tiers store the same memory.
            target: Where the result goes; ``max_bytes(len(source))`` bytes, or more.

        Returns:
            The length of the result.

        Raises:
            Exception: The object is not stored in this tier, and the log says so.
        """

    @abstractmethod
    def decode(self, key: BlockKey, source: memoryview, target: memoryview) -> int:
        """Undo `encode`.

        Args:
            key: Of the object.
            source: What `encode` made; or anything, if the medium or a stranger has changed it.
            target: Where the object goes; at least as long as the object was.

        Returns:
            The length of the object.

        Raises:
            CorruptError: If the source is not what `encode` made for this key, or makes more than fits. The
                object is deleted, from a shared tier too.
            UnverifiableError: If this codec cannot tell, as it has not what the source was made with; before
                the target is written. The object is a miss, and a shared tier keeps it for others.
        """


class CodecConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of a codec's configuration: the keys beside ``name``, as one frozen type."""


@dataclass(frozen=True, slots=True)
class CodecContext:
    """What a codec is told when it is opened."""

    namespace: Namespace
    """16 bytes. Objects of another namespace never meet this codec."""
    max_bytes: int
    """Length of the longest object that it has to encode."""
    tier: str
    """The tier's name in the configuration, for messages."""


@dataclass(frozen=True, slots=True)
class CodecKind:
    """What a package registers: how codecs of one kind are configured and opened."""

    name: str
    """As written in ``codecs``, and the name of the entry point."""
    config_type: type[CodecConfig]
    """A subclass of `CodecConfig`."""
    open: Callable[[Any, CodecContext], Codec]
    """``open(config, context)``. Raises `ConfigError` for what it cannot work with: a key file that cannot
    be read, a package that is missing."""
    saves_room: bool = False
    """It is there to make objects shorter. Refused on a tier that gives each object an equal slot."""
    contract_version: int = CONTRACT_VERSION
    """As of a `Backend`."""
