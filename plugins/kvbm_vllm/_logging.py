"""Our log lines in vLLM's format, where vLLM's go."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points
from typing import Final

from kvbm_core.hookspecs import ENTRY_POINT_GROUP

__all__ = ["share_log"]

_OURS: Final = ("kvbm_core", "kvbm_device", "kvbm_engine", "kvbm_metrics", "kvbm_vllm")
"""Beside these each plug-in logs under the name of its package, those of others too."""
_given: Final[set[logging.Handler]] = set()
"""Handlers of vLLM's that our loggers have from here."""


def share_log() -> None:
    """Give our loggers vLLM's handlers; vLLM sets none on the root, so ours would be silent.

    A process that vLLM forks makes handlers of its own: each line would come twice with those of before.
    """
    theirs = logging.getLogger("vllm")
    # vLLM may have taken the root's handlers too; those get our lines already.
    handlers = [each for each in theirs.handlers if each not in logging.getLogger().handlers]
    plug_ins = {point.module.partition(".")[0] for point in entry_points(group=ENTRY_POINT_GROUP)}
    for name in plug_ins.union(_OURS):
        ours = logging.getLogger(name)
        ours.setLevel(theirs.level)
        for handler in _given.difference(handlers):
            ours.removeHandler(handler)
        for handler in handlers:
            ours.addHandler(handler)
    _given.update(handlers)
