"""What the log says when a tier is left alone, short of room or slow, and when it is so no more."""

import re
import time

from test_mover import KEYS, NAMESPACE, Held, Offered, config, device

from kvbm_core import Capabilities, Completion, Op, Outcome, Planner, Reason, Stack, TierStatus
from kvbm_core.leader.tier_news import TierNews


class Broken(Held):
    broken = True

    def _run(self, transfer):
        if self.broken:
            return Completion(
                transfer.ticket, Outcome.FAILED, Reason.ERROR, "[Errno 5] Input/output\nerror" + "x" * 999
            )
        return super()._run(transfer)


def test_the_line_has_the_mediums_words_and_the_wall_clock_and_another_says_that_it_works(
    caplog, monkeypatch
):
    registry = Offered(Broken)
    before = time.strftime("%Y-%m-%d %H:%M")
    with Stack.open(config("test"), device(), NAMESPACE, registry=registry) as stack:
        for at in range(3):
            stack.store(KEYS[at : at + 1], [at])
            stack.wait()
        [line] = [message for message in caplog.messages if "left alone" in message]
        assert "tier test0 fails (store: error)" in line
        assert "and is left alone, with 0 blocks: nothing is loaded or stored" in line
        assert "[Errno 5] Input/output error" in line
        assert len(line) < 400
        since, again = re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line)
        assert before <= since <= again
        registry.tiers[0].broken = False
        real, wall = time.monotonic, time.time
        monkeypatch.setattr(time, "monotonic", lambda: real() + 120)
        monkeypatch.setattr(time, "time", lambda: wall() + 120)
        for at in range(3, 5):
            stack.store(KEYS[at : at + 1], [at])
            stack.wait()
        # Of the engine, or of a rank that tries it beside the engine: whichever comes first.
        [line] = [message for message in caplog.messages if "works again" in message]
        assert line.startswith("tier test0 works again")
        assert re.search(f"; it had failed since {since}, for 12[0-9] s$|for 2 min$", line)


def test_what_a_tier_raises_is_named_in_the_line(caplog):
    class Raising(Held):
        def submit(self, transfers):
            raise OSError("no such device")

    with Stack.open(config("test"), device(), NAMESPACE, registry=Offered(Raising)) as stack:
        for at in range(3):
            stack.store(KEYS[at : at + 1], [at])
            stack.wait()
    [line] = [message for message in caplog.messages if "fails (store: error)" in message]
    assert "OSError in submit" in line


def news(monkeypatch):
    """Give a function that says things at a time, and the planner of which they are said."""
    made = Planner(
        [[TierStatus("disk", Capabilities(capacity_bytes=1 << 20), [], (4096,), (4096,))]], block_tokens=16
    )
    said = TierNews(made.tiers, 2, made.cost_model)
    monkeypatch.setattr(said._lines, "_clock", lambda: said.now_s)

    def say(now_s, method, *args, **more):
        said.now_s = now_s
        getattr(said, method)(*args, now_s, **more)

    return say, made


def numbers_out(lines):
    return [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "WHEN", line) for line in lines]


def test_a_tier_that_is_slow_is_said_to_be_and_said_to_be_no_more(monkeypatch, caplog):
    say, made = news(monkeypatch)
    model = made.cost_model
    say(0.0, "speeds")
    model.computed(1600, 1.0, 1.0)
    model.loaded(0, 10, 2.0, 2.0)
    for at in range(5):  # A line at the change, none after it.
        say(2.0 + at, "speeds")
    model.loaded(0, 4, 0.02, 92.0)  # A try of it.
    say(92.0, "speeds")
    assert numbers_out(caplog.messages) == [
        "tier disk loads more slowly than the engine computes (200 ms a block, computed 10 ms): its 0 "
        "blocks are computed where that is faster. It is tried again in 30 s at the soonest, and stored to "
        "meanwhile",
        "tier disk loads faster than the engine computes again (5 ms a block, computed 10 ms), with 0 "
        "blocks; it was slower since WHEN, for 90 s",
    ]


def test_a_tier_short_of_room_is_said_to_be_and_said_to_be_no_more(monkeypatch, caplog):
    say, made = news(monkeypatch)
    [tier] = made.tiers
    say(0.0, "full", tier, 4096, "No space left on device")
    say(300.0, "whole", tier)
    say(301.0, "whole", tier)
    assert numbers_out(caplog.messages) == [
        "tier disk: its medium is full at 8KiB of the 2MiB configured. Its oldest blocks make room for new "
        "ones from here on, and it grows when there is more: free space on it, or write a smaller capacity. "
        "It says: No space left on device.",
        "tier disk holds its whole capacity again, with 0 blocks; it held less since WHEN, for 5 min",
    ]


def test_a_tier_that_flaps_has_two_lines_a_minute_and_what_was_said_to_fail_is_said_to_work(
    monkeypatch, caplog
):
    say, made = news(monkeypatch)
    [tier] = made.tiers

    def fails(now_s, reason=Reason.ERROR):
        for _ in range(3):
            tier.breaker.note(Op.STORE, reason, now_s)
        say(now_s, "left_alone", tier, Op.STORE, reason, "")

    def works(now_s, **more):
        tier.breaker.close(now_s)
        say(now_s, "works", tier, **more)

    for at in range(60, 180):
        (works if at % 2 else fails)(float(at))
    kinds = ["works" if "works again" in line else "fails" for line in caplog.messages]
    assert kinds == ["fails", "works"] * 2
    assert "(and 29 more in the last 60 s)" in caplog.messages[2]
    # A rank has said already that it works; another cause is another line.
    caplog.clear()
    fails(500.0)
    works(501.0, is_said=True)
    fails(502.0, Reason.DEADLINE)
    works(503.0)
    assert [line.partition(" and ")[0] for line in caplog.messages] == [
        "tier disk fails (store: error)", "tier disk fails (store: deadline)", caplog.messages[2],
    ]  # fmt: skip
    assert caplog.messages[2].endswith(", for 1 s")
