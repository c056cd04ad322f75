"""Text of others, made harmless for the terminals and logs of those who read it."""

from __future__ import annotations

from typing import Final

__all__ = ["PROSE", "printable"]

PROSE: Final = "\n\t\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\u200c\u200d"
"""Characters that text of several lines and of all scripts is written with; no terminal obeys them."""


def printable(text: str, keep: str = "") -> str:
    """Write as an escape what a terminal would take for a command, or would not show.

    Args:
        text: From a server, a file or a store.
        keep: Characters that are left as they are, though they do not print.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
