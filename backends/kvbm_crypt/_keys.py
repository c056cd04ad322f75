"""Reads keys from where an operator keeps them, and derives from each what encrypts objects.

A key is 256 random bits: 32 bytes as they are, or 64 hexadecimal digits with white space around them. What is
wrong with a source is said without a byte of what was read.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvbm_core import ConfigError
from kvbm_crypt._config import KeySource

__all__ = ["ID_BYTES", "SALT_BYTES", "Key", "read_key"]

ID_BYTES: Final = 16
SALT_BYTES: Final = 12
_KEY_BYTES: Final = 32
_MOST_BYTES: Final = 1024
"""Of a source: it is no key file that is longer."""
_COMMAND_S: Final = 30.0
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_REMEDY: Final = "a key is 32 random bytes, or 64 hexadecimal digits, made by: openssl rand -hex 32"
_BLOCK_BITS: Final = 128


class Key:
    """One key, and what it derives by XAES-256-GCM (C2SP): a key of AES-256-GCM for half of a nonce.

    ::

        nonce, 24 random bytes    first 12, the salt ──CMAC──► key of AES-256-GCM
                                  last 12            ────────► nonce of AES-256-GCM

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self.id = hashlib.sha256(b"kvbm-crypt key id" + key).digest()[:ID_BYTES]
        """Stands in each object. A digest of 256 random bits gives nothing away."""
        self._key = key
        low = int.from_bytes(self._blocks(bytes(16)), "big") << 1
        # The subkey K1 of CMAC, NIST SP 800-38B, section 6.1: 0x87 is the field's polynomial.
        self._subkey = low ^ (1 << _BLOCK_BITS | 0x87) if low >> _BLOCK_BITS else low

    def __repr__(self) -> str:
        return f"<Key {self.id.hex()[:8]}>"

    def derive(self, salt: bytes) -> AESGCM:
        """Give the AES-256-GCM of a salt. Several threads may use it."""
        return AESGCM(self._blocks(b"".join(self._counted(count, salt) for count in (1, 2))))

    def _counted(self, count: int, context: bytes) -> bytes:
        block = bytes([0, count]) + b"X\0" + context
        return (int.from_bytes(block, "big") ^ self._subkey).to_bytes(16, "big")

    def _blocks(self, blocks: bytes) -> bytes:
        return Cipher(algorithms.AES(self._key), modes.ECB()).encryptor().update(blocks)


def read_key(source: KeySource) -> Key:
    """Read a key.

    Raises:
        ConfigError: If it cannot be read, others can read it too, or it is no key.
    """
    content = _content(source)
    if len(content) == _KEY_BYTES:
        return Key(content)
    text = content.strip()
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"keys: {source} has {len(content)} bytes that are no key; {_REMEDY}")
    return Key(key)


def _content(source: KeySource) -> bytes:
    if source.file:
        return _file(source.file)
    if source.command:
        return _printed(source)
    assert source.environment
    text = os.environ.get(source.environment)
    if text is None:
        raise ConfigError(f"keys: the environment has no {source.environment}; set it, and export it")
    return os.fsencode(text)


def _file(name: str) -> bytes:
    path = Path(name).expanduser()
    try:
        # O_NONBLOCK: a pipe would wait for somebody at its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            _check_file(name, os.fstat(fd))
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"keys: file {name!r} cannot be read ({error.strerror}); {_REMEDY}") from error


def _check_file(name: str, state: os.stat_result) -> None:
    """Refuse a file that others can read, or could have put there."""
    if not stat.S_ISREG(state.st_mode):
        raise ConfigError(f"keys: {name!r} is no regular file; {_REMEDY}")
    if state.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"keys: file {name!r} belongs to user {state.st_uid}; chown it to the user that runs the engine"
        )
    if state.st_mode & _OTHERS:
        raise ConfigError(
            f"keys: file {name!r} is open to others, {state.st_mode & 0o777:o}; chmod 600 {name}"
        )


def _printed(source: KeySource) -> bytes:
    assert source.command
    try:
        # What it says of errors goes to this process's own standard error.
        ended = subprocess.run(
            source.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=_COMMAND_S, check=False
        )
    except OSError as error:
        raise ConfigError(
            f"keys: {source} cannot be started ({error.strerror}); write its whole path"
        ) from error
    except subprocess.TimeoutExpired:
        raise ConfigError(f"keys: {source} has not ended after {_COMMAND_S:.0f} s; try it by hand") from None
    if ended.returncode:
        raise ConfigError(f"keys: {source} ended with status {ended.returncode}; try it by hand")
    return ended.stdout[:_MOST_BYTES]
