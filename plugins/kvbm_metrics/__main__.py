"""The old form of `kvbm metrics copy`."""

from __future__ import annotations

from kvbm_core.command import moved

if __name__ == "__main__":
    moved("python -m kvbm_metrics", "metrics", "copy")
