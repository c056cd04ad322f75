"""Two or more runs beside each other: a table, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.table import Table

from kvbm_bench._report import Run, Summary, percentile, summarise
from kvbm_core.printable import printable

Groups = Mapping[str, Sequence[Run]]
"""Runs by label, in the order of their first appearance."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm bench compare --json` writes."""

    runs: dict[str, Summary]
    """By label; runs of one label count as one."""
    doubts: list[str]
    """What makes the comparison doubtful."""


def compared(groups: Groups, runs: Sequence[Run]) -> Comparison:
    """Give the comparison for programs."""
    return Comparison(
        runs={label: summarise(each) for label, each in groups.items()}, doubts=differences(runs)
    )


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Put the runs of each label together: repetitions count as one long run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(printable(run.label), []).append(run)
    return groups


def make_comparison(groups: Groups) -> Table:
    """Draw a row for each label; the speed-up is that of the median, against the first label.

    The first question of a conversation can find its history nowhere, so later ones stand apart.
    """
    table = Table(title="Time to first token, and the rest")
    headings = ("run", "requests", "p50 (s)", "p95 (s)", "p99 (s)", "speed-up", "later rounds p50 (s)")
    for heading in (*headings, "between tokens p50, p95 (s)", "prompt tok/s", "answer tok/s"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    summaries = {label: summarise(runs) for label, runs in groups.items()}
    base_s = next(iter(summaries.values())).first_token_s.p50
    for label, summary in summaries.items():
        first, between = summary.first_token_s, summary.inter_token_s
        later_s = [each.first_token_s for run in groups[label] for each in run.requests if each.number > 1]
        failed = f" ({summary.failures} failed)" if summary.failures else ""
        table.add_row(
            escape(label if len(groups[label]) == 1 else f"{label} ({len(groups[label])} runs)"),
            f"{summary.requests}{failed}",
            *(f"{value_s:.3f}" for value_s in (first.p50, first.p95, first.p99)),
            f"{base_s / first.p50:.2f} x",
            f"{percentile(later_s, 50):.3f}" if later_s else "-",
            f"{between.p50:.4f}, {between.p95:.4f}" if between else "-",
            f"{summary.prompt_tokens_per_s:,.1f}",
            f"{summary.answer_tokens_per_s:,.1f}",
        )
    return table


def differences(runs: Sequence[Run]) -> list[str]:
    """Return what makes a comparison doubtful, a line each."""
    lines = []
    if len({run.plan for run in runs}) > 1:
        lines.append("The runs had different plans; they do not measure the same load.")
    if len({run.model for run in runs}) > 1:
        lines.append("The runs had different models.")
    lines += [f"A run of {run.label} was interrupted." for run in runs if run.interrupted]
    return lines


def draw(groups: Groups, file: Path) -> None:
    """Draw time to first token by round, and how many requests had theirs by when."""
    # Only here: the load itself needs no matplotlib.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_round, shares = figure.subplots(1, 2)
    for label, runs in groups.items():
        requests = [request for run in runs for request in run.requests]
        numbers = sorted({request.number for request in requests})
        times_s = [[each.first_token_s for each in requests if each.number == n] for n in numbers]
        [line] = by_round.plot(numbers, [percentile(each, 50) for each in times_s], marker="o", label=label)
        low, high = ([percentile(each, percent) for each in times_s] for percent in (5, 95))
        by_round.fill_between(numbers, low, high, color=line.get_color(), alpha=0.15)
        ordered = sorted(request.first_token_s for request in requests)
        share = [100 * at / len(ordered) for at in range(len(ordered) + 1)]
        shares.step([ordered[0], *ordered], share, where="post", color=line.get_color(), label=label)
    by_round.set(xlabel="round", ylabel="time to first token (s)", yscale="log")
    by_round.set_title("Median by round, 5 to 95 % shaded")
    by_round.xaxis.get_major_locator().set_params(integer=True)
    shares.set(xlabel="time to first token (s)", ylabel="requests (%)", xscale="log")
    shares.set_title("Share of requests with their first token")
    for axis in (by_round.yaxis, shares.xaxis):
        axis.set_major_formatter("{x:g}")
    for panel in (by_round, shares):
        panel.grid(visible=True, alpha=0.3)
    by_round.legend()
    figure.savefig(file)
