"""The suite of codecs: what every codec must do.

    from kvbm_core.testing.codec_suite import CodecSuite

    class TestDeflate(CodecSuite):
        codec = "deflate"

        def settings(self, folder):
            return {"level": 3}

Run it with pytest. Each test is named for the line of `kvbm_core.Codec` that it proves; none can be
overridden, see `kvbm_core.testing.suite`.

A codec need not find every damage: the seal within the decoded bytes does. It must end with `CorruptError`
or a length, and write nothing outside its target.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import random
import tracemalloc
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm_core.codec import Codec, CodecConfig, CodecContext, CodecKind
from kvbm_core.config import convert
from kvbm_core.errors import CorruptError, UnverifiableError
from kvbm_core.registry import Registry
from kvbm_core.testing._bench import Bench, block_key, contents_of
from kvbm_core.testing._machine import settings_of
from kvbm_core.testing._process import changes, process_state
from kvbm_core.testing._rig import NAMESPACE, Memory, lengths
from kvbm_core.testing._watch import handles
from kvbm_core.testing._whole import WholeSuite, insist_on_the_whole
from kvbm_core.tier import CONTRACT_VERSION

__all__ = ["CodecSuite"]

_MOST_BYTES: Final = 40 * 1024 + 96
_THREADS: Final = 4
_ROUNDS: Final = 40
_FLIPS: Final = 200
_SECRET_BYTES: Final = 12
"""So many bytes of a file that are found elsewhere are no accident."""
_BOMB_BYTES: Final = 4 << 20


class CodecSuite(WholeSuite):
    """Subclass it, name a codec, and run pytest."""

    codec: ClassVar[str | CodecKind]
    """The name of an entry point, or a `kvbm_core.CodecKind`."""
    uses_key: ClassVar[bool] = False
    """True if what it makes depends on the key. Else the key must make no difference."""
    waivers: ClassVar[Mapping[str, str]] = {}
    """Tests that this codec cannot pass, and why. Each must fail, else the waiver is out of date."""
    programs: ClassVar[int] = 200
    """Random objects of the last two tests."""
    members = frozenset({"codec", "settings", "another", "uses_key", "waivers", "programs"})

    def settings(self, folder: Path) -> Mapping[str, Any]:
        """Give the keys beside ``name``, as an operator would write them. By default none.

        Args:
            folder: Of the test's own: a place for a key file.
        """
        return {}

    def another(self, folder: Path) -> Mapping[str, Any] | None:
        """Give settings under which objects are made otherwise: another key, another level.

        Args:
            folder: As in `settings`.

        Returns:
            None if there are none.
        """
        return None

    @pytest.fixture
    def bench(self, tmp_path: Path) -> Bench:
        """Give the test a codec."""
        insist_on_the_whole(type(self))
        return Bench(self.opened(tmp_path))

    def kind(self) -> CodecKind:
        """Give what the package registers."""
        return Registry().codec(self.codec) if isinstance(self.codec, str) else self.codec

    def opened(
        self, folder: Path, settings: Mapping[str, Any] | None = None, max_bytes: int = _MOST_BYTES
    ) -> Codec:
        """Open a codec; with other settings than the suite's if they are given."""
        kind = self.kind()
        said = self.settings(folder) if settings is None else settings
        config = convert(said, kind.config_type, "settings")
        return kind.open(config, CodecContext(NAMESPACE, max_bytes, "suite"))

    def test_the_codec_is_what_the_core_expects(self, bench: Bench) -> None:
        """Its name is its entry point's, its contract ours, what it opens is a codec."""
        kind = self.kind()
        assert kind.contract_version == CONTRACT_VERSION
        assert isinstance(self.codec, CodecKind) or kind.name == self.codec
        assert issubclass(kind.config_type, CodecConfig)
        assert isinstance(kind.saves_room, bool)
        assert isinstance(bench.codec, Codec)
        assert isinstance(bench.codec.identity, bytes)
        assert "\n" not in repr(bench.codec)

    def test_max_bytes_grows_with_the_length(self, bench: Bench) -> None:
        """One longest object thus bounds all others."""
        most = [bench.codec.max_bytes(nbytes) for nbytes in range(1, _MOST_BYTES, 7)]
        assert min(most) > 0
        assert most == sorted(most)

    def test_a_decoded_object_is_the_one_that_was_encoded(self, bench: Bench) -> None:
        """Of every length and content; into a target as long as the object, and a longer."""
        for nbytes in lengths(_MOST_BYTES):
            for content in contents_of(nbytes):
                encoded = bench.encode(content)
                assert bench.decode(encoded, nbytes) == content
                assert bench.decode(encoded, nbytes + 1000) == content

    def test_encode_fills_at_most_max_bytes_of_a_longer_target(self, bench: Bench) -> None:
        """The target of the longest object serves the shortest."""
        for nbytes in lengths(_MOST_BYTES):
            for content in contents_of(nbytes):
                assert bench.decode(bench.encode(content, room=5000), nbytes) == content

    def test_an_object_can_be_encoded_again(self, bench: Bench) -> None:
        """Also when the result differs, as with a random nonce: each is the object."""
        content = contents_of(5000)[3]
        for encoded in [bench.encode(content) for _ in range(20)]:
            assert bench.decode(encoded, len(content)) == content

    def test_another_codec_of_the_same_settings_decodes(self, bench: Bench, tmp_path: Path) -> None:
        """After a restart, or in another engine. Its identity is the same."""
        other = Bench(self.opened(tmp_path))
        assert other.codec.identity == bench.codec.identity
        for nbytes in lengths(_MOST_BYTES):
            for content in contents_of(nbytes):
                assert other.decode(bench.encode(content), nbytes) == content

    def test_another_key_makes_no_difference_unless_the_codec_uses_it(self, bench: Bench) -> None:
        """Where the suite says `uses_key`, another's object is refused, or left to the seal."""
        for content in contents_of(5000):
            found = bench.bear(bench.encode(content, 1), len(content), 2)
            assert (found != content) is self.uses_key, f"uses_key is {self.uses_key}"

    def test_a_result_that_does_not_fit_is_corrupt(self, bench: Bench) -> None:
        """`CorruptError`, and no byte is written behind the target."""
        for content in contents_of(9000):
            encoded = bench.encode(content)
            for nbytes in (1, 4096, 8999):
                with pytest.raises(CorruptError):
                    bench.decode(encoded, nbytes)

    def test_flipped_bits_are_refused_or_left_to_the_seal(self, bench: Bench) -> None:
        """`CorruptError` or a length: no other error, no crash, nothing outside the target."""
        chance = random.Random(3)
        for content in contents_of(5000):
            encoded = bench.encode(content)
            places = [*range(min(16, len(encoded))), *chance.choices(range(len(encoded)), k=_FLIPS)]
            for at in places:
                damaged = bytearray(encoded)
                damaged[at] ^= 1 << chance.randrange(8)
                bench.bear(bytes(damaged), len(content))

    def test_a_cut_or_lengthened_object_is_refused_or_left_to_the_seal(self, bench: Bench) -> None:
        """Down to one byte; by zeros, by noise, by itself."""
        for content in contents_of(5000):
            encoded = bench.encode(content)
            cuts = {
                1,
                2,
                len(encoded) // 2,
                len(encoded) - 1,
                *range(1, len(encoded), 1 + len(encoded) // 40),
            }
            for nbytes in sorted(cuts - {0, len(encoded)}):
                bench.bear(encoded[:nbytes], len(content))
            for more in (b"\0", bytes(4096), random.Random(4).randbytes(100), encoded):
                bench.bear(encoded + more, len(content))

    def test_several_threads_may_use_it_at_once(self, bench: Bench) -> None:
        """Each has its own objects."""

        def work(thread: int) -> None:
            chance = random.Random(thread)
            for at in range(_ROUNDS):
                nbytes = chance.randint(1, _MOST_BYTES)
                content = chance.randbytes(nbytes // 2) + bytes(nbytes - nbytes // 2)
                number = thread * _ROUNDS + at
                assert bench.decode(bench.encode(content, number), nbytes, number) == content

        with ThreadPoolExecutor(_THREADS) as threads:
            for end in [threads.submit(work, thread) for thread in range(_THREADS)]:
                end.result()

    def test_an_object_may_be_longer_than_64_kib(self, bench: Bench, tmp_path: Path) -> None:
        """Longer than 16 bits can count."""
        nbytes = 2 * 65536 + 96
        long = Bench(self.opened(tmp_path, max_bytes=nbytes))
        for content in (bytes(nbytes), random.Random(5).randbytes(nbytes)):
            assert long.decode(long.encode(content), nbytes) == content

    def test_source_and_target_may_lie_anywhere(self, bench: Bench) -> None:
        """Between other bytes, at any address."""
        content = contents_of(5000)[3]
        most = bench.codec.max_bytes(len(content))
        for at in (1, 3, 4, 7):
            given, made, plain = bytearray(at + 5000), bytearray(at + most), bytearray(at + 5000)
            given[at:] = content
            source, target = memoryview(given)[at:].toreadonly(), memoryview(made)[at:]
            nbytes = bench.codec.encode(block_key(0), source, target)
            encoded = memoryview(made)[at : at + nbytes].toreadonly()
            assert bench.codec.decode(block_key(0), encoded, memoryview(plain)[at:]) == len(content)
            assert plain[at:] == content, f"{at} bytes behind the start of the memory"

    def test_memory_is_let_go_of(self, bench: Bench) -> None:
        """No view of source or target is kept when a call has returned."""
        content = bytearray(contents_of(5000)[3])
        made, plain = bytearray(bench.codec.max_bytes(len(content))), bytearray(len(content))
        nbytes = bench.codec.encode(block_key(0), memoryview(content).toreadonly(), memoryview(made))
        encoded = made[:nbytes]
        bench.codec.decode(block_key(0), memoryview(encoded).toreadonly(), memoryview(plain))
        gc.collect()
        for name, memory in (("encode", content), ("encode", made), ("decode", encoded), ("decode", plain)):
            try:
                memory.append(0)
            except BufferError:
                pytest.fail(f"{name}() has kept a view of its source or its target")

    def test_what_it_says_of_itself_does_not_change(self, bench: Bench) -> None:
        """Its identity, and how long objects become at most: buffers are made once."""
        sizes = lengths(_MOST_BYTES)
        before = bench.codec.identity, [bench.codec.max_bytes(nbytes) for nbytes in sizes]
        for content in [*contents_of(5000), *contents_of(_MOST_BYTES)]:
            bench.decode(bench.encode(content), len(content))
            bench.bear(content[:100], 5000)
        after = bench.codec.identity, [bench.codec.max_bytes(nbytes) for nbytes in sizes]
        assert after == before
        assert all(type(most) is int for most in after[1]), "max_bytes() gives a length, an int"

    def test_codecs_of_equal_identity_never_take_each_others_objects_for_damage(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        """Each decodes the other's, or raises `UnverifiableError`; `CorruptError` would delete it for all."""
        settings = self.another(tmp_path)
        if settings is None:
            pytest.skip("left out: there are no other settings; write a method `another`")
        other = Bench(self.opened(tmp_path, settings))
        if other.codec.identity != bench.codec.identity:
            return  # They never meet.
        for content in contents_of(5000):
            for mine, theirs in ((bench, other), (other, bench)):
                with contextlib.suppress(UnverifiableError):
                    assert theirs.decode(mine.encode(content), len(content)) == content

    def test_an_object_that_cannot_be_verified_leaves_the_target_as_it_was(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        """`UnverifiableError` comes before anything is written."""
        settings = self.another(tmp_path)
        foreign = [bench.codec] if settings is None else [self.opened(tmp_path, settings)]
        chance = random.Random(6)
        for content in contents_of(5000):
            for encoded in [Bench(codec).encode(content) for codec in foreign]:
                flips = [
                    None,
                    *range(min(100, len(encoded))),
                    *range(max(0, len(encoded) - 100), len(encoded)),
                ]
                for at in flips:
                    damaged = bytearray(encoded)
                    if at is not None:
                        damaged[at] ^= 1 << chance.randrange(8)
                    target = Memory(len(content))
                    try:
                        bench.codec.decode(
                            block_key(0), memoryview(damaged).toreadonly(), target.region.view()
                        )
                    except UnverifiableError:
                        assert target.untouched_behind(0), "the target was written before it raised"
                    except CorruptError:
                        pass

    def test_every_bit_of_the_key_counts(self, bench: Bench) -> None:
        """Where the suite says `uses_key`. Else none does."""
        content = contents_of(5000)[1]
        source, target = Memory(len(content), content), Memory(bench.codec.max_bytes(len(content)))
        nbytes = bench.codec.encode(block_key(1), source.region.view().toreadonly(), target.region.view())
        encoded = target.read()[:nbytes]
        for bit in (0, 100, 128, 255):
            other = (int.from_bytes(block_key(1), "big") ^ (1 << bit)).to_bytes(32, "big")
            plain, found = Memory(len(content)), b""
            with contextlib.suppress(CorruptError):
                made = bench.codec.decode(other, memoryview(encoded), plain.region.view())
                found = plain.read()[:made]
            assert (found != content) is self.uses_key, f"bit {bit} of the key"

    def test_no_secret_is_shown(self, bench: Bench, tmp_path: Path) -> None:
        """Neither `repr` nor the identity has the content of a file that the settings name."""
        self.settings(tmp_path)
        shown = repr(bench.codec).encode() + b" " + bench.codec.identity
        for file in tmp_path.rglob("*"):
            content = file.read_bytes().strip() if file.is_file() else b""
            for form in (content, content.hex().encode(), base64.b64encode(content)):
                assert len(form) < _SECRET_BYTES or form[:_SECRET_BYTES] not in shown, f"it shows {file.name}"

    def test_a_result_that_does_not_fit_takes_no_memory(self, bench: Bench, tmp_path: Path) -> None:
        """A stranger's object that unpacks to much more than its target is refused before it is unpacked.

        What Python allocates is counted, so a codec's own C code is not seen.
        """
        large = Bench(self.opened(tmp_path, max_bytes=_BOMB_BYTES))
        encoded = large.encode(bytes(_BOMB_BYTES))
        target = memoryview(bytearray(100))
        tracemalloc.start()
        try:
            with pytest.raises(CorruptError):
                large.codec.decode(block_key(0), memoryview(encoded), target)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < _BOMB_BYTES // 4, f"{peak_bytes} bytes for a target of 100"

    def test_nothing_grows_with_the_objects(self, bench: Bench) -> None:
        """Neither memory nor files nor threads: what passes through is not kept."""
        for content in contents_of(_MOST_BYTES):
            bench.decode(bench.encode(content), len(content))
        before = handles()
        tracemalloc.start()
        try:
            for number in range(_ROUNDS):
                content = random.Random(number).randbytes(_MOST_BYTES)
                assert bench.decode(bench.encode(content, number), len(content), number) == content
            del content
            gc.collect()
            grown_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert grown_bytes < _ROUNDS * _MOST_BYTES // 4, f"{_ROUNDS} objects later {grown_bytes} bytes more"
        assert handles() <= before + _THREADS, f"{handles() - before} files and threads more"

    def test_the_process_stays_as_it_was_and_nothing_is_printed(self, bench: Bench, tmp_path: Path) -> None:
        """Its folder, umask, signals, environment, cores and logging are the engine's."""
        said = io.StringIO()
        before = process_state()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            other = Bench(self.opened(tmp_path))
            other.decode(other.encode(b"some bytes"), 100)
            other.bear(b"some bytes", 100)
        assert changes(before, process_state()) == []
        assert not said.getvalue(), f"it printed {said.getvalue()[:200]!r}"

    def test_any_object_survives(self, bench: Bench) -> None:
        """Random bytes; hypothesis prints the shortest object that does not."""

        @settings_of(self.programs)
        @given(content=st.binary(min_size=1, max_size=2000), number=st.integers(0, 3))
        def program(content: bytes, number: int) -> None:
            assert bench.decode(bench.encode(content, number), len(content), number) == content

        program()

    def test_any_bytes_are_decoded_or_refused(self, bench: Bench) -> None:
        """Whatever a stranger has put there; hypothesis prints the shortest that is not."""

        @settings_of(self.programs)
        @given(encoded=st.binary(min_size=1, max_size=300), nbytes=st.integers(1, 5000))
        def program(encoded: bytes, nbytes: int) -> None:
            bench.bear(encoded, nbytes)

        program()
