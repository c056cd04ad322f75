"""Keeps one process registered in etcd, whatever happens to etcd.

                 claimed                     key or lease gone, no answer
    STARTING ─────────────► LISTED ─────────────────────────────────────► ADRIFT
        │                     ▲                                            │  ▲
        │ no answer: ADRIFT   └──────────────── claimed ───────────────────┘  │
        └ key of another: TAKEN ── its lease ended: LISTED, or ADRIFT ────────┘

A thread renews the lease three times in its life and claims the key each time, which changes nothing
where the key is there. Each change of state, or of what etcd answers, is one line in the log, at most one of
a kind a minute.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from kvbm_core import Coordinator, CoordinatorError, Member, Probeable
from kvbm_core.log_limit import LogLimit
from kvbm_etcd._client import AwayError, Client, EtcdError, RefusedError
from kvbm_etcd._config import EtcdConfig, init_timeout_s, read_access
from kvbm_etcd._probe import probe
from kvbm_etcd._roll import Entry, check_alike, engine_prefix, missing_ranks, read_entries

__all__ = ["EtcdCoordinator"]

logger = logging.getLogger("kvbm_etcd")

_RETRY_S: Final = 1.0
"""Between attempts while it is not listed."""
_LOOK_S: Final = 0.2
"""Between looks for workers that have not come yet."""


class _State(enum.Enum):
    STARTING = "starting"
    LISTED = "listed"
    ADRIFT = "adrift"
    TAKEN = "taken"


class EtcdCoordinator(Coordinator, Probeable):
    """See `Coordinator`.

    Args:
        config: The settings.

    Raises:
        ConfigError: If they are wrong, or do not fit the environment.
    """

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        self._access = read_access(config)
        self._init_timeout_s = init_timeout_s(config)
        self._entry: Entry | None = None
        self._key = ""
        self._value = b""
        self._lease: int | None = None
        self._state = _State.STARTING
        self._error: EtcdError | None = None
        self._lines = LogLimit(logger)
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvbm-etcd", daemon=True)

    def __repr__(self) -> str:
        return f"<EtcdCoordinator {self._access} {self._key or 'not joined'}: {self._state.value}>"

    def join(self, member: Member) -> None:
        """Register, and stay registered until `close`. See `Coordinator.join`."""
        facts = {key: getattr(member, key) for key in member.__struct_fields__}
        if self._config.metrics_address:
            facts["metrics"] = self._config.metrics_address
        self._entry = Entry(**facts, instance=uuid.uuid4().hex, since=datetime.now(UTC))
        place = "leader" if member.rank is None else str(member.rank)
        self._key = engine_prefix(self._config.prefix, member.engine) + place
        self._value = msgspec.json.encode(self._entry)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._state is not _State.STARTING)
            # If the process there is dead, its lease ends.
            lease_end_s = 1.5 * self._config.lease_s + 1
            self._changed.wait_for(lambda: self._state is not _State.TAKEN, lease_end_s)
            state, error = self._state, self._error
        if state is _State.TAKEN or isinstance(error, RefusedError):
            self.close()
            raise CoordinatorError(self._said(state, error), operation="join")

    def probe(self) -> str:
        """Try etcd without joining. See `Probeable.probe`."""
        return probe(self._config, self._access)

    def gather(self) -> Sequence[Member]:
        """Wait for the engine's workers. See `Coordinator.gather`."""
        assert self._entry is not None, "join comes first"
        client = Client(self._access, self._config.timeout_s)
        try:
            return self._gather(client, self._entry)
        finally:
            client.close()

    def close(self) -> None:
        """Be listed no more. May be called twice."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _gather(self, client: Client, leader: Entry) -> Sequence[Member]:
        prefix = engine_prefix(self._config.prefix, leader.engine)
        answered_s = began_s = time.monotonic()
        while True:
            try:
                entries = read_entries(client.values(prefix))
            except EtcdError as error:
                if time.monotonic() > answered_s + 2 * self._config.timeout_s:
                    logger.warning("%s: the workers are not counted", self._said(_State.ADRIFT, error))
                    return ()
            else:
                answered_s = time.monotonic()
                workers = [entry for entry in entries if entry.rank is not None]
                # Read back like theirs, so that only what differs is different.
                check_alike([*read_entries({"": self._value}), *workers])
                missing = missing_ranks(workers, leader.world_size)
                if not missing:
                    return workers
                if answered_s > began_s + self._init_timeout_s:
                    raise CoordinatorError(self._absence(missing, workers), operation="gather")
            self._closing.wait(_LOOK_S)

    def _absence(self, missing: Sequence[int], workers: Sequence[Member]) -> str:
        assert self._entry is not None
        present = ", ".join(map(str, workers)) or "none"
        return (
            f"engine {self._entry.engine}: of {self._entry.world_size} workers, rank "
            f"{', '.join(map(str, missing))} did not register in etcd at {self._access} within "
            f"{self._init_timeout_s:g} s (init_timeout_s, or DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS); "
            f"registered: {present}. Look at the log of the missing ones, and whether they reach etcd"
        )

    # In the thread.

    def _run(self) -> None:
        client = Client(self._access, self._config.timeout_s)
        try:
            while not self._closing.is_set():
                self._closing.wait(self._tick(client))
        except Exception:  # The thread's top: a bug here must not hold up a start.
            logger.exception("a bug in kvbm_etcd")
            self._enter(_State.ADRIFT, EtcdError("a bug, see above; it is not tried again"))
        if self._state is _State.LISTED and self._lease is not None:
            try:
                client.revoke(self._lease)
            except EtcdError as error:
                logger.info("%s; the lease ends by itself", self._said(_State.ADRIFT, error))
        self._lines.close()
        client.close()

    def _tick(self, client: Client) -> float:
        """Be listed, if that is possible now, and say how long to wait."""
        try:
            if self._lease is None or not client.renew(self._lease):
                if self._state is _State.LISTED:
                    self._enter(_State.ADRIFT, AwayError("it has forgotten the lease"))
                self._lease = client.grant(self._config.lease_s)
            there = client.claim(self._key, self._value, self._lease)
        except EtcdError as error:
            self._enter(_State.ADRIFT, error)
            return _RETRY_S
        if there == self._value:
            self._enter(_State.LISTED)
            return self._config.lease_s / 3
        self._enter(_State.TAKEN, EtcdError(_owner(there)))
        return _RETRY_S

    def _enter(self, state: _State, error: EtcdError | None = None) -> None:
        kind = (state, type(error))
        if kind != (self._state, type(self._error)):
            self._say(kind, self._said(state, error))
        with self._changed:
            self._state, self._error = state, error
            self._changed.notify_all()

    def _say(self, kind: tuple[_State, type], text: str) -> None:
        now_s = time.monotonic()
        if kind[0] is not _State.LISTED:
            self._lines.lasts("not listed", now_s, "%s", text, cause=kind)
        elif self._state is _State.STARTING:
            logger.info("%s", text)
        else:
            self._lines.over("not listed", now_s, "%s; it did not %s", text, level=logging.INFO)

    def _said(self, state: _State, error: EtcdError | None) -> str:
        assert self._entry is not None
        who = f"{self._entry} of engine {self._entry.engine}"
        if state is _State.LISTED:
            return f"etcd at {self._access} lists {who}"
        if state is _State.TAKEN:
            return (
                f"etcd at {self._access} lists {error} in the place of {who}; give each engine an "
                "engine_id of its own, and start each rank once"
            )
        if isinstance(error, RefusedError):
            return (
                f"etcd at {self._access} refuses {who}: {error}; check ETCD_AUTH_USERNAME, "
                "ETCD_AUTH_PASSWORD, and the rights to the prefix"
            )
        return f"etcd at {self._access} does not list {who}: {error}; nothing waits for it"


def _owner(value: bytes) -> str:
    entries = read_entries({"": value})
    return str(entries[0]) if entries else "something else"
