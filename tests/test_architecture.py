"""The shape of the product code: sizes, layers, and where exceptions may be swallowed."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
structure = importlib.import_module("structure")
FILES = [path for folder in ("kvbm_core", "backends", "plugins") for path in (ROOT / folder).rglob("*.py")]
FUNCTIONS = [
    (path, node)
    for path in FILES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]

MAY_SWALLOW = {
    "kvbm_core/layers/deadline.py": "the top of a tier's thread: it becomes completions",
    "kvbm_core/layers/codec_tier.py": "the tops of threads that run a stranger's codecs: it becomes outcomes",
    "kvbm_core/leader/ground/guarded_policies.py": "the edge to a stranger's policy, which is dismissed",
    "kvbm_core/worker/copier.py": "a device's error is foreign: it becomes outcomes",
    "kvbm_core/worker/worker.py": "the top of the transfer engine's thread, and the edge to the engine",
    "backends/kvbm_gds/_io.py": "the tops of the threads that move bytes: it becomes outcomes",
    "backends/kvbm_lmdb/_tier.py": "the tops of the readers' threads",
    "backends/kvbm_lmdb/_writing.py": "the top of the writer's thread",
    "backends/kvbm_remote/_contents.py": "the edge to foreign clients, whose errors may quote a password",
    "backends/kvbm_remote/_tier.py": "the edge to foreign client libraries: it becomes a completion",
    "plugins/kvbm_cli/_app.py": "the program's top: no traceback for a user",
    "plugins/kvbm_etcd/_coordinator.py": "the top of the registration's thread",
    "kvbm_core/testing/_watch.py": "the top of a test's thread: it is raised where the test is",
    "kvbm_core/testing/_whole.py": "a waived test is expected to fail, in whatever way",
    "backends/kvbm_device/_staged.py": "the accelerator's own error is not ours to know: it becomes outcomes",
    "backends/kvbm_cpu/_tier.py": "the accelerator's own error type is not ours to know; it is logged",
}


TIER_BACKENDS = ("kvbm_cpu", "kvbm_lmdb", "kvbm_gds", "kvbm_remote")
WINGS = {
    "kvbm_core/*.py": 2560,
    "kvbm_core/leader/*.py": 775,
    "kvbm_core/leader/ground/*.py": 645,
    "kvbm_core/leader/finding/*.py": 375,
    "kvbm_core/leader/movements/*.py": 440,
    "kvbm_core/leader/tenancy/*.py": 380,
    "kvbm_core/worker/*.py": 1415,
    "kvbm_core/layers/*.py": 815,
    "backends/kvbm_cpu/*.py": 390,
    "backends/kvbm_lmdb/*.py": 1915,
    "backends/kvbm_gds/*.py": 1520,
    "backends/kvbm_remote/*.py": 2130,
    "backends/kvbm_device/*.py": 1600,
    "backends/kvbm_crypt/*.py": 260,
    "backends/kvbm_zstd/*.py": 150,
    "backends/kvbm_eviction/*.py": 660,
    "backends/kvbm_admission/*.py": 160,
    "plugins/kvbm_engine/*.py": 1915,
    "plugins/kvbm_vllm/**/*.py": 2260,
    "plugins/kvbm_replay/*.py": 2290,
}
"""Lines of code of each wing at most, without comments, docstrings and empty lines."""


def code_lines(path):
    tree, prose = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            prose.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and at not in prose for at, line in lines
    )


@pytest.mark.parametrize(("wing", "most"), WINGS.items())
def test_every_wing_is_small(wing, most):
    files = list(ROOT.glob(wing))
    assert files, "the wing has moved"
    assert sum(map(code_lines, files)) <= most


def test_files_and_functions_are_short():
    assert [path for path in FILES if len(path.read_text().splitlines()) > 400] == []
    assert [(path, node.name) for path, node in FUNCTIONS if node.end_lineno - node.lineno >= 60] == []


def test_functions_have_at_most_eight_parameters():
    many = [
        (path, node.name)
        for path, node in FUNCTIONS
        # `self` is counted here. What a kernel is compiled for are parameters of it, too, and typer reads an
        # option of a verb from each.
        if len(node.args.args) + len(node.args.kwonlyargs) > 9
        if path.name != "_kernel.py"
        and not any("answers" in ast.unparse(each) for each in node.decorator_list)
    ]
    assert many == []


def test_interfaces_have_at_most_six_methods_to_implement():
    import kvbm_core
    from kvbm_core.policy import EvictionPolicy
    from kvbm_device._gpu import Copies, Events, Memory, Streams

    interfaces = [
        kvbm_core.Tier,
        kvbm_core.Addressable,
        kvbm_core.Coordinator,
        kvbm_core.Device,
        kvbm_core.Pinnable,
        kvbm_core.Stageable,
        kvbm_core.Work,
        EvictionPolicy,
        Streams,
        Events,
        Memory,
        Copies,
    ]
    assert [each for each in interfaces if len(each.__abstractmethods__) > 6] == []


def is_broad(handler):
    names = (
        {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else set()
    )
    return handler.type is None or bool(names & {"Exception", "BaseException"})


def test_broad_excepts_raise_or_have_a_reason():
    swallowing = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and is_broad(node)
        if not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    }
    assert swallowing <= set(MAY_SWALLOW), swallowing - set(MAY_SWALLOW)


def test_lines_of_backends_name_their_tier():
    # `TierLog` puts the name in front; a logger of their own would not.
    loggers = [
        (str(path.relative_to(ROOT)), node.lineno)
        for path in FILES
        if path.parent.name in TIER_BACKENDS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("getLogger", "info", "warning", "error")
        if isinstance(node.value, ast.Name) and node.value.id == "logging"
    ]
    assert loggers == []


def test_a_checksum_that_can_be_made_to_collide_finds_damage_and_names_nothing():
    users = {str(path.relative_to(ROOT)) for path in FILES if "xxhash" in path.read_text()}
    assert users == {"kvbm_core/layers/seal.py", "backends/kvbm_gds/_slab.py"}


def test_who_may_import_whom():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("module", ["torch", "numpy", "vllm", "lmdb", "asyncio"])
def test_the_core_pulls_in_nothing_heavy(module):
    program = f"import kvbm_core, sys; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_page_of_the_house_draws_what_the_imports_say_and_there_is_no_circle():
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    arrows = structure.imports(ROOT)
    assert structure.circle_of(arrows) == []
    drawn = structure.diagram(ROOT, arrows)
    assert f"```mermaid\n{drawn}\n```" in page, "run `python tools/structure.py` and put its diagram there"


def test_a_circle_among_files_is_found(tmp_path):
    for name, other in (("one", "two"), ("two", "one")):
        path = tmp_path / "kvbm_core" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"from kvbm_core.{other} import thing\n")
    circle = structure.circle_of(structure.imports(tmp_path))
    assert set(circle) == {"kvbm_core.one", "kvbm_core.two"}
