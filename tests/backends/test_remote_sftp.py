"""The remote tier over SFTP, with paramiko on both sides of a real socket, and real files behind it."""

import contextlib
import importlib.util
import os
import socket
import threading
import tracemalloc

import pytest
from test_cpu import BLOCK, NAMESPACE, content, key, load, run, store

from kvbm_core.tier import Op, Outcome, Reason, TierContext, Transfer
from kvbm_remote import RemoteConfig, RemoteTier

if importlib.util.find_spec("paramiko") is None:
    pytest.skip("SERVER MISSING: no 'paramiko'; install the extra dev", allow_module_level=True)
import paramiko

LARGE = 256 << 20
"""Bytes of a planted object."""
MUCH = 4 << 20
"""Bytes that are too many for a block and what lies in buffers."""


class Door(paramiko.ServerInterface):
    """Lets everybody in."""

    def check_auth_password(self, username, password):
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind, chanid):
        return paramiko.OPEN_SUCCEEDED


class Handle(paramiko.SFTPHandle):
    """An open file."""

    def __init__(self, server, fd, flags):
        super().__init__(flags)
        self.server, self.fd = server, fd

    def read(self, offset, length):
        data = os.pread(self.fd, length, offset)
        with self.server.lock:
            self.server.sent_bytes += len(data)
        return data

    def write(self, offset, data):
        os.pwrite(self.fd, data, offset)
        return paramiko.SFTP_OK

    def stat(self):
        return paramiko.SFTPAttributes.from_stat(os.fstat(self.fd))

    def close(self):
        os.close(self.fd)


def answered(method):
    """Give the protocol's number for an error of the operating system's."""

    def call(*arguments):
        try:
            result = method(*arguments)
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno)
        return paramiko.SFTP_OK if result is None else result

    return call


class Files(paramiko.SFTPServerInterface):
    """Serves the folder of its server, and nothing above it."""

    def __init__(self, door, server):
        self.server = server

    def _at(self, path):
        return f"{self.server.folder}{self.canonicalize(path)}"

    @answered
    def list_folder(self, path):
        found = []
        for entry in os.scandir(self._at(path)):
            found.append(paramiko.SFTPAttributes.from_stat(entry.stat(), entry.name))
        return found

    @answered
    def stat(self, path):
        return paramiko.SFTPAttributes.from_stat(os.stat(self._at(path)))

    lstat = stat

    @answered
    def open(self, path, flags, attr):
        return Handle(self.server, os.open(self._at(path), flags, 0o600), flags)

    @answered
    def remove(self, path):
        os.remove(self._at(path))

    @answered
    def posix_rename(self, oldpath, newpath):
        os.replace(self._at(oldpath), self._at(newpath))

    rename = posix_rename

    @answered
    def mkdir(self, path, attr):
        os.mkdir(self._at(path))


class SftpServer:
    """Serves a folder by SFTP, until the block is left."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.lock = threading.Lock()
        self.sent_bytes = 0
        self._key = paramiko.RSAKey.generate(2048)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._transports = []
        self._thread = threading.Thread(target=self._accept, name="sftp-server")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        # Closing it alone does not wake the thread.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        for transport in self._transports:
            transport.close()
            transport.join()

    @property
    def url(self):
        return f"sftp://kvbm@127.0.0.1:{self._socket.getsockname()[1]}/x"

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                transport = paramiko.Transport(connection)
                transport.add_server_key(self._key)
                transport.set_subsystem_handler("sftp", paramiko.SFTPServer, Files, self)
                self._transports.append(transport)
                with contextlib.suppress(paramiko.SSHException, EOFError):
                    transport.start_server(server=Door())


@pytest.fixture
def server(tmp_path):
    (tmp_path / "x").mkdir()
    with SftpServer(tmp_path) as made:
        yield made


@pytest.fixture
def tier(server):
    options = {"password": "p", "look_for_keys": False, "allow_agent": False}
    config = RemoteConfig(server.url, options, max_in_flight=2, connect_timeout_s=15.0, timeout_s=15.0)
    made = RemoteTier(config, TierContext(NAMESPACE, BLOCK))
    yield made
    made.close()


def path_of(server, number):
    [path] = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(server.folder)
        for name in names
        if name == key(number).hex()
    ]
    return path


def lookup(tier, number):
    return run(tier, [Transfer(1, Op.LOOKUP, key(number))])[1]


def test_a_block_comes_back_and_a_missing_one_does_not(server, tier):
    assert store(tier, 1).outcome is Outcome.DONE
    assert load(tier, 1)[1] == content(1)
    assert load(tier, 2)[0].outcome is Outcome.MISSING
    assert lookup(tier, 2).outcome is Outcome.MISSING
    with open(path_of(server, 1), "rb") as file:
        assert file.read() == content(1)


def test_a_planted_object_costs_no_more_than_a_block(server, tier):
    assert store(tier, 1).outcome is Outcome.DONE
    assert load(tier, 1)[0].outcome is Outcome.DONE, "its connection is there"
    os.truncate(path_of(server, 1), LARGE)
    server.sent_bytes = 0
    tracemalloc.start()
    try:
        # What paramiko reads is bytes of Python's, which are counted. The server is in this process, too.
        end, got = load(tier, 1)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.CORRUPT)
    assert got == b"\xaa" * BLOCK
    assert BLOCK < server.sent_bytes < MUCH
    assert peak_bytes < MUCH


@pytest.mark.parametrize("nbytes", [0, BLOCK + 1])
def test_an_object_that_is_empty_or_longer_than_the_region_is_corrupt(server, tier, nbytes):
    assert store(tier, 1).outcome is Outcome.DONE
    os.truncate(path_of(server, 1), nbytes)
    end, got = load(tier, 1)
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.CORRUPT)
    assert got == b"\xaa" * BLOCK


def test_an_object_that_was_cut_short_says_its_length_and_the_seal_finds_it(server, tier):
    assert store(tier, 1).outcome is Outcome.DONE
    os.truncate(path_of(server, 1), BLOCK - 1)
    end, got = load(tier, 1)
    assert (end.outcome, end.nbytes) == (Outcome.DONE, BLOCK - 1)
    assert got[-1:] == b"\xaa"
