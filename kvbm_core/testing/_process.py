"""What of a process belongs to all of it."""

from __future__ import annotations

import gc
import locale
import logging
import os
import signal
import sys
import threading
import warnings
from typing import Any

__all__ = ["changes", "process_state"]


def process_state() -> dict[str, Any]:
    """Describe what of a process belongs to all of it."""
    umask = os.umask(0o077)
    os.umask(umask)
    root = logging.getLogger()
    return {
        "folder": os.getcwd(),
        "umask": oct(umask),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals() if number < 32},
        "environment": dict(os.environ),
        "cores": os.sched_getaffinity(0),
        "logging": (root.level, list(root.handlers), logging.root.manager.disable),
        "warnings": list(warnings.filters),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "path": list(sys.path),
        "locale": locale.setlocale(locale.LC_ALL),
        "gc": (gc.isenabled(), gc.get_threshold()),
        "switch interval": sys.getswitchinterval(),
        "priority": os.nice(0),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what is different. Of the environment only names are told: values may be secret."""
    found = []
    for name, value in before.items():
        other = after[name]
        if value == other:
            continue
        if isinstance(value, dict):
            found += [f"{name}: {key}" for key in {*value, *other} if value.get(key) != other.get(key)]
        else:
            found.append(f"{name}: {value} before, {other} after")
    return found
