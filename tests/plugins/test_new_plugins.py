"""`kvbm plugins`: what is installed and what cannot be used, and packages that pass their tests at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from published import published

from kvbm_cli._app import run as kvbm
from kvbm_cli.plugins._list import KINDS
from kvbm_core import hookspecs
from kvbm_core.command import ExitCode

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "third_party"))
install = __import__("toy_install").install


def listed(capsys, status=0):
    capsys.readouterr()
    assert kvbm(["plugins", "--json"]) == status
    found = published("plugins", capsys.readouterr().out)
    return {each["name"]: each for each in found["plugins"]}


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Gives a function that puts an entry point, and the module it names, on the path."""

    def put(name, text, requires=""):
        folder = tmp_path / name
        info = folder / f"kvbm_{name}-2.5.dist-info"
        info.mkdir(parents=True)
        (folder / f"kvbm_{name}.py").write_text(text)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kvbm-{name}\nVersion: 2.5\n{requires}")
        (info / "entry_points.txt").write_text(f"[kvbm_core]\n{name} = kvbm_{name}\n")
        monkeypatch.syspath_prepend(str(folder))

    yield put
    for name in [name for name in sys.modules if name.startswith("kvbm_strange")]:
        del sys.modules[name]


def test_every_plug_in_of_the_tree_is_listed(capsys):
    found = listed(capsys)
    kinds = {name: each["kind"] for name, each in found.items()}
    assert kinds.items() >= {
        "memory": "backend", "cpu": "backend", "lmdb": "backend", "gds": "backend", "remote": "backend",
        "etcd": "coordinator", "zstd": "codec", "crypt": "codec", "lru": "policy", "fifo": "policy",
        "kvbm": "engine", "always": "admission policy",
    }.items()  # fmt: skip
    assert found["remote"]["capabilities"] == ["shared"]
    assert found["zstd"]["capabilities"] == ["saves_room"]
    assert found["cpu"]["contract_version"] == 2
    assert found["cpu"]["settings"] == [{"key": "capacity", "required": True, "default": None}]
    assert found["kvbm"]["engine"].startswith("vllm")
    assert {each["state"] for each in found.values()} == {"ready"}


def test_every_hook_is_listed():
    hooks = {key for key, value in vars(hookspecs).items() if hasattr(value, "kvbm_core_spec")}
    assert KINDS.keys() == hooks - {"kvbm_coordinator"}


BACKEND = "from kvbm_core import *\nfrom kvbm_core import Backend, TierConfig, hookimpl\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", "cannot be imported: division by zero"),
        ("", "offers no such backend"),
        ("def kvbm_coordinator(settings): ...", "has a function kvbm_coordinator() that is no hook"),
        (f"{BACKEND}def kvbm_backends(): return []", "has a function kvbm_backends() that is no hook"),
        (
            f"{BACKEND}@hookimpl\ndef kvbm_backends():\n"
            "    return [Backend('strange', TierConfig, lambda a, b: None, contract_version=1)]",
            "was written for contract version 1, this kvbm-core has 2",
        ),
    ],
)
def test_what_cannot_be_used_is_listed_with_the_reason(stranger, text, said, capsys):
    stranger("strange", text)
    found = listed(capsys, ExitCode.MEND)["strange"]
    assert (found["state"], found["kind"]) == ("broken", None)
    assert (found["distribution"], found["version"]) == ("kvbm-strange", "2.5")
    assert said in found["problem"]
    assert kvbm(["plugins"]) == ExitCode.MEND
    assert said in capsys.readouterr().out


def test_a_package_that_is_not_installed_is_no_fault(stranger, capsys):
    stranger("strange", "import absent_package", 'Requires-Dist: absent-package; extra == "strange"\n')
    found = listed(capsys)["strange"]
    assert found["state"] == "absent"
    assert found["problem"].endswith("pip install 'kvbm-strange[strange]'")


# ---- new packages


def check(*command, **more):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PACKAGES = ("backend", "codec", "policy")


def make(kind, folder, capsys):
    assert kvbm(["plugins", "new", kind, f"my-{kind}", "--folder", str(folder), "--json"]) == 0
    return published("plugins new", capsys.readouterr().out)


def test_new_packages_lint(tmp_path, capsys):
    for kind in PACKAGES:
        written = make(kind, tmp_path / kind, capsys)
        module, test = f"kvbm_my_{kind}.py", f"tests/test_my_{kind}.py"
        assert written == {
            "folder": str(tmp_path / kind), "files": ["README.md", module, "pyproject.toml", test],
        }  # fmt: skip
    scripts = Path(sys.executable).parent
    check(scripts / "ruff", "check", "--no-cache", ".", cwd=tmp_path)
    check(scripts / "ruff", "format", "--no-cache", "--check", ".", cwd=tmp_path)
    sources = [str(file) for file in tmp_path.glob("*/**/*.py")]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    assert len(sources) == 2 * len(PACKAGES)
    check(scripts / "mypy", "--strict", "--cache-dir=mypy", *sources, cwd=tmp_path, env=environment)


@pytest.mark.early
def test_new_packages_install_and_pass_their_tests(tmp_path, capsys):
    folders = {kind: tmp_path / kind for kind in PACKAGES}
    for kind, folder in folders.items():
        make(kind, folder, capsys)
    site = install(tmp_path / "site", *folders.values())
    paths = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-q", "-W", "error", "-p", "no:cacheprovider"]
    for folder in folders.values():
        assert " passed" in check(sys.executable, "-m", "pytest", *options, cwd=folder, env=environment)
    listing = check(sys.executable, "-m", "kvbm_cli", "plugins", "--json", env=environment)
    found = {each["name"]: each for each in published("plugins", listing)["plugins"]}
    for kind in PACKAGES:
        assert (found[f"my-{kind}"]["kind"], found[f"my-{kind}"]["state"]) == (kind, "ready")
        assert found[f"my-{kind}"]["distribution"] == f"kvbm-my-{kind}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My Own", "NAME: 'My Own' cannot be one; write small letters, digits and hyphens"),
        ("2q", "NAME: '2q' cannot be one; write small letters, digits and hyphens, a letter first"),
        ("lmdb", "NAME: 'lmdb' of kvbm-core"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(name, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert kvbm(["plugins", "new", "backend", name]) == ExitCode.WRONG
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_used_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes").touch()
    assert kvbm(["plugins", "new", "codec", "fine", "--folder", str(tmp_path)]) == ExitCode.WRONG
    assert "is not empty; write another folder with --folder" in capsys.readouterr().err
    assert kvbm(["plugins", "new", "codec", "fine", "--folder", "/proc/no"]) == ExitCode.WRONG
    assert "/proc/no: " in capsys.readouterr().err
