"""What lies in a directory of LMDB's, read from the index of each rank; not while an engine uses it."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvbm_core.block import NAMESPACE_BYTES, Namespace
from kvbm_core.localdir import LocalDirectory
from kvbm_core.stored import Stored, stored_in_directory
from kvbm_lmdb._config import LmdbConfig
from kvbm_lmdb._place import SEQUENCE, is_whole, nbytes_of

__all__ = ["stored"]


def stored(config: LmdbConfig) -> Sequence[Stored]:
    """See `Backend.stored`."""
    return stored_in_directory(LocalDirectory(config.path, "lmdb"), _count)


def _count(folder: Path, in_use: bool) -> Mapping[Namespace, tuple[int, int]] | None:
    if in_use:
        return None
    file = folder / "data.mdb"
    if file.is_symlink() or not file.is_file() or not file.stat().st_size:
        return {}
    # Here, because py-lmdb need not be installed where this module is imported.
    import lmdb

    from kvbm_lmdb._environment import DAMAGE

    counts: dict[Namespace, tuple[int, int]] = {}
    try:
        with lmdb.open(str(file), subdir=False, readonly=True, lock=False, max_dbs=2) as env:
            # Reading a page beyond the end of the file would end this process.
            nbytes = file.stat().st_size
            if (env.info()["last_pgno"] + 1) * mmap.PAGESIZE > nbytes:
                return None
            with env.begin(db=env.open_db(b"index", create=False)) as txn:
                for full_key, row in txn.cursor():
                    if is_whole(full_key, row, nbytes):
                        objects, total = counts.get(full_key[:NAMESPACE_BYTES], (0, 0))
                        counts[full_key[:NAMESPACE_BYTES]] = (
                            objects + 1, total + nbytes_of(row[SEQUENCE.size :]),
                        )  # fmt: skip
    except (lmdb.Error, OSError, *DAMAGE):
        return None
    return counts
