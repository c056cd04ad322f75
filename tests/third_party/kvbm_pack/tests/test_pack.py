"""The suite in a few lines, and what it cannot know: levels, and frames made to exhaust memory."""

import pytest
import zstandard
from kvbm_pack import PackCodec, PackConfig

from kvbm_core import CodecContext, ConfigError, CorruptError
from kvbm_core.testing.codec_suite import CodecSuite

KEY = b"k" * 32


class TestPack(CodecSuite):
    codec = "pack"

    def settings(self, folder):
        return {"level": 3}

    def another(self, folder):
        return {"level": 19}


def codec(level=3):
    return PackCodec(PackConfig(level=level), CodecContext(b"n" * 16, 1 << 20, "test"))


def decode(frame, nbytes=100):
    return codec().decode(KEY, memoryview(frame), memoryview(bytearray(nbytes)))


@pytest.mark.parametrize("level", [0, 23, -1])
def test_a_level_out_of_range_is_refused(level):
    with pytest.raises(ConfigError, match=f"level: {level}; write 1 to 22"):
        PackConfig(level=level)


def test_a_higher_level_makes_what_repeats_shorter():
    content = b"".join(str(number * number).encode() for number in range(20000))
    target = memoryview(bytearray(codec().max_bytes(len(content))))
    lengths = [codec(level).encode(KEY, memoryview(content), target) for level in (1, 22)]
    assert lengths[1] < lengths[0] < len(content)


def test_a_frame_that_claims_a_terabyte_is_refused_before_it_is_read():
    # The header of a frame in one segment, with eight bytes for the length.
    claim = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little")
    with pytest.raises(CorruptError, match="1099511627776 bytes, for 100"):
        decode(claim + b"\x01\x00\x00")


def test_a_frame_that_does_not_say_its_length_is_refused():
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    with pytest.raises(CorruptError):
        decode(compressor.compress(b"x" * 50))


def test_a_frame_of_nothing_and_a_second_frame_are_refused():
    one = zstandard.ZstdCompressor().compress(b"x" * 50)
    for frame in (zstandard.ZstdCompressor().compress(b""), one + one):
        with pytest.raises(CorruptError):
            decode(frame)
