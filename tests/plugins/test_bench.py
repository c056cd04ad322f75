"""The chat benchmark: its schedule, text and numbers; whole runs against a small server that only counts
words, which stands in this file; and one run against a real vLLM."""

import contextlib
import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path

import msgspec
import numpy
import pytest
from published import published
from rich.console import Console

from kvbm_bench._chat import Load
from kvbm_bench._compare import differences, group, make_comparison
from kvbm_bench._errors import BenchError
from kvbm_bench._plan import Plan
from kvbm_bench._progress import describe, watch
from kvbm_bench._report import Request, Run, percentile, read_json, spread, summarise
from kvbm_bench._text import Script, Sentences
from kvbm_cli._app import run as kvbm
from kvbm_core.command import ExitCode

STORY = resources.files("kvbm_cli").joinpath("story.txt").read_text()
PATIENCE_S = 30
SMALL = ["--users", "3", "--rounds", "3", "--qps", "100", "--system-prompt", "40", "--history", "200"]


class CountingServer(ThreadingHTTPServer):
    """No model: it speaks the protocol, takes a word for a token and answers with as many words as asked.

    `before` is called with the user's number and the round before each answer of the load.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.models = [{"id": "words", "max_model_len": 2000}]
        self.counts_usage = True
        self.before = lambda user, number: None
        self.asked = []
        self.open = set()
        self.overlaps = 0
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        # A client that was interrupted hangs up; that is what its test is about.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        asked = len(self.server.asked)
        pages = {
            "/v1/models": json.dumps({"data": self.server.models}),
            "/metrics": f'vllm:kvbm_loaded_blocks_total{{tier="cpu"}} {asked}\n',
        }
        self._answer(200, pages[self.path].encode())

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = request["messages"]
        user = next(
            (int(each[1]) for m in messages if (each := re.match(r"User (\d+) ", m["content"]))), None
        )
        number = sum(message["role"] == "user" for message in messages)
        try:
            with self._one_at_a_time(user):
                if user is not None:
                    self.server.asked.append((user, number, request))
                    self.server.before(user, number)
                self._stream(request)
        except RuntimeError as error:
            self._answer(500, str(error).encode())

    @contextlib.contextmanager
    def _one_at_a_time(self, user):
        with self.server.lock:
            self.server.overlaps += user in self.server.open
            self.server.open.add(user)
        yield
        with self.server.lock:
            self.server.open.discard(user)

    def _stream(self, request):
        words = sum(len(message["content"].split()) for message in request["messages"])
        usage = {"prompt_tokens": words, "completion_tokens": request["max_tokens"]}
        events = [{"choices": [{"delta": {"content": f"w{at} "}}]} for at in range(request["max_tokens"])]
        if self.server.counts_usage:
            events.append({"choices": [], "usage": usage})
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        self._answer(200, f"{lines}data: [DONE]\n\n".encode())

    def _answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    with CountingServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def chat(server, *arguments):
    return kvbm(["bench", "chat", "--url", server.url, *SMALL, "--answer", "5", *map(str, arguments)])


def request(user=1, number=1, **changes):
    fields = {
        "launched_s": 100.0, "first_token_s": 0.5, "generation_s": 2.0, "prompt_tokens": 1000,
        "answer_tokens": 5, "gaps_s": (0.5, 0.5, 0.5, 0.5), "user": user, "number": number,
    }  # fmt: skip
    return Request(**{**fields, **changes})


def make_run(label, requests, **changes):
    fields = {
        "label": label, "url": "http://x", "model": "m", "command": "c", "started": "2026-11-25",
        "plan": Plan(2, 2, 1.0, 10, 10, 5), "requests": requests,
    }  # fmt: skip
    return Run(**{**fields, **changes})


# ---- schedule and text


def test_users_ask_every_users_by_qps_seconds_and_begin_evenly_spread():
    plan = Plan(users=5, rounds=4, qps=0.5, system_tokens=0, history_tokens=0, answer_tokens=1)
    assert plan.gap_s == 10
    assert [plan.first_s(place) for place in range(5)] == [0, 2, 4, 6, 8]
    assert [plan.rounds_of(place, first=True) for place in range(5)] == [4] * 5
    assert plan.requests == 20


def test_with_a_duration_the_first_conversations_have_all_lengths_and_later_ones_the_whole():
    plan = Plan(5, 10, 1.0, 0, 0, 1, duration_s=60)
    assert [plan.rounds_of(place, first=True) for place in range(5)] == [2, 4, 6, 8, 10]
    assert Plan(5, 2, 1.0, 0, 0, 1, duration_s=60).rounds_of(0, first=True) == 1
    assert plan.rounds_of(0, first=False) == 10
    assert plan.requests is None


def test_text_has_the_length_asked_for_and_is_the_same_for_the_same_seed():
    for words in (0, 1, 700, 5000):
        text = Sentences(STORY, 7).passage(words, "user 1")
        assert len(text.split()) == words
        assert text == Sentences(STORY, 7).passage(words, "user 1")
    assert Sentences(STORY, 7).passage(50, "user 1") != Sentences(STORY, 8).passage(50, "user 1")


def test_text_is_real_and_repeats_no_sentence_before_all_have_come():
    whole = len(STORY.split())
    text = Sentences(STORY, 0).passage(whole, "user 1")
    assert sorted(text.split()) == sorted(STORY.split())
    assert text.split() != STORY.split()


def test_histories_differ_from_their_first_words_on_and_the_system_prompt_is_shared():
    script = Script(Plan(9, 2, 1.0, 50, 400, 5), Sentences(STORY, 0), tokens_per_word=1.3)
    openings = [script.opening(user) for user in range(1, 10)]
    assert len({system["content"] for system, _ in openings}) == 1
    assert len({tuple(history["content"].split()[:2]) for _, history in openings}) == 9
    assert len({tuple(history["content"].split()[5:30]) for _, history in openings}) == 9
    assert {len(history["content"].split()) for _, history in openings} == {4 + round(400 / 1.3)}
    assert len({script.question(1, number) for number in range(1, 6)}) == 5


# ---- numbers


def test_percentiles_are_numpys():
    values = random.Random(0)
    for length in (1, 2, 3, 10, 101):
        sample = [values.expovariate(1) for _ in range(length)]
        for percent in (0, 5, 50, 95, 99, 100):
            assert percentile(sample, percent) == pytest.approx(numpy.percentile(sample, percent))


def test_of_speeds_a_percentile_is_what_so_many_reach():
    times = spread(range(101))
    speeds = spread(range(101), more_is_better=True)
    assert (times.mean, times.p50, times.p95, times.p99) == (50, 50, 95, 99)
    assert (speeds.mean, speeds.p50, speeds.p95, speeds.p99) == (50, 50, 5, 1)
    assert spread([]) is None


def test_the_summary_adds_up():
    late = request(number=2, launched_s=104.0, first_token_s=1.5, gaps_s=(1.0,), answer_tokens=2, late=True)
    numbers = summarise([make_run("a", [request(), late])])
    assert numbers.duration_s == 7.5  # From 100 to 104 + 1.5 + 2.
    assert (numbers.requests, numbers.late, numbers.failures) == (2, 1, 0)
    assert numbers.prompt_tokens_per_s == pytest.approx(2000 / 7.5)
    assert numbers.answer_tokens_per_s == pytest.approx(7 / 7.5)
    assert numbers.first_token_s.p50 == 1.0
    assert numbers.inter_token_s.mean == pytest.approx(3 / 5)
    assert numbers.request_prompt_tokens_per_s.p50 == pytest.approx((1000 / 0.5 + 1000 / 1.5) / 2)
    assert numbers.request_answer_tokens_per_s.mean == pytest.approx((4 / 2 + 1 / 2) / 2)


def test_answers_of_one_token_have_no_time_between_tokens():
    numbers = summarise([make_run("a", [request(answer_tokens=1, gaps_s=())])])
    assert numbers.inter_token_s is None
    assert numbers.request_answer_tokens_per_s is None


# ---- options and errors: whatever is wrong is named before the load starts


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--users", "0"], "'--users':"),
        (["--rounds", "1.5"], "'--rounds':"),
        (["--history", "-3"], "--history"),
        (["--qps", "0"], "'--qps': 0.0 cannot be used; write a number above 0"),
        (["--qps", "nan"], "'--qps': nan"),
        (["--duration", "inf"], "--duration"),
        (["--url", "127.0.0.1:8000"], "'--url': '127.0.0.1:8000' is no address; write one like http://"),
        (["--out", "/no/such/folder/run.json"], "--out"),
        (["--speed", "1"], "--speed"),
    ],
)
def test_a_wrong_option_is_named(arguments, named, capsys):
    assert kvbm(["bench", "chat", *arguments]) == ExitCode.WRONG
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert named in said


def test_a_server_that_is_not_there_is_named(server, capsys):
    server.shutdown()
    server.server_close()
    assert chat(server) == ExitCode.UNUSABLE
    assert f"--url {server.url}: no OpenAI-compatible server answers there" in capsys.readouterr().err


def test_something_else_that_answers_is_no_server(server, capsys):
    server.models = 3
    assert chat(server) == ExitCode.UNUSABLE
    assert "no OpenAI-compatible server answers there" in capsys.readouterr().err


def test_an_unknown_model_is_answered_with_those_there_are(server, capsys):
    assert chat(server, "--model", "verbs") == ExitCode.UNUSABLE
    assert "--model verbs: the server has words; write one of these" in capsys.readouterr().err
    server.models.append({"id": "verbs"})
    assert chat(server) == ExitCode.UNUSABLE
    assert "--model is missing: the server has words, verbs" in capsys.readouterr().err
    assert server.asked == []


def test_a_conversation_too_long_for_the_model_is_refused_before_it_starts(server, capsys):
    assert chat(server, "--history", 1900) == ExitCode.UNUSABLE
    assert "--history 1900 --rounds 3: the last prompt would have about 20" in capsys.readouterr().err
    assert server.asked == []


def test_a_server_that_does_not_count_tokens_is_refused(server, capsys):
    server.counts_usage = False
    assert chat(server) == ExitCode.UNUSABLE
    assert "does not count tokens in a stream" in capsys.readouterr().err


def test_what_a_server_says_cannot_command_the_terminal(server, capsys):
    owned = "\x1b]0;owned\x07"
    server.models[:] = [{"id": f"a{owned}"}, {"id": "b"}]
    assert chat(server) == ExitCode.UNUSABLE
    assert r"the server has a\x1b]0;owned\x07, b" in capsys.readouterr().err

    def fail(user, number):
        raise RuntimeError(f"no{owned}")

    server.before = fail
    server.models[:] = [{"id": f"a{owned}"}]
    assert chat(server) == ExitCode.UNUSABLE
    shown = capsys.readouterr()
    assert r"(500): no\x1b]0;owned\x07" in shown.err
    assert not {"\x1b", "\x07"} & set(shown.out + shown.err)


# ---- whole runs


def test_all_users_ask_all_rounds_with_all_that_was_said_before(server, tmp_path, capsys):
    # Each round is answered when all three users have asked: they talk at the same time.
    together = threading.Barrier(3)
    server.before = lambda user, number: together.wait(PATIENCE_S)
    assert chat(server, "--csv", tmp_path / "run.csv", "--out", tmp_path / "run.json", "--exact") == 0
    assert sorted((user, number) for user, number, _ in server.asked) == [
        (user, number) for user in (1, 2, 3) for number in (1, 2, 3)
    ]
    assert server.overlaps == 0, "a user asked before the answer was there"
    prompts = {(user, number): request["messages"] for user, number, request in server.asked}
    for (user, number), messages in prompts.items():
        assert [m["role"] for m in messages] == ["system", "user", *["assistant", "user"] * (number - 1)]
        assert all(m["content"] == "w0 w1 w2 w3 w4 " for m in messages if m["role"] == "assistant")
        if number > 1:
            assert messages[: 2 * number - 2] == prompts[user, number - 1]
    assert all(request["max_tokens"] == 5 and request["ignore_eos"] for _, _, request in server.asked)

    with open(tmp_path / "run.csv", newline="") as file:
        heading, *rows = csv.reader(file)
    assert ",".join(heading) == (
        "prompt_tokens,generation_tokens,ttft,generation_time,user_id,question_id,launch_time,finish_time"
    )
    assert [(int(row[4]), int(row[5])) for row in rows] == sorted(prompts)
    for tokens, answer, ttft, generation, user, number, launched, finished in rows:
        words = sum(len(m["content"].split()) for m in prompts[int(user), int(number)])
        assert (int(tokens), int(answer)) == (words, 5)
        assert float(finished) == pytest.approx(float(launched) + float(ttft) + float(generation))

    kept = read_json(tmp_path / "run.json")
    assert kept.label == "run"
    assert kept.summary == summarise([kept])
    assert kept.counted == {"tier cpu": 9}
    assert all(len(request.gaps_s) == 4 for request in kept.requests)
    assert "run: 9 requests in" in capsys.readouterr().out


def test_what_programs_read(server, tmp_path, capsys):
    assert chat(server, "--json", "--out", tmp_path / "run.json") == 0
    run = published("bench chat", capsys.readouterr().out)
    assert len(run["requests"]) == 9
    assert kvbm(["bench", "compare", str(tmp_path / "run.json"), "--json"]) == 0
    assert published("bench compare", capsys.readouterr().out)["runs"] == {"run": run["summary"]}


def test_a_slow_answer_makes_the_next_question_late_not_early(server, tmp_path, capsys):
    server.before = lambda user, number: time.sleep(0.3)  # Ten times the gap.
    assert chat(server, "--out", tmp_path / "run.json", "--rounds", 2) == 0
    assert server.overlaps == 0
    assert {r.number: r.late for r in read_json(tmp_path / "run.json").requests if r.user == 1}[2]
    assert "of 6 requests were sent late" in capsys.readouterr().out


def test_a_failed_request_ends_its_conversation_and_no_other(server, tmp_path, capsys):
    def fail(user, number):
        if (user, number) == (2, 2):
            raise RuntimeError("out of memory")

    server.before = fail
    assert chat(server, "--out", tmp_path / "run.json") == 1
    kept = read_json(tmp_path / "run.json")
    assert [(each.user, each.number) for each in kept.failures] == [(2, 2)]
    assert len(kept.requests) == 7
    shown = capsys.readouterr().out
    assert "1 requests failed" in shown
    assert "question 2 of user 2: the server refused the request (500): out of memory" in shown


def test_with_a_duration_new_users_take_the_places_of_those_who_finish(server, tmp_path):
    assert chat(server, "--out", tmp_path / "run.json", "--duration", 1, "--rounds", 2) == 0
    requests = read_json(tmp_path / "run.json").requests
    assert max(each.user for each in requests) > 3
    assert max(each.number for each in requests) == 2
    first_words = {request["messages"][1]["content"] for _, _, request in server.asked}
    assert len(first_words) == len({each.user for each in requests})


def test_an_interrupted_run_keeps_what_it_has(server, tmp_path):
    stalled, go_on = threading.Event(), threading.Event()

    def stall(user, number):
        if number == 2:
            stalled.set()
            go_on.wait(PATIENCE_S)

    server.before = stall
    # The form that it had before it was a group of `kvbm`.
    command = [sys.executable, "-m", "kvbm_bench", "chat", "--url", server.url, *SMALL, "--json", "run.json"]
    with subprocess.Popen(
        [*command, "--users", "1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        # What a shell starts beside itself ignores it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert stalled.wait(PATIENCE_S)
            process.send_signal(signal.SIGINT)
            shown, _ = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            go_on.set()
    assert process.returncode == 130
    assert b"1 requests in" in shown
    kept = read_json(tmp_path / "run.json")
    assert kept.interrupted
    assert len(kept.requests) == 1


def test_a_log_is_told_how_far_the_load_is():
    load = Load(Plan(2, 2, 1.0, 10, 10, 5), requests=[request()], running=1)
    assert describe(load) == "1 running, first token p50 0.50 s, p95 0.50 s"
    sink = io.StringIO()
    with watch(Console(file=sink, width=200), load.plan) as tell:
        tell(load)
        tell(load)
    assert sink.getvalue() == "0 s: 1 of 4 done, 1 running, first token p50 0.50 s, p95 0.50 s\n"
    with watch(Console(file=(sink := io.StringIO()), force_terminal=True, width=200), load.plan) as tell:
        tell(load)
    assert "1/4" in sink.getvalue()


def test_a_missing_package_is_one_line_that_says_what_to_install():
    program = "import sys; sys.modules['httpx'] = None; from kvbm_cli import main; main()"
    command = [sys.executable, "-c", program, "bench", "compare", "x.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.UNUSABLE
    assert done.stderr.startswith("kvbm bench: verb 'bench' needs httpx, which is not installed")
    assert done.stderr.count("\n") == 1


# ---- comparison


def shown(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_runs_of_one_label_count_as_one():
    slow = [make_run("without", [request(first_token_s=first_s)]) for first_s in (2.0, 4.0)]
    fast = make_run("with", [request(first_token_s=0.5), request(first_token_s=0.3, number=2)])
    groups = group([slow[0], fast, slow[1]])
    assert list(groups) == ["without", "with"]
    text = shown(make_comparison(groups))
    assert re.search(r"without \(2 runs\) +│ +2 │ +3\.000 │ .* 1\.00 x │ +- │", text)
    assert re.search(r"with +│ +2 │ +0\.400 │ .* 7\.50 x │ +0\.300 │", text)


def test_runs_that_cannot_be_compared_are_said_to_be_so():
    plain, other = make_run("a", [request()]), make_run("b", [request()], plan=Plan(9, 2, 1.0, 10, 10, 5))
    assert differences([plain, plain]) == []
    assert differences([plain, other]) == ["The runs had different plans; they do not measure the same load."]
    assert "different models" in differences([plain, msgspec.structs.replace(plain, model="n")])[0]
    assert "interrupted" in differences([msgspec.structs.replace(plain, interrupted=True)])[0]


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_picture_is_drawn(suffix, start, server, tmp_path, capsys):
    assert chat(server, "--out", tmp_path / "a.json") == 0
    assert chat(server, "--out", tmp_path / "b.json", "--label", "with tiers") == 0
    picture = tmp_path / f"chart.{suffix}"
    assert (
        kvbm(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--plot", str(picture)])
        == 0
    )
    assert picture.read_bytes().startswith(start)
    if suffix == "svg":
        drawn = picture.read_text()
        assert all(f"<!-- {text} -->" in drawn for text in ("a", "with tiers", "time to first token (s)"))
    assert "with tiers" in capsys.readouterr().out


def test_a_file_that_is_no_run_is_named(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert kvbm(["bench", "compare", str(tmp_path / "x.json")]) == ExitCode.UNUSABLE
    assert "x.json is no run of `kvbm bench chat --out`" in capsys.readouterr().err
    with pytest.raises(BenchError, match="no request was answered"):
        summarise([make_run("a", [])])
    assert kvbm(["bench", "compare", "x.json", "--plot", "chart.bmp"]) == ExitCode.WRONG


# ---- a real vLLM, with the connector, and less KV memory than the conversations need


@pytest.fixture
def real_server(tmp_path):
    from kvbm_cli._demo_verb import read_port
    from kvbm_cli._engine import ServeSettings, find_engine, serve_command, serve_environment
    from kvbm_cli._model import prepare_model
    from kvbm_cli._server import Server

    settings = ServeSettings(
        str(prepare_model()), read_port("auto"), [{"backend": "cpu", "capacity": "256MiB"}]
    )
    engine, url = find_engine(), f"http://127.0.0.1:{settings.port}"
    command = serve_command(settings, engine)
    command[command.index("--max-model-len") + 1] = "1024"
    # A model's longest prompt takes eight blocks of 128 tokens; three conversations want more than ten.
    command += ["--num-gpu-blocks-override", "10"]
    environment = serve_environment(settings, engine, os.environ)
    with Server(command, environment, url, tmp_path / "vllm.log") as server:
        server.wait_ready(lambda _: None)
        yield url


@pytest.mark.early
@pytest.mark.engine
def test_a_real_engine_is_asked_what_was_planned_and_counts_the_same(real_server, tmp_path):
    file: Path = tmp_path / "run.json"
    load = ["--users", "3", "--rounds", "3", "--qps", "2", "--system-prompt", "150", "--history", "450"]
    assert (
        kvbm(["bench", "chat", "--url", real_server, *load, "--answer", "8", "--exact", "--out", str(file)])
        == 0
    )
    kept = read_json(file)
    assert sorted((each.user, each.number) for each in kept.requests) == [
        (user, number) for user in (1, 2, 3) for number in (1, 2, 3)
    ]
    assert {each.answer_tokens for each in kept.requests} == {8}
    # Beside what was asked for there are a question and the chat template.
    first = [each.prompt_tokens - 600 for each in kept.requests if each.number == 1]
    assert all(-60 < more < 120 for more in first), first
    by_source = {name: count for name, count in kept.counted.items() if name.startswith("source ")}
    assert sum(by_source.values()) == sum(each.prompt_tokens for each in kept.requests)
    assert by_source["source external_kv_transfer"] > 0
    assert kept.counted["tier cpu"] > 0
