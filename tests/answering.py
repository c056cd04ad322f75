"""A web server that answers as it is told, for faults that a real S3 server cannot be made to have.

with AnsweringServer() as server:
    server.answer = Answer(403, error("AccessDenied"))
    ... a client at server.endpoint ...
    assert server.requests[0].headers["X-Amz-Security-Token"] == "..."
"""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Self

__all__ = ["Answer", "AnsweringServer", "Request", "error"]

_CHUNK = bytes(1 << 16)


@dataclass
class Request:
    """What a client asked."""

    method: str
    path: str
    headers: Message


@dataclass
class Answer:
    """What it is told."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    nbytes: int | None = None
    """Announced as the body's length, in place of what is sent."""
    endless: bool = False
    """Zeros follow the body until all that is announced is sent."""


def error(code: str, more: str = "") -> bytes:
    """Give S3's document for an error."""
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message>{more}</Error>"
    return text.encode()


class AnsweringServer:
    """Serves on a free loopback port, by TLS if it is given a folder with server.pem and server.key."""

    def __init__(self, certificates: Path | None = None) -> None:
        self.answer: Answer | Callable[[Request], Answer] = Answer()
        self.requests: list[Request] = []
        self.sent_bytes = 0
        """Of bodies, as far as the clients took them."""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def handle_one_request(self) -> None:
                # Clients that have enough go away.
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def serve(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = Request(self.command, self.path, self.headers)
                outer.requests.append(request)
                answer = outer.answer(request) if callable(outer.answer) else outer.answer
                outer._send(self, answer)

        for method in ("GET", "HEAD", "PUT", "POST", "DELETE", "CONNECT"):
            setattr(Handler, f"do_{method}", Handler.serve)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._scheme = "http"
        if certificates is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._server.handle_error = lambda *_: None
            self._scheme = "https"
        self._thread = threading.Thread(target=self._server.serve_forever, name="answering", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        """``http://host:port``."""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        """The number."""
        return self._server.server_port

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _send(self, handler: http.server.BaseHTTPRequestHandler, answer: Answer) -> None:
        nbytes = len(answer.body) if answer.nbytes is None else answer.nbytes
        handler.send_response(answer.status)
        facts = {
            "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
            "ETag": '"x"',
            "Content-Length": str(nbytes),
        }
        for name, value in {**facts, **answer.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        handler.wfile.write(answer.body)
        left = nbytes - len(answer.body)
        while answer.endless and left > 0:
            handler.wfile.write(_CHUNK[: min(left, len(_CHUNK))])
            left -= len(_CHUNK)
            self.sent_bytes += len(_CHUNK)
        if left > 0:
            handler.close_connection = True
