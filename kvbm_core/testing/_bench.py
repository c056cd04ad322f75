"""What the suite of codecs is written with: objects, and memory that nobody else may touch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random

from kvbm_core.block import BlockKey
from kvbm_core.codec import Codec
from kvbm_core.errors import CorruptError
from kvbm_core.testing._rig import Memory

__all__ = ["Bench", "block_key", "contents_of"]


def block_key(number: int) -> BlockKey:
    """Make the key of a numbered object."""
    return hashlib.sha256(f"codec {number}".encode()).digest()


@functools.cache
def contents_of(nbytes: int) -> list[bytes]:
    """Make objects of one length: nothing but zeros, noise, a pattern, and numbers as a cache has them."""
    chance = random.Random(nbytes)
    pattern = (b"kvbm-core " * (nbytes // 10 + 1))[:nbytes]
    # bfloat16 around zero: the low byte of each is noise, the high byte one of a few.
    near_zero = bytes(
        chance.randrange(256) if at % 2 == 0 else 0x3C + chance.randrange(4) for at in range(nbytes)
    )
    return [bytes(nbytes), chance.randbytes(nbytes), pattern, near_zero]


class Bench:
    """Encodes and decodes with one codec, between memory that nobody may touch."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def encode(self, content: bytes, number: int = 0, *, room: int = 0) -> bytes:
        """Encode an object.

        Args:
            content: The object.
            number: Of its key.
            room: Bytes that its target has beyond what `Codec.max_bytes` says.
        """
        most = self.codec.max_bytes(len(content))
        source, target = Memory(len(content), content), Memory(most + room)
        made = self.codec.encode(block_key(number), source.region.view().toreadonly(), target.region.view())
        assert isinstance(made, int), f"encode() gave {made!r}, it must be a length"
        assert 0 < made <= most, f"{len(content)} bytes became {made}, max_bytes() says {most}"
        assert target.sound, "bytes outside the target were written"
        assert source.sound, "bytes outside the source were written"
        assert source.read() == content, "the source was changed: other tiers store the same memory"
        return target.read()[:made]

    def decode(self, encoded: bytes, nbytes: int, number: int = 0) -> bytes:
        """Decode into a target of so many bytes.

        Raises:
            CorruptError: By the codec.
        """
        source, target = Memory(len(encoded), encoded), Memory(nbytes)
        try:
            made = self.codec.decode(
                block_key(number), source.region.view().toreadonly(), target.region.view()
            )
        finally:
            assert target.sound, "bytes outside the target were written"
            assert source.sound, "bytes outside the source were written"
            assert source.read() == encoded, "the source was changed"
        assert isinstance(made, int), f"decode() gave {made!r}, it must be a length"
        assert 0 <= made <= nbytes, f"decode() says {made} bytes, its target has {nbytes}"
        return target.read()[:made]

    def bear(self, encoded: bytes, nbytes: int, number: int = 0) -> bytes | None:
        """Decode what may be damaged; None if the codec refuses it."""
        with contextlib.suppress(CorruptError):
            return self.decode(encoded, nbytes, number)
        return None
