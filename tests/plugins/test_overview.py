"""The five lines of a stack that is ready."""

import pytest

from kvbm_core import Capabilities, TierStatus, load_config
from kvbm_core.groups import Coverage, KvGroup, Rule, group_tag
from kvbm_metrics import rate_reading
from kvbm_vllm._overview import overview
from kvbm_vllm._values import Handshake

GIB = 1 << 30
WHERE = "with the engine's own"


def group(tokens, coverage=Coverage()):  # noqa: B008 - it is frozen.
    return KvGroup(tokens, coverage, group_tag({"tokens": tokens, "coverage": str(coverage)}))


def rank(number, capacity, charges, *, found=(), speed=None):
    cpu = TierStatus("cpu", Capabilities(capacity_bytes=capacity), [], charges, charges)
    disk = TierStatus(
        "disk", Capabilities(capacity_bytes=4 * capacity, durable=True), [*found], charges, charges
    )
    shelf = TierStatus(
        "shelf", Capabilities(capacity_bytes=None, shared=True, remote_lookup=True), [], charges, charges
    )
    rates = {rate_reading(method, way, chosen=chosen): rate for method, way, chosen, rate in speed or ()}
    return Handshake(number, [cpu, disk, shelf], {}, constants=rates, namespace=f"{number:032x}")


@pytest.fixture
def config():
    return load_config(
        {
            "tiers": [
                {"backend": "cpu", "capacity": "4GiB"},
                {"backend": "lmdb", "name": "disk", "capacity": "16GiB", "path": "/nvme",
                 "codecs": ["zstd"]},
                {"backend": "remote", "name": "shelf", "url": "s3://kv"},
            ]
        }
    )  # fmt: skip


def test_of_several_ranks_the_least_decides(config):
    found = [(at.to_bytes(32), 3 << 20) for at in range(1200 // 4)]
    speeds = [("staged", "device_to_host", "yes", 54e9), ("dma", "device_to_host", "", 60e9),
              ("staged", "host_to_device", "yes", 53e9)]  # fmt: skip
    ranks = [
        rank(
            1, GIB, (1 << 21,), found=found, speed=[(m, w, c == "yes", int(s * 0.9)) for m, w, c, s in speeds]
        ),
        rank(0, GIB, (1 << 20,), found=found, speed=[(m, w, c == "yes", int(s)) for m, w, c, s in speeds]),
    ]
    lines = overview(ranks, config, [group(16)], WHERE)
    assert lines == [
        "KvbmConnector is ready: cpu > disk+zstd > shelf; 2 ranks",
        "room: cpu 2GiB, 8,192 tokens; disk 8GiB, 32,768 tokens; shelf has no limit",
        "found from before: cpu nothing; disk 600 objects, 1.75GiB; shelf is asked when a prompt comes",
        "speed: 48.6 GB/s out of the device (staged), 47.7 GB/s into it (staged); "
        "tiers are measured as they load",
        f"namespace: {0:032x} on rank 0; metrics: {WHERE}",
    ]


def test_windows_and_states_come_beside_what_keeps_all_tokens(config):
    groups = [group(16), group(16, Coverage(Rule.WINDOW, 1024)), group(64, Coverage(Rule.STATE))]
    lines = overview([rank(0, GIB, (1 << 20, 1 << 20, 1 << 22))], config, groups, WHERE)
    assert "cpu 1GiB, 16,384 tokens and what windows and states need beside them" in lines[1]
    assert lines[3:] == [
        "speed: tiers are measured as they load",
        f"namespace: {0:032x}; metrics: {WHERE}",
    ]


def test_where_no_group_keeps_all_tokens_their_number_is_not_known(config):
    [_, room, *_] = overview([rank(0, GIB, (1 << 20,))], config, [group(16, Coverage(Rule.STATE))], WHERE)
    assert room == "room: cpu 1GiB; disk 4GiB; shelf has no limit"
