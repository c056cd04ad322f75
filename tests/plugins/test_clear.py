"""`kvbm clear`: deletes what was chosen and nothing else, and not while an engine holds the place."""

import os
import time

import pytest
from planted_faults import (
    AT_ONCE,
    DURABLE,
    FACTS,
    KEYS,
    NAMESPACE,
    OBJECT_BYTES,
    drop_order,
    fill,
    listed,
    opened,
    tier,
)
from published import published

from kvbm_cli._app import run as kvbm
from kvbm_cli.clear._order import Order
from kvbm_core import Stack, make_namespace
from kvbm_core.command import ExitCode
from kvbm_core.testing import MemoryDevice

OTHER = {**FACTS, "block_tokens": 32}


@pytest.fixture
def clear(capsys):
    def run(place, *arguments, status=ExitCode.DONE):
        capsys.readouterr()
        assert kvbm(["clear", str(place), "--json", *arguments]) == status
        return published("clear", capsys.readouterr().out)

    return run


def keys_in(name, folder):
    return {each.key for each in listed(name, folder)}


@pytest.mark.parametrize("name", DURABLE)
def test_a_namespace(tmp_path, clear, name):
    fill(tier(name, tmp_path), KEYS[:8])
    with Stack.open(
        {"tiers": [tier(name, tmp_path)]},
        MemoryDevice(4, OBJECT_BYTES - 96),
        make_namespace(OTHER),
        facts=OTHER,
    ) as stack:
        stack.store(KEYS[100:104], list(range(4)))
        stack.wait()
    drop_order(tier(name, tmp_path))
    digits = make_namespace(OTHER).hex()[:10].upper()
    said = clear(tmp_path / name, "--namespace", digits)
    assert said["removed"] is None
    assert {part["namespace"]: (part["objects"], part["left_objects"]) for part in said["parts"]} == {
        make_namespace(OTHER).hex(): (4, 0), NAMESPACE.hex(): (0, 8),
    }  # fmt: skip
    assert len(keys_in(name, tmp_path)) == 12, "without --yes nothing is deleted"
    assert clear(tmp_path / name, "--namespace", digits, "--yes")["removed"] == 4
    assert keys_in(name, tmp_path) == {*KEYS[:8]}
    with opened(tier(name, tmp_path)) as stack:
        assert stack.load(KEYS[:8], list(range(8))) == 8


@pytest.mark.parametrize("name", DURABLE)
def test_down_to_a_size_the_oldest_go(tmp_path, clear, name):
    fill(tier(name, tmp_path), KEYS[: 2 * AT_ONCE])
    order = sorted(listed(name, tmp_path), key=lambda each: each.order)
    size = f"{50 * OBJECT_BYTES + 7}B"
    assert clear(tmp_path / name, "--down-to", size, "--yes")["removed"] == 2 * AT_ONCE - 50
    left = listed(name, tmp_path)
    assert len(left) == 50
    assert min(each.order for each in left) >= order[2 * AT_ONCE - 51].order
    assert clear(tmp_path / name, "--down-to", "0B", "--yes")["removed"] == 50
    assert not listed(name, tmp_path)


@pytest.mark.parametrize("name", DURABLE)
def test_what_is_old(tmp_path, clear, name):
    fill(tier(name, tmp_path), KEYS[:4])
    old_s = time.time() - 7200
    pattern = "v1/*/r*of*/*/*" if name == "remote" else "rank0/namespaces/*.json"
    for file in (tmp_path / name).glob(pattern):
        os.utime(file, (old_s, old_s))
    assert clear(tmp_path / name, "--older-than", "3h", "--yes")["removed"] == 0
    assert clear(tmp_path / name, "--older-than", "90m", "--yes")["removed"] == 4
    assert not listed(name, tmp_path)


@pytest.mark.parametrize("name", ["gds", "lmdb"])
def test_an_engine_keeps_its_place(tmp_path, capsys, name):
    with opened(tier(name, tmp_path)) as stack:
        stack.store(KEYS[:4], list(range(4)))
        stack.wait()
        assert kvbm(["clear", str(tmp_path / name), "--down-to", "0B", "--yes"]) == ExitCode.UNUSABLE
        assert f"is in use by another engine (pid {os.getpid()}); stop it first" in capsys.readouterr().err
        assert stack.load(KEYS[:4], list(range(4))) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing is chosen; write --namespace, --older-than or --down-to"),
        (["--older-than", "soon"], "--older-than: 'soon'; write a number and s, m, h, d or w"),
        (["--namespace", ""], "--namespace: ''; write the first of its digits"),
        (["--down-to", "much"], "--down-to"),
    ],
)
def test_a_wrong_choice_deletes_nothing(tmp_path, capsys, arguments, said):
    fill(tier("gds", tmp_path), KEYS[:4])
    assert kvbm(["clear", str(tmp_path / "gds"), "--yes", *arguments]) == ExitCode.WRONG
    assert said in capsys.readouterr().err
    assert len(listed("gds", tmp_path)) == 4


def test_the_table_for_people(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    fill(tier("gds", tmp_path), KEYS[:4])
    assert kvbm(["clear", str(tmp_path / "gds"), "--down-to", "0B"]) == ExitCode.DONE
    assert "nothing is deleted: with --yes 4 objects would be" in capsys.readouterr().out
    assert kvbm(["clear", str(tmp_path / "gds"), "--down-to", "0B", "--yes"]) == ExitCode.DONE
    assert "4 of 4 objects deleted" in capsys.readouterr().out


def test_the_order_of_many_takes_bounded_memory():
    order, stored = Order(64), [(float(at), 10) for at in range(5000)]
    for at, nbytes in stored:
        order.add(at, nbytes)
    assert repr(order) != repr(Order()), "it has counted"
    assert len(order._bytes) <= 64
    order.cut(12_345)
    gone = [at for at, nbytes in stored if order.chosen(at, nbytes)]
    # As many as must be, and none that is younger than another by more than a span.
    assert 10 * (len(stored) - len(gone)) <= 12_345 < 10 * (len(stored) - len(gone) + 1)
    assert max(gone) - len(gone) < 5000 / 16
