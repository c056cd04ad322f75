"""The evening of breaking things: each tier with traffic, each fault, found from log and metrics in a minute.

A line names the tier as it is configured, the backend's own error and the remedy; none comes twice within a
minute; a metric shows it; repaired, the tier serves again and says so if it was left alone. What has to be
seen is read from the operators' page, and what a fault is, is in `evening_child.py`.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from evening_child import TIERS, USER
from test_docs import DOCS, rows, section

from kvbm_metrics import METRICS, reading
from kvbm_vllm._stats import PREFIX

pytestmark = pytest.mark.soak
HERE = Path(__file__).parent
PAGE = DOCS / "how-to" / "when-a-tier-fails.md"
FOUND_WITHIN_S = 60.0


@dataclass(frozen=True)
class Seen:
    """What an operator has to see: a row of the page's first table. Of alternatives one will do."""

    lines: list[str]
    """Patterns of the line while it is broken."""
    metrics: list[str]
    """Readings that change."""
    again: list[str]
    """Patterns of the line when it is repaired. Empty: nothing had been given up."""


TIER_OF = {
    "`cpu`": "cpu", "`lmdb`": "lmdb", "`gds`": "gds", "`remote`, `file://`": "file", "`remote`, `s3://`": "s3"
}  # fmt: skip
METRIC = re.compile(r"`(\S+?)(?:\{(.+)\})?`")


def table(title):
    """Give the rows of a table of the page, by tier and fault."""
    cells = rows(section(PAGE, title))
    return {(TIER_OF[tier], fault.partition(" ")[0]): more for tier, fault, *more in cells}


def patterns(cell, tier):
    """Give what the lines in a cell have to look like: ``…`` is anything."""
    said = [line.replace("<tier>", NAMES[tier]) for line in re.findall("`([^`]+)`", cell)]
    return [".*".join(map(re.escape, re.split(r"\s*…\s*", line))) for line in said]


def readings(cell, tier):
    """Give the keys of the readings that Prometheus knows by the names in a cell."""
    exported, found = {metric.exported(PREFIX): metric for metric in METRICS.values()}, []
    for name, labels in METRIC.findall(cell):
        given = dict(re.findall(r'(\w+)="(\w+)"', labels))
        labels = (given.get(label, NAMES[tier]) for label in exported[name].labels)
        found.append(reading(exported[name].name, *labels))
    return found


NAMES = {tier: entries[0]["name"] for tier, entries in TIERS.items()}
CELLS = {
    (tier, fault): Seen(patterns(line, tier), readings(metric, tier), patterns(again, tier))
    for (tier, fault), (line, metric, _, again) in table("While the engine runs").items()
}
REFUSED = {
    (tier, fault): (patterns(checked, tier), patterns(opened, tier))
    for (tier, fault), (checked, opened, _) in table("When the engine starts").items()
}
"""At the start: what is said before the model is loaded, and at open. Empty: engines share the place."""
NAMED = re.compile(rf"(\d+ more in the last \d+ s of: )?tier ({'|'.join(NAMES.values())})[: ]")


@pytest.fixture(scope="module")
def faulty_medium(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: a medium that hangs cannot be made")
    library = tmp_path_factory.mktemp("medium") / "faulty_medium.so"
    source = HERE / "plugins/faulty_medium.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    library.chmod(0o755)
    return library


@pytest.fixture
def place():
    """A folder that another user reaches, too; pytest's are private."""
    with tempfile.TemporaryDirectory(prefix="kvbm-evening-") as name:
        os.chmod(name, 0o755)
        (Path(name) / "medium").mkdir()
        (Path(name) / "switch").write_bytes(b"-")
        yield Path(name)


@contextlib.contextmanager
def disk(place, *, thin):
    """Mount a small disk; a thin one has less than it promises. Gives where others take its room."""
    medium, back = place / "medium", place / "back"
    back.mkdir()
    small = ["mount", "-t", "tmpfs", "-o"]
    steps = [[*small, "size=14m", "tmpfs", medium]]
    if thin:
        steps = [
            [*small, "size=9m", "tmpfs", back],
            ["truncate", "-s", "32M", back / "image"],
            ["mkfs.ext4", "-q", "-O", "^has_journal", back / "image"],
            ["mount", "-o", "loop", back / "image", medium],
        ]
    try:
        for step in steps:
            made = subprocess.run(step, capture_output=True)
            if made.returncode:
                pytest.skip(f"A FULL DISK IS NOT TESTED: {step[0]}: {made.stderr.decode()}")
        yield back if thin else medium
    finally:
        subprocess.run(["umount", "-l", medium], capture_output=True)
        subprocess.run(["umount", "-l", back], capture_output=True)


def run(place, library, tier, fault, **more):
    """Run a cell in a process of its own, and give what it saw."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)]),
        "LD_PRELOAD": str(library),
        "KVBM_FAULTY_FOLDER": str(place / "medium"),
        "KVBM_FAULTY_SWITCH": str(place / "switch"),
        **more,
    }
    program = [sys.executable, str(HERE / "evening_child.py"), tier, fault]
    command = [*program, str(place / "medium"), str(place / "switch")]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


def server_of(tier, request):
    """Give a child's environment for a tier's server, if it has one."""
    if tier != "s3":
        return {}
    server = request.getfixturevalue("s3_server")
    host, port = server.address
    return {**server.env, "KVBM_S3_ADDRESS": f"{host}:{port}", "KVBM_S3_BUCKET": server.bucket}


def as_another_user(place, fault):
    """Have a child take another user's place where permission is what fails: root needs none."""
    if fault != "permission":
        return {}
    if os.geteuid():
        pytest.skip("MISSING PERMISSION IS NOT TESTED: only root can take another user's place")
    os.chown(place / "medium", USER, USER)
    return {"KVBM_AS_USER": "1"}


@pytest.mark.parametrize(("tier", "fault"), CELLS)
def test_a_fault_is_found_from_log_and_metrics_and_its_end_is_said(
    tier, fault, place, faulty_medium, request
):
    expected = CELLS[tier, fault]
    more = {**server_of(tier, request), **(as_another_user(place, fault) if tier != "s3" else {})}
    # What hangs is the tier below.
    broken = "cpu-over-file" if (tier, fault) == ("cpu", "silent") else tier
    with contextlib.ExitStack() as stack:
        if fault == "full" and tier != "s3":
            more["KVBM_DISK"] = str(stack.enter_context(disk(place, thin=tier == "gds")))
        seen = run(place, faulty_medium, broken, fault, **more)
    assert seen["wrong"] == 0
    assert seen["well"] == [], "nothing is said while all is well"
    lines = [line for _, line in seen["lines"]]
    found = [at for at, line in seen["lines"] if says(expected.lines, line)]
    assert found, lines
    assert found[0] < FOUND_WITHIN_S
    changed = [seen["metrics"][name] for name in expected.metrics if name in seen["metrics"]]
    assert changed, seen["metrics"]
    assert min(changed) < FOUND_WITHIN_S
    assert repeated(seen["lines"]) == []
    # At most: a block is damaged, the tier is full, is left alone, works again, grows again.
    assert len(set(map(words_of, lines))) <= 5, lines
    assert seen["served"], seen
    assert seen["usable"] == 1
    assert seen["short"] == 0
    said = [*lines, *(line for _, line in seen["again"])]
    assert not expected.again or any(says(expected.again, line) for line in said), said
    assert [line for line in [*said, *seen["end"]] if not NAMED.match(line)] == [], "a line names no tier"


def words_of(line):
    """Give what two lines that are alike have in common: not numbers, moments and the block's name."""
    return re.sub(r"block \w+|[\d:.-]+", "#", line)


def repeated(lines):
    """Give lines that came twice within a minute; that a tier works again belongs to one of them."""
    last, twice = {}, []
    for at, line in lines:
        if "works again" in line:
            continue
        if at - last.get(words_of(line), -FOUND_WITHIN_S) < FOUND_WITHIN_S - 1:
            twice.append((at, line))
        last[words_of(line)] = at
    return twice


def says(patterns, line):
    """Return True if a line is one of those that are expected."""
    return any(re.search(pattern, line, re.DOTALL) for pattern in patterns)


@pytest.mark.parametrize(("tier", "fault"), REFUSED)
def test_a_start_over_a_fault_is_refused_with_the_remedy(tier, fault, place, faulty_medium, request):
    more = {**server_of(tier, request), **as_another_user(place, fault)}
    if fault == "permission":
        # Root's, and nobody else's.
        (place / "medium/kv").mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        if fault == "full" and tier != "cpu":
            more["KVBM_DISK"] = str(stack.enter_context(disk(place, thin=False)))
        seen = run(place, faulty_medium, tier, fault, KVBM_AT_START="1", **more)
    for when, expected in zip(("checked", "opened"), REFUSED[tier, fault], strict=True):
        assert bool(seen[when]) == bool(expected), seen
        assert says(expected, seen[when]) or not expected, seen
    if not any(REFUSED[tier, fault]):
        assert seen["served"]
        assert seen["shared"], "the first engine does not see what the second stored"
        # A store finds the block there; the load finds that it is damaged, and the next store mends it.
        assert (seen["damaged"], seen["mended"], seen["wrong"]) == (False, True, 0)
