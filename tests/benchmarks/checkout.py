"""Lets a benchmark run from a checkout that is not installed: import it first.

It needs the packages that the core depends on, `lmdb` and `fsspec`; neither vLLM nor torch.
"""

from __future__ import annotations

import sys
import tempfile
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if not entry_points(group="kvbm_core"):
    sys.path[:0] = [str(ROOT), str(ROOT / "backends"), str(ROOT / "plugins")]
    place = Path(tempfile.mkdtemp(prefix="kvbm-checkout-"))
    facts = place / "kvbm_core-0.dist-info"
    facts.mkdir()
    lines = []
    for group, points in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "entry-points"
    ].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (facts / "entry_points.txt").write_text("\n".join(lines))
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: kvbm-core\nVersion: 0\n")
    sys.path.insert(0, str(place))
