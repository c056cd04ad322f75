"""What lies in a directory of slabs, read from the index of each rank, also beside an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvbm_core.block import Namespace, is_of_order
from kvbm_core.stored import Stored, stored_in_directory
from kvbm_gds._config import GdsConfig
from kvbm_gds._layout import ENTRY, FORMAT_VERSION, HEADER, HEADER_BYTES, MAGIC
from kvbm_gds._slab import directory_of, read_entries, sound_fields

__all__ = ["stored"]


def stored(config: GdsConfig) -> Sequence[Stored]:
    """See `Backend.stored`."""
    return stored_in_directory(directory_of(config), _count)


def _count(folder: Path, in_use: bool) -> Mapping[Namespace, tuple[int, int]] | None:
    counts: dict[Namespace, tuple[int, int]] = {}
    try:
        with (folder / "index").open("rb") as file:
            header = file.read(HEADER_BYTES)
            if len(header) < HEADER_BYTES or HEADER.unpack_from(header)[:2] != (MAGIC, FORMAT_VERSION):
                return None
            for _, raw in read_entries(file.fileno()):
                if fields := sound_fields(raw):
                    namespace, key, _, nbytes, _ = ENTRY.unpack(fields)
                    if is_of_order(key):
                        continue
                    objects, total = counts.get(namespace, (0, 0))
                    counts[namespace] = objects + 1, total + nbytes
    except FileNotFoundError:
        return {}
    except OSError:
        return None
    return counts
