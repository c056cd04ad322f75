"""What this machine has of GPUDirect Storage."""

from __future__ import annotations

import ctypes
from pathlib import Path

__all__ = ["has_nvidia_fs", "why_gds_is_unavailable"]


def why_gds_is_unavailable() -> str:
    """Say why GPUDirect Storage cannot work here, without touching it; empty if it might."""
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        return "there is no NVIDIA device"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver (libcuda.so.1)"
    return ""


def has_nvidia_fs() -> bool:
    """Say whether the kernel can move data between the disk and the GPU without host memory."""
    return Path("/proc/driver/nvidia-fs").exists()
