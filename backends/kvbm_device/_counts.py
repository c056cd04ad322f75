"""What a device has copied, and how fast it can, for the metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CopyCounts"]


@dataclass(slots=True)
class CopyCounts:
    """Since the device was opened; its attribute `counts`. Each is written under a lock or by one thread."""

    gathered_bytes: int = 0
    """From the engine's memory to host memory."""
    scattered_bytes: int = 0
    """From host memory to the engine's."""
    staging_full_blocks: int = 0
    """Not gathered because all staging memory of the device was in use."""
    bytes_per_s: dict[tuple[str, str, bool], float] = field(default_factory=dict)
    """Of each way to copy, as calibrated: name, `device_to_host` or `host_to_device`, true if it is used."""
