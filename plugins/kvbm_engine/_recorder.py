"""The log of hashes: what was asked for, as `kvbm replay` reads it. No text, no tokens, no keys.

    {"kvbm_log": 2, "run": "5f…", "block_tokens": 16, "token_bytes": 131072, "groups": [{…}]}
    {"timestamp": 12, "input_length": 50, "output_length": 14, "engine_blocks": 1,
     "looks": [[12345, 16, 50]], "stores": [[45678, 48], [90123, 63]], "ended": 90101, "hash_ids": [83…]}
    {"lost": 3}

A request's line comes when it has ended and its last blocks were offered to the tiers: when it came, tokens
of prompt and answer, the leading blocks that the engine's own cache had, each moment at which it was looked
up and at which blocks were offered, and a hash of 48 bits for each complete block. Moments are microseconds,
no two of a log alike: they give the order in which requests that ran side by side met the tiers.

The hashes are keyed with a secret that is drawn for each start and kept nowhere: who has the log cannot even
try whether it has a text that he knows.

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
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvbm_core import ConfigError, StackConfig
from kvbm_core.groups import KvGroup
from kvbm_engine._keys import hash_tokens

__all__ = ["Recorder", "check_record"]

logger = logging.getLogger("kvbm_engine")

_VERSION: Final = 2
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


@dataclass(slots=True)
class _Life:
    """A request, from when it came."""

    came_us: int
    turned: tuple[int, int] | None = None
    """The moment at which the engine first turned to it, and the leading tokens that its own cache had."""
    looks: list[tuple[int, int, int]] = field(default_factory=list)
    """Of each time that it was admitted: moment, the leading tokens that the engine's own cache had, and all
    that it had then."""
    stores: list[tuple[int, int]] = field(default_factory=list)
    """Moment, and the leading tokens whose blocks had been offered then."""


class _Ended(NamedTuple):
    """A request that has ended."""

    life: _Life
    input_tokens: int
    tokens: int
    digests: Sequence[bytes]
    ended_us: int


class Recorder:
    """Writes a line for each request, into a file of bounded size.

    Args:
        path: The file. When it is full, or is there already, it becomes ``<path>.1``, in place of that.
        groups: The engine's KV groups.
        block_bytes: For each group the bytes of a block over all ranks.
        capacity_bytes: Of both files together.

    Raises:
        ConfigError: If the file cannot be written.
    """

    def __init__(
        self, path: Path, groups: Sequence[KvGroup], block_bytes: Sequence[int], capacity_bytes: int
    ) -> None:
        self._path = path
        self._block_tokens = hash_tokens(groups)
        self._header = _header(groups, block_bytes)
        self._secret = secrets.token_bytes(32)
        self._file_bytes = capacity_bytes // 2
        self._first_s: float | None = None
        self._last_us = -1
        self._lives: dict[str, _Life] = {}
        """Of requests that have not ended."""
        self._leaving: dict[str, _Ended] = {}
        """Requests that have ended, and whose last blocks were not offered yet."""
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
        return f"<Recorder {self._path}: {len(self._lives)} requests, {self._ended.qsize()} to be written>"

    def arrived(self, name: str, now_s: float) -> None:
        """Note that a request has come."""
        if name not in self._lives:
            self._lives[name] = _Life(self._moment(now_s))

    def turned(self, name: str, engine_tokens: int, now_s: float) -> None:
        """Note that the engine turns to a request, whether it has room for it or not; only the first time."""
        life = self._lives.get(name)
        if life and not life.turned:
            life.turned = self._moment(now_s), engine_tokens

    def looked(self, name: str, engine_tokens: int, tokens: int, now_s: float) -> None:
        """Note that a request was admitted, anew after it was preempted.

        Args:
            name: Of the request.
            engine_tokens: Leading tokens that the engine's own cache has.
            tokens: That the request has.
            now_s: The time.
        """
        self.arrived(name, now_s)  # It may have come before the session began.
        life = self._lives[name]
        if life.turned and life.turned[0] == self._last_us:
            life.turned = None  # There was room at once.
        life.looks.append((self._moment(now_s), engine_tokens, tokens))

    def offered(self, name: str, tokens: int, now_s: float) -> None:
        """Note that blocks of a request were offered to the tiers, up to so many leading tokens."""
        leaving = self._leaving.get(name)
        life = leaving.life if leaving else self._lives.get(name)
        if life is None:
            return
        before = life.stores[-1][1] if life.stores else 0
        if tokens // self._block_tokens != before // self._block_tokens:
            life.stores.append((self._moment(now_s), tokens))

    def ended(
        self, name: str, input_tokens: int, tokens: int, digests: Sequence[bytes], now_s: float
    ) -> None:
        """Note that a request has ended: its line waits for `settle`.

        Args:
            name: Of the request. One that was never admitted is forgotten.
            input_tokens: Of its prompt.
            tokens: Of prompt and answer.
            digests: Of its prefixes, see `BlockKeys.prefixes`.
            now_s: The time.
        """
        life = self._lives.pop(name, None)
        if life and life.looks:
            self._leaving[name] = _Ended(life, input_tokens, tokens, digests, self._moment(now_s))

    def forget(self, name: str) -> None:
        """Note that a request is gone of which no more is known."""
        self._lives.pop(name, None)

    def settle(self, owed: Container[str] = ()) -> None:
        """Hand over the requests that have ended, but for those that still have blocks to offer."""
        for name in [name for name in self._leaving if name not in owed] if self._leaving else ():
            ended = self._leaving.pop(name)
            if not self._thread.is_alive():
                continue
            try:
                self._ended.put_nowait((ended, self._lost))
                self._lost = 0
            except queue.Full:
                self._lost += 1

    def close(self) -> None:
        """Write what has ended, and close the file. May be called twice."""
        self.settle()
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

    def _moment(self, now_s: float) -> int:
        """Give the time in microseconds since the first, later than any before: it tells the order, too."""
        if self._first_s is None:
            self._first_s = now_s
        self._last_us = max(self._last_us + 1, round((now_s - self._first_s) * 1e6))
        return self._last_us

    def _row(self, ended: _Ended) -> dict[str, Any]:
        life = ended.life
        return {
            "timestamp": life.came_us / 1e3,
            "input_length": ended.input_tokens,
            "output_length": ended.tokens - ended.input_tokens,
            "engine_blocks": life.looks[0][1] // self._block_tokens,
            **({"turned": life.turned} if life.turned else {}),
            "looks": life.looks,
            "stores": life.stores,
            "ended": ended.ended_us,
            "hash_ids": [self._hash(digest) if digest else 0 for digest in ended.digests],
        }

    def _hash(self, digest: bytes) -> int:
        hashed = hashlib.blake2b(digest, digest_size=_HASH_BYTES, key=self._secret)
        return int.from_bytes(hashed.digest(), "big")

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


def _header(groups: Sequence[KvGroup], block_bytes: Sequence[int]) -> dict[str, Any]:
    """Say what a replay must know of the engine."""
    described: list[dict[str, Any]] = [
        {
            "block_tokens": group.block_tokens, "block_bytes": nbytes,
            "rule": group.coverage.rule.value, "rule_tokens": group.coverage.tokens,
        }
        for group, nbytes in zip(groups, block_bytes, strict=True)
    ]  # fmt: skip
    token_bytes = sum(each["block_bytes"] // each["block_tokens"] for each in described)
    return {
        "kvbm_log": _VERSION, "run": secrets.token_hex(8), "block_tokens": hash_tokens(groups),
        "token_bytes": token_bytes, "groups": described,
    }  # fmt: skip


def _encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"
