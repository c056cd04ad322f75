"""The suite of coordinators proves itself: it finds each that is broken, and passes the sound one."""

import contextlib

import pytest
from broken_coordinators import BROKEN
from sound_coordinators import FolderCoordinator

from kvbm_core.testing._hall import Hall
from kvbm_core.testing._whole import members_of
from kvbm_core.testing.coordinator_suite import CoordinatorSuite


class Folder(CoordinatorSuite):
    coordinator = staticmethod(FolderCoordinator)
    forget_s = 0.1
    wait_s = 60.0

    def settings(self, folder):
        if not (folder / "hidden").exists():
            (folder / "root").mkdir(exist_ok=True)
        return {"path": str(folder / "root"), "init_timeout_s": self.wait_s}

    def hasty(self, folder):
        return {**self.settings(folder), "init_timeout_s": 0.1}

    @contextlib.contextmanager
    def away(self, folder):
        self.settings(folder)
        root, hidden = folder / "root", folder / "hidden"
        root.rename(hidden)
        try:
            yield
        finally:
            hidden.rename(root)


class TestFolder(Folder):
    pass


@pytest.mark.parametrize(("made", "test"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_coordinator_is_found_by_the_test_named_for_its_fault(made, test, tmp_path, monkeypatch):
    for part in ("coordinator_suite", "_hall"):
        monkeypatch.setattr(f"kvbm_core.testing.{part}.PATIENCE_S", 1)
    suite = type("Suite", (Folder,), {"coordinator": staticmethod(made), "wait_s": 0.5})()
    (tmp_path / "hall").mkdir()
    hall = Hall(suite, tmp_path / "hall")
    try:
        with pytest.raises((Exception, pytest.fail.Exception)):
            getattr(suite, test)(hall)
    finally:
        with contextlib.suppress(Exception):
            hall.close()


def test_every_test_of_the_suite_is_named_by_a_broken_coordinator():
    tests = {name for name in members_of(CoordinatorSuite) if name.startswith("test_")}
    assert tests == {test for _, test in BROKEN}


def test_a_test_cannot_be_overridden():
    with pytest.raises(TypeError, match=r"overrides .*test_who_lives_stays_listed"):
        type("Mine", (Folder,), {"test_who_lives_stays_listed": lambda self: None})
