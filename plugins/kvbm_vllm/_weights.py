"""Tells weights apart by what is in their files.

Two checkpoints under one path must never share blocks: a fine-tuned model answers from its own KV. BLAKE3,
a checksum, because who offers a model to others could otherwise make a second one with the same name. It is a
cryptographic digest like the SHA-256 of keys, which takes four times as long; and vLLM brings it.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

__all__ = ["UNKNOWN", "AdapterDigests", "digest_files", "find_files", "weights_digest"]

logger = logging.getLogger("kvbm_vllm")

UNKNOWN: Final = "unknown:"
"""How the name of weights begins whose files were not found."""

_PART_BYTES: Final = 64 << 20
_READ_BYTES: Final = 1 << 20
_THREADS: Final = 8
_PROGRESS_S: Final = 10.0
_WEIGHTS: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz"})
_BESIDE: Final = re.compile(
    r".*\.py|.*\.index\.json|(pre)?processor_config\.json|video_preprocessor_config\.json"
    r"|(hf_quant|quantize|quant)_config\.json"
)
"""Files that say how weights are read, or what images become: code, lists of shards, settings."""
_CONTENT_NAME: Final = re.compile(r"[0-9a-f]{64}")
"""The SHA-256 of a large file in the hub's cache. A small one's is a SHA-1, which can be made to collide."""


def weights_digest(model: str, revision: str | None, weights_id: str | None) -> str:
    """Name a model's weights.

    Args:
        model: A folder, a file, or an identifier of the Hugging Face hub that is in the local cache.
        revision: Of the hub's repository.
        weights_id: What the operator calls them; then no file is read.

    Returns:
        Equal for equal contents wherever the folder lies. If the files cannot be found, a name that
        no other process has, so that nothing is shared with a later start.
    """
    if weights_id is not None:
        return f"id:{weights_id}"
    files = find_files(model, revision)
    if not files:
        logger.warning(
            "the weight files of %s were not found, so blocks are not reused after a restart; "
            "set weights_id in the connector's configuration to a name that changes with the weights",
            model,
        )
        return f"{UNKNOWN}{os.urandom(16).hex()}"
    began_s = time.monotonic()
    digest = digest_files(files, model)
    logger.info("read %d files of %s in %.1f s: %s", len(files), model, time.monotonic() - began_s, digest)
    return digest


def find_files(model: str, revision: str | None = None, *, adapter: bool = False) -> dict[str, Path]:
    """List the files that make a model, by their names in its folder; nothing if it is not on this machine.

    Args:
        model: As in `weights_digest`.
        revision: Likewise.
        adapter: It is a LoRA adapter: its settings scale the weights.
    """
    path = Path(model)
    if path.is_file():
        return {"": path}
    if not path.is_dir():
        snapshot = _hub_snapshot(model, revision)
        if snapshot is None:
            return {}
        path = snapshot
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    if not any(file.suffix in _WEIGHTS for file in found.values()):
        return {}
    return {
        name: file
        for name, file in sorted(found.items())
        if file.suffix in _WEIGHTS or _BESIDE.fullmatch(file.name) or (adapter and file.suffix == ".json")
    }


def digest_files(files: Mapping[str, Path], model: str = "") -> str:
    """Digest names and contents, reading with several threads.

    A file that the hub's cache stores under its own SHA-256 is named by that and not read. A line each ten
    seconds says how much of the `model` was read.
    """
    whole, read_bytes, said_s = blake3(), 0, time.monotonic()
    targets = {name: file.resolve() for name, file in files.items()}
    total_bytes = sum(file.stat().st_size for file in targets.values() if not _content_name(file))
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, parts in [(name, _parts(file, pool)) for name, file in targets.items()]:
            # With their lengths, so that nothing can move from one field, or one file, to the next.
            for field in (os.fsencode(name), len(parts).to_bytes(8, "little")):
                whole.update(len(field).to_bytes(8, "little") + field)
            for part in parts:
                digest, part_bytes = part.result() if isinstance(part, Future) else (part, 0)
                whole.update(digest)
                read_bytes += part_bytes
                if time.monotonic() - said_s >= _PROGRESS_S:
                    said_s = time.monotonic()
                    logger.info(
                        "reading the files of %s: %.1f of %.1f GB", model, read_bytes / 1e9, total_bytes / 1e9
                    )
    return f"blake3:{whole.hexdigest()}"


def _content_name(file: Path) -> bytes:
    """Give the digest that is the name of a file in the hub's cache; nothing for another file."""
    is_named = file.parent.name == "blobs" and _CONTENT_NAME.fullmatch(file.name)
    return bytes.fromhex(file.name) if is_named else b""


def _parts(file: Path, pool: ThreadPoolExecutor) -> list[bytes | Future[tuple[bytes, int]]]:
    """Give what stands for a file: 32 bytes for each part, or what will be these and the part's length."""
    if name := _content_name(file):
        return [name]
    starts = range(0, max(file.stat().st_size, 1), _PART_BYTES)
    return [pool.submit(_digest_part, file, start) for start in starts]


def _digest_part(file: Path, start: int) -> tuple[bytes, int]:
    digest, room, done_bytes = blake3(), bytearray(_READ_BYTES), 0
    view = memoryview(room)
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while done_bytes < _PART_BYTES:
            count = stream.readinto(view[: _PART_BYTES - done_bytes])
            if not count:
                break
            digest.update(view[:count])
            done_bytes += count
    return digest.digest(), done_bytes


def _hub_snapshot(model: str, revision: str | None) -> Path | None:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None


class AdapterDigests:
    """Names LoRA adapters by their weights and configuration; reads each adapter once."""

    def __init__(self) -> None:
        self._digests: dict[tuple[str, int, str], str] = {}

    def digest(self, lora: Any) -> str:
        """Name an adapter. One whose files are not here gets a name no other process has."""
        key = (lora.lora_name, lora.lora_int_id, lora.lora_path)
        if key not in self._digests or getattr(lora, "load_inplace", False):
            self._digests[key] = _adapter_digest(lora.lora_path)
        return self._digests[key]


def _adapter_digest(path: str) -> str:
    try:
        files = find_files(path, adapter=True)
        if files:
            return digest_files(files, path)
    except OSError as error:
        logger.warning("the LoRA adapter %s cannot be read (%s): its blocks are kept apart", path, error)
    return f"{UNKNOWN}{os.urandom(16).hex()}"
