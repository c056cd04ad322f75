"""Numbers of bytes, as people write them: ``8GiB``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

from kvbm_core.errors import ConfigError
from kvbm_core.printable import shown

__all__ = ["ByteSize", "parse_size", "size_text"]

_UNITS: Final[Mapping[str, int]] = {
    "": 1, "B": 1,
    "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class ByteSize(int):
    """A number of bytes, written as a number or like ``8GiB``, ``500MB``."""

    __slots__ = ()


def parse_size(value: object, key: str = "size") -> ByteSize:
    """Read a size like ``8GiB``, ``500MB`` or a plain number of bytes.

    Raises:
        ConfigError: If it is not a size; names `key` and the value.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return ByteSize(value)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS:
        units = ", ".join(u for u in _UNITS if u)
        raise ConfigError(
            f"{key}: {shown(value)} is not a size; write a number and a unit ({units}), like 8GiB"
        )
    return ByteSize(math.floor(float(match[1]) * _UNITS[match[2]]))


def size_text(nbytes: int, *, up: bool = False) -> str:
    """Write a number of bytes for people, so that `parse_size` reads it: ``12.34GiB``.

    Args:
        nbytes: At least 0.
        up: Round up, for what is needed; otherwise down, for what there is.
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        step = _UNITS[unit]
        if nbytes >= step:
            hundredths = -(-100 * int(nbytes) // step) if up else 100 * int(nbytes) // step
            return f"{hundredths / 100:.2f}".rstrip("0").rstrip(".") + unit
    return f"{int(nbytes)}B"
