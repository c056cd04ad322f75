"""The suite of codecs proves itself: it finds every codec that is broken on purpose, and passes the sound."""

import ctypes
import hashlib
import inspect
import struct
import threading
import zlib

import pytest
from hypothesis import Phase

from kvbm_core.codec import Codec, CodecConfig, CodecKind
from kvbm_core.errors import CorruptError
from kvbm_core.testing.codec_suite import CodecSuite, _Bench
from kvbm_core.tier import PAGE_BYTES


class NoSettings(CodecConfig, frozen=True):
    level: int = 1


class Zlib(Codec):
    """Deflate; sound."""

    def __init__(self, config, context):
        self.level = config.level

    def max_bytes(self, nbytes):
        return nbytes + nbytes // 1000 + 64

    def encode(self, key, source, target):
        packed = zlib.compress(source, self.level)
        target[: len(packed)] = packed
        return len(packed)

    def decode(self, key, source, target):
        packed = zlib.decompressobj()
        try:
            plain = packed.decompress(source, len(target) + 1)
        except zlib.error as error:
            raise CorruptError(f"deflate: {error}") from error
        if not packed.eof or packed.unused_data or len(plain) > len(target):
            raise CorruptError("deflate: it is cut, or longer than its target")
        target[: len(plain)] = plain
        return len(plain)


class Pad(Zlib):
    """Adds a pad that the key makes, and proves nothing; sound, for the seal proves it."""

    def max_bytes(self, nbytes):
        return nbytes

    def encode(self, key, source, target):
        if len(source) > len(target):
            raise CorruptError("it is longer than its target")
        pad = hashlib.shake_128(key).digest(len(source))
        mixed = int.from_bytes(source, "little") ^ int.from_bytes(pad, "little")
        target[: len(source)] = mixed.to_bytes(len(source), "little")
        return len(source)

    decode = encode


def kind(made, **members):
    return CodecKind("mine", NoSettings, made, **members)


class TestZlib(CodecSuite):
    codec = kind(Zlib, saves_room=True)

    def settings(self, folder):
        return {"level": 6}


class TestPad(CodecSuite):
    codec = kind(Pad)
    uses_key = True


BROKEN = []


def found_by(test):
    def add(made):
        BROKEN.append((made, test))
        return made

    return add


@found_by("test_the_codec_is_what_the_core_expects")
class HasNoIdentity(Zlib):
    identity = "zlib"


@found_by("test_max_bytes_grows_with_the_length")
class BoundsByPages(Zlib):
    """Says less for a whole page than for a part of one."""

    def max_bytes(self, nbytes):
        return super().max_bytes(nbytes) + (100 if nbytes % 4096 else 0)


@found_by("test_a_decoded_object_is_the_one_that_was_encoded")
class PromisesTooLittle(Zlib):
    """Knows nothing that grows."""

    def max_bytes(self, nbytes):
        return nbytes

    def encode(self, key, source, target):
        packed = zlib.compress(source, self.level)
        target[:] = packed[: len(target)].ljust(len(target), b"\0")
        return len(packed)


@found_by("test_a_decoded_object_is_the_one_that_was_encoded")
class DropsTheLastByte(Zlib):
    def encode(self, key, source, target):
        return super().encode(key, source[: max(1, len(source) // 2 * 2)], target)


@found_by("test_a_decoded_object_is_the_one_that_was_encoded")
class SaysItsTarget(Zlib):
    """Gives the length of the target for that of the object."""

    def decode(self, key, source, target):
        super().decode(key, source, target)
        return len(target)


@found_by("test_a_decoded_object_is_the_one_that_was_encoded")
class WorksInPlace(Zlib):
    """Transforms the source, and then copies it."""

    def encode(self, key, source, target):
        made = super().encode(key, source, target)
        memoryview(source.obj).cast("B")[0] ^= 0xFF
        return made


@found_by("test_a_decoded_object_is_the_one_that_was_encoded")
class WritesTooFar(Zlib):
    """As a library does that is told a wrong length."""

    def encode(self, key, source, target):
        pages_bytes = -(-len(target) // PAGE_BYTES) * PAGE_BYTES
        ctypes.memset(ctypes.addressof(target.obj) + pages_bytes, 0, 8)
        return super().encode(key, source, target)


@found_by("test_encode_fills_at_most_max_bytes_of_a_longer_target")
class FillsItsTarget(Zlib):
    """Pads the result to the whole target."""

    def encode(self, key, source, target):
        made = super().encode(key, source, target)
        return made if len(target) == self.max_bytes(len(source)) else len(target)


@found_by("test_an_object_can_be_encoded_again")
class CountsItsObjects(Zlib):
    """Mixes a count in that nobody else knows."""

    count = 0

    def encode(self, key, source, target):
        self.count += 1
        made = super().encode(key, source, target)
        target[0] ^= self.count
        return made

    def decode(self, key, source, target):
        return super().decode(key, bytes([source[0] ^ self.count]) + bytes(source[1:]), target)


@found_by("test_another_codec_of_the_same_settings_decodes")
class DrawsAKey(Pad):
    """Knows its key only until it is closed."""

    def __init__(self, config, context):
        self.own = hashlib.sha256(str(id(self)).encode()).digest()

    def encode(self, key, source, target):
        return super().encode(self.own, source, target)

    decode = encode


@found_by("test_another_codec_of_the_same_settings_decodes")
class DrawsAnIdentity(Zlib):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.identity = str(id(self)).encode()


@found_by("test_another_key_makes_no_difference_unless_the_codec_uses_it")
class UsesTheKeyInSecret(Pad):
    pass


@found_by("test_a_result_that_does_not_fit_is_corrupt")
class CutsToItsTarget(Zlib):
    def decode(self, key, source, target):
        whole = bytearray(1 << 20)
        made = min(super().decode(key, source, memoryview(whole)), len(target))
        target[:made] = whole[:made]
        return made


@found_by("test_a_result_that_does_not_fit_is_corrupt")
class RaisesItsOwnError(Zlib):
    """Finds out when it copies."""

    def decode(self, key, source, target):
        plain = zlib.decompress(source)
        target[: len(plain)] = plain
        return len(plain)


@found_by("test_flipped_bits_are_refused_or_left_to_the_seal")
class TrustsTheMedium(Zlib):
    def decode(self, key, source, target):
        plain = zlib.decompress(source)
        if len(plain) > len(target):
            raise CorruptError("it is longer than its target")
        target[: len(plain)] = plain
        return len(plain)


@found_by("test_a_cut_or_lengthened_object_is_refused_or_left_to_the_seal")
class ReadsAHeader(Zlib):
    """Takes it that there is a whole one."""

    def max_bytes(self, nbytes):
        return super().max_bytes(nbytes) + 4

    def encode(self, key, source, target):
        target[:4] = struct.pack("<I", len(source))
        return 4 + super().encode(key, source, target[4:])

    def decode(self, key, source, target):
        (nbytes,) = struct.unpack_from("<I", source)
        if super().decode(key, source[4:], target) != nbytes:
            raise CorruptError("it has another length than its header says")
        return nbytes


@found_by("test_several_threads_may_use_it_at_once")
class SharesAScratch(Zlib):
    """Has one buffer for all threads. They meet here, so that it shows each time."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.meeting = threading.Barrier(2)

    def encode(self, key, source, target):
        self.packed = zlib.compress(source, self.level)
        self.meeting.wait(5)
        target[: len(self.packed)] = self.packed
        return len(self.packed)


@found_by("test_any_object_survives")
class DropsPairs(Zlib):
    """Takes an object of two bytes for a mark of its own."""

    def encode(self, key, source, target):
        return super().encode(key, source[:1] if len(source) == 2 else source, target)


@found_by("test_any_bytes_are_decoded_or_refused")
class KnowsOneVersion(Zlib):
    """Looks its first byte up."""

    def max_bytes(self, nbytes):
        return super().max_bytes(nbytes) + 1

    def encode(self, key, source, target):
        target[0] = 1
        return 1 + super().encode(key, source, target[1:])

    def decode(self, key, source, target):
        return {1: super().decode}[source[0]](key, source[1:], target)


def tried(codec, test, folder, monkeypatch, **members):
    monkeypatch.setattr("kvbm_core.testing._machine._PHASES", (Phase.generate,))  # Nobody reads it.
    suite = type("Suite", (CodecSuite,), {"codec": codec, "programs": 500, **members})()
    names = inspect.signature(getattr(suite, test)).parameters
    fixtures = {"bench": _Bench(suite.opened(folder)), "tmp_path": folder}
    getattr(suite, test)(**{name: fixtures[name] for name in names})


@pytest.mark.parametrize(("made", "test"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_codec_is_found_by_the_test_named_for_its_fault(made, test, tmp_path, monkeypatch):
    with pytest.raises((Exception, pytest.fail.Exception)):
        tried(kind(made), test, tmp_path, monkeypatch)


def test_every_test_of_the_suite_is_named_by_a_broken_codec():
    tests = {name for name in vars(CodecSuite) if name.startswith("test_")}
    assert tests == {test for _, test in BROKEN}


def test_a_codec_that_does_not_use_the_key_must_not_say_so(tmp_path, monkeypatch):
    test = "test_another_key_makes_no_difference_unless_the_codec_uses_it"
    with pytest.raises(AssertionError, match="uses_key is True"):
        tried(kind(Zlib), test, tmp_path, monkeypatch, uses_key=True)


def test_a_test_cannot_be_overridden():
    with pytest.raises(TypeError, match=r"overrides .*test_any_object_survives"):
        type("Mine", (CodecSuite,), {"codec": kind(Zlib), "test_any_object_survives": lambda self: None})
