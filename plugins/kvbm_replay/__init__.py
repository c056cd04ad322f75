"""Replays traces of requests through the real planner: what a stack would hit, write and evict."""

from kvbm_replay.generators import generate
from kvbm_replay.trace import Course, Keys, Request, Trace

__all__ = ["Course", "Keys", "Request", "Trace", "generate"]
