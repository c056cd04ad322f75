"""Tiers behind codecs pass the suite of tiers: wrapping keeps the contract.

The codecs are opened as the core does it. The tiers are `remote` in a folder (durable, shared), and `memory`.
"""

from dataclasses import replace
from typing import ClassVar

import pytest

from kvbm_core import CodecContext, Op, Registry
from kvbm_core.config import convert
from kvbm_core.layers import CodecChain, CodecTier, ForwardTier
from kvbm_core.testing.suite import TierSuite

TRAILER_BYTES = 64
"""That `crypt` puts behind each object."""


class Told(ForwardTier):
    """Counts as the core does, which knows how long objects are: the tier tells the encoded length."""

    def __init__(self, inner, overhead_bytes):
        super().__init__(inner)
        self.overhead_bytes = overhead_bytes
        self.loads = set()

    @property
    def capabilities(self):
        return replace(self._inner.capabilities, overhead_bytes=self.overhead_bytes)

    def submit(self, transfers):
        self._inner.submit(transfers)
        self.loads |= {transfer.ticket for transfer in transfers if transfer.op is Op.LOAD}

    def poll(self):
        done = self._inner.poll()
        loads = {completion.ticket for completion in done} & self.loads
        self.loads -= loads
        return [each if each.ticket in loads else replace(each, nbytes=0) for each in done]


def behind(inner, codecs, overhead_bytes=0):
    """Give a backend whose tiers are those of another behind codecs."""
    backend = Registry().backend(inner)

    def open_tier(config, context):
        chain = CodecChain(
            [(name, opened(name, settings, context)) for name, settings in codecs.items()], context.max_bytes
        )
        tier = backend.open(config, replace(context, max_bytes=chain.max_bytes(context.max_bytes)))
        return Told(CodecTier(tier, chain, context.max_bytes, context.wake, "suite"), overhead_bytes)

    def share_bytes(blocks, block_bytes):
        return backend.share_bytes(blocks, block_bytes + overhead_bytes)

    return replace(backend, open=open_tier, share_bytes=share_bytes)


def opened(name, settings, context):
    kind = Registry().codec(name)
    config = convert(settings, kind.config_type, "settings")
    return kind.open(config, CodecContext(context.namespace, 1 << 20, "suite"))


HANDED_ON = "it wakes also when `poll` has an encoded object to hand on to the tier"
CRYPT = {"crypt": {"keys": [{"environment": "KVBM_TEST_KEY"}]}}
BOTH = {"zstd": {}, **CRYPT}


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("KVBM_TEST_KEY", "11" * 32)


class TestZstdAndCryptOverFiles(TierSuite):
    backend = behind("remote", BOTH)
    programs = 20
    waivers: ClassVar = {"test_wake_is_called_when_poll_has_something_and_without_a_lock": HANDED_ON}

    def settings(self, folder):
        return {"url": f"file://{folder}/kv"}


class TestCryptOverMemory(TierSuite):
    backend = behind("memory", CRYPT, TRAILER_BYTES)
    programs = 20

    def settings(self, folder):
        return {"capacity": "512KiB"}
