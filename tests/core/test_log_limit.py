"""One line for each key a minute, and a count of what was left out."""

import logging
import threading

import pytest

from kvbm_core.log_limit import LogLimit, TierLog


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limit(clock):
    return LogLimit(logging.getLogger("kvbm_core"), 60.0, clock)


def test_the_first_line_is_written_at_once_and_repeats_are_counted_with_the_next(limit, clock, caplog):
    for _ in range(313):
        limit.error(("disk", "store", "full"), "tier %s: %s", "disk", "no space")
    assert caplog.messages == ["tier disk: no space"]
    clock.now_s += 60
    limit.error(("disk", "store", "full"), "tier %s: %s", "disk", "no space")
    assert caplog.messages[1:] == ["tier disk: no space (and 312 more in the last 60 s)"]
    clock.now_s += 61
    limit.error(("disk", "store", "full"), "tier %s: %s", "disk", "no space")
    assert caplog.messages[2:] == ["tier disk: no space"]


def test_each_key_has_its_own_line_and_a_level(limit, caplog):
    limit.error("a", "first")
    limit.warning("b", "second")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("ERROR", "first"),
        ("WARNING", "second"),
    ]
    assert {record.filename for record in caplog.records} == {"test_log_limit.py"}


def test_what_no_line_has_followed_is_said_at_close_and_only_once(limit, clock, caplog):
    limit.warning("a", "the disk is 100 %")
    limit.warning("a", "the disk is 100 %")
    limit.warning("b", "alone")
    clock.now_s += 5
    limit.close()
    limit.close()
    assert caplog.messages == ["the disk is 100 %", "alone", "1 more in the last 5 s of: the disk is 100 %"]


def test_the_keys_remembered_are_bounded_and_none_is_lost_unsaid(limit, caplog):
    limit.error(0, "line %d", 0)
    limit.error(0, "line %d", 0)
    for key in range(1, 1000):
        limit.error(key, "line %d", key)
    assert repr(limit) == "<LogLimit 256 keys, 0 lines left out>"
    assert caplog.messages.count("1 more in the last 0 s of: line 0") == 1


def test_threads_write_one_line_together(limit, clock, caplog):
    start = threading.Barrier(8)

    def storm():
        start.wait()
        for _ in range(500):
            limit.error("disk", "fails")

    threads = [threading.Thread(target=storm) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.now_s += 60
    limit.error("disk", "fails")
    assert caplog.messages == ["fails", "fails (and 3999 more in the last 60 s)"]


def test_a_tiers_lines_begin_with_its_name_and_come_from_where_they_are_written(clock, caplog):
    log = TierLog("kvbm_core", "100 %s")
    log.warning("%d of %d", 1, 2)
    log.error("no arguments")
    LogLimit(log, 60.0, clock).error("key", "limited: %s", "full")
    TierLog("kvbm_core").warning("%s", "of no tier")
    assert caplog.messages == [
        "tier 100 %s: 1 of 2", "tier 100 %s: no arguments", "tier 100 %s: limited: full", "of no tier",
    ]  # fmt: skip
    assert {record.filename for record in caplog.records} == {"test_log_limit.py"}
