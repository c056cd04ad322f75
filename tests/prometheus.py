"""A real Prometheus for tests, on a free loopback port, its data in a temporary directory."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import services

DEPLOY = services.DEPLOY
_READY_WAIT_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def program(name: str) -> str:
    """The path of ``prometheus`` or ``promtool``; where there is none the test is skipped."""
    found = services.find(name)
    if found is None:
        pytest.skip(f"SERVER MISSING: no {name!r}; run `python3 tools/services.py fetch`")
    return str(found)


class Prometheus:
    """Scrapes each of `targets`, a port by its job's name, several times a second."""

    def __init__(self, folder: Path, targets: dict[str, int], rules: Path | None = None) -> None:
        self._folder = folder
        self._port = free_port()
        # As it is shipped, but for what is scraped and how often.
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        [shipped] = config["scrape_configs"]
        config |= {
            "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(rules)] if rules else [],
            "scrape_configs": [
                {**shipped, "job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
                for job, port in targets.items()
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._command = [
            program("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
            f"--web.listen-address=127.0.0.1:{self._port}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.console.templates={folder}", f"--web.console.libraries={folder}",
        ]  # fmt: skip

    def __enter__(self) -> Self:
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        give_up_s = time.monotonic() + _READY_WAIT_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > give_up_s:
                self.__exit__()
                raise RuntimeError((self._folder / "log").read_text()[-2000:])
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def query(self, expr: str) -> dict[tuple[str, ...], float]:
        """Values now, by the labels' values in order of their names, without the target's and the name."""
        return {_labels(each["metric"]): float(each["value"][1]) for each in self.get("query", query=expr)}

    def series(self, expr: str, start_s: float, end_s: float, step_s: float) -> list[dict[str, Any]]:
        """What a panel draws: for each series its labels and ``[time, value]`` pairs."""
        return self.get("query_range", query=expr, start=start_s, end=end_s, step=step_s)["result"]

    def types(self, job: str) -> dict[str, str]:
        """The types of all metrics of a job, by name. OpenMetrics leaves suffixes out.

        The times at which series began, which the library adds by itself, are left out.
        """
        data = self.get("targets/metadata", match_target=f'{{job="{job}"}}')
        return {
            each["metric"].removesuffix("_total") + ("_total" if each["type"] == "counter" else ""): each[
                "type"
            ]
            for each in data
            if not each["metric"].endswith("_created")
        }

    def get(self, path: str, **parameters: object) -> Any:
        """Ask its API; of an instant query only the result."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                data = json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error
        return data["result"] if path == "query" else data

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=1):
                return True
        except OSError:
            return False


def panels() -> list[dict[str, Any]]:
    """The panels of the dashboard as it is shipped."""
    return json.loads((DEPLOY / "grafana" / "dashboards" / "kvbm.json").read_text())["panels"]


def concrete(expr: str, rate_window: str, shown: str) -> str:
    """What Grafana makes of a query, with everything chosen."""
    expr = re.sub(r'=~"\$\w+"', '=~".*"', expr)
    return expr.replace("$__rate_interval", rate_window).replace("$__range", shown)


def _labels(metric: dict[str, str]) -> tuple[str, ...]:
    aside = {"__name__", "instance", "job", "engine", "model_name"}
    return tuple(value for name, value in sorted(metric.items()) if name not in aside)
