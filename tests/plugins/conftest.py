import gc
import importlib
import sys
from types import SimpleNamespace

import pytest

_FAULTY = """
from kvbm_core import Backend, hookimpl
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing import FaultyTier

fault = None   # set by the test: a function from a transfer to the name of a fault
claims = []    # set by the test: keys the inventory lists although they are not there


class Liar(FaultyTier):
    def inventory(self):
        return [(key, 1) for key in claims]


def open_faulty(config, context):
    return Liar(MemoryTier(config, context), lambda transfer: fault(transfer) if fault else None)


@hookimpl
def kvbm_backends():
    return [Backend("faulty", MemoryConfig, open_faulty)]
"""

_SHARED = """
from kvbm_core import Backend, Capabilities, hookimpl
from kvbm_core.memory import MemoryConfig, MemoryTier


class SharedTier(MemoryTier):
    def __init__(self, config, context):
        super().__init__(config, context)
        self._capabilities = Capabilities(
            capacity_bytes=None, queue_depth=64, durable=True, shared=True, remote_lookup=True
        )

    def _run(self, transfer):
        bounds, self._capabilities = self._capabilities, Capabilities(capacity_bytes=1 << 40)
        try:
            return super()._run(transfer)
        finally:
            self._capabilities = bounds


@hookimpl
def kvbm_backends():
    return [Backend("shared", MemoryConfig, SharedTier, shared=True)]
"""


_SLOW = """
import time
from kvbm_core import Codec, CodecConfig, CodecKind, hookimpl

takes_s = 0.0    # set by the test: for each object


class Slow(Codec):
    def max_bytes(self, nbytes):
        return nbytes

    def encode(self, key, source, target):
        target[: len(source)] = source
        return len(source)

    def decode(self, key, source, target):
        time.sleep(takes_s)
        return self.encode(key, source, target)


@hookimpl
def kvbm_codecs():
    return [CodecKind("slow", CodecConfig, lambda config, context: Slow())]
"""


def pytest_collection_modifyitems(items):
    """The engine's own warnings are not ours to mend."""
    for item in items:
        if item.get_closest_marker("engine") or item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def _models_are_looked_at_here(request):
    """Spare a test that runs vLLM's code a process for each architecture."""
    if not {"engine", "vllm"}.isdisjoint(request.keywords):
        from engines import look_at_models_here

        look_at_models_here()


def install(site, name, source):
    """Install a stranger's backend as a distribution of its own; import it."""
    info = site / f"kvbm_{name}-0.1.dist-info"
    info.mkdir(parents=True)
    (site / f"kvbm_{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kvbm-{name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[kvbm_core]\n{name} = kvbm_{name}\n")
    importlib.invalidate_caches()
    return importlib.import_module(f"kvbm_{name}")


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """A backend that misbehaves on command."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield install(tmp_path / "site", "faulty", _FAULTY)
    del sys.modules["kvbm_faulty"]


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A codec that decodes as slowly as it is told."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield install(tmp_path / "site", "slow", _SLOW)
    del sys.modules["kvbm_slow"]


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A backend in memory that cannot list its blocks and keeps them for other engines."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield install(tmp_path / "site", "shared", _SHARED)
    del sys.modules["kvbm_shared"]


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


@pytest.fixture
def drive(llama, shared, faulty, monkeypatch):
    """Run a random engine with a seed; give what happened, or the error that says what was wrong."""
    import random_engine
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash

    from kvbm_vllm import _scheduler

    init_none_hash(sha256)

    def run(seed, mix="full", steps=400):
        engine = random_engine.Engine(llama, seed, mix, faulty=faulty)
        monkeypatch.setattr(_scheduler, "time", SimpleNamespace(monotonic=lambda: engine.clock_s))
        try:
            engine.run(steps)
        except AssertionError as error:
            raise AssertionError(f"{mix}, seed {seed}: {error}") from error
        finally:
            engine.close()
        return engine.happened()

    return run
