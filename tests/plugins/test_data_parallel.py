"""Replicas of one configuration: who has which share and which folder of a tier, and two real ones."""

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import data_parallel_child

from kvbm_core import ConfigError, Peers, load_config
from kvbm_vllm._replicas import Replicas, note_replicas, replicas_of

TIERS = [
    {"backend": "cpu", "capacity": "1GiB"},
    {"backend": "gds", "capacity": "1GiB", "path": "/nvme/kv"},
    {"backend": "remote", "url": "file:///far/kv"},
]


def started(size=1, local=None, rank=0):
    """What the process that a user starts makes of its arguments."""
    parallel = SimpleNamespace(
        data_parallel_size=size, data_parallel_size_local=size if local is None else local,
        data_parallel_rank=rank, data_parallel_index=rank, world_size=2,
    )  # fmt: skip
    note_replicas(parallel)
    return parallel


def engine(parallel, number, *, dense=True):
    """What one of its engines is given."""
    parallel = pickle.loads(pickle.dumps(parallel))
    parallel.data_parallel_index = number
    if dense:  # It is to believe that it is alone.
        parallel.data_parallel_size = parallel.data_parallel_size_local = 1
        parallel.data_parallel_rank = 0
    else:
        parallel.data_parallel_rank = number
    note_replicas(parallel)
    return parallel


def test_one_engine_has_everything():
    alone = engine(started(), 0)
    assert replicas_of(alone) == Replicas()
    assert replicas_of(alone).peers(alone, 4) == Peers(4)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("size", "local", "rank", "shares"),
    [
        pytest.param(2, 2, 0, [(0, 0, 2), (0, 1, 2)], id="one command"),
        pytest.param(4, 2, 0, [(0, 0, 2), (0, 1, 2)], id="the first of two hosts"),
        pytest.param(4, 2, 2, [(2, 0, 2), (2, 1, 2)], id="the second of two hosts"),
        pytest.param(2, 1, 1, [(1, 0, 1)], id="a command for each"),
        pytest.param(2, 0, 0, [], id="no engine here"),
    ],
)
def test_replicas_of_a_command_divide_a_capacity(size, local, rank, shares, dense):
    command = started(size, local, rank)
    assert replicas_of(command).first == rank
    for number, (first, place, count) in enumerate(shares, rank):
        parallel = engine(command, number, dense=dense)
        assert replicas_of(parallel) == Replicas(first, count, size)
        assert replicas_of(parallel).peers(parallel, 2) == Peers(2, place, count)


def test_those_that_another_command_starts_have_a_folder_of_their_own_where_they_do_not_share():
    config = load_config({"tiers": TIERS})
    assert Replicas(0, 2).apart(config) is config
    apart = Replicas(2, 2).apart(config)
    assert [tier.settings.get("path") for tier in apart.tiers] == [None, "/nvme/kv/dp2", None]
    assert [tier.settings for tier in (apart.tiers[0], apart.tiers[2])] == [
        tier.settings for tier in (config.tiers[0], config.tiers[2])
    ]


def test_whose_a_folder_is_is_told(tmp_path, caplog):
    for name in ("dp1", "dp3", "dp4", "dpx", "rank0"):
        (tmp_path / name).mkdir()
    config = load_config({"tiers": [TIERS[0], {**TIERS[1], "path": str(tmp_path)}, TIERS[2]]})

    def lines(replicas):
        caplog.clear()
        with caplog.at_level("INFO", "kvbm_vllm"):
            replicas.tell(replicas.apart(config), 2)
        return sorted(caplog.messages)

    assert [line.partition(":")[0] for line in lines(Replicas())] == [
        f"{tmp_path}/dp{number}" for number in (1, 3, 4)
    ]
    [first, second, told] = lines(Replicas(0, 2, 4))
    assert first.startswith(f"{tmp_path}/dp1: a replica that another command started left it")
    assert second.startswith(f"{tmp_path}/dp4: ")
    assert told.startswith("replicas 0 to 1 divide the capacity")
    assert "rank0 to rank1 are of the first" in told
    assert lines(Replicas(2, 1, 3)) == [
        f"replica 0 is started by another command: {tmp_path}/dp2 is of those started here"
    ]


def test_a_list_of_engines_shows_that_a_capacity_is_divided():
    from kvbm_vllm._membership import _shown

    tiers = load_config({"tiers": TIERS}).tiers
    assert [_shown(tier, 2) for tier in tiers] == [
        "cpu 1GiB over 2 engines",
        "gds 1GiB over 2 engines",
        "remote",
    ]
    assert [_shown(tier, 1) for tier in tiers] == ["cpu 1GiB", "gds 1GiB", "remote"]


@pytest.mark.parametrize(("size", "number"), [(1, 1), (2, 0)])
def test_without_the_plugin_where_they_were_started_the_share_is_not_known(size, number):
    parallel = SimpleNamespace(data_parallel_size=size, data_parallel_index=number)
    with pytest.raises(
        ConfigError, match=rf"data_parallel_size: this is replica {number}, .* add kvbm to VLLM_PLUGINS"
    ):
        replicas_of(parallel)


def test_a_replica_beyond_those_of_the_command_is_refused():
    parallel = engine(started(4, 2), 3)
    with pytest.raises(ConfigError, match=r"replica 3 was not started by the command .* replicas 0 to 1 on"):
        replicas_of(parallel).peers(parallel, 1)


@pytest.mark.vllm
def test_vllms_configuration_brings_the_number_to_an_engine_and_a_directory_is_told(llama, tmp_path, caplog):
    from test_configuration import configure

    tiers = [{"backend": "lmdb", "capacity": "64MiB", "path": str(tmp_path / "kv")}]
    with caplog.at_level("INFO", "kvbm_vllm"):
        config = pickle.loads(pickle.dumps(configure(llama, tiers, engine={"data_parallel_size": 2})))
    config.parallel_config.data_parallel_index = 1
    config.parallel_config.reconfigure_for_independent_dp_rank()
    config.__post_init__()
    assert replicas_of(config.parallel_config).peers(config.parallel_config, 1) == Peers(1, 1, 2)
    assert sum("replicas 0 to 1 divide the capacity" in line for line in caplog.messages) == 1


@pytest.mark.vllm
def test_a_capacity_with_no_block_for_each_replica_and_a_port_too_many_are_found_early(llama, monkeypatch):
    from test_configuration import configure

    tiers, engine = [{"backend": "cpu", "capacity": "40KiB"}], {"data_parallel_size": 2}
    with pytest.raises(Exception, match="smaller than one block of 24KiB for each of 2 engines"):
        configure(llama, tiers, engine=engine)
    tiers[0]["capacity"] = "64MiB"
    monkeypatch.setenv("DYN_KVBM_METRICS", "true")
    monkeypatch.setenv("DYN_KVBM_METRICS_PORT", "65535")
    with pytest.raises(Exception, match="DYN_KVBM_METRICS_PORT: 65535 and the 1 of this engine are 65536"):
        configure(llama, tiers, engine=engine)
    configure(llama, tiers)


def free_ports():
    """Give a port that is free, and the next is, too."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port
    raise AssertionError("no two ports in a row are free")


@pytest.mark.engine
def test_two_replicas_keep_blocks_of_their_own_over_a_restart_and_share_a_remote_tier(llama, tmp_path):
    environ = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "DYN_KVBM_METRICS": "true",
        "DYN_KVBM_METRICS_PORT": str(free_ports()),
    }  # fmt: skip
    command = [sys.executable, data_parallel_child.__file__, str(llama), str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    blocks = data_parallel_child.BLOCKS

    for start in (first, second):
        assert start["folders"] == ["disk/rank0", "disk/rank1"]
        # Each has answered its own prompt, and the other's.
        assert start["again"] == first["again"]
        assert start["theirs"] == first["again"][::-1]
        for counts in start["counts"]:
            assert counts["tier_capacity_bytes cpu"] <= 32 << 20
            assert counts["tier_used_bytes lmdb"] <= counts["tier_capacity_bytes lmdb"] <= 32 << 20
    assert second["own"] == first["again"]
    for before, after in zip(first["counts"], second["counts"], strict=True):
        assert [before[f"loaded_blocks {tier}"] for tier in ("cpu", "lmdb", "remote")] == [0, 0, blocks]
        assert [after[f"loaded_blocks {tier}"] for tier in ("cpu", "lmdb", "remote")] == [0, 2 * blocks, 0]
