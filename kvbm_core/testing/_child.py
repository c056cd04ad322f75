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

from kvbm_core.testing._rig import PATIENCE_S, Rig, key_of
from kvbm_core.tier import Backend, Op, Outcome, Transfer

__all__ = ["IdleChild", "KilledChild"]


class _Child:
    """Uses a tier in a process of its own.

    Args:
        backend: The backend's name; a `Backend` itself is used by a forked process.
        settings: As an operator would write them.
        max_bytes: Length of the longest object; see `TierContext.max_bytes`.
    """

    def __init__(self, backend: str | Backend, settings: Mapping[str, Any], max_bytes: int) -> None:
        self._backend = backend
        self._settings = settings
        self._max_bytes = max_bytes

    def _start(self, said: Any, **job: Any) -> subprocess.Popen[bytes] | _Forked:
        job |= {"settings": dict(self._settings), "max_bytes": self._max_bytes}
        if isinstance(self._backend, Backend):
            return self._fork(said, job)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        main = "from kvbm_core.testing._child import main; main()"
        command = [sys.executable, "-c", main, json.dumps({"backend": self._backend, **job})]
        return subprocess.Popen(command, stdout=said, stdin=subprocess.DEVNULL, env=environment)

    def _fork(self, said: Any, job: Mapping[str, Any]) -> _Forked:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _live(self._backend, said.fileno(), **job)
                threading._shutdown()  # type: ignore[attr-defined]  # As the interpreter does at its end.
                status = 0
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(status)
        return _Forked(pid)


class KilledChild(_Child):
    """Stores numbered objects in a process of its own, and dies by SIGKILL in the midst of it.

    Args:
        backend: The backend's name; a `Backend` itself is used by a forked process.
        settings: As an operator would write them.
        max_bytes: Length of the longest object; see `TierContext.max_bytes`.
    """

    def acknowledged(
        self,
        after: int,
        *,
        batch: int = 1,
        keep: int | None = None,
        longest: bool = False,
        meanwhile: Callable[[], object] | None = None,
    ) -> list[int]:
        """Start it, and have it killed when `after` objects are stored.

        Args:
            after: It dies as soon as `Tier.poll` has said so, before any other call.
            batch: Objects that it has in flight at once, also when it dies.
            keep: It discards the oldest objects as soon as it has stored more than so many. None: none.
            longest: Have all objects as long as the longest. Else they are of many lengths.
            meanwhile: Called again and again until then.

        Returns:
            The numbers of the objects of which the tier had said that they are stored.
        """
        with tempfile.TemporaryFile() as said:
            process = self._start(said, after=after, batch=batch, keep=keep, longest=longest)
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


class IdleChild(_Child):
    """Opens a tier in a process of its own, stores an object, and ends without closing it."""

    def must_end(self) -> None:
        """Start it, and insist that it ends.

        Raises:
            AssertionError: If it does not, or ends by an error.
        """
        with tempfile.TemporaryFile() as said:
            process = self._start(said)
            give_up_s = time.monotonic() + PATIENCE_S
            try:
                while process.poll() is None:
                    assert time.monotonic() < give_up_s, (
                        "the process does not end: threads of the tier keep it"
                    )
                    time.sleep(0.001)
            finally:
                process.kill()
                status = process.wait()
            assert status == 0, f"the process ended with {status}; see the standard error"


class _Forked:
    """What is used of `subprocess.Popen`, for a fork."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None and (ended := os.waitpid(self._pid, os.WNOHANG))[0]:
            self._status = os.waitstatus_to_exitcode(ended[1])
        return self._status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status


def _lines(said: Any) -> int:
    return os.pread(said.fileno(), 1 << 20, 0).count(b"\n")


def _live(
    backend: str | Backend,
    out: int,
    *,
    settings: Mapping[str, Any],
    max_bytes: int,
    after: int | None = None,
    batch: int = 1,
    keep: int | None = None,
    longest: bool = False,
) -> None:
    """Store objects until enough are said to be stored, and die by that; without `after` store one."""
    rig = Rig(backend, lambda folder: settings, Path(), max_bytes)
    tier = rig.open()
    if after is None:
        if not tier.capabilities.read_only:
            rig.store(tier, 0)
        return
    numbers = itertools.count()
    flying: dict[int, Transfer] = {}
    kept: list[int] = []
    said = 0
    while True:
        wanted = list(itertools.islice(numbers, batch - len(flying)))
        if longest:
            rig.set_length(max_bytes, *wanted)
        new = {number: rig.transfer(Op.STORE, number, rig.memory(number)) for number in wanted}
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
        kept += ended
        if keep is not None and len(kept) > keep:
            tier.discard([key_of(number) for number in kept[:-keep]])
            kept = kept[-keep:]
        time.sleep(0.0002)


def main() -> None:
    """Be the child: the job is the command line's JSON. Answers go to the standard output."""
    job = json.loads(sys.argv[1])
    out = os.dup(1)
    os.dup2(2, 1)  # Libraries print there.
    threading.current_thread().name = "kvbm-child"
    _live(job.pop("backend"), out, **job)
