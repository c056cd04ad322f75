"""The suite for the codec ``zstd``, and what it cannot know: what becomes shorter, and frames that harm."""

import random
import struct

import numpy as np
import pytest
import zstandard

from kvbm_core import CodecContext, ConfigError, CorruptError
from kvbm_core.config import convert
from kvbm_core.testing.codec_suite import CodecSuite
from kvbm_zstd import ZstdCodec, ZstdConfig

KEY = b"k" * 32
WIDTHS = [1, 2, 4, 8]


class TestPairs(CodecSuite):
    codec = "zstd"

    def another(self, folder):
        return {"element_bytes": 8}


class TestFours(CodecSuite):
    codec = "zstd"
    programs = 50

    def settings(self, folder):
        return {"element_bytes": 4}

    def another(self, folder):
        return {"element_bytes": 2}


class TestSingles(CodecSuite):
    codec = "zstd"
    programs = 50

    def settings(self, folder):
        return {"element_bytes": 1}

    def another(self, folder):
        return {"element_bytes": 4}


def codec(element_bytes=2):
    config = convert({"element_bytes": element_bytes}, ZstdConfig, "zstd")
    return ZstdCodec(config, CodecContext(b"n" * 16, 1 << 20, "test"))


def encoded(content, element_bytes=2):
    one = codec(element_bytes)
    target = bytearray(one.max_bytes(len(content)))
    return bytes(target[: one.encode(KEY, memoryview(content), memoryview(target))])


def decoded(source, nbytes):
    target = bytearray(nbytes)
    return bytes(target[: codec().decode(KEY, memoryview(source), memoryview(target))])


def numbers(count, element_bytes):
    """Normally distributed, like a cache's: float32, or their upper half, bfloat16."""
    values = np.random.default_rng(1).standard_normal(count).astype("<f4")
    return values.tobytes() if element_bytes == 4 else (values.view("<u4") >> 16).astype("<u2").tobytes()


@pytest.mark.parametrize(("element_bytes", "least"), [(2, 1.4), (4, 1.15)])
def test_planes_make_numbers_shorter_than_zstandard_alone_does(element_bytes, least):
    content = numbers(1 << 17, element_bytes)
    short = encoded(content, element_bytes)
    assert len(content) / len(short) > least
    assert len(short) < len(zstandard.ZstdCompressor(level=3).compress(content)) * 0.95
    assert decoded(short, len(content)) == content


@pytest.mark.parametrize("element_bytes", WIDTHS)
def test_what_cannot_become_shorter_is_plain_with_one_byte_before_it(element_bytes):
    for nbytes in (1, 3, 8, 20, 41, 5000, 100_001):
        content = random.Random(nbytes).randbytes(nbytes)
        assert encoded(content, element_bytes) == b"\0" + content


@pytest.mark.parametrize("element_bytes", WIDTHS)
def test_an_object_is_never_longer_than_one_byte_more(element_bytes):
    chance = random.Random(element_bytes)
    for nbytes in (*range(1, 80), *(chance.randrange(80, 4000) for _ in range(100))):
        # From all noise to all the same, so that the ends of both forms meet somewhere.
        content = chance.randbytes(noise := chance.randrange(nbytes + 1)) + bytes(nbytes - noise)
        short = encoded(content, element_bytes)
        assert len(short) <= nbytes + 1
        assert decoded(short, nbytes) == content


@pytest.mark.parametrize("others", [bytes, random.Random(2).randbytes], ids=["zeros", "noise"])
@pytest.mark.parametrize("element_bytes", WIDTHS)
def test_a_plane_is_never_longer_than_plain_though_its_sample_was_shorter(monkeypatch, element_bytes, others):
    """And one whose frame is as long as the plane is not taken for plain."""
    monkeypatch.setattr("kvbm_zstd._codec._MOST_PART", 2.0)
    chance, count = random.Random(1), 200
    planes = np.frombuffer(others(count * element_bytes), np.uint8).reshape(count, -1).copy()
    for noise in range(count - 80, count):
        planes[:, 0] = list(chance.randbytes(noise) + bytes(count - noise))
        for rest in (b"", b"1234567"[: element_bytes - 1]):
            content = planes.tobytes() + rest
            short = encoded(content, element_bytes)
            assert len(short) <= len(content) + 1
            assert decoded(short, len(content)) == content
            assert short[0] == 0 or int.from_bytes(short[9:13], "little") <= count


@pytest.mark.parametrize("element_bytes", WIDTHS)
def test_each_object_says_its_width_so_that_another_setting_reads_it(element_bytes):
    content = numbers(1000, 2) + b"rest"
    assert decoded(encoded(content, element_bytes), len(content)) == content
    assert codec(element_bytes).identity == codec(2).identity


def test_the_form_is_as_documented():
    content = b"\1\2" * 1000 + b"r"
    width, nbytes, first, second = struct.unpack("<BQII", (short := encoded(content))[:17])
    assert (width, nbytes, 17 + first + second + 1) == (2, len(content), len(short))
    planes = [short[17 : 17 + first], short[17 + first : 17 + first + second]]
    assert [zstandard.ZstdDecompressor().decompress(plane) for plane in planes] == [
        b"\1" * 1000,
        b"\2" * 1000,
    ]
    assert short[-1:] == b"r"


def form(nbytes, *planes, rest=b""):
    lengths = struct.pack("<BQII", 2, nbytes, *map(len, planes))
    return lengths + b"".join(planes) + rest


@pytest.mark.parametrize(
    "source",
    [
        b"\2",
        b"\2" * 16,
        struct.pack("<BQ3I", 3, 99, 33, 33, 33) + bytes(99),
        form(1, b"", b"", rest=b"r"),
        form(100, bytes(50), b""),
        form(100, bytes(50), bytes(49)),
        form(100, bytes(50), bytes(50), rest=b"r"),
        form(1 << 40, bytes(50), bytes(50)),
        form(0, b"", b""),
        # A frame that claims a terabyte, one of nothing, two frames, and one that does not say its length.
        form(100, bytes(50), b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\1\0\0"),
        form(100, bytes(50), zstandard.ZstdCompressor().compress(b"")),
        form(100, bytes(50), zstandard.ZstdCompressor().compress(bytes(50)) * 2),
        form(100, bytes(50), zstandard.ZstdCompressor(write_content_size=False).compress(bytes(50))),
    ],
)
def test_what_was_made_to_do_harm_is_refused(source):
    with pytest.raises(CorruptError):
        decoded(source, 1000)


@pytest.mark.parametrize("element_bytes", [0, 3, 16, "two"])
def test_another_width_is_refused_by_name(element_bytes):
    with pytest.raises(ConfigError, match="element_bytes"):
        codec(element_bytes)


def test_no_thread_is_started():
    import threading

    before = threading.active_count()
    assert decoded(encoded(numbers(1 << 17, 2)), 1 << 18) == numbers(1 << 17, 2)
    assert threading.active_count() == before
