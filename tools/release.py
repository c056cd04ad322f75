"""Builds what is uploaded in a release, checks it, and refuses what is not ready. Uploads nothing.

python tools/release.py                the commit of a tag, see docs/how-to/release.md
python tools/release.py --rehearse     any commit: what would be refused is said, and the rest is done
"""

from __future__ import annotations

import argparse
import ast
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

from commands import CommandError, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PLACEHOLDER = "example.org"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the commit, build, check what was built, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="go on where this commit cannot be released")
    options = parser.parse_args(arguments)
    version = version_of(ROOT)
    reasons = why_not(ROOT, version)
    for reason in reasons:
        print(f"release: {version} cannot be released: {reason}", file=sys.stderr)
    if reasons and not options.rehearse:
        return 1
    try:
        files = build(version)
        run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)])
        print("release: twine takes both; now the tests of the unpacked sdist, some minutes", flush=True)
        run([sys.executable, "-m", "pytest", "-q", "-m", "soak", "tests/test_wheel.py"])
    except CommandError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    print(f"release: {' and '.join(str(path.relative_to(ROOT)) for path in files)} are sound")
    print("release: this was a rehearsal" if reasons else f"release: next, twine upload dist/*{version}*")
    return 0


def version_of(root: Path) -> str:
    """Read the version where it is written, without importing what may lack its requirements."""
    for node in ast.parse((root / "kvbm_core" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return str(ast.literal_eval(node.value))
    raise CommandError("kvbm_core/__init__.py has no __version__")


def why_not(root: Path, version: str) -> list[str]:
    """List what keeps a commit from being released."""
    reasons = []
    urls = tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]
    if PLACEHOLDER in urls["Source"]:
        reasons.append(f"pyproject.toml: project.urls: {urls['Source']} is a placeholder; write the address")
    if f"\n## [{version}] - " not in (root / "CHANGELOG.md").read_text():
        reasons.append(f"CHANGELOG.md has no heading '## [{version}] - YEAR-MONTH-DAY'")
    if _git(root, "status", "--porcelain"):
        reasons.append("there are changes that are not committed")
    if f"v{version}" not in _git(root, "tag", "--points-at", "HEAD").split():
        reasons.append(f"no tag v{version} on this commit; git tag -a v{version}")
    return reasons


def build(version: str) -> list[Path]:
    """Build the sdist, and the wheel from what is unpacked from it; give both."""
    shutil.rmtree(DIST, ignore_errors=True)
    hatchling = [sys.executable, "-m", "hatchling", "build"]
    run([*hatchling, "-t", "sdist", "-d", str(DIST)], cwd=ROOT)
    sdist = DIST / f"kvbm_core-{version}.tar.gz"
    unpacked = ROOT / "build" / f"kvbm_core-{version}"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked.parent, filter="data")
    run([*hatchling, "-t", "wheel", "-d", str(DIST)], cwd=unpacked)
    return [sdist, *DIST.glob("*.whl")]


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
