"""A process that stores blocks until it is killed: for backends that say they are durable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvbm_core.testing._rig import PATIENCE_S, Rig
from kvbm_core.tier import Backend

__all__ = ["KilledChild"]

_MOST_BLOCKS: Final = 4096


class KilledChild:
    """Stores numbered blocks in a process of its own, and dies by SIGKILL in the midst of it.

    Args:
        backend: The backend's name; a `Backend` itself is used by a forked process.
        settings: As an operator would write them.
        block_bytes: Of every region.
    """

    def __init__(self, backend: str | Backend, settings: Mapping[str, Any], block_bytes: int) -> None:
        self._backend = backend
        self._settings = settings
        self._block_bytes = block_bytes

    def acknowledged(self, after: int) -> list[int]:
        """Start it, kill it when it has said that `after` blocks are stored.

        Returns:
            The numbers of the blocks that it had said are stored.
        """
        with tempfile.TemporaryFile() as said:
            process = self._fork(said) if isinstance(self._backend, Backend) else self._spawn(said)
            give_up_s = time.monotonic() + PATIENCE_S
            try:
                while _lines(said) < after:
                    assert process.poll() is None, "the child ended by itself; see the standard error"
                    assert time.monotonic() < give_up_s, "the child stores nothing"
                    time.sleep(0.001)
            finally:
                process.kill()
                process.wait()
            said.seek(0)
            return [int(line) for line in said.read().split(b"\n")[:-1]]

    def _spawn(self, said: Any) -> subprocess.Popen[bytes]:
        job = json.dumps(
            {"backend": self._backend, "settings": dict(self._settings), "nbytes": self._block_bytes}
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", "from kvbm_core.testing._child import main; main()", job]
        return subprocess.Popen(command, stdout=said, stdin=subprocess.DEVNULL, env=environment)

    def _fork(self, said: Any) -> _Forked:
        pid = os.fork()
        if pid == 0:
            try:
                _live(self._backend, self._settings, self._block_bytes, said.fileno())
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(1)
        return _Forked(pid)


class _Forked:
    """What is used of `subprocess.Popen`, for a fork."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = False

    def poll(self) -> int | None:
        if not self._ended:
            self._ended = os.waitpid(self._pid, os.WNOHANG)[0] != 0
        return 1 if self._ended else None

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        if not self._ended:
            os.waitpid(self._pid, 0)
            self._ended = True


def _lines(said: Any) -> int:
    return os.pread(said.fileno(), 1 << 20, 0).count(b"\n")


def _live(backend: str | Backend, settings: Mapping[str, Any], nbytes: int, out: int) -> None:
    """Store one block after the other, as many as fit, and wait for the end."""
    rig = Rig(backend, lambda folder: settings, Path(), nbytes)
    tier = rig.open()
    capacity = tier.capabilities.capacity_blocks
    for number in range(_MOST_BLOCKS if capacity is None else capacity):
        rig.must_store(tier, number)
        os.write(out, f"{number}\n".encode())
    while True:
        time.sleep(1)


def main() -> None:
    """Be the child: the job is the command line's JSON. Answers go to the standard output."""
    job = json.loads(sys.argv[1])
    out = os.dup(1)
    os.dup2(2, 1)  # Libraries print there.
    threading.current_thread().name = "kvbm-child"
    _live(job["backend"], job["settings"], job["nbytes"], out)
