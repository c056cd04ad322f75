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

__all__ = ["NO_SEAL", "SEAL_BYTES", "SealTier", "make_seal", "why_damaged"]

logger = logging.getLogger("kvbm_core")

# magic, format version, seal bytes, payload bytes, namespace, key, then the checksum of payload
# and these fields. The seal follows the payload, so that the payload keeps its page alignment.
_FIELDS: Final = struct.Struct(f"<8sIIQ{NAMESPACE_BYTES}s{KEY_BYTES}s")
_MAGIC: Final = b"KVBMBLK\0"
_FORMAT_VERSION: Final = 1
_CHECKSUM_BYTES: Final = 16
SEAL_BYTES: Final = 96
"""Bytes that `SealTier` adds behind a payload (88 used, 8 zero)."""
NO_SEAL: Final = "it has no seal"
"""What `why_damaged` says of bytes that end in anything else."""


def make_seal(content: memoryview, key: BlockKey, namespace: Namespace) -> bytes:
    """Make the seal of an object.

    Args:
        content: Its bytes; the last `SEAL_BYTES` are the seal's room and do not count.
        key: 32 bytes.
        namespace: 16 bytes, the engine's.

    Returns:
        `SEAL_BYTES`, see `docs/reference/on-disk-format.md`.
    """
    payload_bytes = len(content) - SEAL_BYTES
    fields = _FIELDS.pack(_MAGIC, _FORMAT_VERSION, SEAL_BYTES, payload_bytes, namespace, key)
    checksum = xxhash.xxh3_128(content[:payload_bytes])
    checksum.update(fields)
    return (fields + checksum.digest()).ljust(SEAL_BYTES, b"\0")


def why_damaged(content: memoryview, key: BlockKey, namespace: Namespace) -> str:
    """Prove that bytes are those stored, under this key, in this namespace.

    Args:
        content: The object's bytes, with its seal.
        key: 32 bytes.
        namespace: 16 bytes, the engine's.

    Returns:
        Empty if they are; otherwise what does not fit, in words.
    """
    if len(content) <= SEAL_BYTES:
        return f"it has {len(content)} bytes, fewer than a seal and a payload"
    seal = content[-SEAL_BYTES:]
    if seal == make_seal(content, key, namespace):
        return ""
    magic, version, seal_bytes, payload_bytes, other_namespace, other_key = _FIELDS.unpack_from(seal)
    if magic != _MAGIC:
        return NO_SEAL
    if (version, seal_bytes) != (_FORMAT_VERSION, SEAL_BYTES):
        return f"its seal has format {version} and {seal_bytes} bytes"
    if payload_bytes != len(content) - SEAL_BYTES:
        return f"its seal is of {payload_bytes} bytes, and {len(content) - SEAL_BYTES} are there"
    if other_namespace != namespace:
        return f"its seal is of namespace {other_namespace.hex()}"
    if other_key != key:
        return f"its seal is of key {other_key.hex()}"
    return "its checksum does not fit"


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
                content[-SEAL_BYTES:] = make_seal(content, transfer.key, self._namespace)
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

    def _verify(self, completion: Completion) -> Completion:
        transfer = self._loads.pop(completion.ticket, None)
        if transfer is None or completion.outcome is not Outcome.DONE:
            return completion
        content = self._content(transfer)
        whole = completion.nbytes in (0, len(content))
        if whole and not why_damaged(content, transfer.key, self._namespace):
            return completion
        self._lines.error(
            "corrupt",
            "tier %s: block %s is not what was stored (load: corrupt). It is dropped there and computed; "
            "look whether the disk or the memory fails (dmesg, smartctl), or another program writes there",
            self._name, transfer.key.hex()[:16],
        )  # fmt: skip
        return Completion(completion.ticket, Outcome.FAILED, Reason.CORRUPT, "its seal does not fit")
