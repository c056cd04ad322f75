"""What a backend does against the contract, and what an operator has stacked wrongly, is found at open."""

import logging
from dataclasses import replace
from fractions import Fraction
from typing import ClassVar

import pytest

from kvbm_core import (
    Backend,
    BackendError,
    ConfigError,
    Registry,
    Stack,
    TierConfig,
    TierOpenError,
    check_stack,
    load_config,
)
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing import MemoryDevice

BLOCK = 4096
TOY = {"backend": "toy", "capacity": "1MiB"}
ODD = {"backend": "toy", "name": "odd", "capacity": "1MiB"}


def registry_of(**backends):
    registry = Registry()
    registry._loaded.update(backends)
    return registry


def open_stack(open_tier, *, tiers=(ODD,), **options):
    registry = registry_of(toy=Backend("toy", MemoryConfig, open_tier, **options))
    return Stack.open({"tiers": list(tiers)}, MemoryDevice(4, BLOCK), bytes(16), registry=registry)


class Lacks:
    """Is no tier, and lacks three methods."""

    capabilities = None

    def submit(self, transfers): ...

    def close(self): ...


class LacksOne(MemoryTier):
    """Lacks a method of the contract."""


LacksOne.__abstractmethods__ = frozenset({"poll"})


def fails(config, context):
    raise KeyError("device")


@pytest.mark.parametrize(
    ("open_tier", "words"),
    [
        (fails, r"tier odd: backend 'toy' failed in open\(\) with KeyError: 'device'"),
        (
            lambda config, context: None,
            r"tier odd: backend 'toy': open\(\) returned a NoneType, .*no kvbm_core.Tier;",
        ),
        (
            lambda config, context: Lacks(),
            r"tier odd: .* returned a Lacks, .* and has no discard, inventory, poll;",
        ),
        (LacksOne, r"tier odd: .* failed in open\(\) with TypeError: Can't instantiate .*poll"),
        (lambda config: None, r"tier odd: .* failed in open\(\) with TypeError: .*1 positional argument"),
    ],
)
def test_an_open_that_fails_or_gives_no_tier_names_tier_and_backend(open_tier, words):
    with pytest.raises((BackendError, TierOpenError), match=words) as caught:
        open_stack(open_tier)
    assert (caught.value.operation, caught.value.tier) == ("open", "odd")


def test_the_distribution_at_fault_is_named():
    assert Registry().owner("memory").startswith("'memory' of kvbm-core ")


def test_a_backends_own_error_names_the_tier_as_configured():
    def refuses(config, context):
        raise TierOpenError("no room", operation="open", tier="toy")

    with pytest.raises(TierOpenError, match=r"^tier odd: no room$"):
        open_stack(refuses)


class Says(MemoryTier):
    """Says something else of itself, and notes whether it was closed."""

    said: ClassVar = {}
    closed_tiers = 0

    @property
    def capabilities(self):
        return replace(super().capabilities, **self.said)

    def close(self):
        Says.closed_tiers += not self._closed
        super().close()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"capacity_bytes": "8"}, "capacity_bytes is '8'; it must be None or an int, 0 or more"),
        ({"capacity_bytes": -1}, "capacity_bytes is -1"),
        ({"capacity_bytes": True}, "capacity_bytes is True"),
        ({"capacity_bytes": 8.0}, "capacity_bytes is 8.0"),
        ({"queue_depth": 0}, "queue_depth is 0; it must be an int, 1 or more"),
        ({"queue_depth": "64"}, "queue_depth is '64'"),
        ({"queue_depth": True}, "queue_depth is True"),
        ({"queue_depth": None}, "queue_depth is None"),
        ({"durable": "no"}, "durable is 'no'; it must be True or False"),
        ({"device_direct": 1}, "device_direct is 1"),
        ({"remote_lookup": None}, "remote_lookup is None"),
        ({"remote_lookup": True}, "with remote_lookup capacity_bytes must be None"),
        ({"detail": None}, "detail is a NoneType; it must be a str"),
        ({"addressable": True}, "addressable is True, and Says is no kvbm_core.Addressable"),
        ({"shared": True}, "capabilities.shared is True, and the Backend's shared is False"),
    ],
)
def test_capabilities_that_cannot_be_are_refused_and_the_tier_closed(monkeypatch, said, words):
    monkeypatch.setattr(Says, "said", said)
    monkeypatch.setattr(Says, "closed_tiers", 0)
    with pytest.raises(BackendError, match=words) as caught:
        open_stack(Says)
    assert str(caught.value).startswith("tier odd: backend 'toy'")
    assert Says.closed_tiers == 1


def test_a_backend_that_says_shared_of_a_tier_that_is_not_is_refused():
    with pytest.raises(BackendError, match="shared is False, and the Backend's shared is True"):
        open_stack(MemoryTier, shared=True)


def test_what_is_no_capabilities_is_refused(monkeypatch):
    monkeypatch.setattr(MemoryTier, "capabilities", {"capacity_bytes": 8})
    with pytest.raises(BackendError, match=r"capabilities is a dict; it must be kvbm_core.Capabilities"):
        open_stack(MemoryTier)


@pytest.mark.parametrize(("hosts", "seen"), [(1, 8 << 20), (2, 4 << 20), (3, (8 << 20) // 3)])
def test_a_backend_checks_the_share_of_this_host(hosts, seen):
    found = []
    toy = Backend("toy", MemoryConfig, MemoryTier, lambda config: found.append(config.capacity))
    stack = load_config({"tiers": [{**TOY, "capacity": "8MiB"}]})
    check_stack(stack, registry_of(toy=toy), share=Fraction(1, hosts))
    assert found == [seen]


@pytest.mark.parametrize(("engines", "refused"), [(1, False), (2, False), (3, True)])
def test_a_capacity_must_hold_a_block_of_each_engine(engines, refused):
    registry = registry_of(toy=Backend("toy", MemoryConfig, MemoryTier))
    stack = load_config({"tiers": [{**TOY, "capacity": "1MiB"}]})
    if not refused:
        check_stack(stack, registry, block_bytes=1 << 19, engines=engines)
        return
    with pytest.raises(
        TierOpenError, match="'1MiB' is smaller than one block of 512KiB for each of 3 engines"
    ):
        check_stack(stack, registry, block_bytes=1 << 19, engines=engines)


class Placed(TierConfig, frozen=True):
    """Where blocks are."""

    path: str = ""
    url: str = ""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"path": "{0}/kv"}, {"path": "{0}/kv/"}),
        ({"path": "{0}/kv"}, {"path": "{0}/link"}),
        ({"path": "{0}/kv"}, {"path": "{0}/x/../kv"}),
        ({"path": "{0}/kv"}, {"url": "file://{0}/kv"}),
        ({"url": "s3://bucket/kv"}, {"url": "s3://bucket/kv/"}),
    ],
)
def test_one_place_for_two_tiers_is_refused(tmp_path, first, second):
    (tmp_path / "kv").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kv")
    registry = registry_of(**{name: Backend(name, Placed, MemoryTier) for name in ("one", "two")})
    tiers = [
        {"backend": name, **{key: value.format(tmp_path) for key, value in place.items()}}
        for name, place in (("one", first), ("two", second))
    ]
    with pytest.raises(
        ConfigError, match=r"tiers 'one' and 'two' have the same path or URL.*a place of its own"
    ):
        check_stack(load_config({"tiers": tiers}), registry)
    tiers[1] = {"backend": "two", "path": str(tmp_path / "other")}
    check_stack(load_config({"tiers": tiers}), registry)


def test_a_remote_tier_above_another_is_warned_of(caplog):
    far = Backend("far", MemoryConfig, MemoryTier, shared=True)
    stack = {"tiers": [{**TOY, "backend": "far"}, TOY]}
    with caplog.at_level(logging.WARNING, "kvbm_core"):
        check_stack(
            load_config({"tiers": stack["tiers"][::-1]}),
            registry_of(toy=Backend("toy", MemoryConfig, MemoryTier), far=far),
        )
        assert not caplog.records
        check_stack(load_config(stack), registry_of(toy=Backend("toy", MemoryConfig, MemoryTier), far=far))
    [line] = caplog.messages
    assert line.startswith("tier far is remote and stands above tier toy")
    assert "remote ones at the end" in line


def test_a_tier_smaller_than_the_one_above_is_warned_of_with_both_sizes(caplog):
    registry = registry_of(toy=Backend("toy", MemoryConfig, MemoryTier))
    tiers = [{**TOY, "capacity": "8GiB"}, {**ODD, "capacity": "4GiB"}]
    with caplog.at_level(logging.WARNING, "kvbm_core"):
        check_stack(
            load_config({"tiers": [{**TOY, "capacity": "4GiB"}, {**ODD, "capacity": "4GiB"}]}), registry
        )
        assert not caplog.records
        check_stack(load_config({"tiers": tiers}), registry)
    [line] = caplog.messages
    assert line.startswith("tier odd (capacity 4GiB) is smaller than tier toy above it (8GiB)")
