"""What the host-memory tier may take: the limits of a real cgroup, and the early check."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvbm_core.config import ByteSize
from kvbm_core.errors import TierOpenError
from kvbm_cpu import CpuConfig, kvbm_backends

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
