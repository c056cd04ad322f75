"""What all tests share."""

import os
import threading
import time

import pytest
from hypothesis import settings
from servers import etcd_server, s3_server  # noqa: F401 - fixtures for all tests

# Read when torch is first imported. Engines' models are small: threads that wait for each other at every step
# take longer than one, and many times as long where another process has one of the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: on a busy machine a step takes as long as it takes. A failure prints what replays it.
settings.register_profile("kvbm", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("kvbm")

_PATIENCE_S = 10


def pytest_collection_modifyitems(config, items):
    """Begin with those marked `early`; leave out those marked `soak` unless -m names the mark."""
    items.sort(key=lambda item: not item.get_closest_marker("early"))
    if "soak" in config.option.markexpr:
        return
    if long := [item for item in items if item.get_closest_marker("soak")]:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where KVBM_REQUIRE_SERVERS is set, as in CI, a test that found no server has failed."""
    report = yield
    if report.skipped and "SERVER MISSING" in str(report.longrepr) and os.environ.get("KVBM_REQUIRE_SERVERS"):
        report.outcome = "failed"
        report.longrepr = str(report.longrepr)
    return report


def _ours():
    return {thread for thread in threading.enumerate() if thread.name.startswith("kvbm-")}


@pytest.fixture(autouse=True)
def _no_thread_left(request):
    """Fail a test that leaves one of our threads behind. An engine lives longer than a test."""
    before = _ours()
    yield
    if "engine" in request.keywords:
        return
    give_up_s = time.monotonic() + _PATIENCE_S
    while (left := _ours() - before) and time.monotonic() < give_up_s:
        time.sleep(0.01)
    assert not left, f"threads left behind: {sorted(thread.name for thread in left)}"
