"""The few calls to etcd that are needed. Everything that knows gRPC or a client package is here.

The messages and stubs are those that the package ``aetcd`` has generated from etcd's own definition.
Its client is not used: it has no TLS and wants an event loop. gRPC's blocking channel has the one and
does without the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
from aetcd import rpc

from kvbm_core.printable import printable
from kvbm_etcd._config import Access

__all__ = ["AwayError", "Client", "EtcdError", "RefusedError", "Status"]

_REFUSALS: Final = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    # A wrong password, no user where one is needed, a user where there is none.
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
}
# Engines and etcd are neighbours; a proxy for the way out would not know them.
_OPTIONS: Final = [("grpc.enable_http_proxy", 0)]


class EtcdError(Exception):
    """A call did not succeed. The message says why, and holds no secret."""


class AwayError(EtcdError):
    """No endpoint answered as it should; a later call may succeed."""


class RefusedError(EtcdError):
    """etcd does not let this user do this."""


@dataclass(frozen=True, slots=True)
class Status:
    """What an endpoint says of itself."""

    version: str
    index: int
    """The last entry of the cluster's log that it has put into effect."""
    errors: tuple[str, ...]
    """Alarms, like that its room is used up."""


class Client:
    """Blocking calls, each ended by a timeout. An endpoint that fails is left for the next one.

    Not for use from several threads.

    Args:
        access: How etcd is reached.
        timeout_s: For each call to each endpoint.
    """

    def __init__(self, access: Access, timeout_s: float) -> None:
        self._access = access
        self._timeout_s = timeout_s
        self._at = 0
        self._channel: Any = None
        self._token: str | None = None

    def status(self) -> Status:
        """Ask the endpoint how it is.

        Raises:
            EtcdError: As every method here.
        """
        answer = self._call(lambda channel: rpc.MaintenanceStub(channel).Status, rpc.StatusRequest())
        errors = tuple(printable(each) for each in answer.errors)
        return Status(printable(answer.version), int(answer.raftAppliedIndex), errors)

    def grant(self, ttl_s: int) -> int:
        """Make a lease.

        Raises:
            EtcdError: As every method here.
        """
        request = rpc.LeaseGrantRequest(TTL=ttl_s)
        return int(self._call(lambda channel: rpc.LeaseStub(channel).LeaseGrant, request).ID)

    def renew(self, lease: int) -> bool:
        """Start a lease's time anew. False: it has ended."""
        request = rpc.LeaseKeepAliveRequest(ID=lease)
        answer = self._call(lambda channel: _single(rpc.LeaseStub(channel).LeaseKeepAlive), request)
        return bool(answer.TTL > 0)

    def revoke(self, lease: int) -> None:
        """End a lease and delete its keys."""
        request = rpc.LeaseRevokeRequest(ID=lease)
        self._call(lambda channel: rpc.LeaseStub(channel).LeaseRevoke, request)

    def claim(self, key: str, value: bytes, lease: int) -> bytes:
        """Write a key if it is not there, bound to a lease, and give the value that is there now."""
        name = key.encode()
        absent = rpc.Compare(key=name, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL, create_revision=0)
        put = rpc.RequestOp(request_put=rpc.PutRequest(key=name, value=value, lease=lease))
        get = rpc.RequestOp(request_range=rpc.RangeRequest(key=name))
        request = rpc.TxnRequest(compare=[absent], success=[put], failure=[get])
        answer = self._call(lambda channel: rpc.KVStub(channel).Txn, request)
        return value if answer.succeeded else bytes(answer.responses[0].response_range.kvs[0].value)

    def values(self, prefix: str) -> dict[str, bytes]:
        """Give every key below a prefix that ends in a slash, with its value."""
        first = prefix.encode()
        request = rpc.RangeRequest(key=first, range_end=first[:-1] + bytes([first[-1] + 1]))
        answer = self._call(lambda channel: rpc.KVStub(channel).Range, request)
        return {pair.key.decode(errors="replace"): bytes(pair.value) for pair in answer.kvs}

    def close(self) -> None:
        """Close the connection. The next call makes a new one."""
        channel, self._channel, self._token = self._channel, None, None
        if channel is not None:
            channel.close()

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        """Make a call, at each endpoint until one answers."""
        for _ in self._access.targets[1:]:
            try:
                return self._call_here(method, request)
            except AwayError:
                continue
        return self._call_here(method, request)

    def _call_here(self, method: Callable[[Any], Any], request: Any) -> Any:
        fresh = self._token is None
        try:
            return self._send(method, request)
        except grpc.RpcError as error:
            if error.code() in _REFUSALS and not fresh:
                # A token expires, and is forgotten at a restart or when rights change: sign in again.
                self._token = None
                return self._call_here(method, request)
            raise self._failed(error) from error

    def _send(self, method: Callable[[Any], Any], request: Any) -> Any:
        if self._channel is None:
            self._channel = self._connect()
        if self._access.user and self._token is None:
            who = rpc.AuthenticateRequest(name=self._access.user, password=self._access.password)
            self._token = rpc.AuthStub(self._channel).Authenticate(who, timeout=self._timeout_s).token
        metadata = (("token", self._token),) if self._token else None
        return method(self._channel)(request, timeout=self._timeout_s, metadata=metadata)

    def _connect(self) -> Any:
        access = self._access
        target = access.targets[self._at]
        if not access.tls:
            return grpc.insecure_channel(target, _OPTIONS)
        return grpc.secure_channel(
            target, grpc.ssl_channel_credentials(access.ca, access.key, access.cert), _OPTIONS
        )

    def _failed(self, error: Any) -> EtcdError:
        """Explain an error. A connection that failed is replaced: it may be one that will never answer."""
        code, said = error.code(), printable(error.details() or "")
        if code in _REFUSALS:
            return RefusedError(said)
        self.close()
        self._at = (self._at + 1) % len(self._access.targets)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            said = f"no answer within {self._timeout_s} s"
        return AwayError(said or str(code))


def _single(stream: Any) -> Callable[..., Any]:
    """Turn a call with streams of requests and answers into one with one of each."""

    def call(request: Any, **options: Any) -> Any:
        answers = stream(iter([request]), **options)
        for answer in answers:
            answers.cancel()
            return answer
        raise AwayError("the answer was empty")

    return call
