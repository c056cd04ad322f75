"""Deletes objects from a directory of LMDB's that no engine uses."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

import lmdb

from kvbm_core.errors import TierError
from kvbm_core.localdir import HeldFolder
from kvbm_lmdb._cut import STEP_PAGES, delete
from kvbm_lmdb._environment import open_store
from kvbm_lmdb._tree import TornError, read_meta

__all__ = ["remove_rows"]


def remove_rows(folder: Path, rows: Mapping[bytes, bytes]) -> int:
    """Delete the objects whose rows are as given, and say how many.

    Args:
        folder: Of a rank.
        rows: By key with namespace.

    Raises:
        TierError: An engine uses the folder, or the file cannot be written.
    """
    held = HeldFolder(folder, "lmdb")
    try:
        fd = held.open("data.mdb", os.O_RDWR)
        try:
            # A keeper whose engine was killed may be about to end.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _remove(fd, rows)
        finally:
            os.close(fd)
    except (OSError, lmdb.Error, TornError) as error:
        raise TierError(f"{folder}/data.mdb cannot be written: {error}", tier="lmdb") from error
    finally:
        held.release()


def _remove(fd: int, rows: Mapping[bytes, bytes]) -> int:
    # No larger a map than the engine's: a file that grew beyond it would be dropped at the next start.
    store, removed = open_store(fd, read_meta(fd).map_bytes, lambda: None), 0
    try:
        for key, row in rows.items():
            with store.env.begin(db=store.index) as txn:
                if txn.get(key) != row:
                    continue
            left = -1.0
            while left < 0:
                # As small as the engine's: each lists the pages that it frees in one page.
                with store.env.begin(write=True) as txn:
                    left = delete(store, txn, key, STEP_PAGES)
            removed += 1
        store.env.sync(True)
    finally:
        store.env.close()
    return removed
