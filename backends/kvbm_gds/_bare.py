"""A file past the page cache with no tier around it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from kvbm_core.bare import Bare
from kvbm_core.localdir import FILE_MODE, unusable
from kvbm_core.trust import open_direct
from kvbm_gds._config import GdsConfig
from kvbm_gds._layout import in_pages
from kvbm_gds._slab import directory_of

__all__ = ["BareFile"]


class BareFile(Bare):
    """As many threads as objects are on their way, that call ``pwrite`` and ``pread``. See `Backend.bare`."""

    says = "pwrite and pread"

    def __init__(self, config: GdsConfig, nbytes: int, objects: int, depth: int) -> None:
        self._slot_bytes = in_pages(nbytes)
        self._pool = ThreadPoolExecutor(depth)
        self._path: Path = directory_of(config).root / "kvbm-bare"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd, direct = open_direct(
                partial(os.open, mode=FILE_MODE), str(self._path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            )
            # Set aside at open, as a tier does.
            os.posix_fallocate(self._fd, 0, objects * self._slot_bytes)
        except OSError as error:
            raise unusable(self._path, error, "gds") from error
        if direct:
            self.says = "pwrite and pread past the page cache"

    def __repr__(self) -> str:
        return f"<BareFile {self._path}>"

    def store(self, contents: Sequence[memoryview]) -> None:
        """See `Bare.store`."""
        self._each(lambda content, at: os.pwrite(self._fd, content, at), contents)

    def load(self, targets: Sequence[memoryview]) -> None:
        """See `Bare.load`."""
        self._each(lambda target, at: os.preadv(self._fd, [target], at), targets)

    def close(self) -> None:
        """See `Bare.close`."""
        self._pool.shutdown()
        os.close(self._fd)
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _each(self, move: Callable[[memoryview, int], int], buffers: Sequence[memoryview]) -> None:
        places = range(0, len(buffers) * self._slot_bytes, self._slot_bytes)
        try:
            list(self._pool.map(move, [buffer[: self._slot_bytes] for buffer in buffers], places))
        except OSError as error:
            raise unusable(self._path, error, "gds") from error
