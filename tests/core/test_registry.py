import importlib
import sys
from importlib.metadata import EntryPoint, entry_points

import pytest

from kvbm_core import BackendError, PolicyContext, Registry
from kvbm_core.config import load_config
from kvbm_core.leader.ground.guarded_policies import GuardedPolicy

MODULE = """
from kvbm_core import Backend, hookimpl
from kvbm_core.memory import MemoryConfig, MemoryTier
@hookimpl
def kvbm_backends():
    return [{offer}]
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution with one entry point and its module."""
    made = []

    def install(distribution, name, module, source):
        site = tmp_path / distribution
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[kvbm_core]\n{name} = {module}\n")
        (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        made.append(module)

    yield install
    for module in made:
        sys.modules.pop(module, None)


def test_backends_come_in_by_the_door_that_strangers_use():
    registry = Registry()
    assert {"memory", "cpu", "lmdb"} <= set(registry.names())
    assert registry.backend("memory").name == "memory"


def test_a_stranger_is_found_by_name(install):
    install("stranger", "toy", "toy_backend", MODULE.format(offer='Backend("toy", MemoryConfig, MemoryTier)'))
    assert Registry().backend("toy").name == "toy"


POLICY = """
from kvbm_core import Lru, Policy, PolicyConfig, hookimpl
class Mine(Lru):
    pass
@hookimpl
def kvbm_policies():
    return [Policy("mine", PolicyConfig, lambda config, context: Mine())]
"""


@pytest.mark.parametrize(("name", "watched"), [("lru", False), ("fifo", False), ("mine", True)])
def test_a_strangers_policy_is_watched_even_if_it_is_made_from_ours(install, name, watched):
    install("stranger", "mine", "mine_policy", POLICY)
    config = load_config({"tiers": [{"backend": "memory", "capacity": "1MiB", "policy": name}]})
    made = Registry().policies(config).order(0, PolicyContext(1 << 20, 1 << 10, "memory"))
    assert isinstance(made, GuardedPolicy) is watched


def test_a_broken_neighbour_does_no_harm(install):
    install("broken", "broken", "broken_backend", "raise RuntimeError('broken')")
    assert Registry().backend("memory")
    with pytest.raises(BackendError, match=r"'broken' of broken 1.0 cannot be imported: broken"):
        Registry().backend("broken")


def test_two_of_a_name_are_refused_naming_both(install):
    for distribution in ("first", "second"):
        offer = 'Backend("toy", MemoryConfig, MemoryTier)'
        install(distribution, "toy", f"{distribution}_backend", MODULE.format(offer=offer))
    with pytest.raises(BackendError, match=r"(?=.*first 1.0)(?=.*second 1.0).*uninstall one"):
        Registry().backend("toy")


@pytest.mark.parametrize(
    ("offer", "words"),
    [
        ("42", "wrong 1.0 offers 42 as a backend"),
        ('Backend("other", MemoryConfig, MemoryTier)', "offers no such backend"),
        (
            'Backend("toy", MemoryConfig, MemoryTier, contract_version=99)',
            "contract version 99, this .* has 2",
        ),
        ('Backend("toy", dict, MemoryTier)', "config_type must be a kvbm_core.TierConfig"),
    ],
)
def test_what_is_no_backend_of_this_contract_is_refused(install, offer, words):
    install("wrong", "toy", "wrong_backend", MODULE.format(offer=offer))
    with pytest.raises(BackendError, match=words):
        Registry().backend("toy")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(BackendError, match=r"unknown backend 'memori'; did you mean 'memory'"):
        Registry().backend("memori")
    with pytest.raises(BackendError, match=r"unknown backend 'xyz'; installed, of all kinds: .*memory"):
        Registry().backend("xyz")


def test_a_hook_that_does_not_exist_is_refused(install):
    install(
        "odd", "toy", "odd_backend", "from kvbm_core import hookimpl\n@hookimpl\ndef kvbm_nonsense(): ...\n"
    )
    with pytest.raises(BackendError, match=r"odd 1\.0"):
        Registry().backend("toy")


def test_entry_points_can_be_given():
    points = [EntryPoint("memory", "kvbm_core.memory", "kvbm_core")]
    assert Registry(points).names() == ["memory"]
    assert entry_points(group="kvbm_core")


@pytest.mark.parametrize(
    "body", ["return 42", "return Backend('toy', MemoryConfig, MemoryTier)", "raise KeyError(1)"]
)
def test_a_hook_that_fails_or_gives_no_list_is_named(install, body):
    install("odd", "toy", "odd_backend", MODULE.replace("return [{offer}]", body))
    with pytest.raises(BackendError, match=r"'toy' of odd 1\.0: kvbm_backends\(\) failed"):
        Registry().backend("toy")


@pytest.mark.parametrize("hook", ["kvbm_backends()", "kvbm_coordinator(settings)"])
def test_a_hook_without_its_marker_is_named(install, hook):
    install("odd", "toy", "odd_backend", f"def {hook}:\n    return []\n")
    name = hook.partition("(")[0]
    words = rf"'toy' of odd 1\.0: odd_backend has a function {name}\(\) that is no hook; write @hookimpl"
    with pytest.raises(BackendError, match=words):
        Registry().backend("toy")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("None", "open must be a function"),
        ("MemoryTier, check=3", "check must be"),
        ("MemoryTier, shared='no'", "shared is 'no'"),
    ],
)
def test_a_backend_of_wrong_parts_is_refused(install, more, words):
    install("odd", "toy", "odd_backend", MODULE.format(offer=f"Backend('toy', MemoryConfig, {more})"))
    with pytest.raises(BackendError, match=rf"'toy' of odd 1\.0: {words}"):
        Registry().backend("toy")
