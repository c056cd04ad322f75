"""Coordinators that are wrong on purpose, each in one way, and the test of the suite that must find it."""

from __future__ import annotations

import os
import queue
import threading
import time
from urllib.parse import quote

import msgspec
from sound_coordinators import FolderCoordinator, check_alike

from kvbm_core.errors import CoordinatorError

__all__ = ["BROKEN"]

BROKEN = []
"""Each with the name of the test that must find it."""
_LEFT = []


def found_by(test):
    def add(made):
        BROKEN.append((made, test))
        return made

    return add


@found_by("test_the_coordinator_is_what_the_core_expects")
class ShowsLines(FolderCoordinator):
    """Shows its state in two lines."""

    def __repr__(self):
        return f"<{self.root}\n{self.member}>"


@found_by("test_the_coordinator_is_what_the_core_expects")
class IsNoCoordinator:
    """Only looks like one."""

    def __init__(self, settings):
        self.inner = FolderCoordinator(settings)
        self.join, self.gather, self.close = self.inner.join, self.inner.gather, self.inner.close


@found_by("test_a_wrong_setting_is_refused_when_it_is_made")
class TakesAnySetting(FolderCoordinator):
    """Takes what it knows of its settings, and nothing of the rest."""

    def __init__(self, settings):
        known = {"path", "init_timeout_s"}
        super().__init__({key: value for key, value in settings.items() if key in known})


@found_by("test_making_one_connects_nowhere")
class ConnectsAtOnce(FolderCoordinator):
    """Connects when it is made."""

    def __init__(self, settings):
        super().__init__(settings)
        os.listdir(self.root)


@found_by("test_making_one_connects_nowhere")
class StartsAtOnce(FolderCoordinator):
    """Starts its thread when it is made."""

    def __init__(self, settings):
        super().__init__(settings)
        threading.Thread(target=self.closing.wait, daemon=True).start()


@found_by("test_the_leader_gets_its_workers_by_rank")
class GivesThemAsTheyCame(FolderCoordinator):
    """Gives workers in the order in which they came."""

    def gather(self):
        return sorted(super().gather(), key=lambda worker: worker.pid)


@found_by("test_the_leader_gets_its_workers_by_rank")
class ForgetsMetrics(FolderCoordinator):
    """Leaves out what it does not need itself."""

    def written(self):
        return msgspec.json.encode(msgspec.structs.replace(self.member, metrics=""))


@found_by("test_the_leader_gets_its_workers_by_rank")
class CountsTheLeader(FolderCoordinator):
    """Gives the leader among its workers."""

    def gather(self):
        return [self.member, *super().gather()]


@found_by("test_the_leader_waits_for_workers_that_come_late")
class LooksOnce(FolderCoordinator):
    """Does not wait."""

    def gather(self):
        missing = self.member.world_size - len(self.workers())
        if missing:
            raise CoordinatorError(f"{missing} did not come")
        return self.workers()


@found_by("test_an_engine_may_have_any_name")
class TakesANameForAPath(FolderCoordinator):
    """Makes folders of an engine's name."""

    def folder(self, engine):
        return self.root / engine


@found_by("test_an_engine_may_have_any_name")
class LooksByPrefix(FolderCoordinator):
    """Takes engines whose names begin alike for one."""

    def workers(self):
        prefix = f"e-{quote(self.member.engine, safe='')}"
        places = [place for place in self.root.glob("*/*") if place.parent.name.startswith(prefix)]
        found = [self.read(place) for place in sorted(places) if place.name.isdecimal()]
        return [worker for worker in found if worker]


@found_by("test_an_engine_may_have_any_name")
class KnowsLettersOnly(FolderCoordinator):
    """Drops what is no letter from a name."""

    def folder(self, engine):
        return self.root / "".join(letter for letter in engine if letter.isalnum() and letter.isascii())


@found_by("test_gather_may_be_called_again")
class GathersOnce(FolderCoordinator):
    """Gives each worker once."""

    given = False

    def gather(self):
        found = () if self.given else super().gather()
        self.given = True
        return found


@found_by("test_workers_that_do_not_come_are_named")
class CountsTheMissing(FolderCoordinator):
    """Says how many did not come, and not who."""

    def absence(self, missing, workers):
        came = ", ".join(map(str, workers))
        return f"{len(missing)} of {self.member.world_size} workers did not come; {came} did"


@found_by("test_workers_that_do_not_come_are_named")
class GivesWhoCame(FolderCoordinator):
    """Gives those who came when it has waited long enough."""

    def gather(self):
        try:
            return super().gather()
        except CoordinatorError:
            return self.workers()


@found_by("test_workers_that_do_not_come_are_named")
class DoesNotSayWhoCame(FolderCoordinator):
    """Names those who did not come, and nobody else."""

    def absence(self, missing, workers):
        return f"ranks {sorted(missing)} did not come"


@found_by("test_what_differs_is_named_with_both_values")
class ComparesNothing(FolderCoordinator):
    """Takes whoever comes."""

    def workers(self):
        own = self.member
        return [
            msgspec.structs.replace(
                worker,
                world_size=own.world_size,
                shared_namespace="aa",
                stack=own.stack,
                versions=own.versions,
            )
            for worker in super().workers()
        ]


@found_by("test_what_differs_is_named_with_both_values")
class DoesNotCompareVersions(FolderCoordinator):
    """Compares all but the versions."""

    def workers(self):
        return [msgspec.structs.replace(each, versions=self.member.versions) for each in super().workers()]


@found_by("test_what_differs_is_named_with_both_values")
class SaysThatTheyDiffer(FolderCoordinator):
    """Does not say in what."""

    def gather(self):
        try:
            check_alike([self.member, *self.workers()])
        except CoordinatorError:
            raise CoordinatorError("the workers differ") from None
        return super().gather()


@found_by("test_a_second_process_in_a_place_is_refused_and_the_first_stays")
class LetsTheLastWin(FolderCoordinator):
    """Whoever comes later takes the place."""

    def claim(self):
        self.place(self.member).unlink(missing_ok=True)
        return super().claim()


@found_by("test_a_second_process_in_a_place_is_refused_and_the_first_stays")
class CleansUpAfterTheFirst(FolderCoordinator):
    """Who was refused deletes the other's entry when it is closed."""

    def join(self, member):
        try:
            super().join(member)
        except CoordinatorError:
            self.member = member
            raise

    def close(self):
        super().close()
        if self.member is not None:
            self.place(self.member).unlink(missing_ok=True)


@found_by("test_who_closes_is_listed_no_more_and_the_place_is_free")
class StaysListed(FolderCoordinator):
    """Leaves it to time that a process that was closed is listed no more."""

    def leave(self):
        _LEFT.append(self.fd)
        self.fd = None


@found_by("test_who_lives_stays_listed")
class IsForgottenAlive(FolderCoordinator):
    """Does not renew what ends after a while."""

    def stay(self):
        self.closing.wait(0.1)
        self.leave()


@found_by("test_who_is_killed_is_listed_no_more_after_a_while")
class RemembersTheDead(FolderCoordinator):
    """Takes a file for a process that lives."""

    def is_alive(self, fd):
        return True

    def claim(self):
        return not self.place(self.member).exists() and super().claim()


@found_by("test_close_may_be_called_twice_and_without_join")
class ClosesOnce(FolderCoordinator):
    """The second close raises."""

    def close(self):
        if self.closing.is_set():
            raise RuntimeError("closed already")
        super().close()


@found_by("test_close_may_be_called_twice_and_without_join")
class MustJoin(FolderCoordinator):
    """Cannot be closed before it has joined."""

    def close(self):
        if not self.closing.is_set():
            assert self.member is not None
        super().close()


@found_by("test_close_lets_go_of_files_and_threads")
class LeavesItsThread(FolderCoordinator):
    """Its thread goes on when it is closed."""

    def close(self):
        if not self.closing.is_set() and self.thread:
            threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
        super().close()


@found_by("test_close_lets_go_of_files_and_threads")
class LeavesItsFile(FolderCoordinator):
    """Opens a file for each process, and closes none."""

    def join(self, member):
        super().join(member)
        for _ in range(3):
            os.open(self.root, os.O_RDONLY)


@found_by("test_an_engine_starts_while_the_coordinator_is_away")
class RaisesWhenAway(FolderCoordinator):
    """No engine starts without it."""

    def join(self, member):
        if not self.root.exists():
            raise CoordinatorError("it is away", operation="join")
        super().join(member)


@found_by("test_an_engine_starts_while_the_coordinator_is_away")
class WaitsUntilItIsBack(FolderCoordinator):
    """`join` waits until somebody is there."""

    def join(self, member):
        while not self.root.exists():
            time.sleep(0.01)
        super().join(member)


@found_by("test_an_engine_starts_while_the_coordinator_is_away")
class TriesOnce(FolderCoordinator):
    """Does not go on trying."""

    def stay(self):
        """Do nothing."""


@found_by("test_an_engine_starts_while_the_coordinator_is_away")
class MissesAllWhenAway(FolderCoordinator):
    """Takes an absence for workers that did not come."""

    def gather(self):
        found = super().gather()
        if not found:
            raise CoordinatorError("nobody came", operation="gather")
        return found


@found_by("test_who_is_registered_stays_so_over_an_absence")
class GivesUpWhenAway(FolderCoordinator):
    """Is lost with the first absence."""

    def stay(self):
        while not self.closing.wait(0.01):
            if not self.root.exists():
                os.close(self.fd)
                self.fd = None
                return


@found_by("test_close_returns_while_the_coordinator_is_away")
class WaitsAtTheEnd(FolderCoordinator):
    """`close` waits until it can say goodbye."""

    def leave(self):
        if not self.root.exists():
            queue.SimpleQueue().get()
        super().leave()


@found_by("test_close_returns_while_the_coordinator_is_away")
class RaisesAtTheEnd(FolderCoordinator):
    """`close` raises where it cannot say goodbye."""

    def leave(self):
        self.place(self.member).unlink()
        super().leave()


@found_by("test_an_absence_is_said_in_a_few_lines")
class SaysEachAttempt(FolderCoordinator):
    """Writes a line for each attempt."""

    def claim(self):
        self.warned = False
        return super().claim()


@found_by("test_an_absence_is_said_in_a_few_lines")
class SaysNothing(FolderCoordinator):
    """Tells nobody that it is away."""

    def claim(self):
        self.warned = True
        return super().claim()
