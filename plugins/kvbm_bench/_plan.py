"""What is asked of a server: how many users, how much text, and who asks when."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """The load of one run. Two runs with the same plan send the same text at the same times.

        user 1  |1-----|2-----|3-----|           gap = users / qps, from one request to the next
        user 2    |1-----|2-----|3-----|         users begin 1 / qps apart, so that from
        user 3      |1-----|2-----|3-----|       the start 1 / qps lies between two requests

    A user whose answer takes longer than the gap asks again as soon as it is there, never before.
    """

    users: int
    rounds: int
    qps: float
    system_tokens: int
    """Of text at the start of every prompt, the same for all."""
    history_tokens: int
    """Of text behind it, another for each user."""
    answer_tokens: int
    """At most; exactly with `exact`."""
    exact: bool = False
    """Ask for answers that do not end early (`ignore_eos`, which vLLM, SGLang and TensorRT-LLM know)."""
    duration_s: float | None = None
    """So long a user who has finished is replaced by a new one; None for one conversation each."""
    seed: int = 0

    @property
    def gap_s(self) -> float:
        """Between two requests of one user."""
        return self.users / self.qps

    def first_s(self, place: int) -> float:
        """When the user in a place, counted from 0, first asks, from the start of the run."""
        return place / self.qps

    def rounds_of(self, place: int, *, first: bool) -> int:
        """How long the conversation of the user in a place is.

        With a duration the first ones are of all lengths, so that users leave one after the other.
        """
        if self.duration_s is None or not first:
            return self.rounds
        return -(-self.rounds * (place + 1) // self.users)

    @property
    def requests(self) -> int | None:
        """Of the whole run; None where the time decides."""
        return self.users * self.rounds if self.duration_s is None else None
