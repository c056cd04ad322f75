"""A small sound coordinator: what the broken ones are made from, and a model to read.

<path>/e-<engine>/leader, 0, 1 ...    a file each, locked by the process as long as it lives
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import msgspec

from kvbm_core.config import Settings, convert
from kvbm_core.coordinator import Coordinator, Member
from kvbm_core.errors import CoordinatorError

__all__ = ["FolderCoordinator", "FolderSettings"]

_LOOK_S = 0.01
_ALIKE = ("world_size", "shared_namespace", "stack", "versions")
logger = logging.getLogger("folder_coordinator")


class FolderSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a `FolderCoordinator`."""

    path: str
    init_timeout_s: float = 60.0


class FolderCoordinator(Coordinator):
    """Processes of one machine, in a folder; sound. It is away where the folder is not there."""

    def __init__(self, settings):
        self.config = convert(settings, FolderSettings, "coordinator")
        self.root = Path(self.config.path)
        self.member = self.fd = self.thread = None
        self.warned = False
        self.closing = threading.Event()

    def __repr__(self):
        return f"<FolderCoordinator {self.root} {self.member}>"

    def folder(self, engine):
        return self.root / f"e-{quote(engine, safe='')}"

    def place(self, member):
        return self.folder(member.engine) / ("leader" if member.rank is None else str(member.rank))

    def join(self, member):
        self.member = member
        if not self.claim():
            owner = self.read(self.place(member))
            self.member = None
            raise CoordinatorError(f"{owner} is registered in the place of {member}", operation="join")
        self.thread = threading.Thread(target=self.stay, name="folder-coordinator", daemon=True)
        self.thread.start()

    def stay(self):
        while not self.closing.wait(_LOOK_S):
            if self.fd is None:
                self.claim()

    def claim(self):
        """Register, if the folder is there. False if another process is registered."""
        place = self.place(self.member)
        try:
            place.parent.mkdir(exist_ok=True)
            fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            if not self.warned:
                logger.warning("%s does not list %s: it is not there", self.root, self.member)
            self.warned = True
            return True
        if not locked(fd):
            os.close(fd)
            return False
        os.ftruncate(fd, 0)
        os.pwrite(fd, self.written(), 0)
        self.fd = fd
        return True

    def written(self):
        return msgspec.json.encode(self.member)

    def read(self, place):
        """Give who is registered in a place; None for nobody."""
        try:
            fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if self.is_alive(fd):
                return msgspec.convert(json.loads(os.pread(fd, 1 << 20, 0)), Member)
        except json.JSONDecodeError:
            return None  # It is being written.
        finally:
            os.close(fd)
        return None

    def is_alive(self, fd):
        """Say whether the process whose file this is lives."""
        return not locked(fd)

    def gather(self):
        give_up_s = time.monotonic() + self.config.init_timeout_s
        while True:
            if not self.root.exists():
                return ()
            workers = [worker for worker in self.workers() if worker.rank is not None]
            check_alike([self.member, *workers])
            missing = set(range(self.member.world_size)) - {worker.rank for worker in workers}
            if not missing:
                return workers
            if time.monotonic() > give_up_s:
                raise CoordinatorError(self.absence(missing, workers), operation="gather")
            time.sleep(_LOOK_S)

    def absence(self, missing, workers):
        came = ", ".join(map(str, workers)) or "nobody"
        return f"ranks {sorted(missing)} of {self.member.world_size} did not come; {came} did"

    def workers(self) -> Sequence[Member]:
        places = [place for place in self.folder(self.member.engine).glob("*") if place.name.isdecimal()]
        found = [self.read(place) for place in sorted(places, key=lambda place: int(place.name))]
        return [worker for worker in found if worker]

    def close(self):
        self.closing.set()
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.fd is not None:
            self.leave()

    def leave(self):
        with contextlib.suppress(FileNotFoundError):
            self.place(self.member).unlink()
        os.close(self.fd)
        self.fd = None


def locked(fd):
    """Take the lock of a file, if nobody has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_alike(members):
    """Compare what must be equal; name both, and both values."""
    for name in _ALIKE:
        said = [(member, getattr(member, name)) for member in members if getattr(member, name)]
        for member, value in said[1:]:
            first, expected = said[0]
            if value != expected:
                raise CoordinatorError(f"{name} of {member} is {value}, of {first} it is {expected}")
