"""Installs the backend of a stranger, as a stranger would."""

import importlib.util
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "kvbm_toy"


def install_toy(folder):
    """Install kvbm-toy into a folder, with its metadata; give the folder, for ``sys.path``.

    Where hatchling is installed no network is needed; elsewhere pip fetches it to build with.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--target", str(folder)]
    if importlib.util.find_spec("hatchling"):
        command += ["--no-index", "--no-build-isolation"]
    done = subprocess.run([*command, str(SOURCE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(folder)
