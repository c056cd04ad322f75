"""Opens a tier's files anew after they were taken away, in a thread of its own."""

from __future__ import annotations

import threading
from typing import Final

from kvbm_core.errors import TierError
from kvbm_core.tier import TierContext
from kvbm_gds._config import GdsConfig
from kvbm_gds._engines import Engines
from kvbm_gds._layout import Entry, Sizing
from kvbm_gds._slab import Slab

__all__ = ["Reopening"]

_WAIT_S: Final = 10.0
"""For engines without work to end."""


class Reopening:
    """One try to let go of the old files and to open, or make, new ones.

    Args:
        config: The tier's settings.
        context: As the tier was opened with.
        sizing: Of the files.
        old: Engines and files as they were; nothing is in flight.
    """

    def __init__(
        self, config: GdsConfig, context: TierContext, sizing: Sizing, old: tuple[Engines, Slab]
    ) -> None:
        self.opened: tuple[Slab, Engines, list[Entry]] | None = None
        """What there is now; None if it did not work."""
        self.error = ""
        self._config = config
        self._context = context
        self._sizing = sizing
        self._engines, self._slab = old
        self._thread = threading.Thread(target=self._run, name="kvbm-gds-reopen", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return not self._thread.is_alive()

    def close(self, wait_s: float) -> None:
        """Wait, and close what was opened. What hangs is left behind."""
        self._thread.join(wait_s)
        if self.opened is not None:
            slab, engines, _ = self.opened
            slab.close(files=engines.close(wait_s))

    def _run(self) -> None:
        try:
            if not self._engines.close(_WAIT_S):
                self.error = "transfers to the old files go on"
                return
            self._slab.close()
            self.opened = self._open()
        except (TierError, OSError) as error:
            self.error = str(error)
        finally:
            self._context.wake()

    def _open(self) -> tuple[Slab, Engines, list[Entry]]:
        slab = Slab(self._config, self._context)
        try:
            engines = self._engines.again()
            try:
                entries = slab.open(self._sizing)
                engines.add_files(slab.fds, self._sizing)
                slab.keep_facts(starts_empty=False)
            except BaseException:
                engines.close(_WAIT_S)
                raise
        except BaseException:
            slab.close()
            raise
        return slab, engines, entries
