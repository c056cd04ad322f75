"""Codecs that are wrong on purpose, each in one way, and the test of the suite that must find it.

`Zlib` and `Pad` are sound; the others are made from them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import struct
import threading
import zlib

from kvbm_core.codec import Codec, CodecConfig, CodecKind
from kvbm_core.errors import CorruptError, UnverifiableError
from kvbm_core.tier import PAGE_BYTES

__all__ = ["BROKEN", "Pad", "Zlib", "kind"]


class NoSettings(CodecConfig, frozen=True):
    level: int = 1
    file: str = ""


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


BROKEN = []


def found_by(test):
    def add(made):
        BROKEN.append((made, test))
        return made

    return add


@found_by("test_the_codec_is_what_the_core_expects")
class HasNoIdentity(Zlib):
    """Its identity is a text."""

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
    """Takes whole pairs of bytes."""

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
    """Has another identity each time that it is opened."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.identity = str(id(self)).encode()


@found_by("test_another_key_makes_no_difference_unless_the_codec_uses_it")
class UsesTheKeyInSecret(Pad):
    """Does not say that what it makes depends on the key."""


@found_by("test_a_result_that_does_not_fit_is_corrupt")
class CutsToItsTarget(Zlib):
    """Gives what fits."""

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
    """Lets the library's error through."""

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
        self.meeting.wait(0.5)
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


@found_by("test_several_threads_may_use_it_at_once")
class SharesADecoder(Zlib):
    """Unpacks into one buffer for all threads. They meet here, so that it shows each time."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.meeting = threading.Barrier(2)

    def decode(self, key, source, target):
        whole = memoryview(bytearray(len(target)))
        self.plain = whole[: super().decode(key, source, whole)]
        self.meeting.wait(0.5)
        target[: len(self.plain)] = self.plain
        return len(self.plain)


@found_by("test_an_object_may_be_longer_than_64_kib")
class CountsTo65535(Zlib):
    """Keeps an object's length in 16 bits."""

    def decode(self, key, source, target):
        return super().decode(key, source, target) & 0xFFFF


@found_by("test_source_and_target_may_lie_anywhere")
class WantsAlignedMemory(Zlib):
    """Takes it that its memory begins at a multiple of eight."""

    def decode(self, key, source, target):
        if ctypes.addressof(ctypes.c_char.from_buffer(target)) % 8:
            raise ValueError("unaligned")
        return super().decode(key, source, target)


@found_by("test_memory_is_let_go_of")
class KeepsItsSource(Zlib):
    """Remembers the last that it has seen."""

    def encode(self, key, source, target):
        self.last = source
        return super().encode(key, source, target)


@found_by("test_memory_is_let_go_of")
class KeepsItsTarget(Zlib):
    """Remembers where it has written last."""

    def decode(self, key, source, target):
        self.last = target[:8]
        return super().decode(key, source, target)


@found_by("test_what_it_says_of_itself_does_not_change")
class LearnsItsBound(Zlib):
    """Says how long objects have become, and not how long they may become."""

    more = 64

    def max_bytes(self, nbytes):
        return nbytes + self.more + nbytes // 100

    def encode(self, key, source, target):
        made = super().encode(key, source, target)
        self.more = max(self.more, made - len(source) + 65)
        self.more += 1
        return made


@found_by("test_what_it_says_of_itself_does_not_change")
class CountsInItsIdentity(Zlib):
    """Has another identity after each object."""

    def encode(self, key, source, target):
        self.identity += b"."
        return super().encode(key, source, target)


class Keyed(Zlib):
    """Puts the level, as if it were a key, before each object; sound."""

    def max_bytes(self, nbytes):
        return super().max_bytes(nbytes) + 1

    def encode(self, key, source, target):
        target[0] = self.level
        return 1 + super().encode(key, source, target[1:])

    def decode(self, key, source, target):
        if source[0] != self.level:
            raise self.foreign()
        return super().decode(key, source[1:], target)

    def foreign(self):
        return UnverifiableError("it is of another level")


@found_by("test_codecs_of_equal_identity_never_take_each_others_objects_for_damage")
class TakesAnotherKeyForDamage(Keyed):
    """Calls an object corrupt that is of another key."""

    def foreign(self):
        return CorruptError("it is of another level")


@found_by("test_codecs_of_equal_identity_never_take_each_others_objects_for_damage")
class MixesLevels(Zlib):
    """Gives other bytes under other settings, and has the same identity."""

    def decode(self, key, source, target):
        made = super().decode(key, source, target)
        if source[1] != zlib.compress(b"", self.level)[1]:
            target[0] ^= 1
        return made


@found_by("test_an_object_that_cannot_be_verified_leaves_the_target_as_it_was")
class WritesBeforeItKnows(Keyed):
    """Unpacks an object, and then looks whose it is."""

    def decode(self, key, source, target):
        made = Zlib.decode(self, key, source[1:], target)
        if source[0] != self.level:
            raise self.foreign()
        return made


@found_by("test_every_bit_of_the_key_counts")
class UsesHalfOfTheKey(Pad):
    """Makes its pad of the first half of the key."""

    uses_key = True

    def encode(self, key, source, target):
        return super().encode(key[:16], source, target)

    decode = encode


@found_by("test_no_secret_is_shown")
class ShowsItsKey(Zlib):
    """Its identity is its key."""

    def __init__(self, config, context):
        super().__init__(config, context)
        if config.file:
            with open(config.file, "rb") as file:
                self.identity = file.read()


@found_by("test_no_secret_is_shown")
class ShowsItsKeyToPeople(ShowsItsKey):
    """Shows its key where it is printed."""

    def __repr__(self):
        return f"<Codec {self.identity.hex()}>"


@found_by("test_a_result_that_does_not_fit_takes_no_memory")
class UnpacksFirst(Zlib):
    """Unpacks an object whole before it compares lengths."""

    def decode(self, key, source, target):
        try:
            plain = zlib.decompress(source)
        except zlib.error as error:
            raise CorruptError(f"deflate: {error}") from error
        if len(plain) > len(target):
            raise CorruptError("it is longer than its target")
        target[: len(plain)] = plain
        return len(plain)


@found_by("test_nothing_grows_with_the_objects")
class RemembersObjects(Zlib):
    """Keeps what it has made, in case that it is asked for it again."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.made = {}

    def encode(self, key, source, target):
        made = super().encode(key, source, target)
        self.made[key] = bytes(target[:made])
        return made


@found_by("test_nothing_grows_with_the_objects")
class OpensAFileEachTime(Zlib):
    """Opens its source of random numbers for each object, and closes none."""

    def encode(self, key, source, target):
        os.open("/dev/urandom", os.O_RDONLY)
        return super().encode(key, source, target)


@found_by("test_the_process_stays_as_it_was_and_nothing_is_printed")
class SaysHello(Zlib):
    """Prints when it is opened."""

    def __init__(self, config, context):
        super().__init__(config, context)
        print("hello")


@found_by("test_the_process_stays_as_it_was_and_nothing_is_printed")
class TakesASignal(Zlib):
    """Ignores a signal that is the engine's."""

    def __init__(self, config, context):
        super().__init__(config, context)
        signal.signal(
            signal.SIGUSR2, signal.SIG_IGN if signal.getsignal(signal.SIGUSR2) == 0 else signal.SIG_DFL
        )
