"""What strangers meet before the code: hooks, the workflow, and the forms for issues."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"


def test_hooks_run_what_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    lint = [line.strip().removeprefix("@$(BIN)/") for line in recipe.splitlines()]
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in local["hooks"]] == lint


def test_the_workflow_runs_what_maintainers_run():
    jobs = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands[-1] == ".ci/run"


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("github-workflows", "workflows/*.yml"),
        ("github-issue-forms", "ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", "ISSUE_TEMPLATE/config.yml"),
    ],
)
def test_files_for_the_host_are_as_it_reads_them(schema, pattern):
    files = sorted(map(str, GITHUB.glob(pattern)))
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_forms_link_to_pages_that_exist():
    links = re.findall(r"\(\.\./blob/main/([^)]+)\)", (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    assert links
    assert [path for path in links if not (ROOT / path).is_file()] == []
