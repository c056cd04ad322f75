"""Builds the documentation's site with Sphinx, strictly: a link that leads nowhere fails the build.

    python tools/make_site.py                  into site/
    python tools/make_site.py --to FOLDER

The pages are those of the repository. A copy gets what a site needs: a table of contents, made from the index
of docs/README.md, and links that lead to the repository where they leave the site.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
PROJECT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")

REST = {"Backends and codecs": "backends/", "Notes of changes": "changes/", "Project": ""}
"""Sections that the index has no list of, and where their pages lie in the site."""

CONF = """\
project = "kvbm-core"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
html_theme = "furo"
html_title = "kvbm-core"
html_copy_source = html_show_copyright = False
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
"""

_LINK = re.compile(r"^```.*?^```$|\]\((?!https?://|mailto:|#)([^)\s#]+)([^)\s]*)\)", re.MULTILINE | re.DOTALL)
"""A fenced block, in which nothing is a link; or a relative link, and its anchor."""
_SECTION = re.compile(r"^\*\*(.+?)\*\*:.*\n\n((?:(?:- |  ).*\n)+)", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the site and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=ROOT / "site", help="folder (default: site)")
    options = parser.parse_args(arguments)
    source = ROOT / "build" / "site"
    shutil.rmtree(source, ignore_errors=True)
    prepare(ROOT, source)
    return build(source, options.to)


def build(source: Path, target: Path) -> int:
    """Build a folder of pages; every warning is an error, and all of them are shown."""
    (source / "conf.py").write_text(CONF)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    return subprocess.run([*command, str(source), str(target)], check=False).returncode


def prepare(root: Path, folder: Path) -> None:
    """Copy the pages of a repository into a folder, as a site wants them."""
    places = pages(root)
    urls = tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]
    for page, place in places.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(relinked(page, root, places, f"{urls['Source']}/blob/main/"))
    shutil.copytree(root / "docs" / "images", folder / "images")
    with (folder / "index.md").open("a") as index:
        index.write(contents(root, places))


def pages(root: Path) -> dict[Path, str]:
    """Find the repository's pages, and say where in the site each lies."""
    places = {page: page.relative_to(root / "docs").as_posix() for page in (root / "docs").rglob("*.md")}
    places[root / "docs" / "README.md"] = "index.md"
    places |= {page: f"backends/{page.parent.name}.md" for page in (root / "backends").glob("*/README.md")}
    return places | {root / name: name.lower() for name in PROJECT_PAGES}


def relinked(page: Path, root: Path, places: Mapping[Path, str], repository: str) -> str:
    """Give a page's text with links as they are from its place in the site."""

    def lead(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0]
        target = Path(os.path.normpath(page.parent / found[1]))
        if target in places:
            to = os.path.relpath(places[target], Path(places[page]).parent)
        elif target.is_relative_to(root / "docs" / "images"):
            to = os.path.relpath(target.relative_to(root / "docs"), Path(places[page]).parent)
        else:
            to = f"{repository}{target.relative_to(root).as_posix()}"
        return f"]({to}{found[2]})"

    return _LINK.sub(lead, page.read_text())


def contents(root: Path, places: Mapping[Path, str]) -> str:
    """Make the table of contents: the lists of the index, and what it has no list of."""
    index = root / "docs" / "README.md"
    sections = {
        title: [
            places[Path(os.path.normpath(index.parent / link))] for link in re.findall(r"\]\(([^)#]+)", text)
        ]
        for title, text in _SECTION.findall(index.read_text())
    }
    listed = {place for section in sections.values() for place in section}
    others = sorted(set(places.values()) - listed - {"index.md"})
    for title, start in REST.items():
        sections[title] = [place for place in others if place.startswith(start)]
        others = [place for place in others if not place.startswith(start)]
    return "".join(
        "\n```{toctree}\n:hidden:\n:caption: " + title + "\n\n" + "\n".join(section) + "\n```\n"
        for title, section in sections.items()
    )


if __name__ == "__main__":
    sys.exit(main())
