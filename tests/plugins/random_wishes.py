"""What clients of a random engine ask for, and what must be answered."""

import random

VALUES = {
    "keep": [1e-3, 0.01, 1.0, 1e9, 0, -1, True, "long", None, float("nan")],
    "no_store": [True, True, False, 1, "yes"],
    "prefetch_only": [True, False, 0, []],
    "tenant": ["a", "a", "b", "c", "d", "", "default", "a|b", 5],
    "kepe": [5],
}


class Wishes:
    """Hints at random, and a configuration that takes some of them.

    Args:
        seed: Of the random choice. The engine's own choices do not depend on it.
    """

    def __init__(self, seed):
        self.chance = random.Random(f"{seed} wishes")
        self.given = {}

    def settings(self, tiers):
        """Make the configuration of hints, for these tiers."""
        chance = self.chance
        if len(tiers) > 1 and chance.random() < 0.7:
            # Else hardly anything is in the lower tier alone. 24 KiB is a block of the model's configuration.
            tiers[0]["capacity"] = max(24 << 10, tiers[0]["capacity"] // 3)
        made = {
            "prefetch_fraction": chance.choice((0, 0.25, 1, 1)),
            "keep_fraction": chance.choice((0, 0.25, 0.8)),
        }
        if chance.random() < 0.6:
            own = {tier["backend"]: tier["capacity"] for tier in tiers if tier["backend"] != "shared"}
            made["tenants"] = {
                name: {tier: max(1, int(capacity * share)) for tier, capacity in own.items()}
                for name, share in (("a", 0.4), ("b", 0.2), ("default", 0.2))
            }
        return made

    def of(self, name):
        """Choose the hints of a request; give what vLLM carries."""
        chance = self.chance
        if chance.random() < 0.4:
            return None
        hints = {
            hint: chance.choice(values) for hint, values in VALUES.items() if chance.random() < 0.4
        }  # fmt: skip
        self.given[name] = chance.choice([hints] * 9 + ["no mapping"])
        return {"kv_transfer_params": {"kvbm": self.given[name]}}

    def check(self, name, params):
        """Compare the answer with what was asked; give how many hints were answered."""
        hints = self.given.get(name)
        if hints is None:
            assert params is None
            return 0
        answers = params["kvbm"]
        assert answers.keys() == (hints.keys() if isinstance(hints, dict) else {"hints"}), (hints, answers)
        assert {each["answer"] for each in answers.values()} <= {"accepted", "clipped", "refused"}
        for each in answers.values():
            assert ("reason" in each) == (each["answer"] != "accepted")
        return len(answers)
