"""The kinds of faults: what each is called in the log, what it counts as, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvbm_core.tier import Reason

__all__ = [
    "BUCKET",
    "CERTIFICATE",
    "CORRUPT",
    "CUT",
    "DENIED",
    "DESCRIPTORS",
    "ELSEWHERE",
    "KIND_OF_CODE",
    "KIND_OF_ERRNO",
    "KIND_OF_STATUS",
    "MISSING",
    "NO_CREDENTIALS",
    "NO_HOST",
    "OTHER",
    "PRESENT",
    "PROXY",
    "SERVER",
    "STRANGE",
    "TIMEOUT",
    "UNREACHABLE",
    "Kind",
]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault."""

    name: str
    reason: Reason
    advice: str
    again: bool = False
    """Another attempt may work at once."""


_RENEW: Final = "then start the engine again; a role renews its credentials itself"

MISSING: Final = Kind("missing", Reason.MISSING, "")
PRESENT: Final = Kind("present", Reason.BUSY, "the object is there already")
CORRUPT: Final = Kind(
    "corrupt", Reason.CORRUPT, "an object is empty, longer than this model's blocks, or no plain file"
)
STRANGE: Final = Kind(
    "a strange folder",
    Reason.ERROR,
    "below 'url' a link, a file or another user's folder is in the way: look who made it and remove it",
)
BUSY: Final = Kind(
    "busy", Reason.BUSY, "another engine writes the same block just now; nothing to do", again=True
)
BUCKET: Final = Kind(
    "no such bucket or folder", Reason.ERROR, "make the bucket, or correct 'url'", again=True
)
DENIED: Final = Kind(
    "access denied",
    Reason.ERROR,
    "check the credentials in the environment, the region and endpoint, and that they allow to get, put, "
    "delete and list (without the right to list, S3 denies what is merely missing)",
)
_PERMISSION: Final = Kind(
    "no permission",
    Reason.ERROR,
    "let this process's user read and write there (`chown`), or mount it for writing",
)
NO_CREDENTIALS: Final = Kind(
    "no credentials",
    Reason.ERROR,
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, give this machine a role, or write 'anon: true' in "
    "'storage_options'",
)
_EXPIRED: Final = Kind(
    "credentials expired",
    Reason.ERROR,
    f"renew AWS_SESSION_TOKEN with its keys, or 'token' in 'storage_options', {_RENEW}",
)
_KEY: Final = Kind(
    "access key unknown",
    Reason.ERROR,
    "correct AWS_ACCESS_KEY_ID and, where one is used, AWS_SESSION_TOKEN, or 'key' and 'token' in "
    f"'storage_options', and check that 'endpoint_url' is the store they are for, {_RENEW}",
)
_SIGNATURE: Final = Kind(
    "signature refused",
    Reason.ERROR,
    f"correct AWS_SECRET_ACCESS_KEY, or 'secret' in 'storage_options', {_RENEW}; if it is right, a proxy "
    "changes the requests",
)
_CLOCK: Final = Kind(
    "clock differs",
    Reason.ERROR,
    "set this machine's clock (`timedatectl`): requests are refused when it is minutes from the store's",
)
ELSEWHERE: Final = Kind(
    "redirected",
    Reason.ERROR,
    "the bucket is in another region or at another endpoint: set AWS_REGION or {client_kwargs: {region_name: "
    "...}}, and 'endpoint_url', in 'storage_options' (for http, 'url'); a redirect to another host is not "
    "followed, because that host would be sent the credentials",
)
CERTIFICATE: Final = Kind(
    "certificate refused",
    Reason.ERROR,
    "set AWS_CA_BUNDLE (for others than s3, SSL_CERT_FILE) to a PEM file with the certificate of the "
    "authority that signed the server's, and check the host in 'endpoint_url'",
)
PROXY: Final = Kind(
    "proxy",
    Reason.ERROR,
    "the proxy does not answer or wants a password: correct HTTPS_PROXY or HTTP_PROXY, or name the store's "
    "host in NO_PROXY",
    again=True,
)
DESCRIPTORS: Final = Kind(
    "out of descriptors",
    Reason.ERROR,
    "this process or machine has as many files and connections open as it may: raise `ulimit -n` "
    "(LimitNOFILE in systemd), or lower 'max_in_flight'",
)
THROTTLED: Final = Kind("throttled", Reason.ERROR, "the store asks for fewer requests: lower 'max_in_flight'")
NO_HOST: Final = Kind(
    "unknown host",
    Reason.ERROR,
    "correct the host in 'url' or 'endpoint_url', or this machine's name resolution",
    again=True,
)
REFUSED: Final = Kind(
    "connection refused",
    Reason.ERROR,
    "nothing listens there: start the server, or correct host and port in 'url' or 'endpoint_url'",
    again=True,
)
UNREACHABLE: Final = Kind(
    "unreachable", Reason.ERROR, "check that the server runs, and 'url' and 'endpoint_url'", again=True
)
CUT: Final = Kind(
    "answer cut short",
    Reason.ERROR,
    "the connection ended in the midst of an answer: look into the logs of the server and of proxies",
    again=True,
)
TIMEOUT: Final = Kind(
    "timeout",
    Reason.DEADLINE,
    "the store is slow or silent, or no credentials are found: raise 'timeout_s', or check the network",
)
FULL: Final = Kind("full", Reason.FULL, "make room: kvbm clear")
SERVER: Final = Kind("server error", Reason.ERROR, "look into the server's log", again=True)
OTHER: Final = Kind("error", Reason.ERROR, "check 'url' and 'storage_options'")

KIND_OF_CODE: Final[Mapping[str, Kind]] = {
    "NoSuchBucket": BUCKET,
    "ContainerNotFound": BUCKET,
    **dict.fromkeys(("SlowDown", "TooManyRequests", "Throttling", "RequestLimitExceeded"), THROTTLED),
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"), _EXPIRED
    ),
    **dict.fromkeys(("InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId"), _KEY),
    "SignatureDoesNotMatch": _SIGNATURE,
    "RequestTimeTooSkewed": _CLOCK,
    **dict.fromkeys(
        (
            "AuthorizationHeaderMalformed",
            "PermanentRedirect",
            "TemporaryRedirect",
            "IllegalLocationConstraintException",
        ),
        ELSEWHERE,
    ),
    **dict.fromkeys(("ConditionalRequestConflict", "OperationAborted"), BUSY),
    **dict.fromkeys(("PreconditionFailed", "BlobAlreadyExists", "ConditionNotMet"), PRESENT),
    "InvalidRange": CORRUPT,
    "RequestTimeout": TIMEOUT,
    "IncompleteBody": CUT,
}
"""By the store's own code, whatever the status."""
KIND_OF_STATUS: Final[Mapping[int, Kind]] = {
    401: DENIED, 403: DENIED, 404: MISSING, 407: PROXY, 408: TIMEOUT, 409: BUSY, 412: PRESENT, 416: CORRUPT,
    429: THROTTLED, 503: THROTTLED, 504: TIMEOUT, 507: FULL,
}  # fmt: skip
KIND_OF_ERRNO: Final[Mapping[int, Kind]] = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.ECONNREFUSED: REFUSED,
    errno.ECONNRESET: CUT,
    errno.EPIPE: CUT,
    errno.ETIMEDOUT: TIMEOUT,
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _PERMISSION),
    **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN), UNREACHABLE),
}
