"""A process that stores objects until it is killed: for backends that say they are durable."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvbm_core.testing._rig import PATIENCE_S, Rig
from kvbm_core.tier import Backend, Op, Outcome, Transfer

__all__ = ["KilledChild"]


class KilledChild:
    """Stores numbered objects in a process of its own, and dies by SIGKILL in the midst of it.

    Args:
        backend: The backend's name; a `Backend` itself is used by a forked process.
        settings: As an operator would write them.
        max_bytes: Length of the longest object; see `TierContext.max_bytes`.
    """

    def __init__(self, backend: str | Backend, settings: Mapping[str, Any], max_bytes: int) -> None:
        self._backend = backend
        self._settings = settings
        self._max_bytes = max_bytes

    def acknowledged(
        self, after: int, *, batch: int = 1, meanwhile: Callable[[], object] | None = None
    ) -> list[int]:
        """Start it, and have it killed when `after` objects are stored.

        Args:
            after: It dies as soon as `Tier.poll` has said so, before any other call.
            batch: Objects that it has in flight at once, also when it dies.
            meanwhile: Called again and again until then.

        Returns:
            The numbers of the objects of which the tier had said that they are stored.
        """
        job = {"settings": dict(self._settings), "max_bytes": self._max_bytes, "after": after, "batch": batch}
        with tempfile.TemporaryFile() as said:
            process = self._fork(said, job) if isinstance(self._backend, Backend) else self._spawn(said, job)
            give_up_s = time.monotonic() + PATIENCE_S
            try:
                while process.poll() is None:
                    assert time.monotonic() < give_up_s, "the child stores nothing"
                    if meanwhile:
                        meanwhile()
                    time.sleep(0.001)
            finally:
                process.kill()
                process.wait()
            assert _lines(said) >= after, "the child ended by itself; see the standard error"
            said.seek(0)
            return [int(line) for line in said.read().split(b"\n")[:-1]]

    def _spawn(self, said: Any, job: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        main = "from kvbm_core.testing._child import main; main()"
        command = [sys.executable, "-c", main, json.dumps({"backend": self._backend, **job})]
        return subprocess.Popen(command, stdout=said, stdin=subprocess.DEVNULL, env=environment)

    def _fork(self, said: Any, job: Mapping[str, Any]) -> _Forked:
        pid = os.fork()
        if pid == 0:
            try:
                _live(self._backend, said.fileno(), **job)
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


def _live(
    backend: str | Backend, out: int, *, settings: Mapping[str, Any], max_bytes: int, after: int, batch: int
) -> None:
    """Store objects until enough are said to be stored, and die by that."""
    rig = Rig(backend, lambda folder: settings, Path(), max_bytes)
    tier = rig.open()
    numbers = itertools.count()
    flying: dict[int, Transfer] = {}
    said = 0
    while True:
        new = {
            number: rig.transfer(Op.STORE, number, rig.memory(number))
            for number in itertools.islice(numbers, batch - len(flying))
        }
        flying |= new
        tier.submit(list(new.values()))
        stored = {completion.ticket for completion in tier.poll() if completion.outcome is Outcome.DONE}
        ended = [number for number, transfer in flying.items() if transfer.ticket in stored]
        os.write(out, "".join(f"{number}\n" for number in ended).encode())
        said += len(ended)
        if said >= after:
            os.kill(os.getpid(), signal.SIGKILL)
        for number in ended:
            del flying[number]
        time.sleep(0.0002)


def main() -> None:
    """Be the child: the job is the command line's JSON. Answers go to the standard output."""
    job = json.loads(sys.argv[1])
    out = os.dup(1)
    os.dup2(2, 1)  # Libraries print there.
    threading.current_thread().name = "kvbm-child"
    _live(job.pop("backend"), out, **job)
