"""Installs the packages of strangers, as strangers would."""

import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "kvbm_toy"


def install(folder, *names):
    """Install distributions into a folder, with their metadata; give the folder, for ``sys.path``.

    Where hatchling is installed no network is needed; elsewhere pip fetches it to build with. What they need
    beside the core is in the extra ``dev``.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--target", str(folder)]
    if importlib.util.find_spec("hatchling"):
        command += ["--no-index", "--no-build-isolation"]
    command += [str(HERE / name) for name in names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(folder)


def install_toy(folder):
    """Install kvbm-toy into a folder; give the folder."""
    return install(folder, "kvbm_toy")
