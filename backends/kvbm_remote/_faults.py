"""What went wrong, in words that are safe to log.

Every client library has its own exceptions, and their texts quote requests: URLs with passwords,
headers, access keys. So no foreign text is passed on. What is told is the exception's type, the HTTP
status, the store's error code, the operating system's word, and what to change.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from kvbm_remote._kinds import (
    CERTIFICATE,
    CORRUPT,
    CUT,
    DENIED,
    DESCRIPTORS,
    ELSEWHERE,
    KIND_OF_CODE,
    KIND_OF_ERRNO,
    KIND_OF_STATUS,
    MISSING,
    NO_CREDENTIALS,
    NO_HOST,
    OTHER,
    PRESENT,
    PROXY,
    SERVER,
    STRANGE,
    TIMEOUT,
    UNREACHABLE,
    Kind,
)

__all__ = [
    "NOWHERE",
    "Fault",
    "RedirectError",
    "StrangeFolderError",
    "WrongLengthError",
    "classify",
]

NOWHERE: Final = "255.255.255.255:1"
"""Where obstore is told that all other hosts are, see `_redirects`: no connection to it can be made."""
_STATUS: Final = re.compile(r"status(?: code)?: (\d{3})\b")
_CODE: Final = re.compile(r"<Code>(\w{1,64})</Code>")
_REGION: Final = re.compile(r"<Region>([\w-]{1,32})</Region>")
_OS_CODE: Final = re.compile(r"\bOs \{\s+code: (\d{1,3}),")
_HTTP_ERROR: Final = re.compile(r"kind: (Connect|Timeout|Request|Interrupted|Decode)")
_CERTIFICATE: Final = re.compile(r"invalid peer certificate: (\w{1,40})|InvalidCertificate\(\s*(\w{1,40})")
_METADATA: Final = re.compile(r"Error performing \w+ \S+/latest/")
_HOST: Final = re.compile(r"[\w.:\[\]-]{1,100}", re.ASCII)
_CHAIN_LENGTH: Final = 8
"""Exceptions looked at, from the one raised to its causes."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, with nothing in it that must not be logged."""

    kind: Kind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind.name} ({self.detail}): {self.kind.advice}"


class WrongLengthError(Exception):
    """An object is empty, or longer than its reader takes, or is no plain file."""


class StrangeFolderError(Exception):
    """A folder in the way of a block is a link, a file, or somebody else's."""


class RedirectError(Exception):
    """A server sends its client to another host, which would be told what the request carries."""

    def __init__(self, host: str) -> None:
        super().__init__("redirected to another host")
        self.host = host if _HOST.fullmatch(host) else ""
        """Where to. Empty if it is not written like a host."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the server said. Empty if it did not answer."""

    status: int = 0
    code: str = ""
    region: str = ""


def classify(error: BaseException) -> Fault:
    """Say what an exception of a client library means."""
    links = tuple(_chain(error))
    answer = _answer(links)
    codes = tuple(code for link in links for code in _os_codes(link))
    kind = _kind(links, answer, codes)
    said = [type(error).__name__]
    said += [f"status {answer.status}"] if answer.status else []
    said += [answer.code] if answer.code and answer.code != str(answer.status) else []
    said += [f"region {answer.region}"] if answer.region else []
    said += [f"to {link.host}" for link in links if isinstance(link, RedirectError) and link.host]
    # From the number, not the exception's own text: that may quote a path.
    said += [os.strerror(code) for code in codes[:1] if not answer.status]
    said += [_certificate(links)] if kind is CERTIFICATE else []
    return Fault(kind, ", ".join(part for part in said if part))


def _kind(links: tuple[BaseException, ...], answer: _Answer, codes: tuple[int, ...]) -> Kind:
    own = (
        (WrongLengthError, CORRUPT), (StrangeFolderError, STRANGE), (RedirectError, ELSEWHERE),
        (ssl.SSLCertVerificationError, CERTIFICATE), (socket.gaierror, NO_HOST),
    )  # fmt: skip
    if errno.EMFILE in codes or errno.ENFILE in codes:
        return DESCRIPTORS
    for kind_of_error, kind in own:
        if any(isinstance(link, kind_of_error) for link in links):
            return kind
    if answer.code in KIND_OF_CODE:
        return KIND_OF_CODE[answer.code]
    if isinstance(links[0], FileNotFoundError):
        return MISSING
    if isinstance(links[0], FileExistsError) and not answer.status:
        return PRESENT
    if any(_METADATA.search(str(link)) for link in links if _is_obstore(link)):
        return NO_CREDENTIALS
    if answer.status:
        return _kind_of_status(answer.status)
    return _kind_without_answer(links, codes)


def _kind_of_status(status: int) -> Kind:
    if 300 <= status < 400:
        return ELSEWHERE
    return KIND_OF_STATUS.get(status, SERVER if status >= 500 else OTHER)


def _kind_without_answer(links: tuple[BaseException, ...], codes: tuple[int, ...]) -> Kind:
    said = "".join(str(link) for link in links if _is_obstore(link))
    if said:
        for mark, kind in _OBSTORE_SAYS.items():
            if mark in said:
                return kind
        if _CERTIFICATE.search(said):
            return CERTIFICATE
    names = " ".join({each.__name__ for link in links for each in type(link).__mro__})
    if "Proxy" in names:
        return PROXY
    for code in codes:
        if code in KIND_OF_ERRNO:
            return KIND_OF_ERRNO[code]
    for parts, kind in _NAMED.items():
        if any(part in names for part in parts):
            return kind
    return UNREACHABLE if _HTTP_ERROR.search(said) else OTHER


_OBSTORE_SAYS: Final[Mapping[str, Kind]] = {
    NOWHERE: ELSEWHERE,
    "without LOCATION": ELSEWHERE,
    "BadScheme": ELSEWHERE,
    "kind: Timeout": TIMEOUT,
    "dns error": NO_HOST,
    "IncompleteBody": CUT,
    "IncompleteMessage": CUT,
    "UnexpectedEof": CUT,
    "kind: Decode": CUT,
    "kind: Interrupted": CUT,
}
"""What obstore's texts have in them, and what it means. The first that fits counts."""
_NAMED: Final[Mapping[tuple[str, ...], Kind]] = {
    ("Timeout",): TIMEOUT,
    ("NoCredentials", "PartialCredentials"): NO_CREDENTIALS,
    ("DNSError",): NO_HOST,
    ("Permission", "Authenticat", "Credential", "RefreshError"): DENIED,
    ("Payload", "IncompleteRead", "ResponseStreaming", "Disconnected", "ConnectionClosed"): CUT,
    ("Connect", "ServiceRe", "SSHException", "EOFError"): UNREACHABLE,
}
"""Parts of the names of exceptions, and what they mean. The first that fits counts."""


def _answer(links: tuple[BaseException, ...]) -> _Answer:
    """Find the HTTP status and the store's error code."""
    for link in links:
        if _is_obstore(link) or isinstance(link, FileNotFoundError):
            text = str(link)
            status, code, region = _STATUS.search(text), _CODE.search(text), _REGION.search(text)
            if status:
                return _Answer(int(status[1]), code[1] if code else "", region[1] if region else "")
        if type(link).__module__ == "aiohttp.http_exceptions":
            # Its 400 says that an answer could not be read.
            continue
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return _answer_of_botocore(response)
        for name in ("status", "status_code", "code"):
            value = getattr(link, name, None)
            if isinstance(value, int) and 300 <= value < 600:
                said = getattr(link, "error_code", "")
                return _Answer(value, str(getattr(said, "value", said) or "")[:64])
    return _Answer()


def _answer_of_botocore(response: Mapping[str, Mapping[str, object]]) -> _Answer:
    """Read what a ClientError carries."""
    meta, said = response.get("ResponseMetadata", {}), response.get("Error", {})
    headers = meta.get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") if isinstance(headers, dict) else None
    region = str(said.get("Region") or region or "")
    code = str(said.get("Code", ""))
    return _Answer(
        int(str(meta.get("HTTPStatusCode", 0))),
        code if re.fullmatch(r"\w{1,64}", code, re.ASCII) else "",
        region if re.fullmatch(r"[\w-]{1,32}", region, re.ASCII) else "",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(_CHAIN_LENGTH):
        if link is None:
            return
        yield link
        # botocore carries the cause in its keywords, too.
        link = link.__cause__ or link.__context__


def _is_obstore(error: BaseException) -> bool:
    return type(error).__module__.startswith("obstore")


def _os_codes(error: BaseException) -> Iterator[int]:
    """Give the numbers of the operating system's errors that an exception tells."""
    if _is_obstore(error):
        yield from (int(code) for code in _OS_CODE.findall(str(error)))
    elif isinstance(error, OSError) and error.errno and not isinstance(error, socket.gaierror | ssl.SSLError):
        yield error.errno


def _certificate(links: tuple[BaseException, ...]) -> str:
    """Say what is wrong with a certificate, in the words of the library that checked it."""
    for link in links:
        # aiohttp's own is of that type, too, and has no message.
        if isinstance(link, ssl.SSLCertVerificationError) and (said := getattr(link, "verify_message", "")):
            return str(said)[:80]
        if _is_obstore(link) and (found := _CERTIFICATE.search(str(link))):
            return found[1] or found[2]
    return ""
