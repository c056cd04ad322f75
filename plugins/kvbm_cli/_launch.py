"""Becomes another program that ends when the demo ends: `python -m kvbm_cli._launch PARENT_PID COMMAND...`.

The demo stops its server in every way of ending that it can notice. This is for the one that it cannot,
`kill -9`: the kernel then sends SIGTERM to the server, which takes its engine process with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>; the setting survives the exec below."""


def main(parent_pid: int, command: list[str]) -> None:
    """Tie this process to its parent and replace it with `command`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have gone before the line above; then no signal would come.
    if os.getppid() != parent_pid:
        sys.exit("the process that asked for this server has ended")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
