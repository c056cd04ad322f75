"""What LMDB holds after a kill, a flipped bit, or another model: never a wrong token."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import pytest
from engines import connector, drain, generate, keys_of, loaded, make_prompts, make_random_llama

from kvbm_core.tier import PAGE_BYTES
from kvbm_lmdb._place import PIECE_HEADER_BYTES, SEQUENCE, nbytes_of, pieces_of

pytestmark = pytest.mark.engine

KILLS = 3
SOAK_KILLS = 20


def stack(path, capacity="256MiB"):
    return [
        {"backend": "cpu", "capacity": "32MiB"},
        {"backend": "lmdb", "capacity": capacity, "path": str(path)},
    ]


@pytest.mark.early
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [KILLS, pytest.param(SOAK_KILLS, marks=pytest.mark.soak)])
def test_kill_at_random_moments(llama, start, tmp_path, kills):
    """`crash_child.py` keeps vLLM imported and forks an engine for each life; each is killed under load."""
    prompts = [p for p in make_prompts(40, seed=21, longest=700) if len(p) > 64][:16]
    llm = start(llama, None)
    job = {
        "model": str(llama),
        "tiers": stack(tmp_path / "kv"),
        "prompts": prompts,
        "answers": [generate(llm, [prompt])[0] for prompt in prompts],
        "acknowledged": str(tmp_path / "acknowledged"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    program = [sys.executable, Path(__file__).with_name("crash_child.py"), tmp_path / "job.json"]
    rng = random.Random(22)
    restored = 0
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as child,
        contextlib.ExitStack() as at_end,
    ):
        at_end.callback(child.kill)
        for life in range(kills + 1):
            child.stdin.write("last\n" if life == kills else "go\n")
            child.stdin.flush()
            report = json.loads(_line(child, tmp_path))
            assert report["lost"] == 0, f"life {life}: committed blocks are gone"
            if life < kills:
                time.sleep(rng.uniform(0.05, 2.0))
                try:
                    os.kill(report["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    pytest.fail(f"life {life} ended by itself:\n{(tmp_path / 'log').read_text()[-3000:]}")
            ended = json.loads(_line(child, tmp_path))
            assert ended["wrong"] == 0, f"life {life}: wrong tokens"
            restored += ended["loaded"]
    assert restored > 0


def _line(child, folder):
    line = child.stdout.readline()
    assert line, (folder / "log").read_text()[-3000:]
    return line


def places(path):
    """Where each block's bytes are in the directory's file, and how many, by key."""
    with lmdb.open(str(path / "rank0"), map_size=1 << 29, max_dbs=2, readonly=True, lock=False) as env:
        index = env.open_db(b"index", create=False)
        with env.begin(db=index) as txn:
            rows = {key: row[SEQUENCE.size :] for key, row in txn.cursor() if len(key) == 48}
    found = {}
    for key, place in rows.items():
        [(page, _)] = pieces_of(place)  # In a file that has room no object is cut.
        found[key] = (page * PAGE_BYTES + PIECE_HEADER_BYTES, nbytes_of(place))
    return found


def values(path):
    """The values in the directory, by key."""
    with open(path / "rank0" / "data.mdb", "rb") as file:
        return {
            key: os.pread(file.fileno(), nbytes, offset) for key, (offset, nbytes) in places(path).items()
        }


def change(path, updates):
    """Change bytes where they lie: a block that LMDB writes again would lie elsewhere."""
    found = places(path)
    with open(path / "rank0" / "data.mdb", "r+b") as file:
        for key, value in updates.items():
            offset, nbytes = found[key]
            os.pwrite(file.fileno(), value.ljust(nbytes, b"\0"), offset)


def flip(blocks):
    """One bit of each, somewhere."""
    rng = random.Random(23)
    changed = {}
    for key, value in blocks.items():
        at = rng.randrange(len(value))
        changed[key] = value[:at] + bytes([value[at] ^ (1 << rng.randrange(8))]) + value[at + 1 :]
    return changed


def cut(blocks):
    return {key: value[: len(value) // 2] for key, value in blocks.items()}


def swap(blocks):
    return dict(zip(blocks, [*list(blocks.values())[1:], next(iter(blocks.values()))], strict=True))


def test_a_damaged_value_is_a_miss_and_is_counted(llama, start, tmp_path):
    """Each prompt's blocks are damaged in a way of their own."""
    prompts = {
        damage: make_prompts(1, seed=24 + at, longest=330)[-1] for at, damage in enumerate((flip, cut, swap))
    }
    llm = start(llama, stack(tmp_path))
    answers = {damage: generate(llm, [prompt])[0] for damage, prompt in prompts.items()}
    drain(llm)
    llm.llm_engine.engine_core.shutdown()
    stored = values(tmp_path)
    for damage, prompt in prompts.items():
        keys = keys_of(prompt, 10)
        blocks = {key: value for key, value in stored.items() if key[-32:] in keys}
        assert len(blocks) == 10
        change(tmp_path, damage(blocks))
    llm = start(llama, stack(tmp_path))
    for number, (damage, prompt) in enumerate(prompts.items(), start=1):
        assert generate(llm, [prompt])[0] == answers[damage]
        counts = connector(llm).counts["lmdb"]
        assert counts.loaded == 0
        assert counts.failed["load", "corrupt"] == 10 * number


def test_another_model_under_the_same_path_shares_nothing(start, tmp_path):
    model, prompt = tmp_path / "model", make_prompts(1, seed=25, longest=330)[-1]
    answers = {}
    for seed in (1, 2):
        make_random_llama(model, seed)
        llm = start(model, stack(tmp_path / "kv"))
        answers[seed] = generate(llm, [prompt])[0]
        assert sum(loaded(llm).values()) == 0
        drain(llm)
    assert answers[1] != answers[2]
    # Both are kept: the first model finds its own again, and nothing else.
    make_random_llama(model, 1)
    llm = start(model, stack(tmp_path / "kv"))
    assert generate(llm, [prompt])[0] == answers[1]
    assert loaded(llm)["lmdb"] == 10


def test_a_block_of_another_model_put_in_place_is_a_miss(start, tmp_path):
    prompt = make_prompts(1, seed=26, longest=330)[-1]
    answers, found = {}, {}
    for seed in (1, 2):
        model = make_random_llama(tmp_path / f"model{seed}", seed)
        llm = start(model, stack(tmp_path / f"kv{seed}"))
        answers[seed] = generate(llm, [prompt])[0]
        drain(llm)
        llm.llm_engine.engine_core.shutdown()
        found[seed] = values(tmp_path / f"kv{seed}")
    by_block = {key[-32:]: value for key, value in found[2].items()}
    # The blocks of the answers have other tokens and so other keys.
    change(tmp_path / "kv1", {key: by_block[key[-32:]] for key in found[1] if key[-32:] in by_block})
    llm = start(tmp_path / "model1", stack(tmp_path / "kv1"))
    assert generate(llm, [prompt])[0] == answers[1]
    assert connector(llm).counts["lmdb"].failed["load", "corrupt"] == 10


def test_ten_times_the_capacity_stays_inside_it(llama, start, tmp_path):
    capacity = 6 << 20
    llm = start(llama, [{"backend": "cpu", "capacity": "4MiB"},
                        {"backend": "lmdb", "capacity": capacity, "path": str(tmp_path / "kv")}])  # fmt: skip
    rng = random.Random(27)
    planner = connector(llm)._leader.session.planner
    limit = {tier.name: tier.index.capacity_bytes for tier in planner._tiers}
    written = 0
    while written < 10 * capacity:
        generate(llm, [[rng.randrange(2, 2000) for _ in range(2000)]], max_tokens=1)
        drain(llm)
        used = int(
            subprocess.run(
                ["du", "-s", "-B1", tmp_path / "kv"], check=True, capture_output=True
            ).stdout.split()[0]
        )
        assert used <= capacity
        assert all(count <= limit[name] for name, count in planner.occupancy.items())
        written = connector(llm).counts["lmdb"].stored * 24_576
    counts = connector(llm).counts
    assert counts["lmdb"].failed.total() == 0
    assert counts["cpu"].evicted > 0
