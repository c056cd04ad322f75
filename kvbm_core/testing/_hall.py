"""What the suite of coordinators is written with: processes that register, some of them to be killed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from kvbm_core.coordinator import Coordinator, Member
from kvbm_core.errors import CoordinatorError
from kvbm_core.registry import Registry
from kvbm_core.testing._rig import PATIENCE_S

__all__ = ["PAUSE_S", "Hall", "killed", "live"]

PAUSE_S: Final = 0.01


class Hall:
    """Makes coordinators of one kind, and the processes that register with them."""

    def __init__(self, suite: Any, folder: Path) -> None:
        self.suite = suite
        self.folder = folder
        self._made: list[Coordinator] = []
        self._engines = itertools.count()
        self._pids = itertools.count(100)
        self.engine = self.name("an engine")

    def name(self, text: str) -> str:
        """Make a name of an engine that no other test has."""
        return f"{text} {next(self._engines)} {self.folder.parent.name} {os.getpid()}"

    def make(self, *, hasty: bool = False, **more: Any) -> Coordinator:
        """Make a coordinator; it is closed when the test is over."""
        settings = self.suite.hasty(self.folder) if hasty else self.suite.settings(self.folder)
        self._made.append(made(self.suite.coordinator, {**settings, **more}))
        return self._made[-1]

    def member(self, rank: int | None, world_size: int = 2, **facts: Any) -> Member:
        """Describe a process."""
        return Member(
            **{
                "engine": self.engine,
                "rank": rank,
                "world_size": world_size,
                "host": f"host-{rank}",
                "pid": next(self._pids),
                "namespace": "" if rank is None else f"{rank:032x}",
                "shared_namespace": "" if rank is None else "aa" * 16,
                "stack": ("cpu 8GiB", "lmdb 100GiB"),
                "versions": {"kvbm-core": "1.0"},
                **facts,
            }
        )

    def join(
        self, rank: int | None, world_size: int = 2, *, hasty: bool = False, **facts: Any
    ) -> Coordinator:
        """Register a process."""
        coordinator = self.make(hasty=hasty)
        coordinator.join(self.member(rank, world_size, **facts))
        return coordinator

    def until_listed(self, leader: Coordinator) -> None:
        """Wait until the leader finds all its workers."""
        give_up_s = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(CoordinatorError):
                if leader.gather():
                    return
            assert time.monotonic() < give_up_s, "a process is not registered again"
            time.sleep(PAUSE_S)

    def close(self) -> None:
        """Close all."""
        for coordinator in reversed(self._made):
            coordinator.close()


def made(kind: str | Callable[[Mapping[str, Any]], Coordinator], settings: Mapping[str, Any]) -> Coordinator:
    """Make a coordinator as the core does, or by a function."""
    return Registry().coordinator({"backend": kind, **settings}) if isinstance(kind, str) else kind(settings)


def killed(
    kind: str | Callable[[Mapping[str, Any]], Coordinator], settings: Mapping[str, Any], member: Member
) -> None:
    """Register a process of its own, and kill it when it is registered."""
    facts = {name: getattr(member, name) for name in Member.__struct_fields__}
    if isinstance(kind, str):
        main = "from kvbm_core.testing._hall import live; live()"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        job = json.dumps({"kind": kind, "settings": dict(settings), "facts": facts})
        command = [sys.executable, "-c", main, job]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        said = process.stdout.readline()
        process.kill()
        process.wait()
        process.stdout.close()
        assert said, "the child did not register; see the standard error"
        return
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            made(kind, settings).join(member)
            os.write(writer, b"!")
            threading.Event().wait()
        finally:
            os._exit(1)
    os.close(writer)
    said = os.read(reader, 1)
    os.close(reader)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert said, "the child did not register; see the standard error"


def live() -> None:
    """Be the child: register and wait to be killed. The job is the command line's JSON."""
    job = json.loads(sys.argv[1])
    facts = {**job["facts"], "stack": tuple(job["facts"]["stack"])}
    coordinator = made(job["kind"], job["settings"])
    coordinator.join(Member(**facts))
    print("registered", flush=True)
    threading.Event().wait()
