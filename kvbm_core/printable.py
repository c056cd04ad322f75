"""Text of others, made harmless for the terminals and logs of those who read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["PROSE", "noun", "printable", "shown"]

PROSE: Final = "\n\t\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\u200c\u200d"
"""Characters that text of several lines and of all scripts is written with; no terminal obeys them."""
_LONGEST_SHOWN: Final = 40


def printable(text: str, keep: str = "") -> str:
    """Write as an escape what a terminal would take for a command, or would not show.

    Args:
        text: From a server, a file or a store.
        keep: Characters that are left as they are, though they do not print.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """Show a value that is wrong where no secret belongs; of what is nested or like a URL, the type."""
    if isinstance(value, str) and ("://" in value or "@" in value or len(value) > _LONGEST_SHOWN):
        return "a str"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return repr(value) if value is None or isinstance(value, str | int | float) else f"a {noun(value)}"


def noun(value: object) -> str:
    """Name the type of a value as the writer of a YAML file would."""
    if value is None:
        return "None"
    return "mapping" if isinstance(value, Mapping) else type(value).__name__
