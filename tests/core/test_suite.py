"""The suite proves itself: it finds every tier that is broken on purpose, and passes the sound ones."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from broken_guests import BROKEN
from broken_tiers import SOUND, FolderConfig, FolderTier, _fill, _settings
from hypothesis import Phase

from kvbm_core import Backend
from kvbm_core.testing import FaultyTier, MemoryDevice
from kvbm_core.testing._rig import Memory, Rig
from kvbm_core.testing._whole import members_of
from kvbm_core.testing.suite import TierSuite
from kvbm_core.tier import Op


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.backend.open.__name__)
def test_a_broken_tier_is_found_by_the_test_named_for_its_fault(broken, tmp_path, monkeypatch):
    monkeypatch.setattr("kvbm_core.testing._rig.PATIENCE_S", 0.3)
    for part in ("_call_tests", "_medium_tests", "_place_tests", "_process_tests"):
        monkeypatch.setattr(f"kvbm_core.testing.{part}.PATIENCE_S", 0.3)
    monkeypatch.setattr("kvbm_core.testing._child.PATIENCE_S", 1 if "_ends_" in broken.found_by else 5)
    for part in ("_queue_tests", "_life_tests"):
        monkeypatch.setattr(f"kvbm_core.testing.{part}.PATIENCE_S", 2)
    monkeypatch.setattr("kvbm_core.testing._queue_tests.CALL_S", 0.09)
    monkeypatch.setattr("kvbm_core.testing._queue_tests.CLOSE_S", 0.09)
    monkeypatch.setattr("kvbm_core.testing._machine._PHASES", (Phase.generate,))  # Nobody reads it.
    # The first random program that fails ends the search: many programs cost nothing, and none is missed.
    members = {"backend": broken.backend, "settings": lambda self, f: broken.settings(f), "programs": 500}
    suite = type("Suite", (TierSuite,), members)
    test = getattr(suite(), broken.found_by)
    rig = Rig(broken.backend, broken.settings, tmp_path, suite.max_bytes, _fill)
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


class TestSoundMemory(SoundFolder):
    backend = SOUND[3]


class TestSoundReadOnly(SoundFolder):
    backend = SOUND[4]

    def fill(self, folder, namespace, objects):
        _fill(folder, namespace, objects)


class TestSoundShort(SoundFolder):
    """Where no object is longer than a page."""

    backend = SOUND[3]
    max_bytes = 1000


def test_every_test_of_the_suite_is_named_by_a_broken_tier():
    """Those that are left out are listed with the reason."""
    untried = {
        "test_check_accepts_what_can_be_opened_and_changes_nothing": "a check is no tier; tried below",
        "test_close_ends_the_tiers_threads": "tried below",
        "test_a_discarded_object_can_be_stored_again_at_once": "what fails it fails its neighbours too",
        "test_a_capacity_of_less_than_an_object_is_refused": "the core refuses it as well",
        "test_a_new_tier_lists_nothing": "as with its namespace",
    }
    tests = {name for name in members_of(TierSuite) if name.startswith("test_")}
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

    monkeypatch.setattr("kvbm_core.testing._life_tests.PATIENCE_S", 0.05)
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
from broken_tiers import BROKEN, SOUND
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


def run_strangers(text, chosen, tmp_path):
    """Run a stranger's file of tests in a process of its own; give what pytest prints."""
    (tmp_path / "test_waived.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-c", "/dev/null"]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return subprocess.run(
        [*command, "-W", "error", "--rootdir", tmp_path, "test_waived.py", "-k", chosen],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip


STRANGERS = """
from broken_tiers import BROKEN
from kvbm_core.testing.suite import TierSuite

class TestBroken(TierSuite):
    backend = next(b for b in BROKEN if b.backend.name == "%s").backend
    def settings(self, folder):
        return {"capacity": "400KiB"}
"""


def test_a_test_that_fails_shows_the_values(tmp_path):
    shown = run_strangers(STRANGERS % "changesitsmind", "capabilities_are_the_same", tmp_path).stdout
    assert "capacity_bytes: 409267 != 409600" in shown


CRASHING = """
import ctypes
import os

import pytest
from kvbm_core import Backend
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing.suite import TierSuite

class Crashes(MemoryTier):
    def discard(self, keys):
        %s

class TestCrashing(TierSuite):
    backend = Backend("crashes", MemoryConfig, Crashes)
    def settings(self, folder):
        return {"capacity": "400KiB"}
"""


@pytest.mark.parametrize("crash", ["os._exit(0)", "ctypes.memset(8, 0, 8)", "os.kill(os.getpid(), 9)"])
def test_an_interpreter_that_ends_names_its_test(crash, tmp_path):
    done = run_strangers(CRASHING % crash, "discarding_an_absent_key", tmp_path)
    name = "test_waived.py::TestCrashing::test_discarding_an_absent_key_is_ignored"
    assert f"kvbm_core.testing: the process ended in the midst of {name}" in done.stderr
    assert "passed" not in done.stdout


def test_a_waived_test_must_fail_and_the_mark_is_its_class_own(tmp_path):
    result = run_strangers(WAIVED, "close_may or submit_after", tmp_path)
    name = "test_close_may_be_called_twice"
    assert (
        f"XFAIL test_waived.py::TestBroken::{name} - waived: the vendor's library cannot (RuntimeError)"
        in result.stdout
    )
    assert f"FAILED test_waived.py::TestStale::{name}" in result.stdout, "a waiver out of date is found"
    assert "2 passed" in result.stdout


def test_a_memory_device_has_one_pool_of_blocks_for_all_groups():
    device = MemoryDevice(3, (8, 0, 5))
    assert device.traits.block_bytes == (8, 0, 5)
    device.write(1, b"abcdefgh")
    device.write(2, b"12345", group=2)
    memory = Memory(100)
    device.gather([2, 1], [memory.region.part(0, 20), memory.region.part(50, 20)], group=2)
    assert (memory.read()[:6], memory.read()[50:56]) == (b"12345Z", b"abcdeZ")
    device.gather([1], [memory.region], group=1)
    assert memory.read()[:6] == b"12345Z"
    device.scatter([memory.region], [1], group=2)
    assert device.read(1) == b"12345fgh"
    assert device.read(1, group=1) == b""
    assert MemoryDevice(1, 7).traits.block_bytes == (7,)


def test_a_memory_device_refuses_what_it_has_not():
    device = MemoryDevice(3, (8, 5))
    with pytest.raises(ValueError, match="no KV group 2: the device has 2"):
        device.read(0, group=2)
    with pytest.raises(ValueError, match="no block 3: the device has 3"):
        device.gather([3], [Memory(8).region])


@pytest.mark.parametrize("fault", ["flip", "short"])
def test_a_fault_concerns_the_object_and_not_the_region_behind_it(fault, tmp_path):
    rig = Rig(SOUND[3], lambda folder: _settings(SOUND[3], folder), tmp_path, 16480)
    tier = FaultyTier(rig.stocked(1), lambda transfer: fault if transfer.op is Op.LOAD else None)
    for _ in range(50):
        completion, memory = rig.load(tier, 1)
        assert completion.nbytes == rig.length(1)
        assert memory.read()[: completion.nbytes] != rig.content(1)
        assert memory.untouched_behind(completion.nbytes)
