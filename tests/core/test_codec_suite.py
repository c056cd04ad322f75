"""The suite of codecs proves itself: it finds every codec that is broken on purpose, and passes the sound."""

import inspect

import pytest
from broken_codecs import BROKEN, Keyed, Pad, Zlib, kind
from hypothesis import Phase

from kvbm_core.testing._bench import Bench
from kvbm_core.testing._whole import members_of
from kvbm_core.testing.codec_suite import CodecSuite


class TestZlib(CodecSuite):
    codec = kind(Zlib, saves_room=True)

    def settings(self, folder):
        return {"level": 6}

    def another(self, folder):
        return {"level": 1}


class TestKeyed(TestZlib):
    codec = kind(Keyed)


class TestPad(CodecSuite):
    codec = kind(Pad)
    uses_key = True


def settings(self, folder):
    """Give settings with a key in a file."""
    (folder / "key").write_bytes(b"a secret of some length")
    return {"file": str(folder / "key")}


def tried(codec, test, folder, monkeypatch, **members):
    monkeypatch.setattr("kvbm_core.testing._machine._PHASES", (Phase.generate,))  # Nobody reads it.
    members = {"programs": 500, "settings": settings, "another": lambda self, folder: {"level": 9}, **members}
    suite = type("Suite", (CodecSuite,), {"codec": codec, **members})()
    names = inspect.signature(getattr(suite, test)).parameters
    fixtures = {"bench": Bench(suite.opened(folder)), "tmp_path": folder}
    getattr(suite, test)(**{name: fixtures[name] for name in names})


@pytest.mark.parametrize(("made", "test"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_codec_is_found_by_the_test_named_for_its_fault(made, test, tmp_path, monkeypatch):
    with pytest.raises((Exception, pytest.fail.Exception)):
        tried(kind(made), test, tmp_path, monkeypatch, uses_key=getattr(made, "uses_key", False))


def test_every_test_of_the_suite_is_named_by_a_broken_codec():
    tests = {name for name in members_of(CodecSuite) if name.startswith("test_")}
    assert tests == {test for _, test in BROKEN}


def test_a_codec_that_does_not_use_the_key_must_not_say_so(tmp_path, monkeypatch):
    test = "test_another_key_makes_no_difference_unless_the_codec_uses_it"
    with pytest.raises(AssertionError, match="uses_key is True"):
        tried(kind(Zlib), test, tmp_path, monkeypatch, uses_key=True)


def test_a_test_cannot_be_overridden():
    with pytest.raises(TypeError, match=r"overrides .*test_any_object_survives"):
        type("Mine", (CodecSuite,), {"codec": kind(Zlib), "test_any_object_survives": lambda self: None})
