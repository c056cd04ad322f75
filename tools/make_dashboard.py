"""Writes the Grafana dashboard of `kvbm_metrics`: the panels are listed here, their places are computed.

With ``--check`` it says by its exit status whether the file is what it would write.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

TARGET: Final = Path(__file__).parent.parent / "plugins/kvbm_metrics/deploy/grafana/dashboards/kvbm.json"

Json: TypeAlias = dict[str, Any]

ENGINE: Final = 'job=~"$job", instance=~"$instance", model_name=~"$model_name", engine=~"$engine"'
TIER: Final = f'{ENGINE}, tier=~"$tier"'
SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS: Final = 24


def rate(name: str, by: str = "", labels: str = TIER, window: str = "$__rate_interval") -> str:
    """Give the events a second of a counter of ours, summed."""
    return f"sum{f' by ({by})' if by else ''} (rate(vllm:kvbm_{name}_total{{{labels}}}[{window}]))"


def total(name: str, by: str = "", labels: str = TIER) -> str:
    """Give the growth of a counter of ours over what the dashboard shows."""
    return f"sum{f' by ({by})' if by else ''} (increase(vllm:kvbm_{name}_total{{{labels}}}[$__range]))"


def gauge(name: str, by: str = "tier", how: str = "sum") -> str:
    """Give a gauge of ours."""
    return f"{how} by ({by}) (vllm:kvbm_{name}{{{TIER}}})"


def quantile(share: float, metric: str, by: str = "", labels: str = ENGINE) -> str:
    """Give a quantile of a histogram."""
    groups = f"{by}, le" if by else "le"
    buckets = f"sum by ({groups}) (rate({metric}_bucket{{{labels}}}[$__rate_interval]))"
    return f"histogram_quantile({share}, {buckets})"


def operation(share: float, name: str) -> str:
    """Give a quantile of the seconds that one operation takes in each tier."""
    return quantile(share, "vllm:kvbm_operation_seconds", "tier", f'{TIER}, operation="{name}"')


def panel(
    kind: str, title: str, text: str, unit: str, *queries: tuple[str, str],
    width: int = 8, height: int = 8, **custom: Any,
) -> Json:  # fmt: skip
    """Describe one panel; `queries` are expressions and their legends."""
    instant = kind in ("stat", "bargauge")
    targets = [
        {
            "datasource": SOURCE, "refId": chr(ord("A") + at), "expr": expr, "legendFormat": legend,
            "instant": instant, "range": not instant,
        }
        for at, (expr, legend) in enumerate(queries)
    ]  # fmt: skip
    defaults: Json = {"unit": unit, "min": 0, **custom.pop("defaults", {})}
    options: Json = {}
    if kind == "timeseries":
        defaults["custom"] = {"lineWidth": 2, "fillOpacity": 10, "showPoints": "never", **custom}
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif instant:
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    return {
        "type": kind, "title": title, "description": text, "datasource": SOURCE, "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []}, "options": options,
        "gridPos": {"w": width, "h": height, "x": 0, "y": 0},
    }  # fmt: skip


def steps(*levels: tuple[float | None, str]) -> Json:
    """Give the colours of values: from each number on, the colour beside it."""
    return {"thresholds": {"mode": "absolute", "steps": [{"value": v, "color": c} for v, c in levels]}}


STACKED: Final = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40}
LOGARITHMIC: Final = {"scaleDistribution": {"type": "log", "log": 10}}
GOOD: Final = steps((None, "red"), (0.05, "orange"), (0.3, "green"))
BAD: Final = steps((None, "green"), (1, "red"))
FULL: Final = {"max": 1, "thresholds": {"mode": "absolute", "steps": [{"value": None, "color": "blue"}]}}
"""A cache is there to be full: no colour says that it should not be."""
DOCUMENTATION: Final = "https://example.org/kvbm-core/blob/main/docs"
"""As in pyproject.toml, which is not read here: Grafana's users have the file alone."""

_ASKED: Final = rate("hit_blocks", "tier"), rate("missed_blocks", "tier")

ROWS: Final[Sequence[tuple[str, Sequence[Json]]]] = [
    ("Is prefill being saved?", [
        panel("stat", "Prefill saved", "Share of the tokens that the engine's own cache had not.",
              "percentunit",
              (f"{total('saved_tokens', labels=ENGINE)} / {total('asked_tokens', labels=ENGINE)}", "saved"),
              width=4, defaults={"max": 1, **GOOD}),
        panel("stat", "Tokens not computed", "Loaded instead, in the time shown.", "short",
              (total("saved_tokens", labels=ENGINE), "tokens"), width=4),
        panel("timeseries", "Prompt tokens asked for and saved", "What lies between the lines was computed.",
              "short", (rate("asked_tokens", labels=ENGINE), "asked for, a second"),
              (rate("saved_tokens", labels=ENGINE), "saved, a second")),
        panel("timeseries", "Time to first token", "As vLLM measures it; only on vLLM's own /metrics.", "s",
              (quantile(0.5, "vllm:time_to_first_token_seconds"), "median"),
              (quantile(0.95, "vllm:time_to_first_token_seconds"), "95 %")),
    ]),
    ("Which tier serves?", [
        panel("timeseries", "Tokens saved by tier", "A second.", "short",
              (rate("saved_tokens", "tier"), "{{tier}}"), width=6, **STACKED),
        panel("timeseries", "Found, of what reaches a tier",
              "A tier is asked for what the engine's own cache and the tiers above have not.", "percentunit",
              (f"{_ASKED[0]} / ({_ASKED[0]} + {_ASKED[1]})", "{{tier}}"),
              width=6, defaults={"max": 1}),
        panel("bargauge", "Loads of each stored block",
              "Below one, a tier writes more than it gives back. Over the time shown.", "none",
              (f"{total('loaded_blocks', 'tier')} / ({total('stored_blocks', 'tier')} > 0)", "{{tier}}"),
              width=6, defaults=steps((None, "orange"), (1, "green"))),
        panel("timeseries", "Found, and computed all the same",
              "Blocks a second that were expected to load more slowly than they are computed.", "short",
              (rate("declined_blocks", "tier"), "{{tier}}"), width=6),
    ]),
    ("How full?", [
        panel("bargauge", "Used", "Of the tiers that have a limit.", "percentunit",
              (f"{gauge('tier_used_bytes')} / {gauge('tier_capacity_bytes')}", "{{tier}}"),
              width=4, defaults=FULL),
        panel("timeseries", "Bytes of blocks", "Over all ranks.", "bytes",
              (gauge("tier_used_bytes"), "{{tier}}"),
               (gauge("tier_capacity_now_bytes"), "{{tier}} capacity")),
        panel("timeseries", "Blocks stored and evicted",
              "A full tier evicts as much as it stores. That is no harm while it also serves.", "short",
              (rate("stored_blocks", "tier"), "{{tier}} stored"),
              (rate("evicted_blocks", "tier"), "{{tier}} evicted"), width=6),
        panel("timeseries", "Bytes moved between tiers", "Beside what comes from the engine. A source is a "
              "position in the stack, 0 the fastest.", "Bps",
              (rate("filled_bytes", "source, tier, reason"), "{{source}} to {{tier}} {{reason}}"), width=6),
        panel("timeseries", "Blocks waiting", "On their way, or waiting for it.", "short",
              (gauge("queued_blocks", "tier, operation"), "{{tier}} {{operation}}"), width=6),
    ]),
    ("Who has what?", [
        panel("timeseries", "Bytes of tenants", "Over all ranks; a quota is a bound and a promise.", "bytes",
              (gauge("tenant_used_bytes", "tenant, tier"), "{{tenant}} {{tier}}"),
              (gauge("tenant_quota_bytes", "tenant, tier"), "{{tenant}} {{tier}} quota"), width=6),
        panel("timeseries", "Bytes kept", "For requests that have asked for it, over all ranks.", "bytes",
              (gauge("kept_bytes"), "{{tier}}"), width=6),
        panel("timeseries", "Hints", "Of requests that ended, a second, by their answers.", "short",
              (rate("hints", "hint, answer", ENGINE), "{{hint}} {{answer}}"), width=6),
        panel("timeseries", "Read ahead", "Into host memory, for requests that waited; a source is a "
              "position in the stack.", "Bps",
              (rate("filled_bytes", "source", f'{ENGINE}, reason="prefetch"'), "from {{source}}"), width=6),
    ]),
    ("How fast?", [
        panel("timeseries", "Time of a load", "Of the neighbouring blocks of one request, slowest rank.", "s",
              (operation(0.5, "load"), "{{tier}} median"), (operation(0.95, "load"), "{{tier}} 95 %"),
              width=6, defaults={"min": 0.001}, **LOGARITHMIC),
        panel("timeseries", "Time of a store", "Nobody waits for one.", "s",
              (operation(0.5, "store"), "{{tier}} median"), (operation(0.95, "store"), "{{tier}} 95 %"),
              width=6, defaults={"min": 0.001}, **LOGARITHMIC),
        panel("timeseries", "Bytes loaded and stored", "By tier, over all ranks.", "Bps",
              (rate("loaded_bytes", "tier"), "{{tier}} loaded"),
              (rate("stored_bytes", "tier"), "{{tier}} stored"), width=6),
        panel("timeseries", "Device copies",
              "Between the engine's memory and host memory; on a GPU, what was measured at the start.", "Bps",
              (rate("device_copied_bytes", "direction", ENGINE), "{{direction}}"),
              (f'min by (instance, direction) '
               f'(vllm:kvbm_device_copy_bytes_per_second{{{ENGINE}, chosen="yes"}})',
               "{{instance}} {{direction}} can be"), width=6),
    ]),
    ("What fails?", [
        panel("state-timeline", "Tiers in use", "By server. After failures a tier is left alone.", "none",
              (gauge("tier_usable", "instance, engine, tier", how="min"), "{{instance}} {{engine}} {{tier}}"),
              width=6, defaults={"max": 1, **steps((None, "red"), (1, "green")), "mappings": [
                  {"type": "value", "options": {"0": {"text": "left alone", "index": 0},
                                                "1": {"text": "in use", "index": 1}}}]}),
        panel("state-timeline", "Left alone for",
              "The operation that failed last, and why. The server's log has the medium's own words.", "none",
              (gauge("tier_left_alone", "instance, engine, tier, operation, reason", how="max") + " > 0",
               "{{instance}} {{engine}} {{tier}} {{operation}} {{reason}}"),
              width=6, defaults={"max": 1, **steps((None, "red")), "mappings": [
                  {"type": "value", "options": {"1": {"text": "left alone", "index": 0}}}]}),
        panel("timeseries", "Transfers that failed", "Blocks a second. Each was computed, or is not stored.",
              "short", (rate("failed_transfers", "tier, reason"), "{{tier}} {{reason}}"), width=6),
        panel("timeseries", "Blocks dropped", "Not even tried to be stored, a second.", "short",
              (rate("dropped_blocks", "tier, reason"), "{{tier}} {{reason}}"), width=6),
        panel("stat", "Damaged blocks", "Found by their checksum and not used.", "short",
              (total("failed_transfers", labels=f'{TIER}, reason="corrupt"'), "blocks"),
              height=4, defaults=BAD),
        panel("stat", "Deadlines missed", "Blocks that came too late, or never.", "short",
              (total("failed_transfers", labels=f'{TIER}, reason="deadline"'), "blocks"),
              height=4, defaults=BAD),
        panel("stat", "Device staging full", "Blocks not stored because of it.", "short",
              (total("device_staging_full_blocks", labels=ENGINE), "blocks"), height=4, defaults=BAD),
    ]),
]  # fmt: skip


def alerts() -> Json:
    """Mark on every panel when one of our alerts fired."""
    return {
        "name": "Alerts", "datasource": SOURCE, "enable": True, "hide": False, "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Kvbm.*", alertstate="firing", job=~"$job", instance=~"$instance"}',
    }  # fmt: skip


def link(title: str, page: str) -> Json:
    """Lead to a page of the documentation."""
    return {
        "type": "link", "title": title, "url": f"{DOCUMENTATION}/{page}", "icon": "doc", "tooltip": "",
        "tags": [], "asDropdown": False, "targetBlank": True, "includeVars": False, "keepTime": False,
    }  # fmt: skip


def variable(name: str, label: str, query: str) -> Json:
    """Describe a variable whose values Prometheus knows."""
    return {
        "type": "query", "name": name, "label": label, "datasource": SOURCE,
        "query": {"query": query, "refId": name}, "refresh": 2, "multi": True, "includeAll": True,
        "allValue": ".*", "current": {"text": "All", "value": "$__all"}, "sort": 1,
    }  # fmt: skip


def place(rows: Sequence[tuple[str, Sequence[Json]]]) -> list[Json]:
    """Put the panels of each row side by side, and the rows below each other."""
    placed: list[Json] = []
    y = 0
    for title, panels in rows:
        placed.append(
            {"type": "row", "title": title, "collapsed": False, "panels": [],
             "gridPos": {"w": COLUMNS, "h": 1, "x": 0, "y": y}}
        )  # fmt: skip
        x, y = 0, y + 1
        for each in panels:
            if x + each["gridPos"]["w"] > COLUMNS:
                x, y = 0, y + placed[-1]["gridPos"]["h"]
            placed.append({**each, "gridPos": {**each["gridPos"], "x": x, "y": y}})
            x += each["gridPos"]["w"]
        y += placed[-1]["gridPos"]["h"]
    return [{**each, "id": number} for number, each in enumerate(placed, 1)]


def dashboard() -> Json:
    """Describe the dashboard."""
    values = "label_values(vllm:kvbm_tier_used_bytes{%s}, %s)"
    source = {
        "type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus",
        "multi": False, "includeAll": False, "refresh": 1,
    }  # fmt: skip
    variables = [
        source,
        variable("job", "Job", values % ("", "job")),
        variable("instance", "Server", values % ('job=~"$job"', "instance")),
        variable("model_name", "Model", values % ('job=~"$job", instance=~"$instance"', "model_name")),
        variable(
            "engine", "Engine",
            values % ('job=~"$job", instance=~"$instance", model_name=~"$model_name"', "engine"),
        ),
        variable("tier", "Tier", values % (ENGINE, "tier")),
    ]  # fmt: skip
    return {
        "annotations": {"list": [alerts()]},
        "links": [
            link("What each alert asks for", "how-to/runbook.md"), link("Metrics", "reference/metrics.md")
        ],
        "uid": "kvbm", "title": "KV cache tiers", "tags": ["kvbm", "vllm"], "schemaVersion": 39,
        "description": "Is prefill being saved, which tier serves, how full, how fast, what fails.",
        "timezone": "browser", "editable": True, "graphTooltip": 1, "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"}, "templating": {"list": variables}, "panels": place(ROWS),
    }  # fmt: skip


def main() -> int:
    """Write the file, or compare it."""
    text = json.dumps(dashboard(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        return int(not TARGET.is_file() or TARGET.read_text() != text)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
