"""Every fenced block of the documentation is run, parsed by what it is for, or said to be text.

A language has a rule here. A block of a language without a rule fails: give it one, or mark it ``text`` if it
is what a program prints or a drawing.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from model_configs import CONFIGS
from page_commands import (
    check_hints,
    check_shell,
    check_stack,
    check_transfer_config,
    vllm_folder,
)
from pages import DOCS, FENCE, PAGES, READMES, ROOT, blocks, commands, files_of, name_of
from prometheus import program

from kvbm_cli._app import run as kvbm
from kvbm_core import load_config
from kvbm_core.command import COMMANDS_GROUP
from kvbm_metrics import METRICS
from kvbm_replay._reader import read_trace
from kvbm_vllm._stats import PREFIX

CONTAINERS = DOCS / "how-to" / "containers.md"
TUTORIAL = DOCS / "tutorial" / "first-tier.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BLOCKS = [block for page in PAGES + READMES for block in blocks(page)]


# A package that a page writes.


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Gives a function that installs the package of a page: its files, and what an installer would write."""
    modules = set()

    def put(page):
        folder = tmp_path / "site"
        for name, text in files_of(page).items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        name, points = project.get("name", "kvbm-page"), project["entry-points"]["kvbm_core"]
        metadata = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        lines = [f"{key} = {value}" for key, value in points.items()]
        (metadata / "entry_points.txt").write_text("\n".join(["[kvbm_core]", *lines, ""]))
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        modules.update(points.values())
        return folder

    yield put
    for module in modules:
        sys.modules.pop(module, None)


def run_pytest(folder, *arguments):
    """Run pytest in a child that finds a folder's packages, and the core that is tested here."""
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a new folder, which has the file that pages name."""
    (tmp_path / "kvbm.yaml").write_text("tiers: [{backend: memory, capacity: 1MiB}]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Rules of languages. Each is given the block and pytest's request.


def by_another_test(test):
    """Make the rule of blocks that another test proves."""
    file, _, function = test.partition("::")

    def rule(block, request):
        assert f"def {function}(" in (ROOT / file).read_text(), f"{test} is gone: who proves {block}?"

    return rule


def python(block, request):
    if block.generated:
        by_another_test("tests/test_docs.py::test_the_reference_is_what_the_docstrings_say")(block, request)
    elif "runnable" in block.marks:
        if block.page in PACKAGES:
            request.getfixturevalue("install")(block.page)
        request.getfixturevalue("folder")
        exec(compile(block.text, str(block), "exec"), {"__name__": "documentation"})
    elif "llm" in block.marks:
        check_calls_of_llm(block)
    else:
        assert block.mark("file"), "mark it `runnable`; or `file=NAME`, as a part of a page's package"
        assert block.page in PACKAGES, "test_the_package_of_a_page_passes_its_suite runs none of it"


def check_calls_of_llm(block):
    """What is called of ``llm`` is a method of vLLM's LLM, with parameters of these names."""
    tree = ast.parse((vllm_folder() / "entrypoints" / "llm.py").read_text())
    methods = {each.name: each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}
    calls = [each for each in ast.walk(ast.parse(block.text)) if isinstance(each, ast.Call)]
    assert calls
    for call in calls:
        parameters = methods[call.func.attr].args
        names = {each.arg for each in (*parameters.args, *parameters.kwonlyargs)}
        assert {keyword.arg for keyword in call.keywords} <= names


def stack_or_manifest(block, request):
    documents = list(yaml.safe_load_all(block.text))
    if all("kind" in each for each in documents):
        by_another_test("tests/test_containers.py::test_the_manifests_are_what_kubernetes_takes")(
            block, request
        )
        assert block.page == CONTAINERS
        return
    [document] = documents
    if block.page in PACKAGES:
        request.getfixturevalue("install")(block.page)
    check_stack(load_config(document))


def json_of_something(block, request):
    if name := block.mark("trace"):
        parts = [each.text for each in blocks(block.page) if each.mark("trace") == name]
        file = request.getfixturevalue("folder") / name
        file.write_text("".join(parts))
        assert read_trace([file]).requests
        return
    value = json.loads(block.text)
    if "kv_connector" in value:
        request.getfixturevalue("folder")
        check_transfer_config(block.text)
    else:
        check_hints(value)


def entry_points(block, request):
    project = tomllib.loads(block.text)["project"]
    assert project["entry-points"].keys() <= {"kvbm_core", COMMANDS_GROUP}


def flowchart(block, request):
    """Arrows lead from boxes to boxes. That of the imports is compared by test_architecture.py."""
    first, *lines = block.text.splitlines()
    assert first.split()[0] == "flowchart"
    boxes = set(re.findall(r"^ +(\w+)[\[({]", block.text, re.MULTILINE))
    ends = {end for line in lines for end in re.findall(r"\w+", line) if re.fullmatch(r" +\w+ --> \w+", line)}
    assert ends
    assert ends <= boxes


def shell(block, request):
    if "run" in block.marks:
        by_another_test("tests/plugins/test_tutorial.py::test_every_command_of_the_tutorial")(block, request)
        assert block.page == DOCS / "tutorial" / "from-kvbm.md"
        return
    request.getfixturevalue("folder")
    check_shell(block.text)


def text(block, request):
    """What a program prints, or a drawing. An `answer` has lines that the command before it prints."""
    if "answer" not in block.marks:
        return
    before = blocks(block.page)[blocks(block.page).index(block) - 1]
    [words] = commands(before.text)
    assert words[0] == "kvbm"
    folder, capsys = request.getfixturevalue("folder"), request.getfixturevalue("capsys")
    words = [str(model_folder(folder, word)) if word.startswith("/models/") else word for word in words[1:]]
    assert kvbm(words) == 0
    printed = {squeezed(line) for line in capsys.readouterr().out.splitlines()}
    assert [line for line in block.text.splitlines() if squeezed(line) not in printed] == []


def squeezed(line):
    return " ".join(line.split())


def model_folder(folder, name):
    """Make the folder of a model that has what is public of its configuration."""
    path = folder / name.removeprefix("/models/")
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIGS[path.name]))
    return path


RULES = {
    "console": shell,
    "dockerfile": by_another_test(
        "tests/test_containers.py::test_the_dockerfile_passes_its_linter_and_a_wrong_one_does_not"
    ),
    "json": json_of_something,
    "mermaid": flowchart,
    "python": python,
    "text": text,
    "toml": entry_points,
    "yaml": stack_or_manifest,
}

# Blocks in lists would need another reader, here and in every tool.


def test_no_block_is_indented():
    indented = re.compile(r"^ +```", re.MULTILINE)
    assert [name_of(page) for page in PAGES + READMES if indented.search(page.read_text())] == []


PACKAGES = [page for page in PAGES if "pyproject.toml" in files_of(page)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_what_it_says(block, request):
    rule = RULES.get(block.language)
    assert rule, f"{block.language or 'no language'}: write one of {', '.join(RULES)}; `text` for output"
    rule(block, request)


# Packages that pages write.


@pytest.mark.parametrize("page", PACKAGES, ids=name_of)
def test_the_package_of_a_page_passes_its_suite(page, install):
    folder = install(page)
    done = run_pytest(folder, "-W", "error", *(file.name for file in folder.glob("test_*.py")))
    assert done.returncode == 0, done.stdout + done.stderr
    for drawn in (block.text for block in blocks(page) if "suite" in block.marks):
        untimed = [re.sub(r" in \S+s( \(\S+\))?$", "", text.strip()) for text in (done.stdout, drawn)]
        assert untimed[0] == untimed[1]


def test_the_suite_finds_what_the_tutorial_says_it_finds(install):
    folder = install(TUTORIAL)
    module = folder / "kvbm_shelf" / "__init__.py"
    guard = (
        "        if self._used + charge > self._capabilities.capacity_bytes:\n"
        "            return Outcome.FAILED, Reason.FULL, 0\n"
    )
    assert guard in module.read_text()
    module.write_text(module.read_text().replace(guard, ""))
    done = run_pytest(folder, "-k", "capacity", "test_shelf.py")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^FAILED .*more_are_refused", done.stdout, re.MULTILINE)


def test_the_tutorial_is_as_short_as_it_says():
    code = [text for name, text in files_of(TUTORIAL).items() if name.endswith(".py")]
    lines = [line for text in code for line in text.splitlines() if line.strip()]
    assert 100 < len(lines) < 160


# Commands.


SERVE = """vllm serve M --kv-transfer-config '{"kv_connector": "KvbmConnector", "kv_role": %s}'"""
WRONG = [
    "kvbm chek kvbm.yaml",
    "kvbm check kvbm.yaml --modle M",
    "kvbm clear /kv --older-than 30",
    "kvbm replay --generate chatt:seed=1",
    "python -m kvbm_remote gc",
    "make tset",
    "make models ARGS=--onyl",
    "python tests/benchmarks/bench_gds.py --dpeth 3",
    "python -m pytest -m gpus",
    "pytest tests/test_nothing.py",
    "pip install '.[vlm]'",
    "vllm serve M --max-model-length 3",
    SERVE % '"kv_bot"',
    SERVE % '"kv_both", "kv_connector_extra_config": {"tiers": [{"backend": "cpu", "capcity": "8GiB"}]}',
    "frobnicate",
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_command_is_found(wrong, folder):
    with pytest.raises(Exception) as raised:  # What parsers raise has no common root.
        check_shell(wrong)
    assert not isinstance(raised.value, AttributeError | NameError | TypeError)


# Queries.


def queries():
    """Each query in the prose of a page, by where it stands. `<tier>` stands for a tier's name."""
    for page in PAGES:
        prose = FENCE.sub("", page.read_text())
        for query in re.findall(r"`([^`\n]*vllm:kvbm_\w+[^`\n]*)`", prose):
            yield page, query.replace("<tier>", "disk").replace("…", "x")


def test_queries_of_pages_are_read_by_prometheus(tmp_path):
    found = dict.fromkeys(query for page, query in queries() if page.parent != DOCS / "changes")
    assert len(found) > 10
    rules = [{"record": f"query_{at}", "expr": query} for at, query in enumerate(found)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "pages", "rules": rules}]}))
    command = [program("promtool"), "check", "rules", "--lint=none", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_metrics_of_pages_exist():
    names = {metric.exported(PREFIX) for metric in METRICS.values()}
    for page, query in queries():
        for name in re.findall(r"vllm:kvbm_\w+", query):
            plain = re.sub(r"_(bucket|count|sum)$", "", name)
            assert {name, plain} & names or page.parent.name == "changes", f"{name_of(page)} has {name}"
