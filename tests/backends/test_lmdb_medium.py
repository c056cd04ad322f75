"""A disk that fails under LMDB, and is well again: nothing wrong, few words, and no restart.

The faults are injected between the C library and the kernel, in the engine and in the keeper (see
`tests/plugins/faulty_medium.c`). Run by itself this file is the process to which that happens.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import damage
import pytest

SOURCE = Path(__file__).parents[1] / "plugins" / "faulty_medium.c"
PHASES = {"R": range(24, 27), "W": range(27, 30), "E": range(30, 33), "S": range(33, 36)}
"""What fails (reads, writes, both, for want of space), and the blocks stored meanwhile."""
PATIENCE_S = 90.0
MOST_LINES = 8
"""Of the log, for each fault and what follows it."""


@pytest.fixture(scope="module")
def faulty_medium(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: a medium that fails cannot be made")
    library = tmp_path_factory.mktemp("medium") / "faulty_medium.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def test_lmdb_comes_back_when_its_disk_does(faulty_medium, tmp_path):
    folder, switch = tmp_path / "medium", tmp_path / "switch"
    folder.mkdir()
    switch.write_bytes(b"-")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "LD_PRELOAD": str(faulty_medium),
        "KVBM_FAULTY_FOLDER": str(folder),
        "KVBM_FAULTY_SWITCH": str(switch),
    }
    command = [sys.executable, __file__, str(folder), str(switch)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    rows = {row["phase"]: row for row in map(json.loads, child.stdout.splitlines())}
    assert list(rows) == list(PHASES)
    for phase, row in rows.items():
        assert row["wrong"] == 0, row
        assert row["well"], (row, child.stderr[-4000:])
        assert 1 <= row["lines"] <= MOST_LINES, (row, child.stderr[-4000:])
        # The fault was met: where reads fail nothing comes, where writes fail nothing new is kept.
        assert row["came"] == (0 if phase in "RE" else len(damage.OLD)), row
        assert row["kept"] == 0, row
    assert not list(folder.rglob("*.damaged")), "a disk that fails is no damaged file"


class _Lines(logging.Handler):
    """Counts what an operator would see."""

    count = 0

    def emit(self, record):
        self.count += record.levelno >= logging.WARNING


def _turn(switch, byte):
    # Where it is: it is mapped, and must never be empty.
    with open(switch, "r+b") as file:
        file.write(byte.encode())


def main(folder, switch):
    lines = _Lines()
    logging.basicConfig(level=logging.INFO)
    logging.getLogger().addHandler(lines)
    stack, device = damage.open_stack("lmdb", Path(folder))
    with stack:
        damage.store(stack, device, damage.OLD)
        for phase, new in PHASES.items():
            lines.count, everything = 0, range(new.stop)
            _turn(switch, phase)
            damage.store(stack, device, new)
            came, wrong = damage.load(stack, device, damage.OLD)
            kept, wrong_new = damage.load(stack, device, new)
            _turn(switch, "-")
            give_up_s, count = time.monotonic() + PATIENCE_S, 0
            while count < len(everything) and time.monotonic() < give_up_s:
                damage.store(stack, device, everything)
                count, wrong_after = damage.load(stack, device, everything)
                wrong += wrong_after
                time.sleep(0.1)
            row = {"phase": phase, "came": came, "kept": kept, "wrong": wrong + wrong_new}
            print(json.dumps({**row, "lines": lines.count, "well": count == len(everything)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
