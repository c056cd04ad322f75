"""Whatever happened to a durable tier's files: no wrong byte, no dead process, and it stores again.

Replay one with ``python tests/backends/damage.py lmdb FOLDER SEED 1``; `KVBM_DAMAGES` says how many.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import damage
import lmdb
import pytest

from kvbm_core import KvbmError
from kvbm_lmdb._environment import DAMAGE

CASES = int(os.environ.get("KVBM_DAMAGES", "30"))
SOAK_CASES = 500
SEED = int(os.environ.get("KVBM_SEED", "0"))


@pytest.mark.parametrize("cases", [CASES, pytest.param(SOAK_CASES, marks=pytest.mark.soak)])
@pytest.mark.parametrize("backend", damage.SETTINGS)
def test_a_damaged_medium_costs_hits_and_nothing_else(backend, cases, tmp_path):
    command = [sys.executable, damage.__file__, backend, str(tmp_path), str(SEED), str(cases)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in child.stdout.splitlines()]
    results = [row for row in rows if "damage" in row]
    assert child.returncode == 0, (rows[-1], child.stderr[-2000:])
    assert [row["seed"] for row in results] == list(range(SEED, SEED + cases))
    served = [row for row in results if not row["refused"]]
    assert not [row for row in results if row["wrong"]]
    # It works, at once and after a restart.
    assert not [row for row in served if row["new first"] != len(damage.NEW)]
    assert not [row for row in served if row["new second"] != len(damage.NEW)]
    # A restart loses nothing that was there before it.
    assert not [row for row in served if row["old second"] < row["old first"]]
    # It is damage that was done, and not everything is lost by it.
    assert any(row["old"] < len(damage.OLD) for row in served)
    assert any(row["old"] > 0 for row in served)
    # Refused is only what the tier has not made, with its place and a remedy.
    for row in results:
        if row["refused"]:
            assert "directory" in row["damage"] or "link" in row["damage"], row
            assert str(tmp_path) in row["refused"], row
            assert len(row["refused"].split()) > 8, row


def test_what_lmdb_calls_a_bad_transaction_is_damage(tmp_path):
    """Every store failed, and the disk was blamed, until somebody deleted the file.

    A noise page did that to files of format 1 (seed 192). The error is LMDB's own here, of a transaction in
    which a call has failed before; the tier makes no such call.
    """
    env = lmdb.open(str(tmp_path), map_size=1 << 16)
    txn = env.begin(write=True)
    with contextlib.suppress(lmdb.MapFullError):
        txn.put(b"long", bytes(1 << 20))
    with pytest.raises(DAMAGE, match="MDB_BAD_TXN"):
        txn.put(b"short", b"")
    txn.abort()
    env.close()


@pytest.mark.parametrize("backend", damage.SETTINGS)
def test_a_file_that_a_link_leads_to_is_never_written(backend, tmp_path):
    """In a directory that somebody else made first, each name may be a link to somebody's file."""
    sound, case = tmp_path / "sound", tmp_path / "case"
    stack, device = damage.open_stack(backend, sound)
    with stack:
        damage.store(stack, device, damage.OLD)
    victim = tmp_path / "victim"
    text = b"what somebody has written\n" * 4096
    for name in sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_file()):
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(sound, case)
        victim.write_bytes(text)
        (case / name).unlink()
        (case / name).symlink_to(victim)
        with contextlib.suppress(KvbmError):
            stack, device = damage.open_stack(backend, case)
            with stack:
                damage.store(stack, device, damage.NEW)
                assert damage.load(stack, device, damage.OLD)[1] == 0
        assert victim.read_bytes() == text, name
