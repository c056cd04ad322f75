"""The eviction policies of kvbm_eviction: the suite of policies, and what is their own."""

from kvbm_core.testing.policy_suite import PolicySuite


class TestAdaptive(PolicySuite):
    policy = "adaptive"


class TestS3Fifo(PolicySuite):
    policy = "s3fifo"
