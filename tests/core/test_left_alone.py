"""What the log says when a tier is left alone, and when it works again."""

import re
import time

from test_mover import KEYS, NAMESPACE, Held, Offered, config, device

from kvbm_core import Completion, Outcome, Reason, Stack


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
        assert line.endswith(f"; it had failed since {since}")


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
