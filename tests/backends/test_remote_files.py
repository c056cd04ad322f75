"""A directory into which others may write: what the remote tier deletes, follows and waits for there."""

import contextlib
import os
import threading
import time

import pytest
from test_cpu import BLOCK, NAMESPACE, content, key, load, lookup, region, run, store

from kvbm_cli._app import run as kvbm
from kvbm_core.tier import Op, Outcome, Reason, TierContext, Transfer
from kvbm_remote import RemoteConfig, RemoteTier, _local_store
from kvbm_remote._local_store import LocalStore

HOURS_AGO = time.time() - 7200
LITTER = f".kvbm-{'0' * 32}.tmp"
STRANGER = 54321


@pytest.fixture
def open_tier(tmp_path):
    with contextlib.ExitStack() as stack:

        def open_(**settings):
            config = RemoteConfig(url=f"file://{tmp_path}/kv", **settings)
            tier = RemoteTier(config, TierContext(NAMESPACE, BLOCK))
            stack.callback(tier.close)
            return tier

        yield open_


def path_of(tmp_path, n):
    name = key(n).hex()
    return tmp_path / "kv/v1" / NAMESPACE.hex() / "r0of1" / name[:2] / name


def aged(path, what="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(what)
    os.utime(path, (HOURS_AGO, HOURS_AGO))
    return path


def test_tidying_deletes_what_this_backend_made_and_nothing_else(tmp_path, open_tier):
    folder = path_of(tmp_path, 1).parent
    litter, young = aged(folder / LITTER), folder / f".kvbm-{'1' * 32}.tmp"
    young.write_text("half")
    others = [
        ".bashrc",
        ".profile",
        "." + "0" * 32,
        f"{LITTER}~",
        f".kvbm-{'A' * 32}.tmp",
        f".kvbm-{'0' * 31}.tmp",
    ]
    kept = [aged(folder / name) for name in others]
    target = aged(tmp_path / "precious")
    link = folder / f".kvbm-{'2' * 32}.tmp"
    link.symlink_to(target)
    os.utime(link, (HOURS_AGO, HOURS_AGO), follow_symlinks=False)
    strange = aged(folder / f".kvbm-{'3' * 32}.tmp")
    os.chown(strange, STRANGER, STRANGER)
    assert store(open_tier(), 1).outcome is Outcome.DONE
    assert not litter.exists()
    assert all(path.read_text() == "mine" for path in (*kept, target, strange))
    assert young.exists()
    assert link.is_symlink()


def test_a_folder_with_a_file_s_name_does_not_end_stores(tmp_path, open_tier, caplog):
    folder = path_of(tmp_path, 1).parent
    for name in (".cache", LITTER):
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (HOURS_AGO, HOURS_AGO))
    assert store(open_tier(), 1).outcome is Outcome.DONE
    assert (folder / ".cache").is_dir()
    assert (folder / LITTER).is_dir()
    assert not caplog.records


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_nothing_is_written_or_deleted_through_a_link(tmp_path, open_tier, caplog, depth):
    home = tmp_path / "home"
    path = path_of(tmp_path, 1)
    inside = path.relative_to(tmp_path / "kv").parts
    precious = aged(home.joinpath(*inside[depth + 1 : -1], LITTER))
    block = aged(home.joinpath(*inside[depth + 1 :]))
    link = (tmp_path / "kv").joinpath(*inside[: depth + 1])
    link.parent.mkdir(parents=True)
    link.symlink_to(home)
    tier = open_tier()
    other = key(1)[:-1] + b"\0"
    end = run(tier, [Transfer(1, Op.STORE, other, region(content(1)))])[1]
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.ERROR)
    assert "look who made it and remove it" in end.detail
    tier.discard([key(1)])
    tier.close()
    kvbm(["remote", "gc", f"file://{tmp_path}/kv", "--max-age", "1h"])
    assert precious.exists()
    assert block.exists()
    assert [each.name for each in block.parent.iterdir() if each.name not in (LITTER, block.name)] == []
    assert "a strange folder" in caplog.text


def test_the_root_itself_may_be_a_link_to_a_mount(tmp_path, open_tier):
    (tmp_path / "mount").mkdir()
    (tmp_path / "kv").symlink_to(tmp_path / "mount")
    tier = open_tier()
    assert store(tier, 1).outcome is Outcome.DONE
    assert load(tier, 1)[1] == content(1)


@pytest.mark.parametrize("again", ["by us", "by others"])
def test_a_directory_that_was_taken_away_is_said_once_and_stores_go_on(tmp_path, open_tier, caplog, again):
    tier = open_tier()
    store(tier, 1)
    (tmp_path / "kv").rename(tmp_path / "away")
    if again == "by others":
        (tmp_path / "kv").mkdir()
    for n in (2, 3):
        assert store(tier, n).outcome is Outcome.DONE
    [line] = caplog.messages
    assert f"file://{tmp_path}/kv is another directory than before" in line
    assert "see if a mount is away" in line


def test_a_directory_that_several_threads_make_at_once_was_no_other_before(
    tmp_path, open_tier, caplog, monkeypatch
):
    make = _local_store._make_root

    def make_slowly(root):
        made = make(root)
        time.sleep(0.2 * made)  # The others see it meanwhile.
        return made

    monkeypatch.setattr(_local_store, "_make_root", make_slowly)
    stores = [Transfer(n, Op.STORE, key(n), region(content(n))) for n in range(16)]
    assert {end.outcome for end in run(open_tier(), stores).values()} == {Outcome.DONE}
    assert not caplog.messages


@pytest.mark.parametrize(
    ("owner", "group", "mode", "trusted"),
    [
        (STRANGER, STRANGER, 0o755, False),
        (STRANGER, STRANGER, 0o777, False),
        (STRANGER, os.getegid(), 0o2775, True),
        (STRANGER, os.getegid(), 0o2755, False),
        (os.geteuid(), STRANGER, 0o700, True),
    ],
)
def test_another_user_s_folder_is_used_only_if_it_was_made_for_a_group_of_ours(
    tmp_path, open_tier, owner, group, mode, trusted
):
    if os.geteuid():
        pytest.skip("ANOTHER USER'S FOLDER IS NOT TESTED: only root can make one")
    folder = tmp_path / "kv/v1"
    folder.mkdir(parents=True)
    os.chown(folder, owner, group)
    folder.chmod(mode)
    end = store(open_tier(), 1)
    assert end.outcome is (Outcome.DONE if trusted else Outcome.FAILED)
    assert ("another user's folder" in end.detail) is not trusted


def test_what_is_no_plain_file_is_corrupt_at_once_and_is_mended(tmp_path, open_tier):
    aged(tmp_path / "precious", "x" * BLOCK)
    for n, make in enumerate((os.mkfifo, os.mkdir, lambda path: path.symlink_to(tmp_path / "precious"))):
        path = path_of(tmp_path, n)
        path.parent.mkdir(parents=True)
        make(path)
    tier = open_tier(timeout_s=60.0)
    for n in range(3):
        for op, target in ((Op.LOAD, region()), (Op.LOOKUP, None)):
            end = run(tier, [Transfer(1, op, key(n), target)])[1]
            assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.CORRUPT), (n, op)
    # A folder cannot be replaced by a file; it costs this block and no other.
    for n in (0, 2):
        tier.discard([key(n)])
        assert lookup(tier, n) is Outcome.MISSING
        assert store(tier, n).outcome is Outcome.DONE
        assert load(tier, n)[1] == content(n)
    assert (tmp_path / "precious").read_text() == "x" * BLOCK


def test_a_mount_without_permission_says_so_once(tmp_path, open_tier, caplog):
    if os.geteuid():
        pytest.skip("A MOUNT WITHOUT PERMISSION IS NOT TESTED: only root can take a user's place")
    tier = open_tier()
    (tmp_path / "kv").mkdir(mode=0o500)
    os.chmod(tmp_path / "kv", 0o500)
    # Threads have a user of their own.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    original = LocalStore.put

    async def as_stranger(self, *arguments, **named):
        libc.syscall(122, STRANGER)  # setfsuid, of this thread alone
        try:
            return await original(self, *arguments, **named)
        finally:
            libc.syscall(122, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "put", as_stranger)
        ends = [store(tier, n) for n in range(20)]
    assert {(end.outcome, end.reason) for end in ends} == {(Outcome.FAILED, Reason.ERROR)}
    said = [record.getMessage() for record in caplog.records if record.name == "kvbm_remote"]
    assert len(said) == 1
    assert (
        "store failed: no permission (PermissionError, Permission denied): let this process's user" in said[0]
    )
    tier.close()
    assert "19 more in the last" in caplog.records[-1].getMessage()


def test_a_mount_that_hangs_keeps_as_many_regions_as_requests_and_no_more(tmp_path, open_tier, monkeypatch):
    # No file system here can be made to hang: the call is held instead.
    free, hanging = threading.Event(), threading.Semaphore(0)
    original = os.preadv

    def hang(*arguments):
        hanging.release()
        free.wait()
        return original(*arguments)

    before = threading.active_count()
    tier = open_tier(timeout_s=0.3, max_in_flight=2)
    for n in range(8):
        store(tier, n)
    monkeypatch.setattr(os, "preadv", hang)
    tier.submit([Transfer(n, Op.LOAD, key(n), region()) for n in range(8)])
    for _ in range(2):
        assert hanging.acquire(timeout=20)
    done, give_up_s = [], time.monotonic() + 20
    while len(done) < 6 and time.monotonic() < give_up_s:
        done.extend(tier.poll())
        time.sleep(0.01)
    assert {end.reason for end in done} == {Reason.DEADLINE}
    assert (len(done), len(tier._open)) == (6, 2)
    assert threading.active_count() == before + 2
    free.set()
    while len(done) < 8 and time.monotonic() < give_up_s:
        done.extend(tier.poll())
        time.sleep(0.01)
    assert [end.outcome for end in done[6:]] == [Outcome.DONE, Outcome.DONE]
