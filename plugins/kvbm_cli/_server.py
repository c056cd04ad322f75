"""One `vllm serve` as a child process: started, waited for, stopped, and never left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from kvbm_cli._errors import DemoError

READY_LIMIT_S = 900.0
"""A large model may load for minutes; a server that dies is noticed at once."""
STOP_LIMIT_S = 30.0
"""For the tiers to write what they still hold. Afterwards the server is killed."""
GROUP_LIMIT_S = 5.0
POLL_INTERVAL_S = 0.25
LOG_TAIL_LINES = 15
NAMED_ERRORS = 5
_DEAD = ("EngineCore failed to start", "EngineDeadError")
"""In the log of a server whose engine has died. Its other half may then hang for ever instead of ending."""
_ERROR = re.compile(r"^(?:\([^)]*\) ERROR [^\]]*\] )?([\w.]+(?:Error|Exception): .+)$", re.MULTILINE)
"""An exception's own line, also as vLLM logs it, with the process and the place before it."""

Progress = Callable[[str], None]


class Server:
    """A server process in a process group of its own, so that all of it can be ended together.

    Leaving the `with` block stops it: in order if nothing went wrong, at once if something did.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], base_url: str, log: Path
    ) -> None:
        self.log = log
        self._base_url = base_url
        launcher = [sys.executable, "-m", "kvbm_cli._launch", str(os.getpid())]
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [*launcher, *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                # Not stopped by the terminal's Ctrl-C but by the demo, which wants its last words first.
                start_new_session=True,
            )

    def __repr__(self) -> str:
        status = self._process.poll()
        state = "running" if status is None else f"ended with {status}"
        return f"<Server pid={self._process.pid} {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    def wait_ready(self, progress: Progress) -> None:
        """Wait until the server answers.

        Raises:
            DemoError: it died or took longer than `READY_LIMIT_S`; the message ends with its last lines.
        """
        deadline_s = time.monotonic() + READY_LIMIT_S
        with httpx.Client(base_url=self._base_url, timeout=5.0, trust_env=False) as http:
            while not _answers(http):
                self.check_alive()
                if time.monotonic() > deadline_s:
                    raise self.failure(f"vLLM was not ready after {READY_LIMIT_S:.0f} s")
                progress("Starting vLLM")
                time.sleep(POLL_INTERVAL_S)

    def check_alive(self) -> None:
        """Raise a `DemoError` with the server's last lines if it has ended."""
        status = self._process.poll()
        if status is not None:
            raise self.failure(f"vLLM ended with status {status}")
        if any(sign in self._text() for sign in _DEAD):
            raise self.failure("vLLM's engine has died")

    def stop(self) -> None:
        """Ask the server to end, waits, and kills what is left of it. May be called twice."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
                self._wait_for_group()
        finally:
            # Also when a second Ctrl-C ends the wait, and for an engine that outlived its server.
            self.kill()

    def kill(self) -> None:
        """End the server and all its children at once. May be called twice."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _wait_for_group(self) -> None:
        """Give the server's children a moment after it has ended: they may be closing a tier."""
        deadline_s = time.monotonic() + GROUP_LIMIT_S
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline_s:
                os.killpg(self._process.pid, 0)
                time.sleep(POLL_INTERVAL_S)

    def failure(self, what: str) -> DemoError:
        """Make the error that says `what` happened, with the log's errors and last lines."""
        text = self._text()
        # The first error is the cause; what follows it in the log are the processes it takes along.
        errors = list(dict.fromkeys(_ERROR.findall(text)))[:NAMED_ERRORS]
        tail = text.splitlines()[-LOG_TAIL_LINES:]
        parts = [f"{what}.", "", *(f"  {error}" for error in errors), "", "The log's last lines:", "", *tail]
        return DemoError("\n".join(parts))

    def _text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
