"""Shows in `help` what stands under the fields of a class: Python itself keeps no docstring of a field."""

from __future__ import annotations

import inspect
import itertools
import linecache
import re
import sys
import textwrap
from collections.abc import Iterable

__all__ = ["show_fields"]

_FIELD = re.compile(r'^    (\w+)(?::| =) [^\n]*\n    """(.+?)"""', re.MULTILINE | re.DOTALL)
"""A field, or a member of an enumeration, and its docstring. Parsing would make an import a tenth slower."""


def show_fields(classes: Iterable[type]) -> None:
    """Add the docstrings of their fields to those of classes, where their source can be read."""
    for cls in classes:
        # Without docstrings (-OO) there is nothing to add to.
        heirs = [base for base in reversed(cls.__mro__[1:]) if "__dataclass_fields__" in vars(base)]
        if cls.__doc__ and (source := "".join(map(_source, [*heirs, cls]))):
            fields = "\n".join(
                textwrap.indent(f"{name}: {inspect.cleandoc(text)}", " " * 8).replace("        ", "    ", 1)
                for name, text in _FIELD.findall(source)
            )
            if fields:
                cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\nAttributes:\n{fields}"


def _source(cls: type) -> str:
    """Give the source of a class, as far as the next line that is not indented; empty where there is none."""
    module = sys.modules.get(cls.__module__)
    lines = linecache.getlines(getattr(module, "__file__", None) or "")
    head = re.compile(rf"class {re.escape(cls.__qualname__)}\b")
    start = next((at for at, line in enumerate(lines) if head.match(line)), len(lines))
    body = itertools.takewhile(lambda line: line[0].isspace(), lines[start + 1 :])
    return "".join([*lines[start : start + 1], *body])
