"""Calls that do not return: a test fails by them, and the others go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

__all__ = ["Fastest", "feed", "files_held", "handles", "returns", "watched"]

_HANG_FACTOR: Final = 4
_hang_s = 0.0


def _bark(*_: Any) -> None:
    raise AssertionError(f"a call has not returned within {_hang_s:.0f} s: see the last line above")


@contextlib.contextmanager
def watched(patience_s: float) -> Iterator[None]:
    """Raise AssertionError where the main thread makes no progress; see `feed`.

    It interrupts whatever waits in Python. Without effect where something else uses SIGALRM.
    """
    global _hang_s
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        yield
        return
    _hang_s = _HANG_FACTOR * patience_s
    signal.signal(signal.SIGALRM, _bark)
    try:
        feed()
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def feed() -> None:
    """Say that there is progress."""
    if signal.getsignal(signal.SIGALRM) is _bark:
        signal.setitimer(signal.ITIMER_REAL, _hang_s)


def returns(use: Callable[[], None], patience_s: float) -> None:
    """Run a function in a thread of its own, which is left behind where it does not return.

    Raises:
        AssertionError: If it has not returned after so long. Raises what the function raises, too.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            use()
        except BaseException as error:  # noqa: BLE001 - it is raised where the test is
            errors.append(error)

    thread = threading.Thread(target=run, name="suite", daemon=True)
    thread.start()
    thread.join(patience_s)
    if errors:
        raise errors[0]
    assert not thread.is_alive(), f"a call has not returned within {patience_s:.0f} s"


class Fastest:
    """Times calls, each several times: a busy machine delays one, not all."""

    def __init__(self) -> None:
        self._fastest_s: dict[str, float] = {}

    def call(self, name: str, call: Callable[[], Any]) -> Any:
        """Make a call; give what it gives."""
        start_s = time.monotonic()
        result = call()
        took_s = time.monotonic() - start_s
        self._fastest_s[name] = min(took_s, self._fastest_s.get(name, took_s))
        return result

    def longer_than(self, bound_s: float) -> list[str]:
        """Name the calls that took longer each time."""
        return [name for name, took_s in self._fastest_s.items() if took_s > bound_s]


def files_held(folder: Path) -> list[str]:
    """List the files of a folder that this process has open, or mapped."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # It has been closed meanwhile.
            found.add(os.readlink(link))
    for line in Path("/proc/self/maps").read_text().splitlines():
        found.add("/" + line.partition("/")[2])
    return sorted(name for name in found if name.startswith(f"{folder.resolve()}/"))


def handles() -> int:
    """Count the files, sockets and threads that this process has."""
    return sum(len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
