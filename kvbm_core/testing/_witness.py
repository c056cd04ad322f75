"""Names the test in which the interpreter ended: a tier's library crashes, or ends the process.

                 name of the test, an empty line after it
this process ────────────────────────────────────────────► a shell
                                                             └─ at the end of the pipe: was there a name?
"""

from __future__ import annotations

import atexit
import contextlib
import subprocess
from collections.abc import Iterator
from typing import Any, Final

__all__ = ["witnessed"]

_SHELL: Final = """
trap '' INT TERM
while IFS= read -r line; do last=$line; done
[ -z "$last" ] && exit
printf '\\n%s\\n%s\\n' "kvbm_core.testing: the process ended in the midst of $last" \
  'The tests behind it did not run; with pytest-xdist (-n 1) they do.' >&2
"""
_witness: subprocess.Popen[str] | None = None


def _started(capture: Any) -> subprocess.Popen[str]:
    global _witness
    if _witness is None:
        # Its words must reach the terminal, not the file in which pytest catches what a test prints.
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            _witness = subprocess.Popen(["/bin/sh", "-c", _SHELL], stdin=subprocess.PIPE, text=True)
        atexit.register(_witness.communicate)
    return _witness


@contextlib.contextmanager
def witnessed(name: str, capture: Any) -> Iterator[None]:
    """Have a test named on the standard error if this process ends before the context does.

    Args:
        name: Of the test.
        capture: Pytest's plug-in of that name, or None.
    """
    witness = _started(capture)
    _tell(witness, name)
    try:
        yield
    finally:
        _tell(witness, "")


def _tell(witness: subprocess.Popen[str], name: str) -> None:
    assert witness.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # Somebody has ended it.
        witness.stdin.write(f"{name}\n")
        witness.stdin.flush()
