"""A rank's folder on a local disk: what is refused, what is said of it, and who holds it."""

import contextlib
import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvbm_core import localdir
from kvbm_core.config import parse_size, size_text
from kvbm_core.errors import TierOpenError
from kvbm_core.localdir import LocalDirectory
from kvbm_core.remedies import remedy
from kvbm_core.trust import why_strange_folder

STRANGER = 54321
GIB = 1 << 30
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="OTHER OWNERS ARE NOT TESTED: this is not root")


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch):
    monkeypatch.setattr(localdir, "_LOCK_WAIT_S", 0.1)


@contextlib.contextmanager
def mounted(path, options):
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True)
    if made.returncode:
        pytest.skip(f"A FAILING FILE SYSTEM IS NOT TESTED: mount is not allowed: {made.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def check(path):
    LocalDirectory(str(path), "gds").check(0, "taken")


def hold(path, tier="gds", rank=0):
    return LocalDirectory(str(path), tier).hold(rank)


def refusal(call, *args, **kwargs):
    with pytest.raises(TierOpenError) as caught:
        call(*args, **kwargs).release()
    return str(caught.value)


IMPORTS = (
    "import os\nfrom kvbm_core.errors import TierOpenError\nfrom kvbm_core.localdir import LocalDirectory\n"
)


def as_user(uid, code, **environ):
    """Run code as another user, and give what it prints."""
    code = f"{IMPORTS}os.setgroups([]); os.setgid({uid}); os.setuid({uid})\n{code}"
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"], **environ}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd="/"
    ).stdout


# What somebody else put there.


def make_link(path, target):
    path.symlink_to(target)


def make_hard_link(path, target):
    path.hardlink_to(target)


def make_pipe(path, target):
    os.mkfifo(path)


def make_folder(path, target):
    path.mkdir()


def make_strangers(path, target):
    path.write_text("")
    os.chown(path, STRANGER, STRANGER)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (make_link, "is a link"),
        (make_hard_link, "has another name as well"),
        (make_pipe, "is no regular file"),
        (make_folder, "is no regular file"),
        pytest.param(make_strangers, f"belongs to uid {STRANGER}", marks=needs_root),
    ],
)
def test_a_lock_file_that_somebody_else_put_there_is_refused_and_its_target_untouched(tmp_path, make, why):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "kv/rank0").mkdir(parents=True)
    make(tmp_path / "kv/rank0/engine.lock", target)
    before = os.listdir("/proc/self/fd")
    for call in (check, hold):
        said = refusal(call, tmp_path / "kv")
        assert f"path: {tmp_path}/kv/rank0/engine.lock {why}" in said
        assert "remove it, or write another path" in said
    assert target.read_text() == "precious"
    assert os.listdir("/proc/self/fd") == before


def test_a_dangling_link_in_place_of_the_lock_makes_no_file(tmp_path):
    (tmp_path / "kv/rank0").mkdir(parents=True)
    (tmp_path / "kv/rank0/engine.lock").symlink_to(tmp_path / "made")
    assert "is a link" in refusal(hold, tmp_path / "kv")
    assert not (tmp_path / "made").exists()


def test_a_link_in_place_of_a_ranks_folder_is_refused(tmp_path):
    (tmp_path / "kv").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "kv/rank0").symlink_to(tmp_path / "home")
    for call in (check, hold):
        said = refusal(call, tmp_path / "kv")
        assert (
            f"kv/rank0 is a link of uid {os.geteuid()} to {tmp_path}/home; write the directory itself" in said
        )
    assert list((tmp_path / "home").iterdir()) == []


@needs_root
def test_a_link_on_the_way_is_followed_if_it_is_ours_and_refused_if_it_is_a_strangers(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "kv").symlink_to(tmp_path / "disk")
    check(tmp_path / "kv")
    hold(tmp_path / "kv").release()
    assert (tmp_path / "disk/rank0/engine.lock").exists()
    os.lchown(tmp_path / "kv", STRANGER, STRANGER)
    for call in (check, hold):
        assert f"is a link of uid {STRANGER} to {tmp_path}/disk" in refusal(call, tmp_path / "kv")


@needs_root
def test_a_ranks_folder_of_a_stranger_is_refused_with_what_to_run(tmp_path):
    (tmp_path / "kv/rank0").mkdir(parents=True)
    os.chown(tmp_path / "kv/rank0", STRANGER, STRANGER)
    for call in (check, hold):
        said = refusal(call, tmp_path / "kv")
        assert f"kv/rank0 belongs to uid {STRANGER}" in said
        assert "run `chown 0` on it" in said


@needs_root
@pytest.mark.parametrize(
    ("owner", "group", "mode", "why"),
    [
        (STRANGER, STRANGER, 0o755, f"belongs to uid {STRANGER}"),
        (STRANGER, STRANGER, 0o777, f"belongs to uid {STRANGER} and everybody may write to it"),
        (STRANGER, os.getegid(), 0o2775, ""),
        (STRANGER, os.getegid(), 0o2777, f"belongs to uid {STRANGER} and everybody may write to it"),
        (STRANGER, os.getegid(), 0o2755, f"belongs to uid {STRANGER}"),
        (os.geteuid(), STRANGER, 0o777, ""),
    ],
)
def test_a_folder_is_trusted_by_owner_group_and_mode(tmp_path, owner, group, mode, why):
    os.chown(tmp_path, owner, group)
    tmp_path.chmod(mode)
    assert why_strange_folder(tmp_path.stat(), may_share=True) == why


@needs_root
def test_the_folder_of_a_rank_is_not_shared_with_a_group(tmp_path):
    os.chown(tmp_path, STRANGER, os.getegid())
    tmp_path.chmod(0o770)
    assert why_strange_folder(tmp_path.stat()) == f"belongs to uid {STRANGER}"


@needs_root
def test_a_directory_of_a_stranger_may_hold_a_folder_of_ours(tmp_path):
    # As a volume that is mounted into a container, whose root is another user's outside.
    (tmp_path / "kv").mkdir()
    os.chown(tmp_path / "kv", STRANGER, STRANGER)
    check(tmp_path / "kv")
    hold(tmp_path / "kv").release()


@needs_root
def test_a_volume_that_everybody_may_write_to_will_do_but_not_for_a_ranks_folder():
    # Not below pytest's folders: they are private.
    place = Path("/tmp") / f"kvbm-test-{os.getpid()}"
    place.mkdir()
    place.chmod(0o777)
    code = (
        f"place = LocalDirectory({str(place / 'kv')!r}, 'gds')\n"
        "try:\n    place.check(0, 'taken')\n    place.hold(0).release()\n    print('held')\n"
        "except TierOpenError as error:\n    print(error)\n"
    )
    try:
        assert as_user(STRANGER, code) == "held\n"
        os.chown(place / "kv/rank0", 0, 0)
        (place / "kv/rank0").chmod(0o777)
        assert "kv/rank0 is root's and everybody may write to it" in as_user(STRANGER, code)
    finally:
        subprocess.run(["rm", "-rf", place], check=True)


def test_a_folder_that_others_may_read_is_made_private(tmp_path):
    (tmp_path / "kv/rank0").mkdir(parents=True)
    (tmp_path / "kv/rank0").chmod(0o777)
    check(tmp_path / "kv")
    assert stat.S_IMODE((tmp_path / "kv/rank0").stat().st_mode) == 0o777, "it changes nothing"
    hold(tmp_path / "kv").release()
    assert stat.S_IMODE((tmp_path / "kv/rank0").stat().st_mode) == 0o700


# What an error of the operating system says.


def test_a_dangling_link_and_a_circle_of_links_are_named(tmp_path):
    (tmp_path / "kv").symlink_to(tmp_path / "gone")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in (tmp_path / "kv", tmp_path / "kv/below"):
        for call in (check, hold):
            assert f"kv leads to {tmp_path}/gone, which is not there: make it, or" in refusal(call, path)
    for call in (check, hold):
        assert "link" in refusal(call, tmp_path / "a")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("call", [check, hold])
def test_a_path_that_is_too_long_a_file_or_not_for_writing(tmp_path, call):
    (tmp_path / "file").write_text("")
    assert "write a shorter path (255 bytes" in refusal(call, tmp_path / ("x" * 300))
    assert "a part of it is a file" in refusal(call, tmp_path / "file/below")
    with mounted(tmp_path / "disk", "ro"):
        assert "mounted read-only: mount it for writing" in refusal(call, tmp_path / "disk/kv")


@pytest.mark.parametrize("call", [check, hold])
def test_a_file_system_without_room_for_a_folder_says_so(tmp_path, call):
    with mounted(tmp_path / "disk", "size=64k,nr_inodes=2"):
        (tmp_path / "disk/full").write_bytes(b"")
        said = refusal(call, tmp_path / "disk")
    assert "No space left on device" in said
    assert "the file system is full (`df -h`, `df -i`): free room there" in said


@needs_root
@pytest.mark.parametrize("verb", ["place.check(0, 'taken')", "place.hold(0)"])
def test_a_folder_without_permission_names_the_user(verb):
    code = (
        f"place = LocalDirectory('/root/kvbm-test', 'gds')\ntry: {verb}\nexcept TierOpenError as e: print(e)"
    )
    said = as_user(STRANGER, code)
    assert f"cannot be used by uid {STRANGER}" in said
    assert "Permission denied" in said
    assert "let that user write there (`chown` it), or write a directory on a local disk" in said


def test_a_process_with_too_many_open_files_is_told_of_ulimit(tmp_path):
    code = (
        "import os, resource\nfrom kvbm_core.localdir import LocalDirectory\n"
        "from kvbm_core.errors import TierOpenError\nresource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        f"place = LocalDirectory({str(tmp_path / 'kv')!r}, 'gds')\n"
        "try:\n    while True: os.open('/', os.O_RDONLY)\nexcept OSError: pass\n"
        "try: place.hold(0)\nexcept TierOpenError as e: print(e)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Too many open files" in said
    assert "has as many files open as it may (40): raise the limit with `ulimit -n`" in said
    assert "local disk" not in said


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOMEM, "free some, or give the container more"),
        (errno.ENFILE, "fs.file-max"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "dmesg"),
        (errno.ESTALE, "mount it again"),
        (errno.EINVAL, "write a directory on a local disk"),
    ],
)
def test_an_error_that_cannot_be_made_here_has_a_remedy_of_its_own(code, words):
    assert words in remedy(OSError(code, os.strerror(code)), Path("/x"))


def test_a_variable_in_a_path_is_refused():
    for path in ("$HOME/kvbm", "/nvme/${USER}"):
        with pytest.raises(TierOpenError, match="has a variable, and none is replaced here; write"):
            LocalDirectory(path, "gds")
    with pytest.raises(TierOpenError, match="zero byte"):
        LocalDirectory("/a\0b", "gds")


@needs_root
def test_a_home_that_nobody_knows_is_refused():
    code = "try: LocalDirectory('~/kvbm', 'gds')\nexcept TierOpenError as e: print(e)"
    said = as_user(STRANGER, code)
    assert said.startswith(f"path: '~/kvbm' cannot be completed for uid {STRANGER} (")
    assert "write the whole path, like /nvme/kvbm, or set HOME" in said
    known = as_user(STRANGER, "print(LocalDirectory('~/kvbm', 'gds'))", HOME="/h")
    assert known == "<LocalDirectory /h/kvbm of gds>\n"


# What is deleted.


def test_a_folder_that_is_no_ranks_is_left_alone(tmp_path, caplog):
    names = ["rank²", "rank01", "rank-1", "rankx", "rank", "rank٣"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "index").write_text("x")
    place = LocalDirectory(str(tmp_path), "gds")
    place.check(0, "taken")
    place.drop_other_ranks(0, 1, logging.getLogger("kvbm_core"))
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert all((tmp_path / name / "index").exists() for name in names)
    assert caplog.records == []


def test_of_a_rank_that_is_gone_only_what_backends_make_is_deleted(tmp_path, caplog):
    rank2, rank3, target = tmp_path / "kv/rank2", tmp_path / "kv/rank3", tmp_path / "target"
    for folder in (rank2, rank3, target):
        folder.mkdir(parents=True)
    (target / "index").write_text("precious")
    for name in ("index", "slab.000", "probe", "data.mdb", "lock.mdb"):
        (rank2 / name).write_bytes(b"x")
        (rank3 / name).write_bytes(b"x")
    (rank3 / "thesis.tex").write_text("precious")
    (tmp_path / "kv/rank4").symlink_to(target)
    place = LocalDirectory(str(tmp_path / "kv"), "gds")
    place.drop_other_ranks(0, 1, logging.getLogger("kvbm_core"))
    assert not rank2.exists()
    assert os.listdir(rank3) == ["thesis.tex"]
    assert (target / "index").read_text() == "precious"
    assert len(caplog.records) == 2


def test_what_another_backend_left_is_deleted_with_one_line(tmp_path, caplog):
    rank0 = tmp_path / "kv/rank0"
    hold(tmp_path / "kv", "lmdb").release()
    for name in ("data.mdb", "lock.mdb", "notes.txt", "slab.x"):
        (rank0 / name).write_bytes(b"x")
    hold(tmp_path / "kv", "other").release()
    hold(tmp_path / "kv", "lmdb").release()
    assert caplog.records == []
    hold(tmp_path / "kv", "gds").release()
    assert sorted(os.listdir(rank0)) == ["engine.lock", "notes.txt", "slab.x"]
    [line] = [record.getMessage() for record in caplog.records]
    assert line == f"{rank0}: backend lmdb was here before gds; dropping its files (data.mdb, lock.mdb)"
    (rank0 / "slab.000").write_bytes(b"x")
    hold(tmp_path / "kv", "lmdb").release()
    assert not (rank0 / "slab.000").exists()


# Who holds it.

ENGINE = """
import ctypes, os, sys, time
from kvbm_core.localdir import LocalDirectory
held = LocalDirectory(sys.argv[1], "gds").hold(0)
child = os.fork() if sys.argv[2] == "python" else ctypes.CDLL(None).fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def killed_engine(path, how):
    """An engine that forked a child and was killed; gives its pid and the child's."""
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(path), how], stdout=subprocess.PIPE, text=True
    )
    child = int(engine.stdout.readline())
    try:
        with pytest.raises(TierOpenError, match=rf"in use by another engine \(pid {engine.pid}\)"):
            hold(path)
        engine.send_signal(signal.SIGKILL)
        yield engine, child
    finally:
        os.kill(child, signal.SIGKILL)
        engine.wait()
        engine.stdout.close()


def test_a_forked_child_does_not_keep_the_lock_of_an_engine_that_was_killed(tmp_path):
    with killed_engine(tmp_path / "kv", "python") as (engine, _):
        engine.wait()
        hold(tmp_path / "kv").release()


def test_a_child_that_was_forked_unseen_is_named_with_what_to_run(tmp_path):
    with killed_engine(tmp_path / "kv", "c") as (engine, child):
        # Not waited for: a dead process that its parent has not collected is still listed.
        give_up_s = time.monotonic() + 10
        while "Z" not in Path(f"/proc/{engine.pid}/stat").read_text().rpartition(")")[2]:
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        for call in (hold, check):
            said = refusal(call, tmp_path / "kv")
            assert (
                f"its engine (pid {engine.pid}) is dead, but what it left holds the lock: pid {child} ("
                in said
            )
            assert f"run `kill {child}`" in said
    hold(tmp_path / "kv").release()


def test_a_fork_takes_nothing_from_the_engine_that_forked(tmp_path):
    held = hold(tmp_path / "kv")
    child = os.fork()
    if child == 0:
        os._exit(0 if len(localdir.who_holds.__globals__["_held"]) == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert "in use by another engine" in refusal(hold, tmp_path / "kv")
    held.release()
    hold(tmp_path / "kv").release()


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("nbytes", [0, 1, 1023, 1024, 70_000, 54 << 20, 12_345_678_901, 800 * GIB, 8 * GIB])
def test_a_size_is_written_as_it_is_read_and_rounded_to_the_safe_side(nbytes, up):
    written = parse_size(size_text(nbytes, up=up))
    assert written >= nbytes if up else written <= nbytes
    assert abs(written - nbytes) <= nbytes / 100
    assert size_text(8 * GIB, up=up) == "8GiB"


def test_a_file_that_others_may_read_is_made_private_when_it_is_opened_for_writing(tmp_path):
    held = localdir.HeldFolder(tmp_path / "rank0", "gds")
    (tmp_path / "rank0/index").write_bytes(b"x")
    modes = []
    for flags in (os.O_RDONLY, os.O_RDWR):
        (tmp_path / "rank0/index").chmod(0o664)
        os.close(held.open("index", flags))
        modes.append(stat.S_IMODE((tmp_path / "rank0/index").stat().st_mode))
    assert modes == [0o664, 0o600]
    held.release()
