"""Encrypts objects by AES-256-GCM, so that who holds the store can neither read nor change or swap them.

    nonce, 12 random bytes | ciphertext | tag, 16 bytes

The namespace and the object's key are associated data: an object under another key, or of another model, is
refused. One key should encrypt at most 2**32 objects, because nonces are random (NIST SP 800-38D, 8.3).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import kvbm_core as kvbm

__all__ = ["AesGcmCodec", "AesGcmConfig", "kvbm_codecs"]

_KEY_BYTES = 32
_NONCE_BYTES = 12
_TAG_BYTES = 16
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class AesGcmConfig(kvbm.CodecConfig, frozen=True):
    """Settings of an `AesGcmCodec`."""

    key_file: str
    """A file of 32 random bytes, the same for all engines that share objects. Its owner's alone (0600)."""


class AesGcmCodec(kvbm.Codec):
    """Every method may be called from several threads: nothing is changed after the start."""

    def __init__(self, config: AesGcmConfig, context: kvbm.CodecContext) -> None:
        key = _read_key(config.key_file)
        self.identity = hashlib.sha256(b"kvbm-aes-gcm" + key).digest()[:16]
        self._cipher = AESGCM(key)
        self._namespace = context.namespace

    def __repr__(self) -> str:
        return f"<AesGcmCodec key {self.identity.hex()[:8]}>"

    def max_bytes(self, nbytes: int) -> int:
        """See `Codec.max_bytes`. Exactly so many."""
        return nbytes + _NONCE_BYTES + _TAG_BYTES

    def encode(self, key: kvbm.BlockKey, source: memoryview, target: memoryview) -> int:
        """See `Codec.encode`."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, source, self._namespace + key)
        nbytes = _NONCE_BYTES + len(sealed)
        target[:_NONCE_BYTES] = nonce
        target[_NONCE_BYTES:nbytes] = sealed
        return nbytes

    def decode(self, key: kvbm.BlockKey, source: memoryview, target: memoryview) -> int:
        """See `Codec.decode`."""
        nbytes = len(source) - _NONCE_BYTES - _TAG_BYTES
        if not 0 < nbytes <= len(target):
            raise kvbm.CorruptError(f"an object of {nbytes} bytes, for {len(target)}")
        try:
            content = self._cipher.decrypt(
                bytes(source[:_NONCE_BYTES]), source[_NONCE_BYTES:], self._namespace + key
            )
        except InvalidTag as error:
            raise kvbm.CorruptError("the tag is wrong: changed, swapped, or of another key file") from error
        target[:nbytes] = content
        return nbytes


def _read_key(name: str) -> bytes:
    remedy = f"write a file made by: head -c {_KEY_BYTES} /dev/urandom > FILE; chmod 600 FILE"
    path = Path(name).expanduser()
    try:
        mode, key = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise kvbm.ConfigError(f"key_file: {name!r} cannot be read ({error.strerror}); {remedy}") from error
    if mode & _OTHERS:
        raise kvbm.ConfigError(f"key_file: {name!r} is open to others, {mode & 0o777:o}; chmod 600 {name}")
    if len(key) != _KEY_BYTES:
        raise kvbm.ConfigError(f"key_file: {name!r} has {len(key)} bytes, not {_KEY_BYTES}; {remedy}")
    return key


@kvbm.hookimpl
def kvbm_codecs() -> Sequence[kvbm.CodecKind]:
    """Offer the codec ``aes-gcm``."""
    return [kvbm.CodecKind("aes-gcm", AesGcmConfig, AesGcmCodec, contract_version=2)]
