"""Settings of the codec ``zstd``."""

from __future__ import annotations

from typing import Literal

from kvbm_core import CodecConfig

__all__ = ["ZstdConfig"]


class ZstdConfig(CodecConfig, frozen=True):
    """Settings of a `ZstdCodec`."""

    element_bytes: Literal[1, 2, 4, 8] = 2
    """Of a number of the KV cache: 2 for bfloat16 and float16, 4 for float32, 1 for fp8. Another width costs
    room, and is still without loss; each object says which it has."""
