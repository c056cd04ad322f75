"""The suite of coordinators: what every coordinator must do.

    from kvbm_core.testing.coordinator_suite import CoordinatorSuite

    class TestConsul(CoordinatorSuite):
        coordinator = "consul"

        def settings(self, folder):
            return {"endpoint": "http://127.0.0.1:8500", "init_timeout_s": 60}

Run it with pytest. Each test is named for the line of `kvbm_core.Coordinator` that it proves; none can be
overridden, see `kvbm_core.testing.suite`. Who is registered is seen through the leader alone, by `gather`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest

from kvbm_core.coordinator import Coordinator, Member
from kvbm_core.errors import ConfigError, CoordinatorError
from kvbm_core.testing._hall import PAUSE_S, Hall, killed
from kvbm_core.testing._rig import PATIENCE_S
from kvbm_core.testing._watch import handles, returns
from kvbm_core.testing._whole import WholeSuite, insist_on_the_whole

__all__ = ["CoordinatorSuite"]

_MOST_LINES: Final = 10
_ALIKE: Final[dict[str, Any]] = {
    "world_size": 3,
    "shared_namespace": "bb" * 16,
    "stack": ("lmdb 1GiB",),
    "versions": {"kvbm-core": "9.9.9"},
}
"""What must be equal in all processes of an engine, and another value of each."""


class CoordinatorSuite(WholeSuite):
    """Subclass it, name a coordinator, give settings, and run pytest."""

    coordinator: ClassVar[Any]
    """The name of an entry point, or a static function that makes a `Coordinator` of settings."""
    forget_s: ClassVar[float] = 10.0
    """A process that was killed is listed no more after so many seconds: the time of a lease."""
    waivers: ClassVar[Mapping[str, str]] = {}
    """Tests that this coordinator cannot pass, and why. Each must fail, else the waiver is out of date."""
    members = frozenset({"coordinator", "settings", "hasty", "away", "forget_s", "waivers"})

    def settings(self, folder: Path) -> Mapping[str, Any]:
        """Give the keys beside ``backend``, as an operator would write them; `gather` waits for a minute.

        Args:
            folder: Of the test's own.
        """
        raise NotImplementedError("write a method `settings`")

    def hasty(self, folder: Path) -> Mapping[str, Any]:
        """Give settings with which `gather` gives up within a second or two; else the same."""
        raise NotImplementedError("write a method `hasty`")

    def away(self, folder: Path) -> AbstractContextManager[None]:
        """Have nobody reach the coordinator's server as long as the context lasts; it loses nothing."""
        raise NotImplementedError("write a method `away`")

    @pytest.fixture
    def hall(self, tmp_path: Path) -> Iterator[Hall]:
        """Give the test its coordinators, and close them."""
        insist_on_the_whole(type(self))
        folder = tmp_path / "hall"
        folder.mkdir()
        hall = Hall(self, folder)
        try:
            yield hall
        finally:
            hall.close()

    # Making one.

    def test_the_coordinator_is_what_the_core_expects(self, hall: Hall) -> None:
        """It is a `Coordinator`, and its state is one line at any time."""
        coordinator = hall.make()
        assert isinstance(coordinator, Coordinator)
        shown = [repr(coordinator)]
        coordinator.join(hall.member(0))
        shown.append(repr(coordinator))
        coordinator.close()
        shown.append(repr(coordinator))
        assert not [text for text in shown if "\n" in text or not text]

    def test_a_wrong_setting_is_refused_when_it_is_made(self, hall: Hall) -> None:
        """`ConfigError` for a key that there is not: before an engine loads its model."""
        with pytest.raises(ConfigError):
            hall.make(no_such_key=1)

    def test_making_one_connects_nowhere(self, hall: Hall) -> None:
        """It opens no file and starts no thread, and nobody need be there."""
        hall.make()
        before = handles()
        with self.away(hall.folder):
            for _ in range(5):
                hall.make()
            assert handles() <= before + 2, f"{handles() - before} files, sockets and threads more"

    # Who comes.

    def test_the_leader_gets_its_workers_by_rank(self, hall: Hall) -> None:
        """As they have described themselves, in whatever order they came."""
        leader = hall.join(None, 3)
        members = {rank: hall.member(rank, 3, metrics=f"http://host-{rank}:9") for rank in (2, 0, 1)}
        for member in members.values():
            hall.make().join(member)
        found = leader.gather()
        assert [worker.rank for worker in found] == [0, 1, 2]
        for worker, rank in zip(found, range(3), strict=True):
            for name in Member.__struct_fields__:
                assert getattr(worker, name) == getattr(members[rank], name), f"{name} of worker {rank}"

    def test_the_leader_waits_for_workers_that_come_late(self, hall: Hall) -> None:
        """It has begun to wait when the last one comes."""
        leader = hall.join(None)
        hall.join(1)
        with ThreadPoolExecutor(1) as pool:
            gathered = pool.submit(leader.gather)
            time.sleep(PAUSE_S)
            hall.join(0)
            assert [worker.rank for worker in gathered.result(PATIENCE_S)] == [0, 1]

    def test_an_engine_may_have_any_name(self, hall: Hall) -> None:
        """With separators, dots, spaces, letters of all kinds; and one name may begin with another."""
        base = hall.name("e")
        names = [
            base,
            f"{base}/0",
            f"{base}/leader",
            f"../{base}",
            f"{base} %2F é☃",
            f"{base}x",
            "." * 2 + base,
        ]
        leaders = [hall.join(None, 1, engine=name) for name in names]
        workers = [hall.member(0, 1, engine=name) for name in names]
        for worker in workers:
            hall.make().join(worker)
        for leader, worker in zip(leaders, workers, strict=True):
            assert [each.pid for each in leader.gather()] == [worker.pid], f"engine {worker.engine!r}"

    def test_gather_may_be_called_again(self, hall: Hall) -> None:
        """And says the same."""
        leader = hall.join(None, 1)
        hall.join(0, 1)
        assert list(leader.gather()) == list(leader.gather())

    # Who does not.

    def test_workers_that_do_not_come_are_named(self, hall: Hall) -> None:
        """By their ranks; and the error says who came."""
        leader = hall.join(None, 5, hasty=True)
        for rank in (0, 4):
            hall.join(rank, 5)
        with pytest.raises(CoordinatorError) as raised:
            leader.gather()
        text = str(raised.value)
        assert all(re.search(rf"\b{rank}\b", text) for rank in (1, 2, 3)), text
        assert "host-4" in text, f"it does not say who came: {text}"

    def test_what_differs_is_named_with_both_values(self, hall: Hall) -> None:
        """What must be equal in all processes of an engine: of two workers, or of the leader and a worker."""
        for name, other in _ALIKE.items():
            hall.engine = hall.name("differs")
            leader = hall.join(None, hasty=True)
            hall.join(0)
            hall.join(1, **{name: other})
            with pytest.raises(CoordinatorError) as raised:
                leader.gather()
            text = str(raised.value)
            shown = next(iter(other.values())) if isinstance(other, dict) else other
            shown = shown[0] if isinstance(shown, tuple) else str(shown)
            assert name in text, f"{name} is not named: {text}"
            assert shown in text, f"the other value is not named: {text}"

    def test_a_second_process_in_a_place_is_refused_and_the_first_stays(self, hall: Hall) -> None:
        """Also when the second has been closed; a leader as well as a worker."""
        leader = hall.join(None, 1)
        hall.join(0, 1)
        second = {rank: hall.make(hasty=True) for rank in (0, None)}
        with ThreadPoolExecutor(2) as pool:  # Each waits until the lease of a dead one would end.
            joins = [
                pool.submit(each.join, hall.member(rank, 1, host="the-second"))
                for rank, each in second.items()
            ]
            refused = [isinstance(join.exception(), CoordinatorError) for join in joins]
        assert refused == [True, True], "worker and leader, refused or not"
        for each in second.values():
            each.close()
        assert [worker.host for worker in leader.gather()] == ["host-0"]

    # Until it ends.

    def test_who_closes_is_listed_no_more_and_the_place_is_free(self, hall: Hall) -> None:
        """At once: an engine is started again."""
        leader = hall.join(None, 1, hasty=True)
        worker = hall.join(0, 1)
        assert len(leader.gather()) == 1
        worker.close()
        with pytest.raises(CoordinatorError):
            leader.gather()
        hall.join(0, 1, host="the-next")
        assert [each.host for each in leader.gather()] == ["the-next"]

    def test_who_lives_stays_listed(self, hall: Hall) -> None:
        """For longer than a dead process would."""
        leader = hall.join(None, 1)
        hall.join(0, 1)
        time.sleep(1.5 * self.forget_s)
        hall.until_listed(leader)

    def test_who_is_killed_is_listed_no_more_after_a_while(self, hall: Hall) -> None:
        """And another process may take its place."""
        leader = hall.join(None, 1, hasty=True)
        killed(self.coordinator, self.settings(hall.folder), hall.member(0, 1, host="the-dead"))
        give_up_s = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(CoordinatorError):
                hall.join(0, 1, host="the-next")
                break
            assert time.monotonic() < give_up_s, "the place of a dead process is never free"
        hall.until_listed(leader)
        assert [each.host for each in leader.gather()] == ["the-next"]

    def test_close_may_be_called_twice_and_without_join(self, hall: Hall) -> None:
        """And from another thread than the others."""
        hall.make().close()
        coordinator = hall.join(0)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(coordinator.close).result(PATIENCE_S)
        coordinator.close()

    def test_close_lets_go_of_files_and_threads(self, hall: Hall) -> None:
        """Nothing grows with each process that was registered."""
        counts = []
        for _ in range(4):
            hall.join(0).close()
            counts.append(handles())
        give_up_s = time.monotonic() + PATIENCE_S
        while handles() >= counts[0] + 3:  # What it left to others ends soon.
            assert time.monotonic() < give_up_s, f"files, sockets and threads, one after the other: {counts}"
            time.sleep(PAUSE_S)

    # When it is away.

    def test_an_engine_starts_while_the_coordinator_is_away(self, hall: Hall) -> None:
        """`join` returns and `gather` is empty; neither raises. When it is back, all are registered."""
        with self.away(hall.folder):
            leader, worker = hall.make(), hall.make()

            def use() -> None:
                worker.join(hall.member(0, 1))
                leader.join(hall.member(None, 1))
                assert list(leader.gather()) == []

            returns(use, PATIENCE_S)
        hall.until_listed(leader)

    def test_who_is_registered_stays_so_over_an_absence(self, hall: Hall) -> None:
        """Or registers again by itself."""
        leader = hall.join(None, 1)
        hall.join(0, 1)
        with self.away(hall.folder):
            time.sleep(1.2 * self.forget_s)
        hall.until_listed(leader)

    def test_close_returns_while_the_coordinator_is_away(self, hall: Hall) -> None:
        """An engine that ends waits for nobody."""
        coordinator = hall.join(0)
        with self.away(hall.folder):
            returns(coordinator.close, PATIENCE_S)

    def test_an_absence_is_said_in_a_few_lines(self, hall: Hall) -> None:
        """Not once for each attempt; and it is said."""
        lines: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        try:
            with self.away(hall.folder):
                for rank in range(2):
                    hall.join(rank)
                time.sleep(max(0.5, 1.5 * self.forget_s))
        finally:
            logging.getLogger().removeHandler(handler)
        assert lines, "nobody is told"
        assert len(lines) <= 2 * _MOST_LINES, f"{len(lines)} lines, the last of them: {lines[-1]}"
