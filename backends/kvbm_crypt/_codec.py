"""An object as it lies in the tier: its bytes, encrypted or not, and behind them a trailer.

    bytes | tag, 16 | "kvbm" | version, 1 | mode, 1 | 0, 2 | key id, 16 | salt, 12 | nonce, 12
                      └───────────── the head, 36 bytes ──────────────┘

The tag is that of AES-256-GCM. Authenticated are the trailer behind it, the namespace, the object's key and
the bytes. So none can be changed, or put in the place of another.

    encrypt    the bytes are encrypted; the rest is data beside them
    sign       the bytes are data beside; the rest is encrypted, and of that only the tag is kept

Salt and nonce are random. A derivation takes as long as 64 KiB, so a salt serves some thousand objects, and a
reader remembers what it has derived.
"""

from __future__ import annotations

import hmac
import logging
import os
import struct
import threading
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvbm_core import BlockKey, Codec, CodecContext, ConfigError, CorruptError, UnverifiableError
from kvbm_crypt._config import CryptConfig
from kvbm_crypt._keys import ID_BYTES, SALT_BYTES, Key, read_key

__all__ = ["CryptCodec"]

logger = logging.getLogger("kvbm_crypt")

_HEAD: Final = struct.Struct(f"<4sBB2x{ID_BYTES}s{SALT_BYTES}s")
_MAGIC: Final = b"kvbm"
_VERSION: Final = 1
_MODES: Final = {"encrypt": 1, "sign": 2}
_TAG_BYTES: Final = 16
_NONCE_BYTES: Final = 12
_TRAILER: Final = struct.Struct(f"{_HEAD.size}s{_NONCE_BYTES}s")
"""Without the tag, which the library writes when it encrypts."""
_TRAILER_BYTES: Final = _TAG_BYTES + _TRAILER.size
_MOST_OBJECTS: Final = 4096
"""Of a salt. Of N objects two have the same salt and nonce with a chance below N * 4096 / 2**97."""
_MOST_DERIVED: Final = 1024
"""That a reader remembers."""


class _Salted:
    """A new salt, and how many objects it may still serve: a few more where two threads count at once."""

    __slots__ = ("cipher", "head", "left")

    def __init__(self, key: Key, mode: int) -> None:
        salt = os.urandom(SALT_BYTES)
        self.head = _HEAD.pack(_MAGIC, _VERSION, mode, key.id, salt)
        self.cipher = key.derive(salt)
        self.left = _MOST_OBJECTS


class CryptCodec(Codec):
    """Encrypts or signs with the first key, and reads what any of its keys has written.

    Behaviour:
        - An object of a key that it has not, or of a later version, is `UnverifiableError`: a miss, and for
          others to serve.
        - One that its own key refutes is `CorruptError`: changed, cut, swapped, or planted without a key.
        - Any thread may call it.

    Args:
        config: The settings.
        context: What the core says.

    Raises:
        ConfigError: If a key cannot be read, or is there twice.
    """

    def __init__(self, config: CryptConfig, context: CodecContext) -> None:
        keys = [read_key(source) for source in config.keys]
        self._writes = keys[0]
        self._keys = {key.id: key for key in keys}
        if len(self._keys) < len(keys):
            raise ConfigError("keys: two sources give the same key; take one away")
        self._namespace = context.namespace
        self._mode = _MODES[config.mode]
        self._signs = config.mode == "sign"
        self._salted = _Salted(self._writes, self._mode)
        self._derived: dict[bytes, AESGCM] = {}
        """By the head of an object."""
        self._lock = threading.Lock()
        # Not the keys: a new one must find what an old one has written.
        self.identity = f"{_VERSION} {config.mode} {config.ring}".encode()
        ids = ", ".join(key.id.hex()[:8] for key in keys)
        logger.info(
            "tier %s: crypt: mode %s; keys, the first of which writes: %s", context.tier, config.mode, ids
        )

    def __repr__(self) -> str:
        return f"<CryptCodec {'sign' if self._signs else 'encrypt'}, key {self._writes.id.hex()[:8]}>"

    def max_bytes(self, nbytes: int) -> int:
        """See `Codec.max_bytes`. Exactly so many."""
        return nbytes + _TRAILER_BYTES

    def encode(self, key: BlockKey, source: memoryview, target: memoryview) -> int:
        """See `Codec.encode`."""
        salted = self._salted
        if salted.left <= 0:
            self._salted = salted = _Salted(self._writes, self._mode)
        salted.left -= 1
        # From the kernel for each object: neither a fork nor a copy of this machine repeats it.
        nonce, nbytes = os.urandom(_NONCE_BYTES), len(source)
        end = nbytes + _TAG_BYTES
        bound = salted.head + nonce + self._namespace + key
        if self._signs:
            target[:nbytes] = source
            target[nbytes:end] = salted.cipher.encrypt(nonce, bound, source)[-_TAG_BYTES:]
        else:
            salted.cipher.encrypt_into(nonce, source, bound, target[:end])
        _TRAILER.pack_into(target, end, salted.head, nonce)
        return nbytes + _TRAILER_BYTES

    def decode(self, key: BlockKey, source: memoryview, target: memoryview) -> int:
        """See `Codec.decode`."""
        nbytes = len(source) - _TRAILER_BYTES
        if not 0 < nbytes <= len(target):
            raise CorruptError(f"an object of {nbytes} bytes, for {len(target)}")
        end = nbytes + _TAG_BYTES
        head, nonce = _TRAILER.unpack_from(source, end)
        cipher = self._derived.get(head) or self._derive(head)
        bound = head + nonce + self._namespace + key
        if self._signs:
            content = source[:nbytes]
            tag = cipher.encrypt(nonce, bound, content)[-_TAG_BYTES:]
            if not hmac.compare_digest(tag, source[nbytes:end]):
                raise self._refuted(head)
            target[:nbytes] = content
        else:
            try:
                cipher.decrypt_into(nonce, source[:end], bound, target[:nbytes])
            except InvalidTag as error:
                raise self._refuted(head) from error
        return nbytes

    def _derive(self, head: bytes) -> AESGCM:
        """Give the cipher of a head that was not seen lately."""
        magic, version, mode, key_id, salt = _HEAD.unpack(head)
        if magic != _MAGIC:
            raise CorruptError("no trailer of crypt: cut, changed, or written by who has no key")
        if version != _VERSION or key_id not in self._keys:
            raise UnverifiableError(
                f"it is of key {key_id.hex()[:8]}, which is not among the keys here"
                if version == _VERSION
                else f"it is of format {version}, this release has {_VERSION}"
            )
        if head != _HEAD.pack(_MAGIC, _VERSION, self._mode, key_id, salt):
            raise CorruptError(f"it is of mode {mode}, not {self._mode}, or changed")
        cipher = self._keys[key_id].derive(salt)
        with self._lock:
            while len(self._derived) >= _MOST_DERIVED:
                del self._derived[next(iter(self._derived))]
            self._derived[head] = cipher
        return cipher

    @staticmethod
    def _refuted(head: bytes) -> CorruptError:
        key_id = _HEAD.unpack(head)[3]
        return CorruptError(
            f"the tag is wrong for key {key_id.hex()[:8]}: changed, swapped, or planted without it"
        )
