"""Each kind of tier under a real engine and a real model, alone and below host memory."""

import pytest
from engines import assert_restored, drain, loaded, own_answers, restore, story_tokens

pytestmark = pytest.mark.engine

OPTIONS = {"num_gpu_blocks_override": 300, "max_model_len": 2048, "dtype": "float32"}


@pytest.fixture
def make_stack(tmp_path, request):
    """Make the tiers named like ``cpu+gds``."""

    def tier(name):
        if name == "cpu":
            return {"backend": "cpu", "capacity": "256MiB"}
        if name == "gds":
            return {"backend": "gds", "capacity": "256MiB", "path": str(tmp_path / "gds")}
        s3 = request.getfixturevalue("s3")
        return {"backend": "remote", "url": f"s3://{s3.bucket}/kv-{tmp_path.name}", **s3.settings}

    return lambda names: [tier(name) for name in names.split("+")]


@pytest.mark.parametrize("names", ["cpu+gds", "cpu+remote", "gds", "remote"])
def test_restored_after_a_restart_with_the_same_answers(start, make_stack, names):
    model, tokens = story_tokens()
    starts, lengths = [0, 0, 0, 50, 99], [65, 200, 416, 100, 555]
    prompts = [tokens[at : at + length] for at, length in zip(starts, lengths, strict=True)]
    durable = names.split("+")[-1]
    extra = {"lookup_deadline_s": 10.0}
    llm = start(model, make_stack(names), extra=extra, **OPTIONS)
    own = own_answers(llm, prompts)
    drain(llm)
    llm = start(model, make_stack(names), extra=extra, **OPTIONS)
    restored = restore(llm, prompts)
    assert_restored(prompts, own, restored)
    assert loaded(llm)[durable] > 0
