"""The suite in a few lines, and what it cannot know: the key file, and that every change is found."""

import pytest
from kvbm_aes_gcm import AesGcmCodec, AesGcmConfig

from kvbm_core import CodecContext, ConfigError, CorruptError
from kvbm_core.testing.codec_suite import CodecSuite

KEY = b"k" * 32
CONTENT = b"some prompt's cache" * 10


def key_file(folder, content=bytes(range(32)), mode=0o600, name="key"):
    file = folder / name
    file.write_bytes(content)
    file.chmod(mode)
    return file


class TestAesGcm(CodecSuite):
    codec = "aes-gcm"
    uses_key = True

    def settings(self, folder):
        return {"key_file": str(key_file(folder))}

    def another(self, folder):
        return {"key_file": str(key_file(folder, bytes(range(1, 33)), name="other"))}


def codec(file, namespace=b"n" * 16):
    return AesGcmCodec(AesGcmConfig(key_file=str(file)), CodecContext(namespace, 1 << 20, "test"))


def encoded(codec, key=KEY):
    target = bytearray(codec.max_bytes(len(CONTENT)))
    return target[: codec.encode(key, memoryview(CONTENT), memoryview(target))]


def decoded(codec, source, key=KEY):
    target = bytearray(len(CONTENT))
    return bytes(target[: codec.decode(key, memoryview(source), memoryview(target))])


def test_every_changed_or_missing_byte_is_found(tmp_path):
    one = codec(key_file(tmp_path))
    sound = encoded(one)
    assert decoded(one, sound) == CONTENT
    for at in range(len(sound)):
        changed = bytearray(sound)
        changed[at] ^= 1
        for source in (changed, sound[:at]):
            with pytest.raises(CorruptError):
                decoded(one, source)


def test_another_key_or_namespace_or_key_file_is_refused(tmp_path):
    one = codec(key_file(tmp_path))
    sound = encoded(one)
    with pytest.raises(CorruptError, match="swapped"):
        decoded(one, sound, b"j" * 32)
    with pytest.raises(CorruptError):
        decoded(codec(tmp_path / "key", b"m" * 16), sound)
    other = codec(key_file(tmp_path, b"o" * 32))
    assert other.identity != one.identity
    with pytest.raises(CorruptError):
        decoded(other, sound)


def test_equal_objects_look_different_and_show_nothing(tmp_path):
    one = codec(key_file(tmp_path))
    first, second = encoded(one), encoded(one)
    assert first != second
    assert CONTENT[:8] not in first


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0, "cannot be read \\(No such file"),
        (b"k" * 31, 0o600, "has 31 bytes, not 32; write a file made by: head -c 32"),
        (b"k" * 32, 0o640, "is open to others, 640; chmod 600"),
    ],
)
def test_a_key_file_that_will_not_do_is_refused_by_name(tmp_path, content, mode, said):
    if content is not None:
        key_file(tmp_path, content, mode)
    with pytest.raises(ConfigError, match=f"key_file: '.*key' {said}") as refused:
        codec(tmp_path / "key")
    assert "kkkk" not in str(refused.value)


def test_neither_its_state_nor_its_identity_shows_the_key(tmp_path):
    one = codec(key_file(tmp_path, b"k" * 32))
    assert b"kkkk" not in one.identity
    assert repr(one) == f"<AesGcmCodec key {one.identity.hex()[:8]}>"
