"""Every coordinator in the tree passes the suite that ships, by the same door as a stranger's."""

import contextlib

import pytest
from servers import FaultProxy

from kvbm_core.testing.coordinator_suite import CoordinatorSuite


@pytest.fixture(scope="module")
def etcd_proxy(etcd_server):
    with FaultProxy(etcd_server) as proxy:
        yield proxy


class TestEtcd(CoordinatorSuite):
    coordinator = "etcd"
    forget_s = 2.0  # The shortest lease.

    @pytest.fixture(autouse=True)
    def server(self, etcd_proxy):
        type(self).proxy = etcd_proxy

    def settings(self, folder):
        return {"endpoints": [self.proxy.endpoint], "lease_s": 2, "timeout_s": 2, "init_timeout_s": 60}

    def hasty(self, folder):
        return {**self.settings(folder), "init_timeout_s": 1}

    @contextlib.contextmanager
    def away(self, folder):
        self.proxy.mode = "refuse"
        try:
            yield
        finally:
            self.proxy.mode = "pass"
