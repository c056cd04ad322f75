"""Strangers' codecs and policies: installed, found, tested by their own tests, used in a stack."""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from toy_install import HERE

from kvbm_core import ConfigError, Registry, Stack, chain_keys, make_namespace, root_key
from kvbm_core.testing import MemoryDevice
from kvbm_core.testing._whole import members_of
from kvbm_core.testing.codec_suite import CodecSuite
from kvbm_core.testing.policy_suite import PolicySuite

SUITES = {
    "kvbm_pack": CodecSuite,
    "kvbm_aes_gcm": CodecSuite,
    "kvbm_arc": PolicySuite,
    "kvbm_learned": PolicySuite,
    "kvbm_chooser": PolicySuite,
}
POLICIES = ("arc", "learned", "chooser")
BLOCK_BYTES, BLOCKS = 20_000, 8
PLAIN = b"a prompt's cache "


@pytest.mark.parametrize("name", SUITES)
def test_its_own_tests_pass_whole(parts_site, tmp_path, name):
    shutil.copytree(HERE / name / "tests", tmp_path / "tests")
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(parts_site), os.environ.get("PYTHONPATH"))))
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "--junitxml=report.xml", "tests"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = list(ET.parse(tmp_path / "report.xml").iter("testcase"))
    suite = {test for test in members_of(SUITES[name]) if test.startswith("test_")}
    assert suite <= {case.get("name") for case in cases}
    assert not [skip for case in cases for skip in case.iter("skipped")]


def test_they_are_found_by_their_entry_points(installed):
    registry = Registry()
    assert registry.codec("pack").saves_room
    assert not registry.codec("aes-gcm").saves_room
    assert [registry.policy(name).name for name in POLICIES] == list(POLICIES)


def key_file(folder, content=b"k" * 32):
    file = folder / "key"
    file.write_bytes(content)
    file.chmod(0o600)
    return str(file)


def stack_over(folder, device, **settings):
    tier = {"backend": "remote", "url": f"file://{folder}/kv", **settings}
    return Stack.open({"tiers": [tier]}, device, make_namespace({"model": "parts"}))


@pytest.mark.parametrize("order", ["pack", "aes-gcm", "pack, aes-gcm", "aes-gcm, pack"])
def test_what_codecs_made_is_loaded_after_a_restart(installed, tmp_path, order):
    parts = {
        "pack": {"name": "pack", "level": 3},
        "aes-gcm": {"name": "aes-gcm", "key_file": key_file(tmp_path)},
    }
    codecs = [{"name": name, **parts[name]} for name in order.split(", ")]
    keys = chain_keys(root_key(), range(16 * BLOCKS), block_tokens=16)
    device = MemoryDevice(2 * BLOCKS, BLOCK_BYTES)
    content = [(PLAIN * (1 + BLOCK_BYTES // len(PLAIN)))[at : at + BLOCK_BYTES] for at in range(BLOCKS)]
    for at in range(BLOCKS):
        device.write(at, content[at])
    with stack_over(tmp_path, device, codecs=codecs) as stack:
        stack.store(keys, list(range(BLOCKS)))
        stack.wait()
    files = [path for path in (tmp_path / "kv").rglob("*") if path.is_file()]
    assert len(files) == BLOCKS
    # Encrypted bytes do not get shorter; what was compressed before does.
    short = order.startswith("pack")
    assert all((path.stat().st_size < BLOCK_BYTES // 10) is short for path in files)
    if "aes-gcm" in order:
        assert not any(PLAIN in path.read_bytes() for path in files)
    with stack_over(tmp_path, device, codecs=codecs) as stack:
        assert stack.load(keys, list(range(BLOCKS, 2 * BLOCKS))) == BLOCKS
    assert [device.read(BLOCKS + at) for at in range(BLOCKS)] == content


def test_with_another_key_file_nothing_is_found(installed, tmp_path):
    keys = chain_keys(root_key(), range(16), block_tokens=16)
    device = MemoryDevice(2, BLOCK_BYTES)
    with stack_over(tmp_path, device, codecs=[{"name": "aes-gcm", "key_file": key_file(tmp_path)}]) as stack:
        stack.store(keys, [0])
        stack.wait()
    other = {"name": "aes-gcm", "key_file": key_file(tmp_path, b"o" * 32)}
    with stack_over(tmp_path, device, codecs=[other]) as stack:
        assert stack.load(keys, [1]) == 0


def test_a_setting_out_of_range_is_refused_by_name(installed, tmp_path):
    with pytest.raises(ConfigError, match="level: 23; write 1 to 22"):
        stack_over(tmp_path, MemoryDevice(1, BLOCK_BYTES), codecs=[{"name": "pack", "level": 23}])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_tier_goes_on_under_a_policy(installed, tmp_path, policy, caplog):
    device = MemoryDevice(1, BLOCK_BYTES)
    tiers = [{"backend": "memory", "capacity": 10 * (BLOCK_BYTES + 1000), "policy": {"name": policy}}]
    with Stack.open({"tiers": tiers}, device, make_namespace({"model": "parts"})) as stack:
        for number in range(60):
            [key] = chain_keys(root_key(), range(number * 16, number * 16 + 16), block_tokens=16)
            device.write(0, bytes([number]) * BLOCK_BYTES)
            stack.store([key], [0])
            stack.wait()
            device.write(0, bytes(BLOCK_BYTES))
            assert stack.load([key], [0]) == 1
            assert device.read(0) == bytes([number]) * BLOCK_BYTES
        [counts] = stack.counts.values()
    assert counts.stored == 60
    # The core says it when it goes on without a policy.
    assert "at fault" not in caplog.text
