"""The tutorial for those who come from KVBM: every command of it, in one shell, in its order."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "tutorial" / "from-kvbm.md"
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATIENCE_S = 900


def blocks(info):
    return [text for found, text in BLOCK.findall(PAGE.read_text()) if found == info]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.early
def test_every_command_of_the_tutorial(tmp_path):
    for name in ("Makefile", "tools", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = Path(sys.prefix)
    (tmp_path / ".venv").symlink_to(environment)
    commands = blocks("console run")
    # The set-up is a no-op where the environment is: `tools/setup.py` looks beside itself for it.
    assert commands[0].splitlines()[0] == "make setup-demo"
    assert all("console" not in info or info == "console run" for info, _ in BLOCK.findall(PAGE.read_text()))
    script = "\n".join(f'{text}\necho "== {number}: $?"' for number, text in enumerate(commands))
    # Another port, because 8000 may be somebody's.
    script = script.replace(":8000", f":{(port := free_port())}").replace("--port 8000", f"--port {port}")
    shell = subprocess.Popen(
        [shutil.which("bash"), "-c", script], cwd=tmp_path, start_new_session=True,
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = shell.communicate(timeout=PATIENCE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    log = (tmp_path / "server.log").read_text()[-3000:] if (tmp_path / "server.log").exists() else ""
    ended = dict(re.findall(r"^== (\d+): (\d+)$", output, re.MULTILINE))
    assert ended == {str(number): "0" for number in range(len(commands))}, output + log
    for shown in blocks("text shown"):
        for line in shown.splitlines():
            assert line in output.splitlines(), output + log
    # What the prose says of the log's second lines.
    prose = PAGE.read_text()
    rooms = re.findall(r"tier (\w+) is open: (\S+) for blocks of (\d+) bytes", output)
    assert len(rooms) == 2
    for tier, room, nbytes in rooms:
        assert f"tier {tier} is open: {room} for blocks of {nbytes} bytes" in prose or (
            f"{room} in tier `{tier}`" in prose
        ), rooms
    assert not (tmp_path / "kvbm-disk").exists()
