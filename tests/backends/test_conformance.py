"""Every backend in the tree passes the suite that ships, by the same door as a stranger's."""

import contextlib

import pytest
from servers import FaultProxy

from kvbm_core.testing._life_tests import LifeTests
from kvbm_core.testing._medium_tests import MediumTests
from kvbm_core.testing._process_tests import ProcessTests
from kvbm_core.testing.suite import TierSuite
from kvbm_gds import _engines, _slots, _tier


class TestMemory(TierSuite):
    backend = "memory"

    def settings(self, folder):
        return {"capacity": "512KiB"}


class TestCpu(TierSuite):
    backend = "cpu"

    def settings(self, folder):
        return {"capacity": "512KiB"}


class TestLmdb(TierSuite):
    backend = "lmdb"
    programs = 20  # Each opening starts a process, the keeper.

    def settings(self, folder):
        return {"capacity": "4MiB", "path": str(folder / "kv")}


class Gds(TierSuite):
    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch):
        """Have it look at once whether its medium is well again."""
        monkeypatch.setattr(_tier, "_REOPEN_EVERY_S", 0.05)
        monkeypatch.setattr(_slots, "_MEND_EVERY_S", 0.05)


PROBED = {part.__name__ for part in (LifeTests, MediumTests, ProcessTests)}
"""Parts of the suite in which each opening probes, in a child: they try what an opening does and leaves."""


class TestGdsByNixl(Gds):
    backend = "gds"
    found = None

    @pytest.fixture(autouse=True)
    def probed_once(self, request, monkeypatch):
        """Probe at the first opening, for half a second, and remember what was found for the other parts."""
        probe = _engines.run_probe

        def remembered(*arguments):
            cls = type(self)
            cls.found = cls.found or probe(*arguments)
            return cls.found

        if request.function.__qualname__.split(".")[0] not in PROBED:
            monkeypatch.setattr(_engines, "run_probe", remembered)

    def settings(self, folder):
        return {"capacity": "2MiB", "path": str(folder / "kv"), "engine": "posix"}


class TestGdsByThreads(Gds):
    backend = "gds"

    def settings(self, folder):
        return {"capacity": "2MiB", "path": str(folder / "kv"), "engine": "threads"}


class TestRemoteFiles(TierSuite):
    backend = "remote"

    def settings(self, folder):
        return {"url": f"file://{folder}/kv"}


@pytest.fixture(scope="module")
def s3_proxy(s3_server):
    with FaultProxy(s3_server) as proxy:
        yield proxy


class TestRemoteS3(TierSuite):
    backend = "remote"
    client = "obstore"

    @pytest.fixture(autouse=True)
    def server(self, s3_server, s3_proxy, monkeypatch):
        for name, value in s3_server.env.items():
            monkeypatch.setenv(name, value)
        type(self).s3, type(self).proxy = s3_server, s3_proxy

    @contextlib.contextmanager
    def broken_medium(self, folder):
        self.proxy.mode = "403"
        try:
            yield
        finally:
            self.proxy.mode = "pass"

    def settings(self, folder):
        url = f"s3://{self.s3.bucket}/{folder.parent.name}-{folder.name}"
        # It shares the machine with the tests.
        options = {"endpoint_url": self.proxy.endpoint}
        return {"url": url, "client": self.client, "storage_options": options, "timeout_s": 30}


class TestRemoteS3ByFsspec(TestRemoteS3):
    client = "fsspec"
    programs = 15
