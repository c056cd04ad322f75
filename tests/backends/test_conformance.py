"""Every backend in the tree passes the suite that ships, by the same door as a stranger's."""

import pytest

from kvbm_core.testing.suite import TierSuite


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


class TestGdsByNixl(TierSuite):
    backend = "gds"
    programs = 15  # Opening it takes half a second, for the probe.

    def settings(self, folder):
        return {"capacity": "2MiB", "path": str(folder / "kv"), "engine": "posix"}


class TestGdsByThreads(TierSuite):
    backend = "gds"

    def settings(self, folder):
        return {"capacity": "2MiB", "path": str(folder / "kv"), "engine": "threads"}


class TestRemoteFiles(TierSuite):
    backend = "remote"

    def settings(self, folder):
        return {"url": f"file://{folder}/kv"}


class TestRemoteS3(TierSuite):
    backend = "remote"
    client = "obstore"

    @pytest.fixture(autouse=True)
    def server(self, s3_server, monkeypatch):
        for name, value in s3_server.env.items():
            monkeypatch.setenv(name, value)
        type(self).s3 = s3_server

    def settings(self, folder):
        url = f"s3://{self.s3.bucket}/{folder.parent.name}-{folder.name}"
        # It shares the machine with the tests.
        options = {"endpoint_url": self.s3.endpoint}
        return {"url": url, "client": self.client, "storage_options": options, "timeout_s": 30}


class TestRemoteS3ByFsspec(TestRemoteS3):
    client = "fsspec"
    programs = 15
