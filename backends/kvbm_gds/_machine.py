"""What this machine has: files past the page cache, and GPUDirect Storage."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["has_nvidia_fs", "open_direct", "why_gds_is_unavailable"]


def open_direct(
    open_file: Callable[[int], int], flags: int = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
) -> tuple[int, bool]:
    """Open a file past the page cache where the file system can.

    Args:
        open_file: Opens it with the flags that it is given.
        flags: As of `os.open`, but for the page cache.

    Returns:
        The file descriptor, and whether it is past the page cache.
    """
    try:
        return open_file(flags | os.O_DIRECT), True
    except OSError:
        return open_file(flags), False


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
