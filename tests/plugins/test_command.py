"""The command `kvbm`: how it finds verbs, what it says of a broken one, how it ends, and its pages."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

from kvbm_cli._app import run as kvbm
from kvbm_core.command import COMMANDS_GROUP, ExitCode, answer_of

ROOT = Path(__file__).parent.parent.parent
SCHEMAS = ROOT / "docs" / "reference" / "schemas"
PATIENCE_S = 60

sys.path.insert(0, str(ROOT / "tools"))
make_commands = __import__("make_commands")

VERBS = dict(make_commands.verbs())


def program(*arguments, **more):
    command = [sys.executable, "-m", "kvbm_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, **more)


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Gives a function that installs a package with verbs: the text of its module, and its entry points."""

    def install(text, name="stranger", **verbs):
        folder = tmp_path / name
        info = folder / f"kvbm_{name}-1.5.dist-info"
        info.mkdir(parents=True)
        (folder / f"kvbm_{name}.py").write_text(text)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: kvbm-{name}\nVersion: 1.5\n"
            'Requires-Dist: absent-package>=2; extra == "more"\n'
        )
        points = "".join(f"{verb} = kvbm_{name}:{what}\n" for verb, what in verbs.items())
        (info / "entry_points.txt").write_text(f"[{COMMANDS_GROUP}]\n{points}")
        monkeypatch.syspath_prepend(str(folder))

    yield install
    for name in [name for name in sys.modules if name.startswith("kvbm_stranger")]:
        del sys.modules[name]


# ---- verbs


def test_help_lists_every_verb_and_imports_no_engine():
    program = (
        "import sys; from kvbm_cli._app import run; status = run(['--help']);"
        "print([name for name in ('torch', 'vllm', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *shown, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {line.split()[1] for line in shown if re.match(r"│ \w+ ", line)}
    names = project["entry-points"][COMMANDS_GROUP]
    assert listed >= {name for name in names if "." not in name}


def test_a_package_adds_a_verb_and_a_group(stranger, capsys):
    stranger(
        "import typer\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def count(number: int) -> None:\n"
        "    '''Count.'''\n"
        "    print(number + 1)\n"
        "@app.callback()\n"
        "def root() -> None:\n"
        "    '''Shelves.'''\n"
        "def greet(name: str = 'you') -> None:\n"
        "    '''Greet.'''\n"
        "    print('hello', name)\n",
        shelf="app",
        greet="greet",
    )
    assert kvbm(["shelf", "count", "4"]) == 0
    assert kvbm(["greet", "--name", "them"]) == 0
    assert capsys.readouterr().out == "5\nhello them\n"
    assert kvbm(["--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"shelf +Shelves\.", shown)
    assert re.search(r"greet +Greet\.", shown)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import absent_package", "which is not installed: pip install 'kvbm-stranger[more]'"),
        ("import kvbm_stranger_part", "needs kvbm_stranger_part, which is not installed"),
        ("1 / 0", "of kvbm-stranger 1.5 cannot be imported: division by zero"),
        ("app = 5", "of kvbm-stranger 1.5 is a int; it must be a typer.Typer or a function"),
    ],
)  # fmt: skip
def test_a_verb_that_cannot_be_imported_is_named_and_harms_no_other(stranger, text, said, capsys):
    stranger(text, shelf="app")
    assert kvbm(["shelf", "--speed", "1", "up"]) == ExitCode.UNUSABLE
    assert said in capsys.readouterr().err
    assert kvbm(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(cannot be used: verb 'shelf'" in shown
    assert "Engines that are registered in etcd." in shown


def test_a_package_adds_a_verb_to_the_group_of_another_one(stranger, capsys):
    stranger("def greet() -> None:\n    '''Greet.'''\n    print('hello')\n", **{"etcd.greet": "greet"})
    stranger("1 / 0", "stranger_two", **{"etcd.broken": "greet", "doctor.greet": "greet"})
    assert kvbm(["etcd", "greet"]) == 0
    assert capsys.readouterr().out == "hello\n"
    assert kvbm(["etcd", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "greet Greet." in shown
    assert "broken (cannot be used: verb 'etcd.broken' of kvbm-stranger_two 1.5" in shown
    assert kvbm(["--help"]) == 0
    assert "greet" not in capsys.readouterr().out
    assert kvbm(["etcd.greet"]) == ExitCode.WRONG


def test_two_packages_with_one_verb_are_both_named(stranger, capsys):
    for name in ("stranger", "stranger_two"):
        stranger("def greet() -> None: ...", name, greet="greet")
    assert kvbm(["greet"]) == ExitCode.UNUSABLE
    said = capsys.readouterr().err
    assert "kvbm-stranger 1.5" in said
    assert "kvbm-stranger_two 1.5" in said


def test_the_nearest_verb_is_named(capsys):
    assert kvbm(["etdc"]) == ExitCode.WRONG
    assert "Did you mean 'etcd'?" in capsys.readouterr().err


def test_completion_finds_verbs_and_options():
    environment = {
        **os.environ,
        "_KVBM_COMPLETE": "complete_bash",
        "COMP_WORDS": "kvbm et",
        "COMP_CWORD": "1",
    }
    assert program(env=environment).stdout.split() == ["etcd"]
    environment |= {"COMP_WORDS": "kvbm clear --old", "COMP_CWORD": "2"}
    assert program(env=environment).stdout.split() == ["--older-than"]


# ---- ends


def test_a_fault_is_one_line_and_raised_on_demand(stranger, capsys, monkeypatch):
    stranger("def crash() -> None:\n    raise LookupError('no\\x1b[2J')", crash="crash")
    assert kvbm(["crash"]) == ExitCode.FAULT
    said = capsys.readouterr().err
    assert said.startswith(r"kvbm crash: failed with LookupError: no\x1b[2J; with KVBM_TRACEBACK=1")
    assert said.count("\n") == 1
    monkeypatch.setenv("KVBM_TRACEBACK", "1")
    with pytest.raises(LookupError):
        kvbm(["crash"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_without_a_traceback(stranger, number, tmp_path):
    stranger(
        "import time\ndef wait() -> None:\n    print('here', flush=True)\n    time.sleep(60)", wait="wait"
    )
    paths = os.pathsep.join([str(tmp_path / "stranger"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "kvbm_cli", "wait"]
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts beside itself ignores it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == ExitCode.INTERRUPTED
    assert said == ""


@pytest.mark.parametrize(
    ("module", "words", "now"),
    [
        ("kvbm_etcd", ["ls", "--endpoint", "nowhere"], "kvbm etcd"),
        ("kvbm_bench", ["compare", "/no/such.json"], "kvbm bench"),
        ("kvbm_metrics", ["/proc/no/such"], "kvbm metrics copy"),
    ],
)
def test_the_old_forms_say_where_they_went_and_work(module, words, now):
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first, second = done.stderr.splitlines()
    assert first == f"`python -m {module}` is now `{now}`"
    assert second.startswith(f"{' '.join(now.split()[:2])}: ")
    assert done.returncode in (ExitCode.WRONG, ExitCode.UNUSABLE)


def test_the_collector_of_old_says_what_does_its_work():
    done = subprocess.run(
        [sys.executable, "-m", "kvbm_remote", "gc", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.WRONG
    assert "is now `kvbm clear URL --older-than 7d --down-to 500GiB --yes`" in done.stderr


# ---- pages


def test_the_page_and_the_schemas_are_what_the_code_gives():
    for file, text in make_commands.files().items():
        assert file.exists(), "run `python tools/make_commands.py`"
        assert file.read_text() == text, "run `python tools/make_commands.py`"
    assert {file.name for file in SCHEMAS.iterdir()} == {make_commands.file_of(name) for name in VERBS}


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_and_option_has_a_text_and_says_what_its_json_is(name):
    verb = VERBS[name]
    assert verb.help.strip().endswith(".")
    assert all(each.help for each in verb.params)
    # Brackets are taken for markup, and not shown.
    assert not any("[" in text for text in (verb.help, *(each.help for each in verb.params)))
    assert ["--json"] in [each.opts for each in verb.params]
    assert answer_of(verb.callback)
    schema = json.loads((SCHEMAS / make_commands.file_of(name)).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
