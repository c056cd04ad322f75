"""The suite for the codec ``crypt``, and what it cannot know: keys, their sources, and every change found."""

import os
import struct
import sys

import pytest

from kvbm_core import CodecContext, ConfigError, CorruptError, UnverifiableError
from kvbm_core.config import convert
from kvbm_core.testing.codec_suite import CodecSuite
from kvbm_crypt import CryptCodec, CryptConfig, _codec
from kvbm_crypt._keys import Key

KEY = b"k" * 32
CONTENT = b"some prompt's cache" * 10
TRAILER = 64
MODES = ["encrypt", "sign"]


def key_file(folder, name="key", content=bytes(range(32)), mode=0o600):
    file = folder / name
    file.write_bytes(content)
    file.chmod(mode)
    return {"file": str(file)}


class TestEncrypting(CodecSuite):
    codec = "crypt"
    uses_key = True

    def settings(self, folder):
        return {"keys": [key_file(folder)]}

    def another(self, folder):
        return {"keys": [key_file(folder, "other", bytes(range(1, 33)))]}


class TestSigning(CodecSuite):
    codec = "crypt"
    uses_key = True

    def settings(self, folder):
        return {"keys": [key_file(folder)], "mode": "sign"}

    def another(self, folder):
        return {"keys": [key_file(folder, "other", bytes(range(1, 33)))], "mode": "sign"}


def codec(*sources, namespace=b"n" * 16, **settings):
    config = convert({"keys": list(sources), **settings}, CryptConfig, "crypt")
    return CryptCodec(config, CodecContext(namespace, 1 << 20, "test"))


def encoded(codec, key=KEY):
    target = bytearray(codec.max_bytes(len(CONTENT)))
    return target[: codec.encode(key, memoryview(CONTENT), memoryview(target))]


def decoded(codec, source, key=KEY):
    target = bytearray(len(CONTENT))
    return bytes(target[: codec.decode(key, memoryview(source), memoryview(target))])


@pytest.mark.parametrize(
    ("key", "said", "sealed"),
    [
        (b"\1" * 32, b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (b"\3" * 32, b"c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ],
    ids=["first", "second"],
)
def test_it_is_xaes_256_gcm_as_published(key, said, sealed):
    """The test vectors of c2sp.org/XAES-256-GCM; of the two keys one has the top bit of CMAC's L set."""
    cipher = Key(key).derive(b"ABCDEFGHIJKL")
    assert cipher.encrypt(b"MNOPQRSTUVWX", b"XAES-256-GCM", said).hex() == sealed


@pytest.mark.parametrize("mode", MODES)
def test_every_changed_or_missing_byte_is_found(tmp_path, mode):
    one = codec(key_file(tmp_path), mode=mode)
    sound = encoded(one)
    assert decoded(one, sound) == CONTENT
    for at in range(len(sound)):
        changed = bytearray(sound)
        changed[at] ^= 1
        for source in (changed, sound[:at]):
            with pytest.raises(CorruptError):
                decoded(one, source)


@pytest.mark.parametrize("mode", MODES)
def test_another_key_or_namespace_or_mode_is_refused(tmp_path, mode):
    source = key_file(tmp_path)
    one = codec(source, mode=mode)
    sound = encoded(one)
    with pytest.raises(CorruptError, match="swapped"):
        decoded(one, sound, b"j" * 32)
    with pytest.raises(CorruptError, match="swapped"):
        decoded(codec(source, mode=mode, namespace=b"m" * 16), sound)
    other = codec(source, mode=MODES[mode == "encrypt"])
    assert other.identity != one.identity
    with pytest.raises(CorruptError, match="mode"):
        decoded(other, sound)


@pytest.mark.parametrize("mode", MODES)
def test_what_another_key_has_written_is_not_to_be_judged_and_not_written_to_the_target(tmp_path, mode):
    one = codec(key_file(tmp_path), mode=mode)
    other = codec(key_file(tmp_path, "other", b"o" * 32), mode=mode)
    target = memoryview(bytearray(b"\xaa" * len(CONTENT)))
    with pytest.raises(UnverifiableError, match="which is not among the keys here"):
        other.decode(KEY, memoryview(encoded(one)), target)
    assert bytes(target) == b"\xaa" * len(CONTENT)
    # Their objects meet in one place, so that a key can be rotated; a ring keeps them apart.
    assert other.identity == one.identity
    assert codec(key_file(tmp_path), mode=mode, ring="b").identity != one.identity


def test_a_later_version_is_left_to_who_knows_it(tmp_path):
    one = codec(key_file(tmp_path))
    later = encoded(one)
    later[len(CONTENT) + 20] = 2
    with pytest.raises(UnverifiableError, match="format 2, this release has 1"):
        decoded(one, later)


@pytest.mark.parametrize("mode", MODES)
def test_the_first_key_writes_and_all_read(tmp_path, mode):
    old, new = key_file(tmp_path, "old"), key_file(tmp_path, "new", b"n" * 32)
    before, between, after = (codec(*keys, mode=mode) for keys in ([old], [new, old], [new]))
    assert before.identity == between.identity == after.identity
    assert decoded(between, encoded(before)) == CONTENT
    assert decoded(after, encoded(between)) == CONTENT
    for one, wrote in ((before, between), (after, before)):
        with pytest.raises(UnverifiableError):
            decoded(one, encoded(wrote))


def test_who_has_no_key_can_plant_nothing(tmp_path):
    """A trailer with the right key's id, copied from an object that anybody may read."""
    for mode in MODES:
        one = codec(key_file(tmp_path), mode=mode)
        sound = encoded(one)
        planted = bytearray(b"a planted block".ljust(len(CONTENT))) + sound[-TRAILER:]
        with pytest.raises(CorruptError, match="planted"):
            decoded(one, planted)
        with pytest.raises(CorruptError, match="no trailer"):
            decoded(one, b"a planted block".ljust(len(sound)))


def test_encrypted_objects_show_nothing_and_signed_ones_are_readable(tmp_path):
    hides, signs = (codec(key_file(tmp_path), mode=mode) for mode in MODES)
    first, second = encoded(hides), encoded(hides)
    assert first[: len(CONTENT)] != second[: len(CONTENT)]
    assert CONTENT[:8] not in first
    assert encoded(signs)[: len(CONTENT)] == CONTENT


def test_a_nonce_is_never_used_twice(tmp_path):
    one = codec(key_file(tmp_path), mode="sign")
    made = [bytes(encoded(one)[-24:]) for _ in range(10_000)]
    assert len({nonce[12:] for nonce in made}) == len(made)
    assert all(len({nonce[at] for nonce in made}) == 256 for at in range(12, 24))
    # One derivation serves 4,096 objects.
    assert [len({nonce[:12] for nonce in made[:count]}) for count in (4096, 4097, 10_000)] == [1, 2, 3]


@pytest.mark.parametrize("mode", MODES)
def test_what_a_reader_remembers_is_bounded_whoever_fills_the_store(tmp_path, mode):
    one = codec(key_file(tmp_path), mode=mode)
    sound, planted = encoded(one), encoded(one)
    for _ in range(2 * _codec._MOST_DERIVED):
        planted[-24:-12] = os.urandom(12)
        with pytest.raises(CorruptError, match="planted"):
            decoded(one, planted)
    assert len(one._derived) == _codec._MOST_DERIVED
    assert decoded(one, sound) == CONTENT


HEX = bytes(range(32)).hex()


@pytest.mark.parametrize(
    "written",
    [HEX.encode(), f" {HEX.upper()}\n".encode(), bytes(range(32))],
    ids=["digits", "spaces", "bytes"],
)
def test_a_key_is_the_same_from_every_source(tmp_path, monkeypatch, written):
    source = key_file(tmp_path, content=written)
    monkeypatch.setenv("THE_KEY", HEX)
    of_file = codec(source)
    prints = {"command": [sys.executable, "-c", f"print({HEX!r})"]}
    for other in (prints, {"environment": "THE_KEY"}):
        assert decoded(codec(other), encoded(of_file)) == CONTENT


def refusal(*sources, **settings):
    with pytest.raises(ConfigError) as refused:
        codec(*sources, **settings)
    return str(refused.value)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (
            b"k" * 31,
            0o600,
            "has 31 bytes that are no key; a key is 32 random bytes, or 64 hexadecimal digits",
        ),
        (b"xy" * 32, 0o600, "has 64 bytes that are no key"),
        ("é".encode() * 32, 0o600, "has 64 bytes that are no key"),
        (b"k" * 32, 0o640, "is open to others, 640; chmod 600"),
    ],
    ids=["short", "no digits", "no text", "open"],
)
def test_a_key_file_that_will_not_do_is_refused_by_name(tmp_path, content, mode, said):
    words = refusal(key_file(tmp_path, "the-file", content, mode))
    assert said in words
    assert "the-file" in words
    assert "kkkk" not in words


def test_what_is_no_file_or_a_strangers_is_refused(tmp_path):
    assert "cannot be read (No such file" in refusal({"file": str(tmp_path / "none")})
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "is no regular file" in refusal({"file": str(tmp_path / "pipe")})
    assert "cannot be read (Is a directory)" in refusal({"file": str(tmp_path)})
    if os.geteuid() == 0:
        source = key_file(tmp_path)
        os.chown(source["file"], 54321, -1)
        assert "belongs to user 54321; chown it" in refusal(source)


def test_a_command_that_fails_is_named_without_its_arguments():
    fails = {"command": [sys.executable, "-c", "import sys; print('kkkk'); sys.exit(3)", "secret"]}
    for source, said in [
        (fails, "ended with status 3; try it by hand"),
        ({"command": ["/none/such", "secret"]}, "cannot be started (No such file"),
        ({"command": [sys.executable, "-c", "print('kkkk')", "secret"]}, "has 5 bytes that are no key"),
    ]:
        words = refusal(source)
        assert said in words
        assert "secret" not in words
        assert "kkkk" not in words


def test_a_variable_that_is_not_set_is_named():
    assert "the environment has no KVBM_NO_KEY; set it" in refusal({"environment": "KVBM_NO_KEY"})


@pytest.mark.parametrize("source", [{}, {"file": "a", "environment": "B"}, {"command": []}])
def test_a_source_is_one_of_three(source):
    assert "write one of {file: PATH}" in refusal(source)


def test_a_key_in_the_configuration_is_refused_and_not_repeated():
    for source in (HEX, {"key": HEX}):
        words = refusal(source)
        assert "keys[0]" in words or "keys[...]" in words
        assert HEX[:8] not in words


def test_no_source_and_the_same_key_twice_are_refused(tmp_path):
    assert "write at least one source" in refusal()
    one, other = key_file(tmp_path), key_file(tmp_path, "copy", HEX.encode())
    assert "two sources give the same key" in refusal(one, other)


def test_neither_its_state_nor_its_identity_nor_the_log_shows_the_key(tmp_path, caplog):
    caplog.set_level("INFO")
    one = codec(key_file(tmp_path, content=b"k" * 32))
    assert repr(one).startswith("<CryptCodec encrypt, key ")
    shown = repr(one).encode() + one.identity + caplog.text.encode() + bytes(encoded(one)[-TRAILER:])
    assert b"kkkk" not in shown
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("tier test: crypt: mode encrypt; keys, the first of which writes: ")


def test_the_trailer_is_as_documented(tmp_path):
    one = codec(key_file(tmp_path))
    magic, version, mode, zero, key_id = struct.unpack("<16x4sBBH16s24x", encoded(one)[-TRAILER:])
    assert (magic, version, mode, zero, key_id) == (b"kvbm", 1, 1, 0, Key(bytes(range(32))).id)
