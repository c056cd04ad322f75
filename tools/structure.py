"""Draws the structure of the product code from its imports: wings as boxes, imports as arrows.

    python tools/structure.py                  a Mermaid diagram, as in docs/explanation/architecture.md
    python tools/structure.py --circles        the circles among files; exit status 1 if there is one

Only the standard library is used, and nothing of the project is imported.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOP = (("kvbm_core", "."), ("backends", "backends"), ("plugins", "plugins"))
"""Folders with product code, and where their packages are imported from."""


def main() -> int:
    """Print the diagram, or the circles."""
    parser = argparse.ArgumentParser(description="Draw the structure of the product code from its imports.")
    parser.add_argument("--circles", action="store_true", help="print circles among files in place of it")
    options = parser.parse_args()
    arrows = imports(ROOT)
    if not options.circles:
        print(diagram(ROOT, arrows))
        return 0
    circle = circle_of(arrows)
    print(" -> ".join(circle) or "no circle")
    return 1 if circle else 0


def modules(root: Path) -> dict[str, Path]:
    """Find the product's modules: dotted name to file."""
    found = {}
    for folder, origin in TOP:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / origin).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> dict[str, set[str]]:
    """Read which module imports which; imports for type checkers alone count, too."""
    known = modules(root)
    return {
        name: {each for each in _imported(ast.parse(path.read_text()), known) if each != name}
        for name, path in known.items()
    }


def _imported(tree: ast.Module, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner
                elif node.module in known:
                    yield node.module


def circle_of(arrows: Mapping[str, set[str]]) -> list[str]:
    """Give a circle among files, its first file once more at its end; empty if there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def wing_of(name: str, known: Mapping[str, Path]) -> str:
    """Give the folder that a module lies in, as a dotted name."""
    return name if known[name].name == "__init__.py" else name.rpartition(".")[0]


def diagram(root: Path, arrows: Mapping[str, set[str]]) -> str:
    """Draw wings with their files, and an arrow where a file of one imports a file of another."""
    known = modules(root)
    files: dict[str, list[str]] = {}
    for name, path in known.items():
        if path.name != "__init__.py":
            files.setdefault(wing_of(name, known), []).append(path.stem)
    lines_out = ["flowchart TD"]
    for wing, stems in files.items():
        rows = [", ".join(stems[at : at + 6]) for at in range(0, len(stems), 6)]
        lines_out.append(f'    {_id(wing)}["<b>{wing}</b><br>{"<br>".join(rows)}"]')
    between = {(wing_of(a, known), wing_of(b, known)) for a, there in arrows.items() for b in there}
    lines_out += [f"    {_id(a)} --> {_id(b)}" for a, b in sorted(between) if a != b and b in files]
    return "\n".join(lines_out)


def _id(wing: str) -> str:
    return wing.replace(".", "_")


if __name__ == "__main__":
    sys.exit(main())
