"""Tells weights apart by what is in their files.

Two checkpoints under one path must never share blocks: a fine-tuned model answers from its own KV.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import xxhash

__all__ = ["UNKNOWN", "AdapterDigests", "digest_files", "find_files", "weights_digest"]

logger = logging.getLogger("kvbm_vllm")

UNKNOWN: Final = "unknown:"
"""How the name of weights begins whose files were not found."""

_CHUNK_BYTES: Final = 64 << 20
_THREADS: Final = 8
_WEIGHTS: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz"})
_CONTENT_NAME: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def weights_digest(model: str, revision: str | None, weights_id: str | None) -> str:
    """Name a model's weights.

    Args:
        model: A folder, a file, or an identifier of the Hugging Face hub that is in the local cache.
        revision: Of the hub's repository.
        weights_id: What the operator calls them; then no file is read.

    Returns:
        Equal for equal contents wherever the files lie. If the files cannot be found, a name that
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
    digest = digest_files(files)
    logger.info(
        "read %d weight files of %s in %.1f s: %s", len(files), model, time.monotonic() - began_s, digest
    )
    return digest


def find_files(model: str, revision: str | None = None, suffixes: frozenset[str] = _WEIGHTS) -> list[Path]:
    """List the weight files of a model, or nothing if it is not on this machine."""
    path = Path(model)
    if path.is_file():
        return [path]
    if not path.is_dir():
        snapshot = _hub_snapshot(model, revision)
        if snapshot is None:
            return []
        path = snapshot
    return sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())


def digest_files(files: Sequence[Path]) -> str:
    """Digest contents, reading with several threads.

    A file that the hub's cache stores under its own digest is named by that and not read.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = [part for file in files for part in _parts(file, pool)]
        whole = xxhash.xxh3_128()
        for part in parts:
            whole.update(part if isinstance(part, bytes) else part.result())
    return f"xxh3:{whole.hexdigest()}"


def _parts(file: Path, pool: ThreadPoolExecutor) -> list[Any]:
    target = file.resolve()
    if target.parent.name == "blobs" and _CONTENT_NAME.fullmatch(target.name):
        return [target.name.encode()]
    size = target.stat().st_size
    return [pool.submit(_digest_part, target, start) for start in range(0, max(size, 1), _CHUNK_BYTES)]


def _digest_part(file: Path, start: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(start)
        return xxhash.xxh3_128_digest(stream.read(_CHUNK_BYTES))


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
        # With its configuration, which scales the weights.
        files = find_files(path, suffixes=_WEIGHTS | {".json"})
        if files:
            return digest_files(files)
    except OSError as error:
        logger.warning("the LoRA adapter %s cannot be read (%s): its blocks are kept apart", path, error)
    return f"{UNKNOWN}{os.urandom(16).hex()}"
