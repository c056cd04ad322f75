"""An object as it lies in the tier: plain, or by planes.

    0 | bytes of the object                                       where compression saves nothing
    w | length, 8 | length of each plane, w * 4 | planes | rest   w bytes make a number

Plane p has byte p of each number, as one frame of Zstandard, or plain if that is no longer. The rest are the
last bytes that make no number. Integers are little-endian.

    bfloat16, two numbers     m0 e0 m1 e1     e: sign and exponent, m: mantissa
    its planes                m0 m1 │ e0 e1   m is noise, e one of few

Apart, the exponents shrink to less than half, and no time is lost on mantissas.
"""

from __future__ import annotations

import struct
import threading
from typing import Any, Final

import numpy as np
import zstandard

from kvbm_core import BlockKey, Codec, CodecContext, CorruptError
from kvbm_zstd._config import ZstdConfig

__all__ = ["ZstdCodec"]

_PLAIN: Final = 0
_WIDTHS: Final = (1, 2, 4, 8)
_LENGTH: Final = struct.Struct("<Q")
_PLANE: Final = struct.Struct("<I")
# In noise of few values the matches that Zstandard finds cost time and are longer than its Huffman codes. So
# it looks for hardly any: a table of 64 entries, of sequences that are 7 bytes at least.
_PARAMETERS: Final[dict[str, int]] = {
    "strategy": zstandard.STRATEGY_FAST,
    "min_match": 7,
    "hash_log": 6,
    "chain_log": 6,
    "search_log": 1,
    "window_log": 17,
    "target_length": 0,
}

_SAMPLE: Final = 8192
_MOST_PART: Final = 0.97
"""Of its length, that a compressed plane takes at most. Else it is plain, and costs a copy."""

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class ZstdCodec(Codec):
    """Compresses in the thread that calls, and starts none.

    Behaviour:
        - An object takes at most one byte more than its length.
        - Nothing is decompressed that says to be longer than there is room for.
        - The settings say how to write; each object says how to read it.

    Args:
        config: The settings.
        context: What the core says.
    """

    identity = b"planes 1"

    def __init__(self, config: ZstdConfig, context: CodecContext) -> None:
        self._width = config.element_bytes
        self._own = threading.local()
        """A compressor and a decompressor are not for several threads."""

    def __repr__(self) -> str:
        return f"<ZstdCodec element_bytes {self._width}>"

    def max_bytes(self, nbytes: int) -> int:
        """See `Codec.max_bytes`."""
        return nbytes + 1

    def encode(self, key: BlockKey, source: memoryview, target: memoryview) -> int:
        """See `Codec.encode`."""
        return self._by_planes(source, target[: len(source)]) or _plain(source, target)

    def decode(self, key: BlockKey, source: memoryview, target: memoryview) -> int:
        """See `Codec.decode`."""
        width = source[0]
        if width == _PLAIN:
            nbytes = len(source) - 1
            if not 0 < nbytes <= len(target):
                raise CorruptError(f"an object of {nbytes} bytes, for {len(target)}")
            target[:nbytes] = source[1:]
            return nbytes
        if width not in _WIDTHS:
            raise CorruptError(f"an object of numbers of {width} bytes")
        return self._joined(width, source, target)

    def _by_planes(self, source: memoryview, target: memoryview) -> int:
        """Encode by planes; give the length, or 0 if nothing is saved."""
        width, head = self._width, 1 + _LENGTH.size + self._width * _PLANE.size
        numbers, at = len(source) // width, head
        values = np.frombuffer(source, f"<u{width}", numbers) if numbers else None
        noise = [values is None or self._is_noise(values, place) for place in range(width)]
        if values is None or all(noise):
            return 0
        rest, plane, lengths = source[numbers * width :], np.empty(numbers, np.uint8), []
        for place in range(width):
            np.right_shift(values, 8 * place, out=plane, casting="unsafe")
            frame = b"" if noise[place] else self._compressor().compress(plane.data)
            part = frame if frame and len(frame) < numbers else plane.data
            if at + len(part) + len(rest) > len(target):
                return 0
            target[at : at + len(part)] = part
            at += len(part)
            lengths.append(len(part))
        target[at : at + len(rest)] = rest
        target[:head] = struct.pack(f"<BQ{width}I", width, len(source), *lengths)
        return at + len(rest)

    def _is_noise(self, values: np.ndarray[Any, Any], place: int) -> bool:
        """Say whether a plane is not worth the time, by some of its bytes from all over it."""
        step = len(values) // _SAMPLE | 1  # Odd: rows of a cache have an even length.
        sample = (values[::step] >> 8 * place).astype(np.uint8)
        return len(self._compressor().compress(sample.data)) > _MOST_PART * len(sample)

    def _joined(self, width: int, source: memoryview, target: memoryview) -> int:
        head = 1 + _LENGTH.size + width * _PLANE.size
        if len(source) < head:
            raise CorruptError("cut short")
        _, nbytes, *lengths = struct.unpack(f"<BQ{width}I", source[:head])
        numbers, rest = divmod(nbytes, width)
        if not numbers or nbytes > len(target) or head + sum(lengths) + rest != len(source):
            raise CorruptError(f"an object of {nbytes} bytes, for {len(target)}, in {len(source)} bytes")
        values = np.frombuffer(target, f"<u{width}", numbers)
        shifted, at = np.empty_like(values), head
        for place, length in enumerate(lengths):
            plane = self._plane(source[at : at + length], numbers)
            if place:
                np.left_shift(plane, 8 * place, out=shifted, dtype=values.dtype, casting="unsafe")
                np.bitwise_or(values, shifted, out=values)
            else:
                values[:] = plane
            at += length
        target[numbers * width : nbytes] = source[at:]
        return int(nbytes)

    def _plane(self, part: memoryview, numbers: int) -> _Bytes:
        if len(part) == numbers:
            return np.frombuffer(part, np.uint8)
        try:
            if zstandard.frame_content_size(part) != numbers:
                raise CorruptError(f"a plane of another length than {numbers}")
            content = self._decompressor().decompress(part, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CorruptError(f"no frame of Zstandard: {error}") from error
        return np.frombuffer(content, np.uint8)

    def _compressor(self) -> zstandard.ZstdCompressor:
        if not hasattr(self._own, "compressor"):
            parameters = zstandard.ZstdCompressionParameters(**_PARAMETERS)
            self._own.compressor = zstandard.ZstdCompressor(compression_params=parameters)
        made: zstandard.ZstdCompressor = self._own.compressor
        return made

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        if not hasattr(self._own, "decompressor"):
            self._own.decompressor = zstandard.ZstdDecompressor()
        made: zstandard.ZstdDecompressor = self._own.decompressor
        return made


def _plain(source: memoryview, target: memoryview) -> int:
    target[0] = _PLAIN
    target[1 : 1 + len(source)] = source
    return 1 + len(source)
