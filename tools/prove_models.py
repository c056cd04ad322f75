"""Proves families of models with the vLLM that is installed; writes the table of docs/reference/models.md.

    python tools/prove_models.py                      all families
    python tools/prove_models.py --only gemma3        one; may be given several times
    python tools/prove_models.py --vllm 0.33.0        with another version, in an environment of its own

Each family is a small model with random weights, in a process of its own: `tests/plugins/model_child.py`
starts it, and says what was restored, or why it was refused. Rows of other versions and devices stay in the
table. Fails if a family that started was not restored as it must be.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHILD = ROOT / "tests" / "plugins" / "model_child.py"
PAGE = ROOT / "docs" / "reference" / "models.md"
BEGIN, END = "<!-- made by `make models` -->", "<!-- until here -->"
KINDS = {
    "FullAttentionSpec": "full", "MLAAttentionSpec": "latent", "SlidingWindowSpec": "window",
    "ChunkedLocalAttentionSpec": "chunk", "MambaSpec": "state",
}  # fmt: skip
HEAD = (
    "family", "vLLM", "on", "KV groups", "restored from host memory", "after a restart, from disk and remote",
    "objects as the rules say", "zeros that show",
)  # fmt: skip
TIMEOUT_S = 1800


def main(arguments: Sequence[str] | None = None) -> int:
    """Prove what is asked for, write the table and return the exit status."""
    parser = argparse.ArgumentParser(
        description="Prove families of models, and write the table of docs/reference/models.md."
    )
    parser.add_argument("--only", metavar="NAME", action="append", help="this family; may be repeated")
    parser.add_argument("--vllm", metavar="VERSION", help="set this version up and use it")
    parser.add_argument("--page", type=Path, default=PAGE, help="the file with the table (%(default)s)")
    options = parser.parse_args(arguments)
    python = set_up(options.vllm) if options.vllm else sys.executable
    if python is None:
        return 1
    names = json.loads(subprocess.run([python, CHILD], capture_output=True, check=True, text=True).stdout)
    if unknown := {*(options.only or ())}.difference(names):
        parser.error(f"--only {', '.join(sorted(unknown))}: no such family; there are {', '.join(names)}")
    failed = 0
    for name in options.only or names:
        print(f"{name:<14} ", end="", flush=True)
        started_s = time.monotonic()
        said = prove(python, name)
        print(f"{summary(said)}, {time.monotonic() - started_s:.0f} s", flush=True)
        failed += "error" not in said and not is_right(said)
        write_row(options.page, name, said, names)
    return 1 if failed else 0


def set_up(version: str) -> str | None:
    """Make an environment with another version of vLLM, and give its Python. None: it cannot be had."""
    venv = f".venv-compat-{version}"
    options = ["--venv", venv, "--extras", "dev", "--vllm", version, "--engine", "cpu"]
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "setup.py"), *options], check=False)
    return None if done.returncode else str(ROOT / venv / "bin" / "python")


def prove(python: str, name: str) -> dict[str, Any]:
    """Have a process of its own prove one family, and give what it says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(CHILD), name, folder]
        try:
            done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {"error": f"nothing was said for {TIMEOUT_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"architecture"')]
    said: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if "error" not in said and "host" not in said:
        words = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        said["error"] = f"the process ended with status {done.returncode}: {words}"
    # Some of vLLM's errors only refer to what a process of its own has logged.
    causes = re.findall(r"\w+Error: .+", done.stdout + done.stderr)
    if causes and "check the logs" in said.get("error", ""):
        said["error"] += f" There: {causes[-1]}"
    return said


def is_right(said: dict[str, Any]) -> bool:
    """Return True if every prompt was restored with the right answer, by exactly what the rules say."""
    parts = (said["host"], said["below"])
    whole = all(part["identical"] == part["counted"] == part["prompts"] for part in parts)
    return bool(whole and said["zeros"]["shown"] and min(said["loaded"].values()) > 0)


def summary(said: dict[str, Any]) -> str:
    """One line for who waits."""
    if "error" in said:
        return f"not served: {said['error'][:120]}"
    cells = cells_of("", said)
    return f"restored {cells[4]} and {cells[5]}, {cells[6]} as the rules say, {cells[7]} zeros show"


def cells_of(name: str, said: dict[str, Any]) -> list[str]:
    """The cells of a family's row."""
    start = [
        f"{name} (`{said.get('architecture', '?')}`)" + (" \\*" if said.get("mended") else ""),
        said.get("vllm", "?"),
        ", ".join(filter(None, (said.get("device"), said.get("dtype")))) or "?",
    ]
    if "error" in said:
        return [*start, f"not served: {said['error']}".replace("|", "\\|"), *[""] * 4]
    groups = [f"{KINDS.get(kind, kind)} {tokens} x {layers}" for kind, tokens, layers in said["groups"]]
    host, below, zeros = said["host"], said["below"], said["zeros"]
    return [
        *start,
        ", ".join(groups),
        *(f"{part['identical']} of {part['prompts']}" for part in (host, below)),
        f"{host['counted'] + below['counted']} of {host['prompts'] + below['prompts']}",
        f"{zeros['shown']} of {zeros['objects']}",
    ]


def write_row(page: Path, name: str, said: dict[str, Any], names: Sequence[str]) -> None:
    """Put a family's row into the page's table, in the place of the one with the same version and device."""
    before, rest = page.read_text().split(BEGIN)
    table, after = rest.split(END)
    rows = [
        [cell.strip().replace("\0", "\\|") for cell in line.replace("\\|", "\0").split("|")[1:-1]]
        for line in table.strip().splitlines()[2:]
    ]
    new = cells_of(name, said)

    def place(row: list[str]) -> tuple[int, list[int], str]:
        family = row[0].split(" ")[0]
        version = [int(part) for part in row[1].split("+")[0].split(".") if part.isdecimal()]
        return names.index(family) if family in names else len(names), version, row[2]

    rows = [row for row in rows if (row[0].split(" ")[0], *row[1:3]) != (name, *new[1:3])]
    rows = sorted([*rows, new], key=place)
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
