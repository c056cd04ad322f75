import gc
import importlib
import sys

import pytest

_FAULTY = """
from kvbm_core import Backend, hookimpl
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing import FaultyTier

fault = None   # set by the test: a function from a transfer to the name of a fault
claims = []    # set by the test: keys the inventory lists although they are not there


class Liar(FaultyTier):
    def inventory(self):
        return list(claims)


def open_faulty(config, context):
    return Liar(MemoryTier(config, context), lambda transfer: fault(transfer) if fault else None)


@hookimpl
def kvbm_backends():
    return [Backend("faulty", MemoryConfig, open_faulty)]
"""


def pytest_collection_modifyitems(items):
    """The engine's own warnings are not ours to mend."""
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """A stranger's backend, installed as a distribution of its own, that misbehaves on command."""
    site = tmp_path / "site"
    info = site / "kvbm_faulty-0.1.dist-info"
    info.mkdir(parents=True)
    (site / "kvbm_faulty.py").write_text(_FAULTY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvbm-faulty\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[kvbm_core]\nfaulty = kvbm_faulty\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield importlib.import_module("kvbm_faulty")
    del sys.modules["kvbm_faulty"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A small random Llama."""
    from engines import make_random_llama

    return make_random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def start():
    """Start engines in this process; the one before is stopped first, and the last at the end."""
    from engines import make_engine

    running = []

    def stop():
        while running:
            running.pop().llm_engine.engine_core.shutdown()
            gc.collect()

    def start(model, tiers, **options):
        stop()
        running.append(make_engine(model, tiers, **options))
        return running[-1]

    yield start
    stop()
