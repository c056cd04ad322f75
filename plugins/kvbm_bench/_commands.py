"""The group `kvbm bench`. Every option is checked here, before anything starts."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import os
import shlex
import sys
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import typer
from rich.console import Console

from kvbm_bench._chat import Load, choose_model, run_load, write_script
from kvbm_bench._client import Client
from kvbm_bench._compare import Comparison, compared, differences, draw, group, make_comparison
from kvbm_bench._errors import BenchError
from kvbm_bench._plan import Plan
from kvbm_bench._progress import watch
from kvbm_bench._report import Run, make_table, read_json, remarks, summarise, write_csv, write_run
from kvbm_core.command import ExitCode, answers, write_json
from kvbm_core.extras import extra_command
from kvbm_core.printable import printable

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Loads for OpenAI-compatible servers, and their comparison.")

_PLAIN_WIDTH = 160
"""Without a terminal there is no width to fit; rich would assume 80 and fold the table."""


def read_url(value: str) -> str:
    """Return the server's address without the `/v1` that is part of every route."""
    try:
        url = httpx.URL(value)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise typer.BadParameter(f"{value!r} is no address; write one like http://127.0.0.1:8000")
    return value.rstrip("/").removesuffix("/v1")


def read_above_zero(value: float | None) -> float | None:
    """Return a number that is finite and above 0."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value!r} cannot be used; write a number above 0, like 0.5")
    return value


def read_writable(file: Path | None) -> Path | None:
    """Return a file that can be written."""
    if file and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
        raise typer.BadParameter(f"{file} cannot be written; name a file in a folder that can")
    return file


def read_picture(file: Path | None) -> Path | None:
    """Return a file that can be drawn."""
    if file and file.suffix not in (".png", ".svg"):
        raise typer.BadParameter(f"{str(file)!r} cannot be drawn; let its name end with .png or .svg")
    return read_writable(file)


@app.command("chat")
@answers(Run)
def chat(
    url: Annotated[str, typer.Option(callback=read_url, help="The server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(metavar="ID", help="Needless where there is only one.")] = None,
    # The lengths by default are those of LMBenchmark's long input.
    users: Annotated[int, typer.Option(min=1, help="Who talk at the same time.")] = 15,
    rounds: Annotated[int, typer.Option(min=1, help="Questions that a user asks.")] = 20,
    qps: Annotated[
        float,
        typer.Option(
            callback=read_above_zero,
            help="Requests a second of all: a user asks every users / qps seconds.",
        ),
    ] = 1.0,
    system_prompt: Annotated[int, typer.Option(min=0, help="Tokens that all prompts begin with.")] = 1000,
    history: Annotated[int, typer.Option(min=0, help="Tokens behind it, others for each user.")] = 20000,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Another one makes other text.")] = 0,
    duration: Annotated[
        float | None,
        typer.Option(
            callback=read_above_zero,
            help="Seconds in which users who finish are replaced.",
            show_default="one conversation each",
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Answers of full length (ignore_eos: vLLM, SGLang).")
    ] = False,
    label: Annotated[
        str | None, typer.Option(help="For comparisons.", show_default="the name of the --out file")
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=read_writable, help="A row a request, LMBenchmark's columns."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=read_writable, help="Everything, for `compare`."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, and all else to stderr.")
    ] = False,
) -> None:
    """Let users talk to a server, round after round."""
    plan = Plan(users, rounds, qps, system_prompt, history, answer, exact, duration, seed)
    console = _console(as_json)
    load, started = Load(plan), datetime.now(UTC)
    interrupted = False
    try:
        asyncio.run(_talk(load, url, model, console))
    except KeyboardInterrupt:
        if not load.requests:
            raise
        interrupted = True
    run = _run(load, url, label or (out.stem if out else load.model), started, interrupted=interrupted)
    _show(run, console, csv, out, as_json=as_json)
    if interrupted:
        raise typer.Exit(ExitCode.INTERRUPTED)
    raise typer.Exit(ExitCode.MEND if load.failures else ExitCode.DONE)


async def _talk(load: Load, url: str, model: str | None, console: Console) -> None:
    # The demo's story: a file of the same distribution.
    text = resources.files("kvbm_cli").joinpath("story.txt").read_text(encoding="utf-8")
    async with Client(url) as client:
        load.model, limit = await choose_model(client, model)
        script = await write_script(client, load, limit, text)
        console.print(printable(f"{load.model} at {url}: {_told(load.plan)}"), markup=False, soft_wrap=True)
        with watch(console, load.plan) as tell:
            await run_load(load, client, script, tell)


def _run(load: Load, url: str, label: str, started: datetime, *, interrupted: bool) -> Run:
    return Run(
        label=label,
        url=url,
        model=load.model,
        command=shlex.join(["kvbm", *sys.argv[1:]]),
        started=started.isoformat(timespec="seconds"),
        plan=load.plan,
        requests=load.requests,
        failures=load.failures,
        counted=dict(load.counted),
        interrupted=interrupted,
    )


def _show(run: Run, console: Console, csv: Path | None, out: Path | None, *, as_json: bool) -> None:
    summary = summarise([run])
    run = msgspec.structs.replace(run, summary=summary)
    if csv:
        write_csv(csv, run.requests)
    if out:
        write_run(out, run)
    if as_json:
        write_json(run)
    console.print(make_table(run, summary))
    for line in remarks(run, summary):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


@app.command("compare")
@answers(Comparison)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN.json...", help="Files of `chat --out`.")],
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=read_picture, help="Draw them: .png or .svg."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Show runs beside each other."""
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise BenchError(f"--plot needs matplotlib: {extra_command('bench')}")
    read = [read_json(file) for file in runs]
    groups, console = group(read), _console(as_json)
    if as_json:
        write_json(compared(groups, read))
    console.print(make_comparison(groups))
    for line in differences(read):
        console.print(printable(line), soft_wrap=True)
    if plot:
        draw(groups, plot)
        console.print(f"Drawn: {plot}", soft_wrap=True)


def _console(as_json: bool) -> Console:
    console = Console(stderr=as_json)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    return console


def _told(plan: Plan) -> str:
    wanted = f"{plan.requests} requests" if plan.requests else f"{plan.duration_s:g} s"
    return f"{plan.users} users, {wanted}, each user asks every {plan.gap_s:g} s"
