"""Compresses objects without loss: numbers' bytes by plane, each plane by Zstandard.

    codecs: [{name: zstd, element_bytes: 2}]

`ZstdCodec` is the codec, `ZstdConfig` its settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_core import CodecKind, hookimpl
from kvbm_zstd._codec import ZstdCodec
from kvbm_zstd._config import ZstdConfig

__all__ = ["ZstdCodec", "ZstdConfig", "kvbm_codecs"]


@hookimpl
def kvbm_codecs() -> Sequence[CodecKind]:
    """Offer the codec ``zstd``."""
    return [CodecKind("zstd", ZstdConfig, ZstdCodec, saves_room=True, contract_version=2)]
