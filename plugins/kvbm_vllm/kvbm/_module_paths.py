"""Answers to the module paths that the guides for NVIDIA's KVBM tell vLLM to import.

    importlib.import_module("kvbm.vllm_integration.connector")
        "kvbm", "kvbm.vllm_integration"       empty packages: Python imports parents first
        "kvbm.vllm_integration.connector"     has our connector by both of its names

A module exists only once somebody imports it, and vLLM imports it where its configuration names it. Python
asks this finder last, so what is installed under these names wins. Where NVIDIA's distribution is installed
that has the path, the finder answers nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

__all__ = ["NAMES", "answer_module_paths", "leads_here"]

NAMES: Final = ("KvbmConnector", "DynamoConnector")
"""The second is what NVIDIA's KVBM calls its connector."""
_THEIR_PATHS: Final[dict[str, str | None]] = {
    "kvbm.vllm_integration.connector": "kvbm",
    "dynamo.llm.vllm_integration.connector": None,
}
"""Where the guides for KVBM, the present and an older one, tell vLLM to find it, and the distribution
that has it. The older one is answered
whatever is installed, if it has no module of that name: ai-dynamo has other parts of `dynamo`."""


class _StandIn(ModuleType):
    """A module that has our connector, imported when it is asked for: that takes a while."""

    def __getattr__(self, name: str) -> Any:
        if name in NAMES:
            return getattr(importlib.import_module("kvbm_vllm"), name)
        raise AttributeError(name)


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of `_THEIR_PATHS` and their parents, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Give a module's specification if its distribution is not installed."""
        for theirs, distribution in _THEIR_PATHS.items():
            if f"{theirs}.".startswith(f"{fullname}.") and not _installed(distribution):
                return ModuleSpec(fullname, self, is_package=fullname != theirs)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make a stand-in for the path itself, and an empty package for a parent."""
        return _StandIn(spec.name) if spec.name in _THEIR_PATHS else ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing: there is no code."""


_finder: Final = _Finder()


def answer_module_paths() -> None:
    """Have the paths found from now on in this process."""
    if _finder not in sys.meta_path:
        sys.meta_path.append(_finder)


def leads_here(path: str) -> bool:
    """Say whether an import of this path gives our connector."""
    if path not in _THEIR_PATHS or _installed(_THEIR_PATHS[path]):
        return False
    try:
        spec = importlib.util.find_spec(path)
    except (ImportError, ValueError):  # A parent that is none, or a module that was made by hand.
        return False
    return spec is not None and spec.loader is _finder


def _installed(distribution: str | None) -> bool:
    if distribution is None:
        return False
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
