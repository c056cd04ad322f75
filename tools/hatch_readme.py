"""A hook of hatchling: the README in a distribution, whose links lead to the repository at this version.

In the repository they are relative, so that they work in a checkout. An index shows the README alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

__all__ = ["ReadmeHook", "absolute"]

_RELATIVE = re.compile(r"\]\((?!https?://|mailto:|#)([^)\s]+)\)")


def absolute(text: str, base: str) -> str:
    """Put `base`, which ends with a slash, in front of every relative link of a Markdown text."""
    return _RELATIVE.sub(lambda link: f"]({base}{link[1]})", text)


class ReadmeHook(MetadataHookInterface):
    """Sets the field ``readme``, which `pyproject.toml` calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Write it into the metadata of the project."""
        base = f"{metadata['urls']['Source']}/blob/v{metadata['version']}/"
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, base)}
