"""What went wrong, in words that are safe to log.

Every client library has its own exceptions, and their texts quote requests: URLs with passwords,
headers, access keys. So no foreign text is passed on. What is told is the exception's type, the HTTP
status, the store's error code, and what to change.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvbm_core.tier import Reason

__all__ = ["BUCKET", "MISSING", "Complaints", "Fault", "Kind", "WrongLengthError", "classify"]

_log = logging.getLogger("kvbm_remote")

_STATUS: Final = re.compile(r"status(?: code)?: (\d{3})\b")
_CODE: Final = re.compile(r"<Code>(\w{1,64})</Code>")
_HTTP_ERROR: Final = re.compile(r"kind: (Connect|Timeout|Request|Interrupted|Decode)")
_COMPLAIN_EVERY_S: Final = 60.0
_CHAIN_LENGTH: Final = 6
"""Exceptions looked at, from the one raised to its causes."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault."""

    name: str
    reason: Reason
    advice: str
    again: bool = False
    """Another attempt may work at once."""


MISSING: Final = Kind("missing", Reason.MISSING, "")
CORRUPT: Final = Kind("corrupt", Reason.CORRUPT, "an object has another length than this model's blocks")
BUCKET: Final = Kind(
    "no such bucket or folder", Reason.ERROR, "make the bucket, or correct 'url'", again=True
)
DENIED: Final = Kind(
    "access denied",
    Reason.ERROR,
    "check the credentials in the environment, the region and endpoint, and that they allow to get, put, "
    "delete and list (without the right to list, S3 denies what is merely missing)",
)
THROTTLED: Final = Kind("throttled", Reason.ERROR, "the store asks for fewer requests: lower 'max_in_flight'")
UNREACHABLE: Final = Kind(
    "unreachable", Reason.ERROR, "check that the server runs, and 'url' and 'endpoint_url'", again=True
)
TIMEOUT: Final = Kind(
    "timeout",
    Reason.DEADLINE,
    "the store is slow or silent, or no credentials are found: raise 'timeout_s', or check the network",
)
FULL: Final = Kind("full", Reason.FULL, "make room: python -m kvbm_remote gc")
SERVER: Final = Kind("server error", Reason.ERROR, "look into the server's log", again=True)
OTHER: Final = Kind("error", Reason.ERROR, "check 'url' and 'storage_options'")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, with nothing in it that must not be logged."""

    kind: Kind
    detail: str = ""


class WrongLengthError(Exception):
    """An object has another length than it must have."""


def classify(error: BaseException) -> Fault:
    """Say what an exception of a client library means."""
    status, code = _answer(error)
    names = {each.__name__ for link in _chain(error) for each in type(link).__mro__}
    detail = ", ".join(
        part for part in (type(error).__name__, status and f"status {status}", code, _strerror(error)) if part
    )
    return Fault(_kind(error, names, status, code), detail)


def _kind(error: BaseException, names: set[str], status: int, code: str) -> Kind:
    if isinstance(error, WrongLengthError):
        return CORRUPT
    if code == "NoSuchBucket":
        return BUCKET
    if isinstance(error, FileNotFoundError) or status == 404:
        return MISSING
    if status == 429 or code in ("SlowDown", "TooManyRequests", "Throttling", "RequestLimitExceeded"):
        return THROTTLED
    if status:
        return _kind_of_status(status)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FULL
    return _kind_of_name(error, names)


def _kind_of_status(status: int) -> Kind:
    known = {401: DENIED, 403: DENIED, 408: TIMEOUT, 503: THROTTLED, 504: TIMEOUT, 507: FULL}
    return known.get(status, SERVER if status >= 500 else OTHER)


def _kind_of_name(error: BaseException, names: set[str]) -> Kind:
    said = set(_HTTP_ERROR.findall(str(error))) if _is_obstore(error) else set()

    def named(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if named("Timeout") or "Timeout" in said:
        return TIMEOUT
    if named("Permission", "Authenticat", "Credential", "RefreshError"):
        return DENIED
    if named("Connect", "ServiceRe", "SSHException", "EOFError", "gaierror", "PayloadError") or said:
        return UNREACHABLE
    return OTHER


def _answer(error: BaseException) -> tuple[int, str]:
    """Find the HTTP status and the store's error code; 0 and "" if there was no answer."""
    for link in _chain(error):
        if _is_obstore(link) or isinstance(link, FileNotFoundError):
            text = str(link)
            status, code = _STATUS.search(text), _CODE.search(text)
            if status:
                return int(status[1]), code[1] if code else ""
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            # botocore's ClientError.
            status_code = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status_code), str(response.get("Error", {}).get("Code", ""))[:64]
        for name in ("status", "status_code", "code"):
            value = getattr(link, name, None)
            if isinstance(value, int) and 400 <= value < 600:
                return value, ""
    return 0, ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(_CHAIN_LENGTH):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _is_obstore(error: BaseException) -> bool:
    return type(error).__module__.startswith("obstore")


def _strerror(error: BaseException) -> str:
    # From the number, not the exception's own text: that may quote a path.
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else ""


class Complaints:
    """Logs each kind of fault once in a while, with how often it came in between."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._next_s: dict[str, float] = {}

    def note(self, fault: Fault, operation: str) -> None:
        """Take in a fault; perhaps log it."""
        kind, now_s = fault.kind, time.monotonic()
        if kind is MISSING:
            return
        with self._lock:
            # Bounded: there are as many as kinds.
            count = self._counts[kind.name] = self._counts.get(kind.name, 0) + 1
            if now_s < self._next_s.get(kind.name, 0.0):
                return
            self._next_s[kind.name] = now_s + _COMPLAIN_EVERY_S
            self._counts[kind.name] = 0
        _log.warning(
            "%s: %s in %s (%s; %d since the last such line): %s",
            self._place, kind.name, operation, fault.detail, count, kind.advice,
        )  # fmt: skip
