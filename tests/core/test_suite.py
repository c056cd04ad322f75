"""The suite proves itself: it finds every tier that is broken on purpose, and passes the sound ones."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import Phase

from kvbm_core import Backend
from kvbm_core.testing._rig import Rig
from kvbm_core.testing.broken import BROKEN, SOUND, FolderConfig, FolderTier, _settings
from kvbm_core.testing.suite import TierSuite


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.backend.open.__name__)
def test_a_broken_tier_is_found_by_the_test_named_for_its_fault(broken, tmp_path, monkeypatch):
    monkeypatch.setattr("kvbm_core.testing._rig.PATIENCE_S", 0.3)
    monkeypatch.setattr("kvbm_core.testing._child.PATIENCE_S", 5)
    monkeypatch.setattr("kvbm_core.testing._machine._PHASES", (Phase.generate,))  # Nobody reads it.
    monkeypatch.setattr("threading.Event.wait", lambda event, timeout=None: event.is_set())
    # The first random program that fails ends the search: many programs cost nothing, and none is missed.
    members = {"backend": broken.backend, "settings": lambda self, f: broken.settings(f), "programs": 500}
    suite = type("Suite", (TierSuite,), members)
    test = getattr(suite(), broken.found_by)
    rig = Rig(broken.backend, broken.settings, tmp_path, suite.block_bytes)
    _, having = getattr(test, "needs", ("", lambda capabilities: True))
    assert having(rig.capabilities()), "the suite would leave this test out"
    try:
        with pytest.raises((Exception, pytest.fail.Exception)):
            test(rig)
    finally:
        if "twice" not in broken.found_by:
            rig.close_all()


class SoundFolder(TierSuite):
    backend = SOUND[0]

    def settings(self, folder):
        return _settings(self.backend, folder)


class TestSoundFolder(SoundFolder):
    pass


class TestSoundSharedFolder(SoundFolder):
    backend = SOUND[1]


class TestSoundLending(SoundFolder):
    backend = SOUND[2]


def test_every_test_of_the_suite_is_named_by_a_broken_tier():
    """Those that are left out are listed with the reason."""
    untried = {
        "test_check_accepts_what_can_be_opened_and_changes_nothing": "a check is no tier; tried below",
        "test_close_ends_the_tiers_threads": "tried below",
        "test_a_discarded_block_can_be_stored_again_at_once": "what fails it fails its neighbours too",
        "test_a_capacity_of_less_than_a_block_is_refused": "the core refuses it as well",
        "test_a_new_tier_lists_nothing": "as with its namespace",
    }
    tests = {name for name in vars(TierSuite) if name.startswith("test_")}
    assert tests - {broken.found_by for broken in BROKEN} == set(untried)


def subclass(**members):
    return type("TestIt", (TierSuite,), {"backend": SOUND[3], "settings": lambda self, f: {}, **members})


def test_a_test_cannot_be_overridden():
    with pytest.raises(TypeError, match=r"overrides .*test_lookup.*declare a waiver"):
        subclass(test_lookup_says_done_or_missing=lambda self: None)
    with pytest.raises(TypeError, match=r"overrides .*rig"):
        subclass(rig=None)
    with pytest.raises(TypeError, match="overrides"):
        type("TestLower", (subclass(),), {"test_close_may_be_called_twice": None})

    mixin = type("Mixin", (), {"test_close_may_be_called_twice": lambda self: None})
    with pytest.raises(TypeError, match="overrides"):
        type("TestMixed", (mixin, TierSuite), {})
    with pytest.raises(TypeError, match="is marked"):
        subclass(pytestmark=[pytest.mark.skip])


def run(test, backend, tmp_path):
    suite = subclass(backend=backend)
    getattr(suite(), test)(Rig(backend, lambda folder: _settings(backend, folder), tmp_path, 4196))


def test_a_check_that_makes_the_folder_is_found(tmp_path):
    backend = Backend("x", FolderConfig, FolderTier, check=lambda config: Path(config.path).mkdir())
    with pytest.raises(AssertionError):
        run("test_check_accepts_what_can_be_opened_and_changes_nothing", backend, tmp_path)


def test_a_thread_left_behind_is_found(tmp_path, monkeypatch):
    ended = threading.Event()

    class Leaves(FolderTier):
        def __init__(self, config, context):
            super().__init__(config, context)
            threading.Thread(target=ended.wait).start()

    monkeypatch.setattr("kvbm_core.testing.suite.PATIENCE_S", 0.05)
    try:
        with pytest.raises(AssertionError, match="left behind"):
            run("test_close_ends_the_tiers_threads", Backend("x", FolderConfig, Leaves), tmp_path)
    finally:
        ended.set()


def test_tests_of_its_own_are_welcome():
    assert subclass(test_of_my_own=lambda self: None)


@pytest.mark.parametrize(
    ("name", "reason", "said"),
    [
        ("test_nonsense", "because", "which is no test of the suite"),
        ("settings", "because", "which is no test of the suite"),
        ("test_close_may_be_called_twice", " ", "without a reason"),
    ],
)
def test_a_waiver_needs_a_test_and_a_reason(name, reason, said):
    with pytest.raises(TypeError, match=said):
        subclass(waivers={name: reason})


WAIVED = """
from kvbm_core.testing.broken import BROKEN, SOUND
from kvbm_core.testing.suite import TierSuite

broken = next(b for b in BROKEN if b.backend.name == "closesonce")

class TestBroken(TierSuite):
    backend = broken.backend
    waivers = {"test_close_may_be_called_twice": "the vendor's library cannot"}
    def settings(self, folder):
        return broken.settings(folder)

class TestStale(TierSuite):
    backend = SOUND[3]
    waivers = {"test_close_may_be_called_twice": "it can by now"}
    def settings(self, folder):
        return {"capacity": "400KiB"}
"""


def test_a_waived_test_must_fail_and_the_mark_is_its_class_own(tmp_path):
    (tmp_path / "test_waived.py").write_text(WAIVED)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-c", "/dev/null"]
    result = subprocess.run(
        [*command, "--rootdir", tmp_path, "test_waived.py", "-k", "close_may or submit_after"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    name = "test_close_may_be_called_twice"
    assert (
        f"XFAIL test_waived.py::TestBroken::{name} - waived: the vendor's library cannot (RuntimeError)"
        in result.stdout
    )
    assert f"FAILED test_waived.py::TestStale::{name}" in result.stdout, "a waiver out of date is found"
    assert "2 passed" in result.stdout
