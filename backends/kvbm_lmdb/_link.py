"""The engine's hold of a keeper: started, asked, ended, and started again when it dies."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import fcntl
import mmap
import multiprocessing.spawn
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Final

import msgspec

from kvbm_core.config import size_text
from kvbm_core.errors import TierOpenError
from kvbm_core.localdir import HeldFolder
from kvbm_core.log_limit import LogLimit
from kvbm_core.tier import Region
from kvbm_lmdb._data_file import DataFile
from kvbm_lmdb._messages import Channel, Ended, Found, Reply, Request, Settings

__all__ = ["Fault", "KeeperError", "Link", "Window"]

_INSIDE: Final = "KVBM_LMDB_KEEPER"
"""Set in a keeper's environment: a program that embeds Python must not start itself over and over."""
_START_WAIT_S: Final = 30.0
"""For the first sign of life, and between two of them while the file is listed."""
_ANSWER_WAIT_S: Final = 60.0
"""For a commit or a flush. A disk that takes longer does not answer."""
_END_WAIT_S: Final = 5.0
"""For a keeper that was told to end."""
_KILL_WAIT_S: Final = 1.0
_FORGET_S: Final = 600.0
"""Faults longer ago than this are not held against a file or a keeper."""
_OPEN_ATTEMPTS: Final = 4
_MOST_RETRY_S: Final = 30.0


class Fault(enum.Enum):
    """Why a keeper is gone, and what is to be done."""

    DAMAGE = "LMDB says that data.mdb is damaged"
    CRASH = "LMDB came upon something in data.mdb that cannot be"
    BUS = "a page of data.mdb cannot be read; look whether somebody cut it short, or the disk fails (dmesg)"
    HUNG = "the disk does not answer; look for input/output errors (dmesg)"
    MEDIUM = "the disk fails; look for input/output errors (dmesg), permissions and a read-only mount"
    GONE = "somebody deleted or replaced it; keep other programs out of this directory"
    SMALL = "the capacity was lowered, and leaves LMDB no room to work in a file of this size"
    KILLED = "somebody killed it; look for the OOM killer (dmesg)"


_STRIKES: Final = {Fault.DAMAGE: 2, Fault.CRASH: 3, Fault.BUS: 6}
"""So many faults within `_FORGET_S` are the file's. A disk that fails to read for half a minute is none;
what fails without a word about the file never is."""
_STRIKES_AT_OPEN: Final = {Fault.DAMAGE: 1, Fault.CRASH: 2, Fault.BUS: 2, Fault.HUNG: 2, Fault.SMALL: 1}
"""An engine that starts cannot wait. Nor is there doubt about a file that cannot be opened."""


class KeeperError(Exception):
    """The keeper is gone, or was ended because it did not answer."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(f"{detail}: {fault.value}")
        self.fault, self.detail = fault, detail


class Window:
    """Memory that the keeper sees: two halves, each for the objects of one transaction.

    Raises:
        TierOpenError: If there is no memory for it.
    """

    def __init__(self, half_bytes: int) -> None:
        self._half_bytes = half_bytes
        nbytes = 2 * half_bytes
        self._memory: ctypes.c_char | None = None
        """The first byte; the mapping goes with it."""
        self.fd = os.memfd_create("kvbm-lmdb", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Taken now and never given back, so that nobody's access to it can fail.
            os.posix_fallocate(self.fd, 0, nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._memory = ctypes.c_char.from_buffer(mmap.mmap(self.fd, nbytes))
        except OSError as error:
            self.close()
            raise TierOpenError(
                f"no memory for a window of {size_text(nbytes)} ({error}); lower other tiers' capacity",
                operation="open", tier="lmdb",
            ) from error  # fmt: skip

    def fill(self, half: int, at: int, region: Region) -> None:
        """Copy an object to byte `at` of a half."""
        assert self._memory is not None
        assert at + region.nbytes <= self._half_bytes
        offset = half * self._half_bytes + at
        # Half the work of a `pwrite`; it releases the interpreter lock as well.
        ctypes.memmove(ctypes.addressof(self._memory) + offset, region.address, region.nbytes)

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
        self._memory = None


class _Keeper:
    """One process, from start to end."""

    def __init__(self, settings: Settings, window_fd: int, data_fd: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = Channel(ours)
        errors, errors_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._errors = errors
        fds = (theirs.fileno(), window_fd, data_fd)
        program = [*_interpreter(), "-P", "-m", "kvbm_lmdb._keeper", *map(str, fds), settings.folder]
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        try:
            self.process = subprocess.Popen(
                program, env={**os.environ, "PYTHONPATH": paths, _INSIDE: "1"}, pass_fds=fds,
                stdin=subprocess.DEVNULL, stdout=errors_end, stderr=errors_end, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            self.channel.close()
            os.close(errors)
            raise
        finally:
            theirs.close()
            os.close(errors_end)
        self.send(settings)

    def send(self, message: msgspec.Struct) -> None:
        # If it is gone, the next `receive` tells its end.
        with contextlib.suppress(OSError):
            self.channel.send(message)

    def receive(self, wait_s: float) -> Reply:
        try:
            packet = self.channel.receive(wait_s)
        except TimeoutError:
            raise KeeperError(Fault.HUNG, f"no answer for {wait_s:.0f} s") from None
        if not packet:
            raise self._epitaph()
        reply: Reply = msgspec.msgpack.decode(packet, type=Reply)
        if isinstance(reply, Ended):
            fault = Fault.DAMAGE if reply.damaged else Fault.SMALL if reply.too_small else Fault.MEDIUM
            raise KeeperError(fault, reply.detail)
        return reply

    def end(self, wait_s: float) -> bool:
        """Let it end, and kill it if it does not. Says whether it is gone."""
        self.channel.close()
        for kill, seconds in ((False, wait_s), (True, _KILL_WAIT_S)):
            if kill:
                self.process.kill()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
            if self._errors >= 0:
                os.close(self._errors)
                self._errors = -1
            return True
        return False

    def _epitaph(self) -> KeeperError:
        """Say what it died of."""
        try:
            status = self.process.wait(_KILL_WAIT_S)
        except subprocess.TimeoutExpired:
            return KeeperError(Fault.HUNG, "it closed its channel and lives")
        try:
            said = os.read(self._errors, 1 << 16).decode(errors="replace").strip().splitlines()
        except OSError:
            said = []
        last = f" ({said[-1][:200]})" if said else ""
        if status >= 0:
            fault = Fault.CRASH if status else Fault.KILLED
            return KeeperError(fault, f"it ended with status {status}{last}")
        name = signal.Signals(-status).name
        faults = {"SIGBUS": Fault.BUS, "SIGKILL": Fault.KILLED, "SIGTERM": Fault.KILLED}
        return KeeperError(faults.get(name, Fault.CRASH), f"it was ended by {name}{last}")


class Link:
    """Keeps a keeper running over a file; used by one thread at a time.

    Args:
        settings: For the keeper.
        window: Where it finds the objects to store.
        lines: Where lines go.
        held: The folder that the file is in.

    Raises:
        TierOpenError: If the file may not be used, or not even an empty one can be opened.
    """

    def __init__(self, settings: Settings, window: Window, lines: LogLimit, held: HeldFolder) -> None:
        self._settings = settings
        self._held = held
        self._window = window
        self.lines = lines
        """Where lines about the tier go."""
        self._folder = Path(settings.folder)
        self._faults: deque[tuple[float, Fault]] = deque(maxlen=32)
        self._keeper: _Keeper | None = None
        self.retry_s = 0.0
        """When `reopen` has something to do, on the clock of `time.monotonic`."""
        self.down = ""
        """Why there is no keeper; empty while there is one."""
        self.data = DataFile(self._held)
        if self.data.nbytes > settings.sizing.map_bytes:
            self.data = self._drop_too_large(self.data)

    def __repr__(self) -> str:
        return f"<Link to {self._folder}, {self.down or 'up'}, {len(self._faults)} faults>"

    def open(self) -> dict[bytes, bytes]:
        """Start the first keeper; a file that ends it is put aside.

        Returns:
            Keys that are served, oldest first, and where their objects lie in `data`, see `_place`.

        Raises:
            TierOpenError: If it cannot be opened.
        """
        if os.environ.get(_INSIDE):
            raise _no_interpreter("this is a keeper already")
        for attempt in range(_OPEN_ATTEMPTS):
            try:
                return self._start()
            except OSError as error:
                raise _no_interpreter(f"{_interpreter()[0]} cannot be started ({error})") from error
            except KeeperError as error:
                self._end(error)
                last = attempt == _OPEN_ATTEMPTS - 1 or self._keeper is not None
                if last or error.fault not in _STRIKES_AT_OPEN:
                    raise TierOpenError(
                        f"path: {self.data.path} cannot be opened: {error}", operation="open", tier="lmdb"
                    ) from error
                if error.fault is Fault.SMALL:
                    self.data = self._drop_too_large(self.data)
                elif self._count(error.fault) >= _STRIKES_AT_OPEN[error.fault]:
                    self._put_aside(error)
        raise AssertionError

    def reopen(self) -> dict[bytes, bytes] | None:
        """Start a keeper again if it is time to. None: not now, or it did not work; see `down`.

        Returns:
            As `open`.
        """
        if time.monotonic() < self.retry_s:
            return None
        if not self._gone():
            self.retry_s = time.monotonic() + _MOST_RETRY_S
            return None
        try:
            if self.data.is_gone:
                self._held.retake()
                self.data = DataFile(self._held)  # New; or, of a disk that was away, as it was.
            found = self._start()
        except KeeperError as error:
            self.failed(error)
            return None
        except (OSError, TierOpenError) as error:
            self.failed(KeeperError(Fault.MEDIUM, str(error)))
            return None
        text = "%s: LMDB works again, with %d objects; it was gone %s"
        self.lines.over("gone", time.monotonic(), text, self._folder, len(found))
        return found

    def send(self, request: Request) -> None:
        """Ask the keeper. The answer, or its end, comes with `receive`."""
        assert self._keeper is not None
        self._keeper.send(request)

    def receive(self) -> Reply:
        """Wait for the answer.

        Raises:
            KeeperError: If there is none.
        """
        assert self._keeper is not None
        return self._keeper.receive(_ANSWER_WAIT_S)

    def died(self) -> KeeperError | None:
        """Say whether the keeper has died while nothing was asked, or somebody took its file away."""
        if self.data.is_gone:
            return KeeperError(Fault.GONE, f"{self.data.path} is not the file that is open")
        if self._keeper is None or self._keeper.process.poll() is None:
            return None
        try:
            self._keeper.receive(0.0)
        except KeeperError as error:
            return error
        return None

    def failed(self, error: KeeperError) -> None:
        """Note that the keeper is gone, say so, and decide when the next one starts."""
        if error.fault is not Fault.GONE and self.data.is_gone:
            error = KeeperError(Fault.GONE, error.detail)
        self._end(error)
        wait_s = 0.0 if len(self._faults) == 1 else min(_MOST_RETRY_S, 2.0 ** (len(self._faults) - 3))
        self.retry_s = time.monotonic() + wait_s
        self.lines.lasts(
            "gone", time.monotonic(), "%s: the process that has LMDB is gone; another is started%s. %s",
            self._folder, f" in {wait_s:.1f} s" if wait_s else "", error, cause=error.fault,
        )  # fmt: skip
        count = self._count(error.fault)
        if count >= _STRIKES.get(error.fault, count + 1):
            self._put_aside(error)
            self.retry_s = 0.0

    def kill(self) -> None:
        """End a keeper that somebody waits for. From any thread."""
        if self._keeper is not None:
            self._keeper.process.kill()

    def close(self) -> bool:
        """Let the keeper end. Says whether it is gone. May be called twice."""
        self.down = self.down or "closed"
        return self._gone(_END_WAIT_S)

    def _start(self) -> dict[bytes, bytes]:
        self._keeper = _Keeper(self._settings, self._window.fd, self.data.fd)
        found: dict[bytes, bytes] = {}
        while True:
            reply = self._keeper.receive(_START_WAIT_S)
            assert isinstance(reply, Found)
            found.update(zip(reply.keys, reply.places, strict=True))
            if reply.last:
                self.down = ""
                return found

    def _end(self, error: KeeperError) -> None:
        self.down = str(error)
        self._gone()
        now_s = time.monotonic()
        while self._faults and now_s - self._faults[0][0] > _FORGET_S:
            self._faults.popleft()
        self._faults.append((now_s, error.fault))

    def _count(self, fault: Fault) -> int:
        return sum(each is fault for _, each in self._faults)

    def _gone(self, wait_s: float = 0.0) -> bool:
        """Make sure that no keeper is left: two at once would write into one file."""
        if self._keeper is not None and self._keeper.end(wait_s):
            self._keeper = None
        return self._keeper is None

    def _put_aside(self, error: KeeperError) -> None:
        self._faults.clear()
        try:
            self.data = self.data.put_aside(str(error))
        except TierOpenError as refused:
            self.lines.error("aside", "%s cannot be put aside: %s", self.data.path, refused)
            return
        self.lines.error(
            "aside",
            "%s is damaged and is now called data.mdb.damaged; the tier starts empty. %s",
            self.data.path, error,
        )  # fmt: skip

    def _drop_too_large(self, data: DataFile) -> DataFile:
        self.lines.warning(
            "smaller",
            "%s is %s and may now be %s: the capacity was lowered. LMDB cannot shrink a file: "
            "dropping it and starting empty.",
            data.path, size_text(data.nbytes), size_text(self._settings.sizing.map_bytes),
        )  # fmt: skip
        return data.start_anew()


def _interpreter() -> list[str]:
    # A program that embeds Python names the interpreter there, as the standard library asks it to.
    program = multiprocessing.spawn.get_executable()
    if not program:
        raise _no_interpreter("sys.executable is empty")
    return [os.fsdecode(program)]


def _no_interpreter(why: str) -> TierOpenError:
    return TierOpenError(
        f"the lmdb tier runs a Python interpreter for a process of its own, and {why}; name one with "
        "multiprocessing.set_executable('/usr/bin/python3')",
        operation="open", tier="lmdb",
    )  # fmt: skip
