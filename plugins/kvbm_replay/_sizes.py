"""Sizes as people write them: in tokens or in bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from kvbm_core.errors import ConfigError
from kvbm_core.sizes import parse_size

__all__ = ["read_blocks", "tokens_text"]

_TOKENS: Final[Mapping[str, int]] = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*|%)")


def read_blocks(option: str, text: str, block_tokens: int, block_bytes: int, whole: int = 0) -> list[int]:
    """Read sizes, in blocks: ``1,2,3M`` (millions of tokens; a unit is of all before it), ``8GiB``, ``5%``.

    Args:
        option: Names the option in messages.
        text: As written.
        block_tokens: Tokens a block.
        block_bytes: Bytes a block.
        whole: Blocks of which percents are taken. 0: percents have no meaning.

    Raises:
        ConfigError: If one is no size, or smaller than a block.
    """
    blocks: list[int] = []
    unit = ""
    for part in reversed(text.split(",")):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"{option} {text}: {part!r} is not a size; {_EXAMPLE}")
        unit = match[2] or unit
        if not unit:
            raise ConfigError(f"{option} {text}: of what? {_EXAMPLE}")
        if unit == "%" and whole:
            count = max(1, round(float(match[1]) / 100 * whole))
        elif unit in _TOKENS:
            count = round(float(match[1]) * _TOKENS[unit]) // block_tokens
        else:
            count = parse_size(match[1] + unit, option) // block_bytes
        if count < 1:
            raise ConfigError(
                f"{option} {text}: {match[1]}{unit} is less than a block of {block_tokens} tokens; {_EXAMPLE}"
            )
        blocks.append(count)
    return blocks[::-1]


_EXAMPLE: Final = "write tokens, like 1,2,5M, or bytes, like 64GiB,1TiB"


def tokens_text(tokens: float) -> str:
    """Write a number of tokens for people: ``1.5 M``."""
    for unit in ("G", "M", "k"):
        if tokens >= 0.9995 * _TOKENS[unit]:
            return f"{tokens / _TOKENS[unit]:.3g} {unit}"
    return f"{tokens:.0f}"
