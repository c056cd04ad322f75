"""The commands and their options. Every option is checked here, before anything starts."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

import httpx
import msgspec
from rich.console import Console

from kvbm_bench._chat import Load, choose_model, run_load, write_script
from kvbm_bench._client import Client
from kvbm_bench._compare import differences, draw, group, make_comparison
from kvbm_bench._errors import BenchError
from kvbm_bench._plan import Plan
from kvbm_bench._progress import watch
from kvbm_bench._report import Run, make_table, read_json, remarks, summarise, write_csv, write_json
from kvbm_core.extras import extra_command
from kvbm_core.printable import PROSE, printable

INTERRUPTED = 130
"""The exit status that shells give to a command ended by Ctrl-C."""
_PLAIN_WIDTH = 160
"""Without a terminal there is no width to fit; rich would assume 80 and fold the table."""


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    options = _parser().parse_args(arguments)
    options.words = arguments
    try:
        return chat(options, console) if options.command == "chat" else compare(options, console)
    except BenchError as error:
        print(printable(f"kvbm_bench {options.command}: {error}", PROSE), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def chat(options: argparse.Namespace, console: Console) -> int:
    """Put the load on the server, and show and write what came of it."""
    load = Load(Plan(**{field.name: getattr(options, field.name) for field in fields(Plan)}))
    started = datetime.now(UTC)
    interrupted = False
    try:
        asyncio.run(_talk(load, options, console))
    except KeyboardInterrupt:
        if not load.requests:
            raise
        interrupted = True
    result = Run(
        label=options.label or (options.json.stem if options.json else load.model),
        url=options.url,
        model=load.model,
        command=shlex.join(["python", "-m", "kvbm_bench", *options.words]),
        started=started.isoformat(timespec="seconds"),
        plan=load.plan,
        requests=load.requests,
        failures=load.failures,
        counted=dict(load.counted),
        interrupted=interrupted,
    )
    _show(result, options, console)
    if interrupted:
        return INTERRUPTED
    return 1 if load.failures else 0


async def _talk(load: Load, options: argparse.Namespace, console: Console) -> None:
    # The demo's story: a file of the same distribution.
    text = resources.files("kvbm_cli").joinpath("story.txt").read_text(encoding="utf-8")
    async with Client(options.url) as client:
        load.model, limit = await choose_model(client, options.model)
        script = await write_script(client, load, limit, text)
        console.print(
            printable(f"{load.model} at {options.url}: {_told(load.plan)}"), markup=False, soft_wrap=True
        )
        with watch(console, load.plan) as tell:
            await run_load(load, client, script, tell)


def _show(result: Run, options: argparse.Namespace, console: Console) -> None:
    summary = summarise([result])
    if options.csv:
        write_csv(options.csv, result.requests)
    if options.json:
        write_json(options.json, msgspec.structs.replace(result, summary=summary))
    console.print(make_table(result, summary))
    for line in remarks(result, summary):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def compare(options: argparse.Namespace, console: Console) -> int:
    """Show runs beside each other."""
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise BenchError(f"--plot needs matplotlib: {extra_command('bench')}")
    runs = [read_json(file) for file in options.runs]
    groups = group(runs)
    console.print(make_comparison(groups))
    for line in differences(runs):
        console.print(printable(line), soft_wrap=True)
    if options.plot:
        draw(groups, options.plot)
        console.print(f"Drawn: {options.plot}", soft_wrap=True)
    return 0


def _told(plan: Plan) -> str:
    wanted = f"{plan.requests} requests" if plan.requests else f"{plan.duration_s:g} s"
    return f"{plan.users} users, {wanted}, each user asks every {plan.gap_s:g} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvbm_bench")
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser(
        "chat", help="let users talk to a server, round after round", usage="%(prog)s [OPTION ...]"
    )
    _add_load(load)
    load.add_argument("--url", type=_url, default="http://127.0.0.1:8000", help="default: %(default)s")
    load.add_argument("--model", metavar="ID", help="needless where the server has only one")
    load.add_argument("--label", help="for comparisons (default: the name of the --json file)")
    load.add_argument("--csv", type=_writable, metavar="FILE", help="a row a request, LMBenchmark's columns")
    load.add_argument("--json", type=_writable, metavar="FILE", help="everything, for `compare`")
    comparison = commands.add_parser("compare", help="show runs beside each other")
    comparison.add_argument("runs", nargs="+", type=Path, metavar="RUN.json", help="files of `chat --json`")
    comparison.add_argument("--plot", type=_picture, metavar="FILE", help="draw them: .png or .svg")
    return parser


def _add_load(load: argparse.ArgumentParser) -> None:
    """Add the fields of the plan; the lengths by default are those of LMBenchmark's long input."""
    rows: list[tuple[str, str, Callable[[str], float], float | None, str]] = [
        ("--users", "users", _whole(1), 15, "who talk at the same time"),
        ("--rounds", "rounds", _whole(1), 20, "questions that a user asks"),
        ("--qps", "qps", _positive, 1.0, "requests a second of all: a user asks every users / qps seconds"),
        ("--system-prompt", "system_tokens", _whole(0), 1000, "tokens that all prompts begin with"),
        ("--history", "history_tokens", _whole(0), 20000, "tokens behind it, others for each user"),
        ("--answer", "answer_tokens", _whole(1), 100, "tokens of an answer, at most"),
        ("--seed", "seed", _whole(0), 0, "another one makes other text"),
        ("--duration", "duration_s", _positive, None, "seconds in which users who finish are replaced"),
    ]
    for option, field, kind, default, what in rows:
        text = f"{what} (default: {default or 'one conversation each'})" if default != 0 else what
        load.add_argument(option, dest=field, type=kind, default=default, metavar="N", help=text)
    load.add_argument(
        "--exact", action="store_true", help="answers of full length (ignore_eos: vLLM, SGLang)"
    )


def _whole(least: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not value.isdecimal() or int(value) < least:
            raise argparse.ArgumentTypeError(f"{value!r} cannot be used; write a whole number from {least}")
        return int(value)

    return read


def _positive(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{value!r} cannot be used; write a number above 0, like 0.5")
    return number


def _url(value: str) -> str:
    """Return the server's address without the `/v1` that is part of every route."""
    try:
        url = httpx.URL(value)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise argparse.ArgumentTypeError(f"{value!r} is no address; write one like http://127.0.0.1:8000")
    return value.rstrip("/").removesuffix("/v1")


def _writable(value: str) -> Path:
    file = Path(value)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{value} cannot be written; name a file in a folder that can")
    return file


def _picture(value: str) -> Path:
    if Path(value).suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{value!r} cannot be drawn; let its name end with .png or .svg")
    return _writable(value)
