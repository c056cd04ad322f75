"""Copies the dashboard, the alert rules, and what starts Prometheus and Grafana with them, into a folder."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Copy. What is there under the same names is replaced."""
    parser = argparse.ArgumentParser(prog="python -m kvbm_metrics", description=__doc__)
    parser.add_argument("folder", type=Path, help="is made if it is not there")
    folder = parser.parse_args(arguments).folder
    shutil.copytree(Path(__file__).with_name("deploy"), folder, dirs_exist_ok=True)
    print(f"copied to {folder}; now: cd {folder} && docker compose up -d")


if __name__ == "__main__":
    main()
