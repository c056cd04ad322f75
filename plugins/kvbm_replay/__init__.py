"""Replays traces of requests through the real planner: what a stack would hit, write and evict."""

from kvbm_replay.generators import generate
from kvbm_replay.trace import Keys, Request, Trace

__all__ = ["Keys", "Request", "Trace", "generate"]
