"""Settings of the codec ``crypt``. They say where keys are; a key itself is never among them."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvbm_core import CodecConfig, ConfigError

__all__ = ["CryptConfig", "KeySource"]


class KeySource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a key comes from: one of three.

    Raises:
        ConfigError: If none of them is written, or more than one.
    """

    file: str | None = None
    """A file of this user, or of root, that nobody else may read."""
    command: tuple[str, ...] | None = None
    """A program and its arguments; no shell. What it prints is the key."""
    environment: str | None = None
    """The name of an environment variable."""

    def __post_init__(self) -> None:
        if sum(bool(each) for each in (self.file, self.command, self.environment)) != 1:
            raise ConfigError(
                "keys: a source that does not say where its key is; write one of {file: PATH}, "
                "{command: [PROGRAM, ARGUMENT]} and {environment: NAME}"
            )

    def __str__(self) -> str:
        if self.file:
            return f"{{file: {self.file}}}"
        # Arguments may hold a token.
        return (
            f"{{command: [{self.command[0]}, ...]}}"
            if self.command
            else f"{{environment: {self.environment}}}"
        )


class CryptConfig(CodecConfig, frozen=True):
    """Settings of a `CryptCodec`.

    Raises:
        ConfigError: If there is no key source.
    """

    keys: tuple[KeySource, ...]
    """The first encrypts or signs; all of them decrypt or verify. To rotate, write the new one first."""
    mode: Literal["encrypt", "sign"] = "encrypt"
    """``sign`` leaves the bytes readable, and proves that a holder of a key has written them."""
    ring: str = ""
    """Names the keys as a whole. Engines that share keys write the same; those with other keys on the same
    store write another, and then never meet each other's objects."""

    def __post_init__(self) -> None:
        if not self.keys:
            raise ConfigError("keys: an empty list; write at least one source, like [{file: /etc/kvbm/key}]")
