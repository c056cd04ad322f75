"""A stranger's backend, in one SQLite file: installed, found by its name, tested by its own tests, used."""

import importlib
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from toy_install import SOURCE, install_toy

from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.testing import MemoryDevice
from kvbm_core.testing._whole import members_of
from kvbm_core.testing.suite import TierSuite


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return install_toy(tmp_path_factory.mktemp("toy") / "site")


def run_python(site, folder, *arguments):
    # The core that is tested here is the one that the child finds, too.
    paths = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def test_it_is_found_by_its_entry_point(site, tmp_path):
    program = (
        "import kvbm_core; r = kvbm_core.Registry(); print(r.names(), r.backend('toy').contract_version)"
    )
    done = run_python(site, tmp_path, "-W", "error", "-c", program)
    assert done.returncode == 0, done.stderr
    assert "'toy'" in done.stdout
    assert done.stdout.endswith("] 2\n")


def test_only_its_module_and_metadata_are_installed(site):
    assert {path.name for path in site.iterdir()} - {"__pycache__"} == {
        "kvbm_toy.py",
        "kvbm_toy-0.1.0.dist-info",
    }


@pytest.mark.early
def test_its_own_tests_pass_whole(site, tmp_path):
    shutil.copytree(SOURCE / "tests", tmp_path / "tests")
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "--junitxml=report.xml", "tests"]
    done = run_python(site, tmp_path, "-m", "pytest", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deselected" not in done.stdout
    cases = list(ET.parse(tmp_path / "report.xml").iter("testcase"))
    suite = {name for name in members_of(TierSuite) if name.startswith("test_")}
    assert {case.get("name") for case in cases if case.get("classname").endswith("TestToy")} == suite
    skipped = [skip for case in cases for skip in case.iter("skipped")]
    # An expected failure is written as skipped, too.
    assert all("left out: the tier is not" in skip.get("message") for skip in skipped)
    run = {case.get("name") for case in cases if case.find("skipped") is None}
    assert "test_what_was_reported_stored_is_served_after_a_kill" in run
    assert "test_any_sequence_of_calls_agrees_with_the_memory_tier" in run


def test_below_host_memory_it_serves_after_a_restart(site, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    tiers = [
        {"backend": "cpu", "capacity": "1MiB"},
        {"backend": "toy", "capacity": "2MiB", "path": str(tmp_path / "toy")},
    ]
    namespace = make_namespace({"model": "toy"})
    keys = chain_keys(root_key(), range(64), block_tokens=16)
    device = MemoryDevice(num_blocks=8, block_bytes=8192)
    for block in range(4):
        device.write(block, bytes([block + 1]) * 8192)
    try:
        with Stack.open({"tiers": tiers}, device, namespace) as stack:
            stack.store(keys, [0, 1, 2, 3])
            stack.wait()
            assert {name: counts.stored for name, counts in stack.counts.items()} == {"cpu": 4, "toy": 4}
        with Stack.open({"tiers": tiers}, device, namespace) as stack:
            assert stack.occupancy == {"cpu": 0, "toy": 4}
            assert stack.load(keys, [4, 5, 6, 7]) == 4
            assert stack.counts["toy"].loaded == 4
    finally:
        sys.modules.pop("kvbm_toy", None)
    assert [device.read(block) for block in (4, 5, 6, 7)] == [device.read(block) for block in (0, 1, 2, 3)]
