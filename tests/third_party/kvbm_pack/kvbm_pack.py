"""Compresses objects by Zstandard, each as one frame that says how long the object is."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import zstandard

import kvbm_core as kvbm

__all__ = ["PackCodec", "PackConfig", "kvbm_codecs"]

_MOST_LEVEL = 22
_SHORT_BYTES = 128 * 1024


class PackConfig(kvbm.CodecConfig, frozen=True):
    """Settings of a `PackCodec`.

    Raises:
        ConfigError: If the level is out of range.
    """

    level: int = 3
    """1, the fastest, to 22, the shortest."""

    def __post_init__(self) -> None:
        if not 1 <= self.level <= _MOST_LEVEL:
            raise kvbm.ConfigError(f"level: {self.level!r}; write 1 to {_MOST_LEVEL}")


class PackCodec(kvbm.Codec):
    """Each thread has a compressor of its own: they are not to be shared."""

    def __init__(self, config: PackConfig, context: kvbm.CodecContext) -> None:
        self._level = config.level
        self._own = threading.local()

    def __repr__(self) -> str:
        return f"<PackCodec level {self._level}>"

    def max_bytes(self, nbytes: int) -> int:
        """See `Codec.max_bytes`. ZSTD_COMPRESSBOUND of zstd.h."""
        return nbytes + (nbytes >> 8) + (max(0, _SHORT_BYTES - nbytes) >> 11)

    def encode(self, key: kvbm.BlockKey, source: memoryview, target: memoryview) -> int:
        """See `Codec.encode`."""
        if not hasattr(self._own, "compressor"):
            self._own.compressor = zstandard.ZstdCompressor(level=self._level)
        frame = self._own.compressor.compress(source)
        target[: len(frame)] = frame
        return len(frame)

    def decode(self, key: kvbm.BlockKey, source: memoryview, target: memoryview) -> int:
        """See `Codec.decode`. Nothing is decompressed that says to be longer than the target."""
        if not hasattr(self._own, "decompressor"):
            self._own.decompressor = zstandard.ZstdDecompressor()
        try:
            # A frame that does not say its length has 0 or -1 here.
            nbytes = zstandard.frame_content_size(source)
            if not 0 < nbytes <= len(target):
                raise kvbm.CorruptError(f"a frame of {nbytes} bytes, for {len(target)}")
            content = self._own.decompressor.decompress(source, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise kvbm.CorruptError(f"no frame of Zstandard: {error}") from error
        target[: len(content)] = content
        return len(content)


@kvbm.hookimpl
def kvbm_codecs() -> Sequence[kvbm.CodecKind]:
    """Offer the codec ``pack``."""
    return [kvbm.CodecKind("pack", PackConfig, PackCodec, saves_room=True, contract_version=2)]
