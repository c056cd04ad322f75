"""A tier's directory: one owner, folders of ranks, and mistakes that are found early."""

import logging
import os
import stat

import pytest

from kvbm_core import TierOpenError, localdir
from kvbm_core.localdir import LocalDirectory, free_bytes


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(localdir, "_LOCK_WAIT_S", 0.1)
    return LocalDirectory(str(tmp_path / "parent" / "kv"), "shelf")


def test_a_folder_has_one_owner_until_it_is_released(directory):
    held = directory.hold(0)
    with pytest.raises(TierOpenError, match=rf"in use by another engine \(pid {os.getpid()}\)") as caught:
        directory.hold(0)
    assert (caught.value.tier, caught.value.operation) == ("shelf", "open")
    with pytest.raises(TierOpenError, match="in use by another engine"):
        directory.check(0, "stored")
    directory.hold(1).release()
    assert repr(held) == f"<HeldFolder {directory.root}/rank0, held>"
    held.release()
    held.release()
    assert repr(held).endswith("released>")
    directory.hold(0).release()
    directory.check(0, "stored")


def test_every_folder_that_is_made_and_the_lock_are_its_users_alone(directory):
    directory.hold(0).release()
    for folder in (directory.root.parent, directory.root, directory.rank_path(0)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory.rank_path(0) / "engine.lock").stat().st_mode) == 0o600


def test_a_folder_that_cannot_be_made_is_named(directory):
    directory.root.parent.mkdir()
    directory.root.write_text("a file")
    for use in (lambda: directory.hold(0), lambda: directory.check(0, "stored")):
        with pytest.raises(TierOpenError, match=rf"path: {directory.root}.* cannot be used by uid"):
            use()


def test_the_check_changes_nothing_and_counts_what_is_there(directory):
    directory.check(0, "stored")
    assert not directory.root.parent.exists()
    directory.hold(0).release()
    (directory.rank_path(0) / "data").write_bytes(bytes(1 << 20))
    with pytest.raises(TierOpenError) as caught:
        directory.check(1 << 60, "taken")
    assert f"capacity: {1 << 60} bytes, of which 10" in str(caught.value)
    assert f"are taken in {directory.root} already" in str(caught.value)


def test_each_rank_drops_its_part_of_what_more_ranks_left(directory, caplog):
    for rank in range(5):
        directory.hold(rank).release()
    (directory.root / "rankle").mkdir()
    directory.drop_other_ranks(1, 2, logging.getLogger("shelf"))
    assert sorted(each.name for each in directory.root.iterdir()) == [
        "rank0", "rank1", "rank2", "rank4", "rankle",
    ]  # fmt: skip
    assert [each.name for each in caplog.records] == ["shelf"]
    used = directory.hold(4)
    with pytest.raises(TierOpenError, match="rank4 is in use by another engine"):
        directory.drop_other_ranks(0, 2, logging.getLogger("shelf"))
    used.release()


def test_the_room_is_told_where_the_folder_is_gone(directory):
    held = directory.hold(0)
    (directory.rank_path(0) / "engine.lock").unlink()
    directory.rank_path(0).rmdir()
    assert free_bytes(held.lock_fd) > 0
    with pytest.raises(FileNotFoundError):
        free_bytes(held.path)
    held.release()
