"""What the demo is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What the user asked for, checked."""

    model: str | None
    """A folder or a model's id; None for the demo's own model."""
    prompt: str | None
    """Sent as it stands; None for the story and its question."""
    cpu_capacity: str
    lmdb_capacity: str
    lmdb_path: Path | None
    """None for a folder that is removed afterwards."""
    max_tokens: int
    port: int
    keep: bool
    """Leave the demo's folder, with LMDB's files and the server's logs."""
