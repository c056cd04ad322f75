"""Draws the dashboard's picture for the documentation, from a real Prometheus that scrapes a real server.

python tests/benchmarks/draw_dashboard.py docs/images/dashboard.png

`vllm serve` with SmolLM2 and three tiers answers conversations for some minutes. Then every query of every
panel is put to Prometheus, and drawn. In between the third tier, a real S3 server, stops answering for a
while. Needs matplotlib, the packages of the demo, and SeaweedFS.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from prometheus import Prometheus, concrete, free_port, panels
from servers import FaultProxy, S3Server

from kvbm_cli._engine import ServeSettings, find_engine, serve_command, serve_environment
from kvbm_cli._model import prepare_model
from kvbm_cli._server import Server

ROOT = Path(__file__).parents[2]
USERS, FIRST_WORDS, LONGEST_WORDS = 6, 600, 1100
COLOURS = ["#73BF69", "#5794F2", "#F2CC0C", "#FF9830", "#F2495C", "#B877D9", "#8AB8FF", "#FFB357", "#96D98D"]
STYLE = {
    "figure.facecolor": "#111217", "axes.facecolor": "#181b1f", "axes.edgecolor": "#2c3235",
    "text.color": "#ccccdc", "axes.labelcolor": "#ccccdc", "xtick.color": "#8e8e9b", "ytick.color": "#8e8e9b",
    "grid.color": "#2c3235", "axes.grid": True, "axes.axisbelow": True, "font.size": 7.5,
    "legend.frameon": False, "legend.fontsize": 6.5, "axes.titlesize": 8.5, "axes.titlelocation": "left",
}  # fmt: skip
NAMED = {"green": "#73BF69", "red": "#F2495C", "orange": "#FF9830"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, S3Server() as store, FaultProxy(store) as proxy:
        folder, port, own_port = Path(name), free_port(), free_port()
        os.environ.update(store.env, DYN_KVBM_METRICS="true", DYN_KVBM_METRICS_PORT=str(own_port))
        tiers = [
            {"backend": "cpu", "capacity": "96MiB"},
            {"backend": "lmdb", "capacity": "320MiB", "path": str(folder / "lmdb")},
            {"backend": "remote", "url": f"s3://{store.bucket}/kv", "timeout_s": 2,
             "storage_options": {"endpoint_url": proxy.endpoint}},
        ]  # fmt: skip
        settings, engine = ServeSettings(str(prepare_model()), port, tiers), find_engine()
        # Little memory of its own, so that the tiers have something to do.
        limits = ["--block-size=32", "--num-gpu-blocks-override=80", "--max-model-len=2048"]
        command = [*serve_command(settings, engine), *limits]
        url, environment = f"http://127.0.0.1:{port}", serve_environment(settings, engine, os.environ)
        with Server(command, environment, url, folder / "log") as server:
            server.wait_ready(lambda _: None)
            with Prometheus(folder, {"vllm": port}) as prometheus:
                start_s = time.time()
                talk(url, settings.model, 60 * options.minutes, proxy)
                time.sleep(1)
                print(*samples(port), sep="\n")
                assert samples(port) == samples(own_port), "the two ports disagree"
                draw(prometheus, start_s, time.time(), options.picture)


def samples(port):
    """Our samples on a port, whatever their order."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    return sorted(
        line for line in text.splitlines() if line.startswith("vllm:kvbm_") and "_created" not in line
    )


def talk(url, model, seconds, proxy):
    """Conversations that grow and begin anew; the store is silent from half of the time to three quarters."""
    words = (ROOT / "plugins/kvbm_cli/story.txt").read_text().split()
    end_s, silent = time.monotonic() + seconds, (0.5 * seconds, 0.72 * seconds)

    def user(number):
        rng, history = random.Random(number), []
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
            while time.monotonic() < end_s:
                if not history or len(history) > LONGEST_WORDS:
                    at = rng.randrange(len(words) - FIRST_WORDS)
                    history = [f"User {number}.", *words[at : at + FIRST_WORDS]]
                at = rng.randrange(len(words) - 60)
                history += words[at : at + 60]
                body = {"model": model, "prompt": " ".join(history), "max_tokens": 12, "temperature": 0}
                answer = http.post("/v1/completions", json=body).raise_for_status().json()
                history += answer["choices"][0]["text"].split()
                time.sleep(rng.random())

    users = [threading.Thread(target=user, args=(number,)) for number in range(USERS)]
    for thread in users:
        thread.start()
    for wait_s, mode in ((silent[0], "stall"), (silent[1] - silent[0], "pass")):
        time.sleep(wait_s)
        proxy.mode = mode
    for thread in users:
        thread.join()


def draw(prometheus, start_s, end_s, picture):
    shown = f"{int(end_s - start_s)}s"
    bottom = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels())
    mpl.use("agg")
    with mpl.rc_context(STYLE):
        figure = pyplot.figure(figsize=(15, bottom * 0.3))
        for panel in panels():
            place, title = panel["gridPos"], panel["title"]
            if panel["type"] == "row":
                y = 1 - (place["y"] + 0.85) / bottom
                figure.text(0.012, y, f"▾ {title}", fontsize=11, fontweight="bold")
                continue
            left, width, height = place["x"] / 24, place["w"] / 24, place["h"] / bottom
            low = 1 - place["y"] / bottom - height
            card = (left + 0.004, low + 0.1 / bottom), width - 0.008, height - 0.25 / bottom
            figure.add_artist(Rectangle(*card, facecolor="#181b1f", edgecolor="#2c3235", zorder=-1))
            axes = figure.add_axes([left + 0.039, low + 1.7 / bottom, width - 0.053, height - 3 / bottom])
            axes.set_title(title, pad=6)
            answers = []
            for target in panel["targets"]:
                expr = concrete(target["expr"], "15s", shown)
                if target["instant"]:
                    found = prometheus.get("query", query=expr)
                    found = [{**each, "values": [each["value"]]} for each in found]
                else:
                    found = prometheus.series(expr, start_s, end_s, 2)
                assert found, f"{title} has no data"
                answers += [(legend(target["legendFormat"], each["metric"]), points(each)) for each in found]
            DRAW[panel["type"]](axes, panel, answers, start_s)
        figure.savefig(picture, dpi=88)
    # A handful of colours: a third of the bytes.
    Image.open(picture).quantize(128).save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size:,} bytes")


def legend(template, metric):
    for name, value in metric.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


def points(series):
    return [(float(at), float(value)) for at, value in series["values"]]


def text_of(value, unit):
    if not math.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit in ("bytes", "Bps"):
        names, step = ["B", "KiB", "MiB", "GiB"], 1024
    else:
        names, step = ["", "k", "M", "G"], 1000
    at = 0
    while abs(value) >= step and at < 3:
        value, at = value / step, at + 1
    number = f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
    return f"{number} {names[at]}".strip() + ("/s" if unit == "Bps" else "")


def colour_of(panel, value):
    plain = {"steps": [{"value": None, "color": "green"}]}
    levels = panel["fieldConfig"]["defaults"].get("thresholds", plain)["steps"]
    passed = [level["color"] for level in levels if level["value"] is None or value >= level["value"]]
    return NAMED[passed[-1]]


def draw_lines(axes, panel, answers, start_s):
    defaults = panel["fieldConfig"]["defaults"]
    # What is always zero stands in the legend of Grafana, and would only fill this one.
    drawn = [a for a in answers if any(math.isfinite(v) and v for _, v in a[1])] or answers[:3]
    if defaults["custom"].get("stacking"):
        times = sorted({at for _, values in drawn for at, _ in values})
        stacks = [[dict(values).get(at, 0.0) for at in times] for _, values in drawn]
        minutes = [(at - start_s) / 60 for at in times]
        axes.stackplot(minutes, stacks, labels=[name for name, _ in drawn], colors=COLOURS, alpha=0.75)
    else:
        # One colour for what begins alike, a tier's name; another dash for what ends otherwise.
        heads = list(dict.fromkeys(name.split()[0] for name, _ in drawn))
        for name, values in drawn:
            minutes = [(at - start_s) / 60 for at, _ in values]
            colour = COLOURS[heads.index(name.split()[0]) % len(COLOURS)]
            alike = [n for n, _ in drawn if n.split()[0] == name.split()[0]]
            dash = ["-", "--", ":", "-."][alike.index(name) % 4]
            axes.plot(minutes, [v for _, v in values], dash, color=colour, label=name, linewidth=1.3)
    top = defaults.get("max")
    if "scaleDistribution" in defaults["custom"]:
        axes.set_yscale("log")
        axes.grid(which="minor", visible=False)
    else:
        axes.set_ylim(0, top * 1.03 if top else None)
    axes.margins(x=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: text_of(v, defaults["unit"])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f} min" if v == int(v) else ""))
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.48, -0.11),
        ncols=3 if panel["gridPos"]["w"] < 8 else 4,
        handlelength=1.2,
        columnspacing=1.2,
    )


def draw_number(axes, panel, answers, start_s):
    del start_s
    [(_, [(_, value)])] = answers
    axes.set_axis_off()
    text = text_of(value, panel["fieldConfig"]["defaults"]["unit"])
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=26, color=colour_of(panel, value))


def draw_bars(axes, panel, answers, start_s):
    del start_s
    defaults = panel["fieldConfig"]["defaults"]
    names, values = [name for name, _ in answers], [v[0][1] for _, v in answers]
    axes.barh(names, values, color=[colour_of(panel, v) for v in values], height=0.55)
    axes.set_xlim(0, 1.5 * (defaults.get("max") or max(values)))
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.grid(visible=False)
    for at, value in enumerate(values):
        axes.text(value, at, "  " + text_of(value, defaults["unit"]), va="center", fontsize=11)


def draw_states(axes, panel, answers, start_s):
    for at, (_, values) in enumerate(answers):
        for (begin, value), (end, _) in itertools.pairwise(values):
            minutes = (begin - start_s) / 60, (end - begin) / 60
            axes.broken_barh([minutes], (at - 0.3, 0.6), color=colour_of(panel, value), linewidth=0)
    axes.set_yticks(range(len(answers)), [name for name, _ in answers])
    axes.invert_yaxis()
    axes.margins(x=0)
    axes.grid(visible=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f} min" if v == int(v) else ""))


DRAW = {"timeseries": draw_lines, "stat": draw_number, "bargauge": draw_bars, "state-timeline": draw_states}


if __name__ == "__main__":
    main()
