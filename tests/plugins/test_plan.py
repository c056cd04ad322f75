"""`kvbm replay` and `kvbm plan`: a replay gives what was expected, and what they print is as published."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from published import published

from kvbm_cli._app import run as kvbm
from kvbm_core import ConfigError
from kvbm_core.command import ExitCode
from kvbm_replay import generate
from kvbm_replay._curve import Distances, Points
from kvbm_replay._machine import Machine, Speed, read_speed
from kvbm_replay._planning import Question, answer_question
from kvbm_replay._sizes import read_blocks, tokens_text

PAGES = Path(__file__).parent.parent.parent / "docs" / "how-to"
COMMANDS = [
    line
    for page in ("replay-a-trace", "plan-sizes")
    for block in re.findall(r"```console\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("kvbm ") and "--generate" in line
]
LOAD = "chat:seed=7,requests=800"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")  # A worker of pytest-xdist has the terminal's, which folds tables.


@pytest.fixture(scope="module")
def trace():
    return generate(LOAD)


def answer(trace, **question):
    machine = question.pop("machine", Machine())
    return answer_question(trace, Question(machine, **question))


def test_a_replay_of_what_is_advised_gives_what_was_expected(trace):
    found = answer(trace, goal=0.8)
    advised = found.advice.disk or found.advice.memory
    assert found.advice.reaches >= 0.8
    assert found.replayed.hit_ratio == pytest.approx(advised.hit_ratio, abs=0.02)
    assert found.replayed.mean_first_token_s == pytest.approx(advised.mean_first_token_s, rel=0.05)
    assert advised.mean_first_token_s < found.uncached_first_token_s
    assert [tier["backend"] for tier in found.config["tiers"]] == ["cpu", "lmdb"]


def test_more_saves_more_and_the_next_gib_says_how_much(trace):
    sizes = answer(trace).memory
    for less, more in pairwise(sizes):
        assert more.hit_ratio >= less.hit_ratio
        assert more.mean_first_token_s <= less.mean_first_token_s
        gib = (more.nbytes - less.nbytes) / 2**30
        saved = less.saved_s_per_hour + gib * less.next_gib_saves_s_per_hour
        assert saved == pytest.approx(more.saved_s_per_hour)
    assert sizes[-1].hit_ratio == pytest.approx(answer(trace).trace.reuse_ratio, rel=0.01)


def test_price_and_speed_decide_between_memory_and_disk(trace):
    dear, cheap = answer(trace, price=1000.0, goal=0.4), answer(trace, price=0.5, goal=0.4)
    assert cheap.advice.disk is None
    assert dear.advice.memory.blocks < cheap.advice.memory.blocks
    assert dear.advice.disk.blocks > cheap.advice.memory.blocks
    # A disk that loads more slowly than the engine computes saves nothing.
    slow = answer(trace, machine=Machine(speeds={"lmdb": Speed(1e9, 1e9, 0.0)}), price=1000.0)
    assert slow.advice.disk is None
    assert slow.stored_bytes_per_day > 0


def test_what_the_engine_has_is_not_saved_again(trace):
    alone, behind = answer(trace), answer(trace, engine_blocks=1_000)
    assert behind.uncached_first_token_s < alone.uncached_first_token_s
    assert behind.memory[-1].hit_ratio < alone.memory[-1].hit_ratio
    # What the engine has needs no load.
    assert 0.9 < behind.memory[-1].mean_first_token_s / alone.memory[-1].mean_first_token_s < 1


def test_some_blocks_are_enough(trace):
    whole, some = answer(trace), answer(trace, part=0.2)
    pairs = zip(whole.memory[-4:], some.memory[-4:], strict=True)
    assert max(abs(one.hit_ratio - other.hit_ratio) for one, other in pairs) < 0.05
    assert some.replayed.mean_first_token_s == pytest.approx(whole.replayed.mean_first_token_s, rel=0.1)


def test_another_policy_is_replayed_at_several_sizes(trace):
    fifo, lru = answer(trace, policy="fifo"), answer(trace)
    assert fifo.config["tiers"][0]["policy"] == "fifo"
    middle = len(lru.memory) // 2
    assert 0 < fifo.memory[middle].hit_ratio < lru.memory[middle].hit_ratio + 0.02


def test_nothing_to_save_is_said():
    with pytest.raises(ConfigError, match="nothing of it was seen before"):
        answer(generate("loop:requests=3"))


def test_curves_find_the_size_for_a_number_of_hits():
    curve = Distances([1, 5, 5, 9], 1.0, 10)
    assert [curve.hits(blocks) for blocks in (0, 1, 4, 5, 9, 99)] == [0, 1, 1, 3, 4, 4]
    assert [curve.blocks_for(hits) for hits in (1, 2, 3, 4)] == [1, 5, 5, 9]
    points = Points([(10, 4.0), (20, 6.0)], 10)
    assert [points.hits(blocks) for blocks in (0, 5, 10, 15, 99)] == [0, 2, 4, 5, 6]
    assert [points.blocks_for(hits) for hits in (2, 4, 5, 6)] == [5, 10, 15, 20]


def test_sizes_are_tokens_or_bytes():
    assert read_blocks("--capacity", "1,2,3M", 500, 1000) == [2000, 4000, 6000]
    assert read_blocks("--capacity", "64k, 1.5M,2KiB", 500, 1000) == [128, 3000, 2]
    assert [tokens_text(count) for count in (17, 999_936, 1_500_000)] == ["17", "1 M", "1.5 M"]
    for text, said in {
        "1,2": "of what?",
        "x": "'x' is not a size",
        "1k": "1k is less than a block",
        "1 Y": "not a size",
    }.items():
        with pytest.raises(ConfigError, match=said):
            read_blocks("--capacity", text, 5000, 1000)


def test_a_speed_has_two_numbers_and_perhaps_a_latency():
    assert read_speed("lmdb=6GB/3GB/0.5") == ("lmdb", Speed(6e9, 3e9, 0.0005))
    assert read_speed("lmdb=6GB/3GB") == ("lmdb", Speed(6e9, 3e9, 0.0))
    for text in ("lmdb", "lmdb=6GB", "=1GB/1GB", "lmdb=0/1GB", "lmdb=1GB/1GB/x", "lmdb=1/2/3/4"):
        with pytest.raises(ConfigError, match=r"like lmdb=6GB/3GB/0\.1"):
            read_speed(text)


# ---- the verbs


def test_replay_prints_a_table_and_its_json_is_as_published(capsys, tmp_path):
    words = ["replay", "--generate", "chat:requests=60", "--capacity", "100,500k", "--policy", "lru,fifo"]
    assert kvbm([*words, "--plot", str(tmp_path / "drawn.svg"), "--save", str(tmp_path / "trace")]) == 0
    shown = capsys.readouterr().out
    assert "Belady %" in shown
    assert (tmp_path / "drawn.svg").read_text().startswith("<?xml")
    assert kvbm(["replay", str(tmp_path / "trace"), *words[3:], "--json"]) == 0
    captured = capsys.readouterr()
    document = published("replay", captured.out)
    assert [row["policy"] for row in document["loads"][0]["rows"]] == ["lru", "fifo"] * 2
    assert "Belady %" in captured.err


def test_several_loads_are_compared_with_lru_and_belady(capsys):
    words = ["replay", "--generate", "loop:requests=400", "--generate", LOAD, "--policy", "fifo,lru"]
    assert kvbm([*words, "--capacity", "10,50%", "--json"]) == 0
    captured = capsys.readouterr()
    document = published("replay", captured.out)
    assert [load["trace"]["name"] for load in document["loads"]] == ["loop:requests=400", LOAD]
    rows = [row for load in document["loads"] for row in load["rows"]]
    fifo, lru = document["policies"]
    assert (fifo["policy"], fifo["replays"], lru["policy"]) == ("fifo", 4, "lru")
    over = [row["hit_ratio"] - row["lru_hit_ratio"] for row in rows if row["policy"] == "fifo"]
    assert fifo["worst_over_lru"] == min(over) < -0.01
    assert abs(lru["worst_over_lru"]) < 0.01
    assert fifo["mean_gain"] < lru["mean_gain"] == pytest.approx(0, abs=0.05)
    for load in document["loads"]:
        blocks = [row["capacity_blocks"] for row in load["rows"]]
        assert blocks == [round(part * load["trace"]["unique_blocks"]) for part in (0.1, 0.1, 0.5, 0.5)]
    assert "Against LRU and Belady" in captured.err
    assert kvbm([*words, "--plot", "x.svg"]) == ExitCode.WRONG


def test_replay_takes_the_connectors_configuration(capsys, tmp_path):
    tiers = [{"backend": "cpu", "capacity": "32GiB"}, {"backend": "lmdb", "capacity": "1TiB", "path": "/x"}]
    file = tmp_path / "stack.yaml"
    file.write_text(json.dumps({"tiers": tiers}))
    rows = []
    for stack in (str(file), json.dumps({"tiers": tiers})):
        words = ["replay", "--generate", LOAD, "--stack", stack, "--no-references", "--paced", "--json"]
        assert kvbm([*words, "--engine-cache", "100k", "--vary", "lmdb", "--capacity", "256GiB"]) == 0
        [row] = json.loads(capsys.readouterr().out)["loads"][0]["rows"]
        rows.append({key: value for key, value in row.items() if key not in ("replay_s", "stack")})
    assert rows[0] == rows[1]
    assert [tier["capacity_blocks"] for tier in rows[0]["tiers"]] == [511, 4096]
    assert rows[0]["engine_hit_ratio"] > 0


def test_several_stacks_stand_in_one_table(capsys, tmp_path):
    one = {"tiers": [{"backend": "cpu", "capacity": "64GiB"}]}
    lower = {"backend": "lmdb", "capacity": "48GiB", "path": "/x"}
    two = {"tiers": [{"backend": "cpu", "capacity": "16GiB"}, {**lower, "movement": {"stores": "demotion"}}]}
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps(one))
    words = ["replay", "--generate", LOAD, "--stack", str(file), "--stack", json.dumps(two)]
    assert kvbm([*words, "--json", "--plot", str(tmp_path / "drawn.svg")]) == 0
    captured = capsys.readouterr()
    rows = published("replay", captured.out)["loads"][0]["rows"]
    assert [(row["stack"], len(row["tiers"])) for row in rows] == [("one.yaml", 1), ("stack 2", 2)]
    assert "lmdb %" in captured.err
    assert kvbm([*words, "--vary", "lmdb", "--capacity", "1GiB"]) == ExitCode.WRONG
    assert "--vary lmdb: there is no such tier; write one of cpu" in capsys.readouterr().err


def test_plan_prints_tables_and_its_json_is_as_published(capsys, tmp_path):
    words = ["plan", "--generate", "chat:requests=200"]
    assert kvbm([*words, "--plot", str(tmp_path / "drawn.png")]) == 0
    shown = capsys.readouterr().out
    assert "Memory alone" in shown
    assert 'Configuration: {"tiers": [{"backend": "cpu"' in shown
    assert kvbm([*words, "--json", "--capacity", "16,32GiB", "--sample", "50"]) == 0
    document = published("plan", capsys.readouterr().out)
    assert [size["nbytes"] >> 30 for size in document["memory"]] == [16, 32]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "write the path of a trace or --generate LOAD"),
        (["x", "--generate", "chat"], "x: No such file"),
        (["/no/trace"], "/no/trace: No such file"),
        (["--generate", "chat", "--prefill", "0"], "--prefill 0.0: write tokens a second"),
        (["--generate", "chat", "--token-bytes", "0"], "--token-bytes 0: write a size above 0"),
        (
            ["--generate", "chat", "--speed", "disk=1GB/1GB"],
            "--speed disk: there is no such tier; write one of cpu",
        ),
        (["--generate", "chat", "--engine-cache", "1,2M"], "--engine-cache 1,2M: write one size"),
        (["--generate", "chat", "--plot", "/no/x.png"], "--plot /no/x.png: write a name that ends with .png"),
        (["--generate", "chat:requests=9", "--policy", "lrru"], "unknown policy 'lrru'; did you mean 'lru'"),
        (["--generate", "chat", "--stack", "{x"], "--stack: not a mapping"),
    ],
)
def test_a_wrong_option_is_named(words, said, capsys):
    assert kvbm(["replay", *words]) in (ExitCode.WRONG, ExitCode.UNUSABLE)
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages_runs(command, capsys):
    assert kvbm(shlex.split(command)[1:]) == ExitCode.DONE
    assert "first token" in capsys.readouterr().out


def test_there_are_commands_to_run():
    assert len(COMMANDS) >= 4


def test_a_policy_with_settings_is_told_where_to_write_them(capsys):
    words = ["replay", "--generate", "zipf:requests=9", "--policy"]
    assert kvbm([*words, "{name: s3fifo, small: 0.2}"]) == ExitCode.WRONG
    assert (
        "has settings; write names here, and a policy with settings into a --stack" in capsys.readouterr().err
    )
