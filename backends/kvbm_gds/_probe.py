"""Finds out, in a child process, which engines move blocks correctly here, and how fast.

    parent ── FILE BYTES_OF_A_PIECE PIECES ENGINE... ──► child
    parent ◄── one line of JSON for each engine ──────── child

A child, because cuFile spins for ever on a machine without a driver, and NIXL's plug-ins have hung
and crashed. It says which engine it tries before it does; what has not answered by the deadline is
killed, and counts as hanging.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvbm_core.errors import TierError
from kvbm_core.localdir import FILE_MODE
from kvbm_core.log_limit import Log
from kvbm_core.trust import open_direct
from kvbm_gds._io import Io, open_engine

__all__ = [
    "DIRECT",
    "HOST",
    "POSIX",
    "Finding",
    "child",
    "choose",
    "run_probe",
]

DIRECT: Final = ("gds_mt", "gds")
"""Engines that can read into device memory, the better first."""
POSIX: Final = ("io_uring", "libaio")
HOST: Final = (*POSIX, "threads")
"""Engines for host memory."""
_ROUNDS: Final = 3
_PR_SET_PDEATHSIG: Final = 1
_CHILD: Final = (sys.executable, "-c", "from kvbm_gds._probe import child; child()")


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out of one engine."""

    engine: str
    problem: str
    """Why it cannot be used; empty if it moved every byte right."""
    write_bytes_per_s: float = 0.0
    read_bytes_per_s: float = 0.0

    @property
    def score(self) -> float:
        """Reads and writes count alike, the slower more (harmonic mean)."""
        rates = (self.write_bytes_per_s, self.read_bytes_per_s)
        return 0.0 if self.problem or min(rates) <= 0 else 2 / sum(1 / rate for rate in rates)


def run_probe(
    file: Path, engines: Sequence[str], piece_bytes: int, pieces: int, deadline_s: float, log: Log
) -> list[Finding]:
    """Try engines on a file of the tier's own directory, in a child.

    Args:
        file: Made for the probe and deleted again.
        engines: Tried in this order, each with the whole deadline.
        piece_bytes: Of one transfer, a multiple of 4096.
        pieces: At once.
        deadline_s: Seconds for each engine.
        log: Where it is said that a child is left behind.

    Returns:
        A finding for each engine.
    """
    findings: list[Finding] = []
    left = list(engines)
    try:
        while left:
            command = [*_CHILD, str(file), str(piece_bytes), str(pieces), *left]
            try:
                # Whatever is there under this name was not made by this probe.
                file.unlink(missing_ok=True)
                news = _ask(command, left, deadline_s, log)
            except OSError as error:
                news = [Finding(engine, f"it could not be tried: {error}") for engine in left]
            findings += news
            left = left[len(news) :]
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
    return findings


def _ask(command: Sequence[str], engines: Sequence[str], deadline_s: float, log: Log) -> list[Finding]:
    """Run one child; it is over with the first engine that hangs or crashes it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    findings: list[Finding] = []
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said,
            start_new_session=True, bufsize=0,
        )  # fmt: skip
        for engine in engines:
            line = _answer(child, deadline_s)
            finding = _understand(engine, line)
            if finding is None:
                _kill(child, log)
                said.seek(0)
                findings.append(Finding(engine, _why_silent(child, line, said.read(), deadline_s)))
                break
            findings.append(finding)
        _kill(child, log)
    return findings


def _answer(child: subprocess.Popen[bytes], deadline_s: float) -> bytes:
    """Give the child's next answer; without its end of line if that does not come by the deadline."""
    assert child.stdout is not None
    give_up_s, line = time.monotonic() + deadline_s, b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([child.stdout], [], [], max(0.0, give_up_s - time.monotonic()))
        news = os.read(child.stdout.fileno(), 1) if readable else b""
        if not news:
            break
        line += news
    return line


def _understand(engine: str, line: bytes) -> Finding | None:
    try:
        finding = Finding(**json.loads(line))
        # Raises for rates that are no numbers.
        sound = finding.engine == engine and finding.score >= 0 and isinstance(finding.problem, str)
    except (ValueError, TypeError):
        return None
    return finding if sound else None


def _why_silent(child: subprocess.Popen[bytes], line: bytes, said: bytes, deadline_s: float) -> str:
    if line.endswith(b"\n"):
        return f"the process that tried it answered {line[:80]!r}"
    if child.returncode in (None, -signal.SIGKILL):
        return f"it did not move a few blocks within {deadline_s:g} s"
    last = said.decode(errors="replace").strip().rpartition("\n")[2] or "nothing"
    return f"it ended the process that tried it (exit status {child.returncode}), saying: {last}"


def _kill(child: subprocess.Popen[bytes], log: Log) -> None:
    """End the child and all it has started. One that sleeps in the kernel cannot be waited for."""
    try:
        child.wait(0.2)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        try:
            child.wait(2)
        except subprocess.TimeoutExpired:
            log.warning("a probe process (pid %d) cannot be killed; it is left behind", child.pid)
    if child.stdout:
        child.stdout.close()


def choose(findings: Sequence[Finding]) -> Finding | None:
    """Take the fastest engine that was right. None if none was."""
    sound = [finding for finding in findings if not finding.problem]
    return max(sound, key=lambda finding: finding.score, default=None)


# The child.


def child() -> None:
    """Try the engines that the command line names, and print a line of JSON for each."""
    file, piece_bytes, pieces, *engines = sys.argv[1:]
    # One that spins inside a library must not outlive an engine that was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries print to the standard output, which is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for engine in engines:
        try:
            words = _try(engine, Path(file), int(piece_bytes), int(pieces))
        except (TierError, OSError, ImportError) as error:
            words = {"engine": engine, "problem": str(error)}
        print(json.dumps(words), file=answers, flush=True)
    # Not through the interpreter's end: a plug-in may hang in its destructors.
    os._exit(0)


def _try(engine: str, file: Path, piece_bytes: int, pieces: int) -> dict[str, Any]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd, _ = open_direct(lambda name, flags: os.open(name, flags, FILE_MODE), str(file), flags)
    os.posix_fallocate(fd, 0, piece_bytes * pieces)
    ended = threading.Event()
    moving = open_engine(engine, ended.set)
    moving.add_file(fd, piece_bytes * pieces)
    memory = _Device(piece_bytes * pieces) if engine in DIRECT else _Host(piece_bytes * pieces)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(_ROUNDS):
        content = random.randbytes(piece_bytes * pieces)
        memory.set(content)
        for write in (True, False):
            if not write:
                memory.set(bytes(piece_bytes * pieces))
            start_s = time.perf_counter()
            moving.post(
                [
                    Io(at, write, fd, at * piece_bytes, memory.address + at * piece_bytes, piece_bytes,
                       engine in DIRECT)
                    for at in range(pieces)
                ]
            )  # fmt: skip
            problem = _await(moving, pieces, ended)
            seconds[write].append(time.perf_counter() - start_s)
            if problem:
                return {"engine": engine, "problem": problem}
        if memory.get() != content:
            return {"engine": engine, "problem": "it read other bytes than were written"}
    total = piece_bytes * pieces
    return {
        "engine": engine, "problem": "",
        "write_bytes_per_s": total / sorted(seconds[True])[_ROUNDS // 2],
        "read_bytes_per_s": total / sorted(seconds[False])[_ROUNDS // 2],
    }  # fmt: skip


def _await(moving: Any, count: int, ended: threading.Event) -> str:
    problem = ""
    while count:
        ended.wait(1)
        ended.clear()
        for io in moving.take():
            count -= 1
            problem = problem or io.error
    return problem


class _Host:
    """Page-aligned host memory."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def set(self, content: bytes) -> None:
        self._memory[:] = content

    def get(self) -> bytes:
        return self._memory[:]


class _Device:
    """Memory of the accelerator, through the CUDA driver alone."""

    def __init__(self, nbytes: int) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._nbytes = nbytes
        device, context, address = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        # The primary context: the one that the engine's process will use, too.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        self.address = address.value

    def set(self, content: bytes) -> None:
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(self.address), content, ctypes.c_size_t(self._nbytes))

    def get(self) -> bytes:
        content = ctypes.create_string_buffer(self._nbytes)
        self._call("cuMemcpyDtoH_v2", content, ctypes.c_uint64(self.address), ctypes.c_size_t(self._nbytes))
        return content.raw

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status != 0:
            raise OSError(f"{name} gave {status}")
