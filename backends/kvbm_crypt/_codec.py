"""An object as it lies in the tier: its bytes, encrypted or not, and behind them a trailer.

    bytes | "kvbm" | version, 1 | mode, 1 | 0, 2 | key id, 16 | nonce, 24 | tag, 16
            └──────────────── 48 bytes, authenticated ───────────────────┘

The tag is that of AES-256-GCM. Authenticated are the trailer before it, the namespace, the object's key and,
of a signed object, its bytes (GMAC). So none can be changed, or put in the place of another.
"""

from __future__ import annotations

import logging
import os
import struct
from typing import Final

from cryptography.exceptions import InvalidTag

from kvbm_core import BlockKey, Codec, CodecContext, ConfigError, CorruptError, UnverifiableError
from kvbm_crypt._config import CryptConfig
from kvbm_crypt._keys import ID_BYTES, NONCE_BYTES, Key, read_key

__all__ = ["CryptCodec"]

logger = logging.getLogger("kvbm_crypt")

_FIELDS: Final = struct.Struct(f"<4sBB2x{ID_BYTES}s{NONCE_BYTES}s")
_MAGIC: Final = b"kvbm"
_VERSION: Final = 1
_MODES: Final = {"encrypt": 1, "sign": 2}
_TAG_BYTES: Final = 16
_TRAILER_BYTES: Final = _FIELDS.size + _TAG_BYTES


class CryptCodec(Codec):
    """Encrypts or signs with the first key, and reads what any of its keys has written.

    Behaviour:
        - An object of a key that it has not, or of a later version, is `UnverifiableError`: a miss, and for
          others to serve.
        - One that its own key refutes is `CorruptError`: changed, cut, swapped, or planted without a key.
        - Nothing is changed after the start, so any thread may call it.

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
        nbytes, nonce = len(source), os.urandom(NONCE_BYTES)
        fields = _FIELDS.pack(_MAGIC, _VERSION, self._mode, self._writes.id, nonce)
        cipher = self._writes.cipher(nonce).encryptor()
        cipher.authenticate_additional_data(fields + self._namespace + key)
        if self._signs:
            target[:nbytes] = source
            cipher.authenticate_additional_data(source)
        else:
            cipher.update_into(source, target[:nbytes])
        cipher.finalize()
        target[nbytes : nbytes + _TRAILER_BYTES] = fields + cipher.tag
        return nbytes + _TRAILER_BYTES

    def decode(self, key: BlockKey, source: memoryview, target: memoryview) -> int:
        """See `Codec.decode`."""
        nbytes = len(source) - _TRAILER_BYTES
        if not 0 < nbytes <= len(target):
            raise CorruptError(f"an object of {nbytes} bytes, for {len(target)}")
        fields, tag = bytes(source[nbytes:-_TAG_BYTES]), bytes(source[-_TAG_BYTES:])
        writer, nonce = self._read_fields(fields)
        cipher = writer.cipher(nonce, tag).decryptor()
        cipher.authenticate_additional_data(fields + self._namespace + key)
        content = source[:nbytes]
        try:
            if self._signs:
                cipher.authenticate_additional_data(content)
                cipher.finalize()
                target[:nbytes] = content
            else:
                cipher.update_into(content, target[:nbytes])
                cipher.finalize()
        except InvalidTag as error:
            raise CorruptError(
                f"the tag is wrong for key {writer.id.hex()[:8]}: changed, swapped, or planted without it"
            ) from error
        return nbytes

    def _read_fields(self, fields: bytes) -> tuple[Key, bytes]:
        """Give the key that wrote an object, and the nonce."""
        magic, version, mode, key_id, nonce = _FIELDS.unpack(fields)
        if magic != _MAGIC:
            raise CorruptError("no trailer of crypt: cut, changed, or written by who has no key")
        if version != _VERSION or key_id not in self._keys:
            raise UnverifiableError(
                f"it is of key {key_id.hex()[:8]}, which is not among the keys here"
                if version == _VERSION
                else f"it is of format {version}, this release has {_VERSION}"
            )
        if mode != self._mode:
            raise CorruptError(f"it is of mode {mode}, not {self._mode}")
        return self._keys[key_id], nonce
