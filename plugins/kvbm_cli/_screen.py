"""What the user sees while the demo works: a spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from kvbm_core.printable import PROSE, printable

HEARTBEAT_S = 20.0
"""How often a log that nobody watches live is told that the demo still works."""
PLAIN_WIDTH = 120
"""Without a terminal there is no width to fit; rich would assume 80 and fold the table."""

Tick = Callable[[str], None]
"""Called with what is being done, several times a second."""


class Screen:
    """Write to one console. What a server says is among it, so nothing of it commands the terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = PLAIN_WIDTH

    def say(self, line: str) -> None:
        """Write lines; see `printable`."""
        self.console.print(Text(printable(line, PROSE)), soft_wrap=True)

    def heading(self, line: str) -> None:
        """Write the title of a part of the demo."""
        self.console.print()
        self.console.print(Text(line, style="bold"))

    @contextmanager
    def task(self, what: str) -> Iterator[Tick]:
        """Show that `what` is being done, and for how long, until the block is left."""
        started_s = time.monotonic()
        with self._spinner(what) if self.console.is_terminal else self._plain(what) as tick:
            yield tick
        self.console.print(Text(f"  {what}: {time.monotonic() - started_s:.1f} s", style="dim"))

    @contextmanager
    def chore(self, what: str) -> Iterator[None]:
        """Show on a terminal that `what` is being done while it is, and leave no line of it."""
        with self._spinner(what) if self.console.is_terminal else nullcontext():
            yield

    @contextmanager
    def answer(self) -> Iterator[Tick]:
        """Give a function that shows an answer piece by piece; a spinner until the first one."""
        with ExitStack() as waiting:
            if self.console.is_terminal:
                waiting.enter_context(self._spinner("Waiting for the first token"))

            def show(piece: str) -> None:
                waiting.close()
                self.console.print(Text(printable(piece, PROSE), style="cyan"), end="", soft_wrap=True)

            yield show
        self.console.print()

    @contextmanager
    def _spinner(self, what: str) -> Iterator[Tick]:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=None)
            yield lambda text: progress.update(task, description=text)

    @contextmanager
    def _plain(self, what: str) -> Iterator[Tick]:
        self.say(f"  {what} ...")
        started_s = time.monotonic()
        next_s = started_s + HEARTBEAT_S

        def tick(text: str) -> None:
            nonlocal next_s
            now_s = time.monotonic()
            if now_s >= next_s:
                next_s = now_s + HEARTBEAT_S
                self.say(f"  {text} ... {now_s - started_s:.0f} s")

        yield tick
