"""The pages of the documentation, the fenced blocks in them, and the commands in these."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
READMES = sorted((ROOT / "backends").glob("*/README.md"))

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_GENERATED = re.compile(r"^<!-- from .*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"'[^']*'|\"[^\"]*\"|([ \t]+#[^\n]*)")
_PUNCTUATION = "|&;()<>\n"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language and what stands behind that, its text, and where it begins."""

    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    text: str
    generated: bool
    """`tools/make_reference.py` writes it, and a test compares."""

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    def mark(self, name: str) -> str | None:
        """The value of ``name=value``, if the block has it."""
        return dict(mark.split("=", 1) for mark in self.marks if "=" in mark).get(name)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in its order."""
    text = page.read_text()
    generated = [found.span() for found in _GENERATED.finditer(text)]
    return [
        Block(
            page, text[: found.start()].count("\n") + 1, *_info(found[1]), found[2],
            any(start < found.start() < end for start, end in generated),
        )
        for found in FENCE.finditer(text)
    ]  # fmt: skip


def _info(line: str) -> tuple[str, tuple[str, ...]]:
    language, *marks = line.split() or [""]
    return language, tuple(marks)


def files_of(page: Path) -> dict[str, str]:
    """The files that a page writes; blocks of one file follow each other, as the reader is told."""
    files: dict[str, list[str]] = {}
    for block in blocks(page):
        if name := block.mark("file"):
            files.setdefault(name, []).append(block.text)
    return {name: "\n".join(texts) for name, texts in files.items()}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell's lines. With a prompt, ``$``, other lines are its answers."""
    text = text.replace("\\\n", " ")
    if re.search(r"^\$ ", text, re.MULTILINE):
        text = "\n".join(re.findall(r"^\$ (.*)$", text, re.MULTILINE))
    text = _COMMENT.sub(lambda found: "" if found[1] else found[0], text)
    reader = shlex.shlex(text, posix=True, punctuation_chars=_PUNCTUATION)
    reader.whitespace, reader.commenters, reader.whitespace_split = " \t", "", True
    words: list[str] = []
    into_file = False
    for word in reader:
        if set(word) <= set(_PUNCTUATION):
            into_file = word in (">", ">>", "<")
            if words and not into_file:
                yield words
                words = []
        elif into_file:
            into_file = False
        else:
            words.append(word)
    if words:
        yield words
