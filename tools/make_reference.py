"""Writes the generated parts of reference pages from docstrings.

    python tools/make_reference.py             write them
    python tools/make_reference.py --check     exit status 1 if a page says anything else

A page says what it wants between its own words, and what stands between the two lines is replaced:

    <!-- from kvbm_core: Stack, chain_keys -->
    <!-- end -->
"""

from __future__ import annotations

import argparse
import enum
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "reference"
WIDTH = 100

_PART = re.compile(r"^<!-- from (\S+): ([^\n]+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"(Args|Attributes|Behaviour|Example|Raises|Returns):")
_ITEM = re.compile(r"(\*{0,2}\w+): (.*)", re.DOTALL)


def main() -> int:
    """Write or check all pages."""
    parser = argparse.ArgumentParser(description="Write the generated parts of reference pages.")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    old = [page for page in sorted(PAGES.glob("*.md")) if renew(page.read_text()) != page.read_text()]
    for page in old:
        print(f"{page.relative_to(ROOT)} {'is not what the docstrings say' if options.check else 'written'}")
        if not options.check:
            page.write_text(renew(page.read_text()))
    return 1 if old and options.check else 0


def renew(text: str) -> str:
    """Give a page's text with its generated parts made anew."""

    def part(found: re.Match[str]) -> str:
        module = importlib.import_module(found[1])
        made = "\n".join(line for name in found[2].split(", ") for line in entry(module, name))
        return f"<!-- from {found[1]}: {found[2]} -->\n{made}\n\n<!-- end -->"

    return _PART.sub(part, text)


def entry(module: ModuleType, name: str) -> Iterator[str]:
    """Describe a function, or a class with its members."""
    target = getattr(module, name)
    yield from ("", f"## {name}", "")
    if not inspect.isclass(target):
        yield from described(name, target)
        return
    # What a class is made from is for its user only where the class says so.
    takes = re.search(r"^(Args|Attributes):$", inspect.getdoc(target) or "", re.MULTILINE)
    if takes and not issubclass(target, enum.Enum):
        yield from _code(f"{name}{signature(target, returns=False)}")
    yield from markdown(target)
    for key, member in vars(target).items():
        function = member.__func__ if isinstance(member, classmethod) else member
        if key.startswith("_") or not (inspect.isfunction(function) or isinstance(member, property)):
            continue
        yield from ("", f"### {name}.{key}", "")
        if isinstance(member, property):
            yield from markdown(member)
        else:
            yield from described(f"{name}.{key}", function, bound=True)


def described(name: str, function: Callable[..., object], *, bound: bool = False) -> Iterator[str]:
    """Give a function's signature and its docstring."""
    yield from _code(f"{name}{signature(function, bound=bound)}")
    yield from markdown(function)


def signature(function: Callable[..., object], *, bound: bool = False, returns: bool = True) -> str:
    """Write a signature as the source has it, one parameter a line if it is long."""
    found = inspect.signature(function)
    given = list(found.parameters.values())[1 if bound else 0 :]
    parts, keyword = [], False
    for each in given:
        if each.kind is each.KEYWORD_ONLY and not keyword:
            parts.append("*")
            keyword = True
        text = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "") + each.name
        # As written: what made the class may have evaluated it.
        annotation = vars(function).get("__annotations__", {}).get(each.name, each.annotation)
        if annotation is not each.empty:
            text += f": {annotation}"
        if each.default is not each.empty:
            default = repr(each.default)
            text += f" = {'...' if '<' in default or len(default) > WIDTH // 3 else default}"
        parts.append(text)
    to = f" -> {found.return_annotation}" if returns and found.return_annotation is not found.empty else ""
    line = f"({', '.join(parts)}){to}"
    return line if len(line) < WIDTH - 20 else "(\n" + "".join(f"    {part},\n" for part in parts) + f"){to}"


def markdown(target: object) -> Iterator[str]:
    """Turn a docstring in Google's style into Markdown."""
    lines = (inspect.getdoc(target) or "").replace("``", "`").split("\n")
    at = 0
    while at < len(lines):
        line = lines[at]
        indented = _indented(lines, at + 1)
        if heading := _SECTION.fullmatch(line):
            yield from _section(heading[1], textwrap.dedent("\n".join(indented)))
            at += len(indented)
        elif indented and (not line or line.endswith("::")):
            # A drawing, or code.
            yield from [line.removesuffix(":"), ""] if line else [""]
            yield from ["```text", *_flush(indented), "```"]
            at += len(indented)
        else:
            yield line
        at += 1


def _indented(lines: list[str], start: int) -> list[str]:
    """Give the lines from `start` that are indented, and the empty ones among them."""
    stop = start
    while stop < len(lines) and (not lines[stop] or lines[stop].startswith("    ")):
        stop += 1
    while stop > start and not lines[stop - 1]:
        stop -= 1
    return lines[start:stop]


def _section(title: str, text: str) -> Iterator[str]:
    if title == "Example":
        yield from ["```python", *(line[4:] for line in text.split("\n")), "```"]
    elif title == "Returns":
        yield f"**Returns**: {text}"
    elif title == "Behaviour":
        yield from [f"**{title}**:", "", text]
    else:
        yield from [f"**{title.replace('Args', 'Arguments')}**:", ""]
        # An item begins where a line is not indented.
        for item in re.split(r"\n+(?=\S)", text):
            named = _ITEM.fullmatch(item)
            words = " ".join((named[2] if named else item).split())
            yield f"- `{named[1]}`: {words}" if named else f"- {words}"


def _flush(lines: list[str]) -> list[str]:
    return textwrap.dedent("\n".join(lines)).strip("\n").split("\n")


def _code(text: str) -> Iterator[str]:
    yield from ["```python", text, "```", ""]


if __name__ == "__main__":
    sys.exit(main())
