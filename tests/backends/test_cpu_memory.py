"""What the host-memory tier may take: the limits of a real cgroup, and the early check."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvbm_core.config import ByteSize
from kvbm_core.errors import TierOpenError
from kvbm_core.log_limit import TierLog
from kvbm_cpu import CpuConfig, kvbm_backends
from kvbm_cpu._memory import in_turn

CODE = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
from kvbm_core.config import ByteSize
from kvbm_core.errors import TierOpenError
from kvbm_cpu import CpuConfig, kvbm_backends
for mib in (16, 256):
    try:
        kvbm_backends()[0].check(CpuConfig(capacity=ByteSize(mib << 20)))
        print("fits")
    except TierOpenError as error:
        print(error)
"""


def test_a_limit_of_cgroup_v1_is_refused_early_by_name():
    own = next(
        (
            line.split(":", 2)[2]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if ":memory:" in line
        ),
        None,
    )
    group = Path(f"/sys/fs/cgroup/memory{own}/kvbm-test-{os.getpid()}")
    if own is None or not os.access(group.parent, os.W_OK):
        pytest.skip("CGROUP V1 IS NOT TESTED: it is not mounted for writing here")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(128 << 20))
        said = subprocess.run(
            [sys.executable, "-c", CODE, str(group)], capture_output=True, text=True, check=True
        )
    finally:
        group.rmdir()
    fits, refused = said.stdout.splitlines()
    assert fits == "fits"
    assert "capacity: all ranks together take 256MiB, but only " in refused
    assert f"(the memory limit of the cgroup {group})" in refused


def test_more_than_the_machine_has_is_refused_before_the_engine_starts():
    with pytest.raises(TierOpenError, match=r"all ranks together take 800TiB, but only .* of memory"):
        kvbm_backends()[0].check(CpuConfig(capacity=ByteSize(800 << 40)))


RANK = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
from kvbm_core.config import ByteSize
from kvbm_core.errors import TierOpenError
from kvbm_core.tier import TierContext
from kvbm_cpu import CpuConfig, CpuTier
context = TierContext(b"n" * 16, 1 << 20, rank=int(sys.argv[2]), world_size=2)
print("ready", flush=True)
sys.stdin.readline()
try:
    tier = CpuTier(CpuConfig(capacity=ByteSize(512 << 20)), context)
except TierOpenError as error:
    print(error, flush=True)
else:
    print("open", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def group():
    """A memory cgroup of this test's own, of either version."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    v1 = next((path for _, names, path in lines if names == "memory"), None)
    top = Path("/sys/fs/cgroup") if v1 is None else Path(f"/sys/fs/cgroup/memory{v1}")
    folder = top / f"kvbm-test-{os.getpid()}"
    if not os.access(top, os.W_OK):
        pytest.skip("MEMORY LIMITS ARE NOT TESTED: no cgroup may be made here")
    folder.mkdir()
    limit = folder / ("memory.max" if v1 is None else "memory.limit_in_bytes")
    if not limit.exists():
        folder.rmdir()
        pytest.skip("MEMORY LIMITS ARE NOT TESTED: there is no memory controller here")
    yield folder, limit
    folder.rmdir()


def test_ranks_that_open_at_the_same_moment_see_each_others_share(group):
    """Each fits alone and both do not: the second is told, and the kernel kills nobody."""
    folder, limit = group
    limit.write_text(str(450 << 20))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["ready\n", "ready\n"]
        for rank in ranks:
            rank.stdin.write("go\n")
            rank.stdin.flush()
        said = sorted(rank.stdout.readline() for rank in ranks)
    finally:
        for rank in ranks:
            rank.communicate()
    assert said[1] == "open\n"
    assert said[0].startswith("capacity: this rank's share is 256MiB, but only ")
    assert str(folder) in said[0]
    assert [rank.returncode for rank in ranks] == [0, 0]


def test_a_rank_that_is_killed_while_it_takes_memory_holds_up_nobody(monkeypatch):
    name = f"\0kvbm-test-{os.getpid()}"
    code = (
        "import time\nfrom kvbm_core.log_limit import TierLog\nfrom kvbm_cpu._memory import in_turn\n"
        f"with in_turn(TierLog('kvbm_cpu'), {name!r}):\n    print('in', flush=True)\n    time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    monkeypatch.setattr("kvbm_cpu._memory._LOOK_S", 0.01)
    entered = threading.Event()

    def enter():
        with in_turn(TierLog("kvbm_cpu"), name):
            entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not entered.wait(0.2)
    other.kill()
    other.communicate()
    waiting.join(timeout=60)
    assert entered.is_set()
