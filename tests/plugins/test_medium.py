"""A disk that fails under a running engine: the process stays, the tier comes back, every answer is right.

Injected between the C library and the kernel (`faulty_medium.c`), so that no part of ours knows of it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.soak]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def faulty_medium(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: a medium that fails cannot be made")
    library = tmp_path_factory.mktemp("medium") / "faulty_medium.so"
    source = HERE / "faulty_medium.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("backend", ["lmdb", "gds", "remote"])
def test_the_engine_outlives_its_disk(backend, llama, faulty_medium, tmp_path):
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
    command = [sys.executable, str(HERE / "medium_child.py"), str(llama), backend, str(folder), str(switch)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-6000:]
    assert child.stdout.count("well again") == 11
