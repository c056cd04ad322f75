"""The log of hashes: what was asked for, as `kvbm replay` reads it. No text, no tokens, no keys.

    {"kvbm_log": 1, "run": "5f…", "block_tokens": 16, "token_bytes": 131072}
    {"timestamp": 12, "input_length": 50, "output_length": 14, "engine_blocks": 1, "hash_ids": [83…, 11…]}
    {"lost": 3}

A request's line comes when it has ended: milliseconds since the first was admitted, tokens of prompt and
answer, the leading blocks that the engine's own cache had, and a hash of 48 bits for each complete block. The
hashes are keyed with a secret that is drawn for each start and kept nowhere: who has the log cannot even try
whether it has a text that he knows.

The engine's thread only hands a list over; another one hashes and writes. What it cannot take is counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import secrets
import threading
from collections.abc import Sequence
from io import BufferedWriter
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvbm_core import BlockKey, ConfigError, StackConfig

__all__ = ["Recorder", "check_record"]

logger = logging.getLogger("kvbm_engine")

_VERSION: Final = 1
_HASH_BYTES: Final = 6
"""So that every JSON reader keeps the number whole."""
_MAX_WAITING: Final = 1024
"""Requests that have ended and are not written."""
_CLOSE_S: Final = 5.0
_LEAST_BYTES: Final = 1 << 20


def check_record(config: StackConfig) -> None:
    """Find mistakes in `record` and `record_capacity` before an engine loads its model.

    Raises:
        ConfigError: If the file cannot be made there, or would be too small.
    """
    if config.record is None:
        return
    path = Path(config.record).expanduser()
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"record: {config.record!r}; write a file in a folder that can be written")
    if config.record_capacity < _LEAST_BYTES:
        raise ConfigError(f"record_capacity: {config.record_capacity}; write at least 1MiB")


class _Ended(NamedTuple):
    """A request that has ended."""

    began_s: float
    input_tokens: int
    output_tokens: int
    engine_tokens: int
    keys: Sequence[BlockKey]


class Recorder:
    """Writes a line for each request, into a file of bounded size.

    Args:
        path: The file. When it is full, or is there already, it becomes ``<path>.1``, in place of that.
        block_tokens: Tokens a block.
        token_bytes: Bytes of the KV of a token over all ranks.
        capacity_bytes: Of both files together.

    Raises:
        ConfigError: If the file cannot be written.
    """

    def __init__(self, path: Path, block_tokens: int, token_bytes: int, capacity_bytes: int) -> None:
        self._path = path
        self._block_tokens = block_tokens
        self._header = {
            "kvbm_log": _VERSION, "run": secrets.token_hex(8), "block_tokens": block_tokens,
            "token_bytes": token_bytes,
        }  # fmt: skip
        self._secret = secrets.token_bytes(32)
        self._file_bytes = capacity_bytes // 2
        self._first_s: float | None = None
        self._began: dict[str, tuple[float, int]] = {}
        """By request: when it was admitted, and the tokens that the engine's own cache had."""
        self._lost = 0
        """Requests that were not handed over since the last that was."""
        self._ended: queue.Queue[tuple[_Ended, int] | None] = queue.Queue(_MAX_WAITING)
        try:
            self._file = self._open()
        except OSError as error:
            raise ConfigError(
                f"record: {path}: {error.strerror}; write a file in a folder that is there"
            ) from error
        self._thread = threading.Thread(target=self._run, name="kvbm-recorder", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Recorder {self._path}: {len(self._began)} requests, {self._ended.qsize()} to be written>"

    def began(self, name: str, engine_tokens: int, now_s: float) -> None:
        """Note that a request was admitted; if it was before, nothing."""
        self._began.setdefault(name, (now_s, engine_tokens))

    def ended(self, name: str, input_tokens: int, output_tokens: int, keys: Sequence[BlockKey]) -> None:
        """Note that a request has ended, and the keys of all its complete blocks."""
        began = self._began.pop(name, None)
        if began is None or not self._thread.is_alive():
            return
        ended = _Ended(began[0], input_tokens, output_tokens, began[1], keys)
        try:
            self._ended.put_nowait((ended, self._lost))
            self._lost = 0
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Write what has ended, and close the file. May be called twice."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):  # A disk that hangs keeps nobody.
                self._ended.put(None, timeout=_CLOSE_S)
                self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        try:
            while (item := self._ended.get()) is not None:
                ended, lost = item
                if lost:
                    self._write({"lost": lost})
                self._write(self._row(ended))
                if self._ended.empty():
                    self._file.flush()
            if self._lost:
                self._write({"lost": self._lost})
            self._file.close()
        except OSError as error:
            logger.warning("record: %s: %s; nothing more is recorded", self._path, error.strerror)

    def _row(self, ended: _Ended) -> dict[str, Any]:
        if self._first_s is None:
            self._first_s = ended.began_s
        hashes = [
            int.from_bytes(hashlib.blake2b(key, digest_size=_HASH_BYTES, key=self._secret).digest(), "big")
            for key in ended.keys
        ]
        return {
            "timestamp": max(0, round((ended.began_s - self._first_s) * 1e3)),
            "input_length": ended.input_tokens,
            "output_length": ended.output_tokens,
            "engine_blocks": ended.engine_tokens // self._block_tokens,
            "hash_ids": hashes,
        }

    def _write(self, row: dict[str, Any]) -> None:
        line = _encode(row)
        if self._file.tell() + len(line) > self._file_bytes:
            self._file.close()
            self._file = self._open()
        self._file.write(line)

    def _open(self) -> BufferedWriter:
        """Begin a file, and keep the one before."""
        if self._path.exists():
            self._path.replace(f"{self._path}.1")
        # Nobody else needs to know how often somebody asks for the same.
        number = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        file = os.fdopen(number, "wb")
        file.write(_encode(self._header))
        file.flush()
        return file


def _encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"
