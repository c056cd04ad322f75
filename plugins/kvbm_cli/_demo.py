"""The story of the demo: one long prompt, cold, then from memory, then from disk after a restart."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import httpx

from kvbm_cli._client import Client, Message
from kvbm_cli._demo_settings import DemoSettings
from kvbm_cli._engine import HOST, Engine, ServeSettings, find_engine, serve_command, serve_environment
from kvbm_cli._errors import DemoError
from kvbm_cli._model import is_prepared, prepare_model
from kvbm_cli._prose import farewell, introduction, own_name
from kvbm_cli._report import ANSWERS_DIFFER, Report, Run, make_table
from kvbm_cli._screen import Screen
from kvbm_cli._server import Server

QUESTION = "Who is Tova Lindqvist, and what did she keep in the salt cellar under the chapel?"
QUIET_S = 2.0
"""A counter that rests this long has arrived: the engine reports several times a second while it works."""
STORE_LIMIT_S = 60.0
COUNT_LIMIT_S = 10.0


def story_messages(prompt: str | None) -> list[Message]:
    """Return the long prompt: `prompt` as it stands, or the story with a question about it."""
    if prompt is not None:
        return [{"role": "user", "content": prompt}]
    story = resources.files("kvbm_cli").joinpath("story.txt").read_text(encoding="utf-8")
    return [
        {"role": "system", "content": "You answer questions about a story in two sentences."},
        {"role": "user", "content": f"{story}\nQuestion: {QUESTION}"},
    ]


def run_demo(settings: DemoSettings, screen: Screen) -> Report:
    """Run the demo and show its table.

    Returns:
        What was measured, and what it failed to show.

    Raises:
        DemoError: the server or the model failed; the message says what to change.
    """
    engine = find_engine()
    for line in introduction(settings, engine):
        screen.say(line)
    model = settings.model or _demo_model(screen)
    with _workspace(settings, screen) as folder:
        report = _Demo(settings, screen, engine, model, folder).run()
    _show(report, screen)
    screen.console.print()
    for line in farewell(own_name()):
        screen.say(line)
    return report


def _demo_model(screen: Screen) -> str:
    if is_prepared():
        return str(prepare_model())
    with screen.task("Preparing the demo's model") as tick:
        return str(prepare_model(tick))


@contextmanager
def _workspace(settings: DemoSettings, screen: Screen) -> Iterator[Path]:
    """Make the demo's folder, and remove it unless it is wanted or holds the log of a failure."""
    folder = Path(tempfile.mkdtemp(prefix="kvbm-demo-"))
    (folder / "lmdb").mkdir()
    kept = settings.keep
    try:
        yield folder
    except DemoError:
        kept = True
        if not settings.keep:
            shutil.rmtree(folder / "lmdb", ignore_errors=True)
        raise
    finally:
        if kept:
            screen.say(f"Files of this demo: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _show(report: Report, screen: Screen) -> None:
    screen.console.print()
    screen.console.print(make_table(report))
    if report.answers_differ():
        screen.say(ANSWERS_DIFFER)
    for problem in report.problems():
        screen.say(problem)


@dataclass(slots=True)
class _Demo:
    """Two lives of one server and three runs of one prompt."""

    settings: DemoSettings
    screen: Screen
    engine: Engine
    model: str
    folder: Path
    start_s: list[float] = field(default_factory=list)

    def run(self) -> Report:
        """Tell the whole story."""
        runs = [*self._first_life(), self._second_life()]
        return Report(runs, [tier["backend"] for tier in self._tiers()], self.model, self.start_s)

    def _first_life(self) -> Sequence[Run]:
        self.screen.heading("1. Cold: vLLM computes the whole prompt, and kvbm stores its blocks")
        with self._serving() as client:
            self._warm_up(client)
            cold = self._ask(client, "cold", None)
            self._wait_for_stores(client)
            self.screen.heading("2. vLLM's own prefix cache is emptied, and the same prompt is sent again")
            client.reset_prefix_cache()
            memory = self._ask(client, "host memory", "cpu")
            self._wait_for_stores(client)
        return [cold, memory]

    def _second_life(self) -> Run:
        self.screen.heading("3. vLLM was stopped; a new process with empty memory opens the same LMDB folder")
        with self._serving() as client:
            self._warm_up(client)
            return self._ask(client, "LMDB, new process", "lmdb")

    def _tiers(self) -> list[dict[str, str]]:
        path = self.settings.lmdb_path or self.folder / "lmdb"
        return [
            {"backend": "cpu", "capacity": self.settings.cpu_capacity},
            {"backend": "lmdb", "capacity": self.settings.lmdb_capacity, "path": str(path)},
        ]

    @contextmanager
    def _serving(self) -> Iterator[Client]:
        """Start the server, and stop it when the block is left."""
        serve = ServeSettings(self.model, self.settings.port, self._tiers())
        base_url = f"http://{HOST}:{serve.port}"
        log = self.folder / f"vllm-{len(self.start_s) + 1}.log"
        command = serve_command(serve, self.engine)
        environment = serve_environment(serve, self.engine, os.environ)
        started_s = time.monotonic()
        with Server(command, environment, base_url, log) as server, Client(base_url, self.model) as client:
            with self.screen.task(f"Starting {self.engine.distribution} {self.engine.version}") as tick:
                server.wait_ready(tick)
            self.start_s.append(time.monotonic() - started_s)
            try:
                yield client
            except httpx.HTTPError as error:
                raise server.failure(f"the connection to vLLM was lost ({error!r})") from error
            with self.screen.chore("Stopping vLLM"):
                server.stop()

    def _warm_up(self, client: Client) -> None:
        """Send another, short prompt: what a process does only once is not to be measured."""
        words = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Name three colours."},
        ]
        with self.screen.chore("Warming up with another prompt"):
            client.ask(words, max_tokens=8, on_text=lambda _: None)

    def _ask(self, client: Client, name: str, expected_tier: str | None) -> Run:
        before = client.counters()
        with self.screen.answer() as show:
            reply = client.ask(story_messages(self.settings.prompt), self.settings.max_tokens, show)
        after = client.settled_counters(QUIET_S, COUNT_LIMIT_S)
        self.screen.say(f"  First token after {reply.first_token_s:.2f} s")
        return Run(name, expected_tier, reply, after.since(before))

    def _wait_for_stores(self, client: Client) -> None:
        """Wait for what goes on after an answer: what has not reached the disk cannot survive the restart."""
        with self.screen.chore("Waiting until the blocks are stored"):
            client.settled_counters(QUIET_S, STORE_LIMIT_S, tier="lmdb")
