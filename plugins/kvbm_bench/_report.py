"""What a run gave: its requests, the percentiles of their times, a table, CSV and JSON."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.table import Table

from kvbm_bench._client import Timing
from kvbm_bench._errors import BenchError
from kvbm_bench._plan import Plan
from kvbm_core.printable import printable

PERCENTILES = (50, 95, 99)
CSV_COLUMNS = {
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "answer_tokens",
    "ttft": "first_token_s",
    "generation_time": "generation_s",
    "user_id": "user",
    "question_id": "number",
    "launch_time": "launched_s",
    "finish_time": "finished_s",
}
"""The columns of LMBenchmark's `multi-round-qa.py`, in its order, and the fields that stand in them."""


class Request(Timing, frozen=True, kw_only=True):
    """One question that was answered."""

    user: int
    number: int
    """Of the round, counted from 1."""
    late: bool = False
    """Sent behind its time: the answer before it was not there."""


class Failure(msgspec.Struct, frozen=True):
    """One question that was not answered; it ended its conversation."""

    user: int
    number: int
    message: str


class Spread(msgspec.Struct, frozen=True):
    """Mean and percentiles of one quantity."""

    mean: float
    p50: float
    p95: float
    p99: float


class Summary(msgspec.Struct, frozen=True):
    """The numbers of one run, or of several with the same label."""

    requests: int
    failures: int
    late: int
    duration_s: float
    """From the first request to the last answer."""
    requests_per_s: float
    prompt_tokens_per_s: float
    answer_tokens_per_s: float
    first_token_s: Spread
    inter_token_s: Spread | None
    """None where every answer came in one piece."""
    request_prompt_tokens_per_s: Spread
    """Each prompt's tokens by its time to first token. Of speeds p95 is what 95 % reach."""
    request_answer_tokens_per_s: Spread | None
    """Each answer's tokens after the first by the time they took."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run, as it is kept in a JSON file."""

    label: str
    url: str
    model: str
    command: str
    started: str
    plan: Plan
    requests: list[Request]
    failures: list[Failure] = []
    counted: dict[str, int] = {}
    """What the server counted meanwhile: prompt tokens by source, blocks loaded by tier."""
    interrupted: bool = False
    summary: Summary | None = None
    """For readers of the file; `compare` computes it anew."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly between its two neighbours.

    The same as numpy's default: rank ``(n - 1) * percent / 100`` in the sorted values.
    """
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def spread(values: Iterable[float], *, more_is_better: bool = False) -> Spread | None:
    """Return mean and percentiles, of speeds those that so many percent reach; None of nothing."""
    known = list(values)
    if not known:
        return None
    percents = (100 - percent if more_is_better else percent for percent in PERCENTILES)
    return Spread(sum(known) / len(known), *(percentile(known, percent) for percent in percents))


def summarise(runs: Sequence[Run]) -> Summary:
    """Return the numbers of runs, their requests taken together and their durations added.

    Raises:
        BenchError: no request was answered.
    """
    requests = [request for run in runs for request in run.requests]
    failures = [failure for run in runs for failure in run.failures]
    first = spread(request.first_token_s for request in requests)
    speed = spread((each.prompt_tokens / each.first_token_s for each in requests), more_is_better=True)
    if first is None or speed is None:
        raise BenchError("no request was answered" + (f": {failures[0].message}" if failures else ""))
    duration_s = sum(_duration_s(run.requests) for run in runs)
    timed = [request for request in requests if request.answer_tokens > 1 and request.generation_s > 0]
    return Summary(
        requests=len(requests),
        failures=len(failures),
        late=sum(request.late for request in requests),
        duration_s=duration_s,
        requests_per_s=len(requests) / duration_s,
        prompt_tokens_per_s=sum(request.prompt_tokens for request in requests) / duration_s,
        answer_tokens_per_s=sum(request.answer_tokens for request in requests) / duration_s,
        first_token_s=first,
        inter_token_s=spread(gap_s for request in requests for gap_s in request.gaps_s),
        request_prompt_tokens_per_s=speed,
        request_answer_tokens_per_s=spread(
            ((request.answer_tokens - 1) / request.generation_s for request in timed), more_is_better=True
        ),
    )


def _duration_s(requests: Sequence[Request]) -> float:
    if not requests:
        return 0.0
    return max(each.finished_s for each in requests) - min(each.launched_s for each in requests)


def make_table(run: Run, summary: Summary) -> Table:
    """Draw the percentiles of one run."""
    table = Table(
        title=f"{escape(printable(run.label))}: {summary.requests} requests in {summary.duration_s:.1f} s"
    )
    for heading in ("", "mean", *(f"p{percent}" for percent in PERCENTILES)):
        table.add_column(heading, justify="right" if heading else "left")
    rows = [
        ("time to first token (s)", summary.first_token_s, 3),
        ("between two tokens (s)", summary.inter_token_s, 4),
        ("tokens/s of a prompt", summary.request_prompt_tokens_per_s, 1),
        ("tokens/s of an answer", summary.request_answer_tokens_per_s, 1),
    ]
    for name, values, digits in rows:
        cells = msgspec.structs.astuple(values) if values else ()
        table.add_row(name, *(f"{cell:,.{digits}f}" for cell in cells))
    return table


def remarks(run: Run, summary: Summary) -> list[str]:
    """Return what a reader has to know beside the table, a line each."""
    lines = [
        f"Together: {summary.requests_per_s:.3f} requests/s ({run.plan.qps:g} wanted), "
        f"{summary.prompt_tokens_per_s:,.1f} prompt tokens/s, "
        f"{summary.answer_tokens_per_s:,.1f} answer tokens/s."
    ]
    if run.counted:
        counts = ", ".join(f"{name}: {count:,}" for name, count in run.counted.items())
        lines.append(f"Counted by the server, prompt tokens by source and blocks by tier: {counts}.")
    if summary.late:
        lines.append(
            f"{summary.late} of {summary.requests} requests were sent late, "
            "because the answer before them was not there: the server does not keep up with --qps."
        )
    if run.failures:
        first = run.failures[0]
        lines.append(
            f"{len(run.failures)} requests failed and ended their conversations; "
            f"the first, question {first.number} of user {first.user}: {first.message}"
        )
    return lines


def write_csv(file: Path, requests: Sequence[Request]) -> None:
    """Write a row for each request, in the columns of LMBenchmark."""
    with file.open("w", newline="", encoding="utf-8") as sink:
        rows = csv.writer(sink, lineterminator="\n")
        rows.writerow(CSV_COLUMNS)
        for request in sorted(requests, key=lambda each: (each.user, each.number)):
            rows.writerow(getattr(request, field) for field in CSV_COLUMNS.values())


def write_run(file: Path, run: Run) -> None:
    """Write the run."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1))


def read_json(file: Path) -> Run:
    """Read what `write_run` wrote.

    Raises:
        BenchError: it is not such a file.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=Run)
    except (OSError, msgspec.DecodeError) as error:
        raise BenchError(f"{file} is no run of `kvbm bench chat --out`: {error}") from error
