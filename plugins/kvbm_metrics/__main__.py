"""Copies the dashboard, the alert rules, and what starts Prometheus and Grafana with them, into a folder."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Final

_DEPLOY: Final = Path(__file__).with_name("deploy")
_DIGESTS: Final = ".kvbm_metrics.json"
"""In the folder: of each file the digest of what was written there."""


def main(arguments: list[str] | None = None) -> None:
    """Copy. A file that somebody has edited stays, and the new text is put beside it."""
    parser = argparse.ArgumentParser(prog="python -m kvbm_metrics", description=__doc__)
    parser.add_argument("folder", type=Path, help="is made if it is not there; files edited there stay")
    folder: Path = parser.parse_args(arguments).folder
    written = _read_digests(folder / _DIGESTS)
    for source in sorted(path for path in _DEPLOY.rglob("*") if path.is_file()):
        name = source.relative_to(_DEPLOY).as_posix()
        text, target = source.read_bytes(), folder / name
        if _edited(target, text, written.get(name)):
            new = target.with_name(f"{target.name}.new")
            new.write_bytes(text)
            print(f"{target} was edited and is left as it is; the text of this version is {new}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)
        written[name] = _digest(text)
    (folder / _DIGESTS).write_text(json.dumps(written, indent=2) + "\n")
    print(f"copied to {folder}; now: cd {folder} && docker compose up -d")


def _edited(target: Path, text: bytes, written: str | None) -> bool:
    """Say whether a file has neither this version's text nor that which was written there."""
    return target.exists() and _digest(target.read_bytes()) not in (_digest(text), written)


def _read_digests(file: Path) -> dict[str, str]:
    """Read what was written. A record that cannot be read is none: then what differs counts as edited."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


if __name__ == "__main__":
    main()
