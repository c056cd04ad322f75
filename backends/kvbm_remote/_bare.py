"""fsspec with no tier around it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvbm_core.bare import Bare
from kvbm_core.errors import TierError
from kvbm_remote._config import RemoteConfig, shown_url
from kvbm_remote._faults import classify

__all__ = ["BareFsspec"]


class BareFsspec(Bare):
    """The URL's file system of fsspec: a call for each object, several at once. See `Backend.bare`."""

    says = "fsspec"

    def __init__(self, config: RemoteConfig, nbytes: int, objects: int, depth: int) -> None:
        self._nbytes = nbytes
        self._shown = shown_url(config.url)
        self._pool = ThreadPoolExecutor(min(depth, config.max_in_flight))
        try:
            import fsspec

            url = f"{config.url.rstrip('/')}/kvbm-bare-{uuid.uuid4().hex}"
            self._fs, self._root = fsspec.core.url_to_fs(url, **config.storage_options)
            with contextlib.suppress(NotImplementedError):
                self._fs.makedirs(self._root, exist_ok=True)
        except ImportError as error:
            raise TierError(
                f"{self._shown}: its bare client is not installed: {error}", tier="remote"
            ) from None
        except Exception as error:  # noqa: BLE001 - a client's error may quote a password, so it is not chained
            raise TierError(f"{self._shown}: {classify(error)}", tier="remote") from None
        self.says = f"{type(self._fs).__name__} of fsspec"

    def __repr__(self) -> str:
        return f"<BareFsspec {self._shown}>"

    def store(self, contents: Sequence[memoryview]) -> None:
        """See `Bare.store`."""
        self._each(lambda path, content: self._fs.pipe_file(path, bytes(content[: self._nbytes])), contents)

    def load(self, targets: Sequence[memoryview]) -> None:
        """See `Bare.load`."""

        def load(path: str, target: memoryview) -> None:
            target[: self._nbytes] = self._fs.cat_file(path)

        self._each(load, targets)

    def close(self) -> None:
        """See `Bare.close`."""
        self._pool.shutdown()
        with contextlib.suppress(Exception):
            self._fs.rm(self._root, recursive=True)

    def _each(self, move: Callable[[str, memoryview], Any], buffers: Sequence[memoryview]) -> None:
        try:
            list(self._pool.map(move, [f"{self._root}/{at}" for at in range(len(buffers))], buffers))
        except Exception as error:  # noqa: BLE001 - as above
            raise TierError(f"{self._shown}: {classify(error)}", tier="remote") from None
