"""What namespaces are made of, as objects beside the blocks: written once, read by whoever starts empty.

    <url>/v1/facts/r<rank>/<namespace>.json    see `kvbm_core.namespace_facts`

They lie together, so that a start lists them in one request; each rank's apart, so that like is compared with
like.
"""

from __future__ import annotations

import heapq
import math
import re
import time
from typing import Final

from kvbm_core.log_limit import Log
from kvbm_core.namespace_facts import MOST_BYTES, decode_facts, encode_facts, why_empty
from kvbm_core.tier import TierContext
from kvbm_remote._faults import classify
from kvbm_remote._kinds import CORRUPT, MISSING
from kvbm_remote._stores import FACTS, Store

__all__ = ["RemoteFacts", "namespace_of"]

_PATH: Final = re.compile(rf"{FACTS}/r\d+/([0-9a-f]{{32}})\.json", re.ASCII)
_AGAIN_S: Final = 3600.0
"""While blocks are stored it is looked as often: a collector deletes facts of a namespace without blocks."""
_MOST_READ: Final = 16


class RemoteFacts:
    """The facts of a tier's namespace in its store.

    Args:
        store: Where.
        context: The tier's. Without facts nothing is done.
        place: The store, for lines.
        log: Where lines go.
        read_only: Write nothing.
    """

    def __init__(self, store: Store, context: TierContext, place: str, log: Log, *, read_only: bool) -> None:
        self._store = store
        self._context = context
        self._place = place
        self._log = log
        self._folder = f"{FACTS}/r{context.rank}"
        self._path = f"{self._folder}/{context.namespace.hex()}.json"
        self.due_s = 0.0 if context.facts and not read_only else math.inf
        """When `write` has something to do, on the clock of `time.monotonic`. For the tier's thread alone."""

    def __repr__(self) -> str:
        return f"<RemoteFacts {self._place} {self._path}>"

    def begin(self) -> None:
        """Note that `write` is about to be run."""
        self.due_s = time.monotonic() + _AGAIN_S

    async def look(self) -> None:
        """Say what was changed if nobody has stored anything of this namespace here."""
        if not self._context.facts:
            return
        found = [
            (entry.modified_s, entry.path)
            async for entry in self._store.entries(self._folder)
            if namespace_of(entry.path)
        ]
        if any(path == self._path for _, path in found):
            return
        others = [decode_facts(await self._get(path)) for _, path in heapq.nlargest(_MOST_READ, found)]
        here = decode_facts(encode_facts(self._context.namespace, self._context.facts))
        if said := why_empty(here or {}, others, self._place):
            self._log.info("%s", said)

    async def write(self) -> None:
        """Write the facts if they are not there, or damaged."""
        if decode_facts(await self._get(self._path)) is None:
            content = encode_facts(self._context.namespace, self._context.facts)
            await self._store.put(self._path, content, overwrite=True)

    async def _get(self, path: str) -> bytes:
        """Read an object; nothing if it is not there, or can be none of these."""
        try:
            return bytes(await self._store.get(path, memoryview(bytearray(MOST_BYTES))))
        except Exception as error:
            if classify(error).kind in (CORRUPT, MISSING):
                return b""
            raise


def namespace_of(path: str) -> str:
    """Give the namespace, in digits, whose facts a path has; empty if it has none."""
    match = _PATH.fullmatch(path)
    return match[1] if match else ""
