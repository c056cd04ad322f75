"""Reads traces: Mooncake's format, and an engine's log, which is the same with a header and one more key.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [46, 47, ...]}    Mooncake

    {"kvbm_log": 1, "run": "c0ffee...", "block_tokens": 16, "token_bytes": 131072}             ours
    {"timestamp": 12, "input_length": 50, "output_length": 14, "engine_blocks": 1, "hash_ids": [...]}
    {"lost": 3}

Times are milliseconds. In Mooncake's format `hash_ids` are of a prompt's blocks of 512 tokens, the last of
which may be short and is not counted. In ours they are of all complete blocks, of the prompt and the answer.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, BinaryIO, Final, Literal

import msgspec

from kvbm_core.errors import ConfigError
from kvbm_replay.trace import Request, Trace

__all__ = ["read_trace", "write_trace"]

MOONCAKE_BLOCK_TOKENS: Final = 512
_LOG_VERSION: Final = 1
_MOST: Final = 2**53
"""That a JSON reader keeps whole."""
_Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]


class _Row(msgspec.Struct):
    """Any line: a request, a header, or a note of what is missing."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, le=_MOST)] | None = None
    input_length: _Count | None = None
    output_length: _Count = 0
    hash_ids: list[int] | None = None
    engine_blocks: _Count | None = None
    kvbm_log: int | None = None
    run: str = ""
    block_tokens: _Count = 0
    token_bytes: Annotated[int, msgspec.Meta(ge=1)] | None = None
    lost: _Count = 0


_OPEN: Final[Mapping[str, Callable[[Path, Literal["rb"]], BinaryIO]]] = MappingProxyType(
    {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]
)
_DECODER: Final = msgspec.json.Decoder(_Row)


def read_trace(paths: Sequence[Path]) -> Trace:
    """Read the files of one trace, also packed as ``.gz`` or ``.xz``, in the order of the requests' times.

    Raises:
        ConfigError: If a file cannot be read, or a line is not of a trace; names file, line and key.
    """
    reader = _Reader()
    for path in paths:
        try:
            with _OPEN.get(path.suffix, open)(path, "rb") as file:
                reader.read(path, file)
        except (OSError, EOFError, lzma.LZMAError) as error:
            why = getattr(error, "strerror", None) or "it is damaged"
            raise ConfigError(f"{path}: {why}; write the path of a trace") from error
    if not reader.requests:
        raise ConfigError(
            f"{', '.join(map(str, paths))}: no requests; write the path of a trace that has some"
        )
    reader.requests.sort(key=lambda request: request.at_s)
    name = paths[0].name
    return Trace(name, reader.block_tokens, reader.requests, reader.token_bytes, reader.lost)


class _Reader:
    """Takes in files, line by line."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.block_tokens = 0
        self.token_bytes: int | None = None
        self.lost = 0
        self._run: str | None = None
        self._is_log = False
        self._known: dict[int, int] = {}
        """Each number to itself, so that it is in memory once."""

    def read(self, path: Path, lines: Iterable[bytes]) -> None:
        """Take in one file."""
        is_first = True
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _DECODER.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}:{number}: {_explain(error)}") from None
            try:
                self._take(row, is_first=is_first)
            except ConfigError as error:
                error.args = (f"{path}:{number}: {error}",)
                raise
            is_first = False

    def _take(self, row: _Row, *, is_first: bool) -> None:
        if row.kvbm_log is not None:
            self._begin_log(row, is_first=is_first)
        elif is_first and not self._begin_other():
            raise ConfigError("no header; a log and a trace of another kind cannot be read as one")
        elif row.hash_ids is None and row.lost:
            self.lost += row.lost
        else:
            self._take_request(row)

    def _begin_log(self, row: _Row, *, is_first: bool) -> None:
        if row.kvbm_log != _LOG_VERSION:
            raise ConfigError(
                f"kvbm_log: {row.kvbm_log}; this release reads version {_LOG_VERSION}: install one that fits"
            )
        if not is_first or row.block_tokens < 1:
            raise ConfigError("a header must be the first line of its file, with block_tokens of 1 or more")
        if self.requests and row.run != self._run:
            raise ConfigError(
                "this log is of another start of an engine than the one before: their hashes cannot be "
                "compared; replay each alone"
            )
        self._run, self._is_log = row.run, True
        self.block_tokens, self.token_bytes = row.block_tokens, row.token_bytes

    def _begin_other(self) -> bool:
        if not self._is_log:
            self.block_tokens = MOONCAKE_BLOCK_TOKENS
        return not self._is_log

    def _take_request(self, row: _Row) -> None:
        if row.timestamp is None or row.input_length is None or row.hash_ids is None:
            keys = {"timestamp": row.timestamp, "input_length": row.input_length, "hash_ids": row.hash_ids}
            lacks = [key for key, value in keys.items() if value is None]
            raise ConfigError(f"no {', '.join(lacks)}; a request has {', '.join(keys)}")
        count = row.input_length // self.block_tokens
        if len(row.hash_ids) < count and not self._is_log:
            raise ConfigError(
                f"hash_ids: {len(row.hash_ids)}; an input_length of {row.input_length} has {count} blocks of "
                f"{self.block_tokens} tokens"
            )
        blocks = list(map(self._known.setdefault, row.hash_ids, row.hash_ids))
        request = Request(row.timestamp / 1e3, blocks[:count], row.input_length, row.output_length)
        if self._is_log:
            request.answer, request.engine_blocks = blocks[count:], row.engine_blocks
            request.asked = min(len(request.blocks), max(0, row.input_length - 1) // self.block_tokens)
        self.requests.append(request)


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace of blocks of 512 tokens in Mooncake's format; answers' blocks are left out.

    Raises:
        ConfigError: If the blocks have another length, or the file cannot be written.
    """
    if trace.block_tokens != MOONCAKE_BLOCK_TOKENS:
        raise ConfigError(
            f"{path}: blocks of {trace.block_tokens} tokens; the format has {MOONCAKE_BLOCK_TOKENS}: write "
            f"block_tokens={MOONCAKE_BLOCK_TOKENS}"
        )
    rows = [
        {
            "timestamp": round(request.at_s * 1e3), "input_length": request.input_tokens,
            "output_length": request.output_tokens, "hash_ids": request.blocks,
        }
        for request in trace.requests
    ]  # fmt: skip
    try:
        path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; write a path that can be written") from error


def _explain(error: msgspec.DecodeError) -> str:
    """Say what is wrong with a line: the key where there is one."""
    text, _, key = str(error).replace(" | null", "").partition(" - at `$.")
    if key:
        return f"{key.rstrip('`')}: {text[0].lower()}{text[1:]}"
    return f"not a line of a trace: {text}; write one JSON object a line"
