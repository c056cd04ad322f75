"""py-lmdb with no tier around it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from kvbm_core.bare import Bare
from kvbm_core.errors import TierError
from kvbm_core.localdir import unusable
from kvbm_lmdb._config import LmdbConfig
from kvbm_lmdb._directory import directory_of

__all__ = ["BareLmdb"]

_AT_ONCE = 16
"""Objects of a transaction."""


class BareLmdb(Bare):
    """One thread that puts and gets. See `Backend.bare`."""

    says = f"py-lmdb, {_AT_ONCE} objects a transaction, not synced"

    def __init__(self, config: LmdbConfig, nbytes: int, objects: int, depth: int) -> None:
        # Here, because py-lmdb need not be installed where this module is imported.
        import lmdb

        self._nbytes = nbytes
        self._path = directory_of(config).root / "kvbm-bare"
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._env = lmdb.open(str(self._path), map_size=4 * config.capacity, sync=False)
        except OSError as error:
            raise unusable(self._path, error, "lmdb") from error
        except lmdb.Error as error:
            raise TierError(f"{self._path}: {error}", tier="lmdb") from error

    def __repr__(self) -> str:
        return f"<BareLmdb {self._path}>"

    def store(self, contents: Sequence[memoryview]) -> None:
        """See `Bare.store`."""
        for start in range(0, len(contents), _AT_ONCE):
            with self._env.begin(write=True) as txn:
                for at, content in enumerate(contents[start : start + _AT_ONCE], start):
                    txn.put(_key(at), content[: self._nbytes])

    def load(self, targets: Sequence[memoryview]) -> None:
        """See `Bare.load`."""
        for start in range(0, len(targets), _AT_ONCE):
            with self._env.begin(buffers=True) as txn:
                for at, target in enumerate(targets[start : start + _AT_ONCE], start):
                    target[: self._nbytes] = txn.get(_key(at)) or b""

    def close(self) -> None:
        """See `Bare.close`."""
        self._env.close()
        shutil.rmtree(self._path, ignore_errors=True)


def _key(at: int) -> bytes:
    return at.to_bytes(32, "big")
