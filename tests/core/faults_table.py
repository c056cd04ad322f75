"""Writes the table of planted faults: each, and the test of the suite that finds it.

python tests/core/faults_table.py             write docs/reference/faults.md
python tests/core/faults_table.py --check     exit status 1 if the page says anything else
"""

from __future__ import annotations

import sys
from pathlib import Path

import broken_codecs
import broken_coordinators
import broken_guests
import broken_policies

__all__ = ["FAULTS", "PAGE", "text"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "faults.md"


def _sentence(fault: str) -> str:
    return " ".join(fault.strip().split("\n\n")[0].split())


FAULTS = {
    "TierSuite": [
        (each.backend.open.__name__, _sentence(each.fault), each.found_by) for each in broken_guests.BROKEN
    ],
    **{
        suite: [(made.__name__, _sentence(made.__doc__ or ""), test) for made, test in module.BROKEN]
        for suite, module in {
            "CodecSuite": broken_codecs,
            "PolicySuite": broken_policies,
            "CoordinatorSuite": broken_coordinators,
        }.items()
    },
}
"""Of each suite: name of the class, what is wrong with it, and the test that must find it."""


def text() -> str:
    """Make the page."""
    count = sum(map(len, FAULTS.values()))
    parts = [
        "# Planted faults",
        f"{count} tiers, codecs, policies and coordinators that are wrong on purpose, each in one way, and\n"
        "the test that must find it. The tests of this repository run that test on each and insist that it\n"
        "fails. They are in `tests/core/broken_*.py`, and no part of the wheel.\n"
        "[Testing](testing.md) describes the suites.\n"
        "`make faults` writes this page.",
    ]
    for suite, faults in FAULTS.items():
        rows = "\n".join(f"| `{name}` | {fault} | `{test}` |" for name, fault, test in faults)
        parts += [
            f"## `{suite}`: {len(faults)}",
            f"| class | what is wrong with it | test that finds it |\n|---|---|---|\n{rows}",
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != text())
    PAGE.write_text(text())
    print(f"{PAGE}: {sum(map(len, FAULTS.values()))} faults")
