"""What a connector needs of any engine: the leader's session and one rank's, in neutral terms.

    Session   in the leader: plans what is loaded and stored, over a `kvbm_core.Planner`
    Ledger    what the leader knows of requests, steps and blocks, with tiers or without
    Rank      in a worker: carries plans out, over a `kvbm_core.Worker`
    Progress  what a rank has yet to say, with tiers or without

An engine's connector translates its own values into these, and its own envelopes around them.
"""

from kvbm_engine._hints import Answers, refuse_all
from kvbm_engine._keys import BlockKeys, hash_tokens
from kvbm_engine._ledger import Ledger
from kvbm_engine._parked import Parked
from kvbm_engine._rank import Copies, CopyCounter, Progress, Rank
from kvbm_engine._recorder import Recorder, check_record
from kvbm_engine._session import Session
from kvbm_engine._spans import Spans, Watchers
from kvbm_engine._sparse import SparseStores, prompt_ends, sparse_stores
from kvbm_engine._storing import Storing
from kvbm_engine._values import EngineRequest, GroupBlocks, Limits, Outcome, Schedule, Scheduled, State, Step

__all__ = [
    "Answers",
    "BlockKeys",
    "Copies",
    "CopyCounter",
    "EngineRequest",
    "GroupBlocks",
    "Ledger",
    "Limits",
    "Outcome",
    "Parked",
    "Progress",
    "Rank",
    "Recorder",
    "Schedule",
    "Scheduled",
    "Session",
    "Spans",
    "SparseStores",
    "State",
    "Step",
    "Storing",
    "Watchers",
    "check_record",
    "hash_tokens",
    "prompt_ends",
    "refuse_all",
    "sparse_stores",
]
