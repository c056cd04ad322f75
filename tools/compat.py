"""Runs the identity test against several versions of vLLM, each in an environment of its own.

    python3 tools/compat.py                     the versions that are promised
    python3 tools/compat.py 0.32.0 0.33.0       others

Prints a table, and fails if one version failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


def main(versions: Sequence[str]) -> int:
    """Try each version and return the exit status."""
    results = [try_version(version) for version in versions]
    print(f"\n{'vLLM':<10} {'passed':<24} {'seconds':>7}")
    for result in results:
        print(f"{result.version:<10} {result.outcome:<24} {result.duration_s:>7.0f}")
    return 0 if all(result.passed for result in results) else 1


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
    sys.exit(main(sys.argv[1:] or VERSIONS))
