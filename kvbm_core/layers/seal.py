"""The seal that follows a block's bytes: written on store, proved on load.

It finds damage, and needs no cryptographic digest for that: who could forge one writes the block as well.
Against strangers a codec signs, see `kvbm_crypt`.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Sequence
from typing import Final

import xxhash

from kvbm_core.block import KEY_BYTES, NAMESPACE_BYTES, BlockKey, Namespace
from kvbm_core.layers.forward import ForwardTier
from kvbm_core.log_limit import LogLimit
from kvbm_core.tier import Completion, Op, Outcome, Reason, Region, Tier, Transfer

__all__ = ["SEAL_BYTES", "SealTier"]

logger = logging.getLogger("kvbm_core")

# magic, format version, seal bytes, payload bytes, namespace, key, then the checksum of payload
# and these fields. The seal follows the payload, so that the payload keeps its page alignment.
_FIELDS: Final = struct.Struct(f"<8sIIQ{NAMESPACE_BYTES}s{KEY_BYTES}s")
_MAGIC: Final = b"KVBMBLK\0"
_FORMAT_VERSION: Final = 1
_CHECKSUM_BYTES: Final = 16
SEAL_BYTES: Final = 96
"""Bytes that `SealTier` adds behind a payload (88 used, 8 zero)."""


class SealTier(ForwardTier):
    """Proves on every load that the bytes are those stored, under this key, in this namespace.

    Behaviour:
        - A flipped bit, a short value, another key's value, another namespace's value: FAILED with
          reason CORRUPT. The log says so, once a minute.
    """

    def __init__(
        self,
        inner: Tier,
        namespace: Namespace,
        read: Callable[[Region], memoryview] | None = None,
        name: str = "",
    ) -> None:
        """Take a tier over.

        Args:
            inner: The tier.
            namespace: 16 bytes.
            read: Brings a region of device memory to the host, see `Stageable.read`.
            name: The tier's name, for the log.
        """
        super().__init__(inner)
        self._namespace = namespace
        self._read_device = read
        self._name = name
        self._lines = LogLimit(logger)
        self._loads: dict[int, Transfer] = {}

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        for transfer in transfers:
            if transfer.op is Op.STORE:
                content = self._content(transfer)
                content[-SEAL_BYTES:] = self._seal(transfer.key, content)
        self._inner.submit(transfers)
        self._loads.update((t.ticket, t) for t in transfers if t.op is Op.LOAD)

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        return [self._verify(completion) for completion in self._inner.poll()]

    def close(self) -> None:
        """See `Tier.close`."""
        super().close()
        self._lines.close()

    def _content(self, transfer: Transfer) -> memoryview:
        region = transfer.region
        assert region is not None
        if not region.on_device:
            return region.view()
        assert self._read_device is not None, "only a device that stages has such regions"
        return self._read_device(region)

    def _seal(self, key: BlockKey, content: memoryview) -> bytes:
        payload_bytes = len(content) - SEAL_BYTES
        fields = _FIELDS.pack(_MAGIC, _FORMAT_VERSION, SEAL_BYTES, payload_bytes, self._namespace, key)
        checksum = xxhash.xxh3_128(content[:payload_bytes])
        checksum.update(fields)
        return (fields + checksum.digest()).ljust(SEAL_BYTES, b"\0")

    def _verify(self, completion: Completion) -> Completion:
        transfer = self._loads.pop(completion.ticket, None)
        if transfer is None or completion.outcome is not Outcome.DONE:
            return completion
        content = self._content(transfer)
        whole = completion.nbytes in (0, len(content))
        if whole and content[-SEAL_BYTES:] == self._seal(transfer.key, content):
            return completion
        self._lines.error(
            "corrupt",
            "tier %s: block %s is not what was stored (load: corrupt). It is dropped there and computed; "
            "look whether the disk or the memory fails (dmesg, smartctl), or another program writes there",
            self._name, transfer.key.hex()[:16],
        )  # fmt: skip
        return Completion(completion.ticket, Outcome.FAILED, Reason.CORRUPT, "its seal does not fit")
