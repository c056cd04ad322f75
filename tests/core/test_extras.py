"""The command that installs an extra, by what pip noted of where the package came from (PEP 610).

The notes are written by pip for real packages; here they are written as the standard has them, because one
test run is installed from one place.
"""

import json
import shlex
import subprocess
import sys

import pytest

from kvbm_core import extras
from kvbm_core.extras import extra_command

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ORIGINS = {
    "an index": (None, "pip install 'kvbm-core[remote]'"),
    "a folder, editable": (
        {"url": "file:///src/kvbm-core", "dir_info": {"editable": True}},
        "pip install -e '/src/kvbm-core[remote]'",
    ),
    "a folder": ({"url": "file:///src/kvbm-core", "dir_info": {}}, "pip install '/src/kvbm-core[remote]'"),
    "a folder with odd characters": (
        {"url": "file:///my%20src/it%27s", "dir_info": {"editable": True}},
        "pip install -e " + shlex.quote("/my src/it's[remote]"),
    ),
    "a wheel": (
        {"url": "file:///w/kvbm_core-0.1.0-py3-none-any.whl", "archive_info": {}},
        "pip install '/w/kvbm_core-0.1.0-py3-none-any.whl[remote]'",
    ),
    "a wheel of a server": (
        {"url": "https://host/kvbm_core-0.1.0-py3-none-any.whl", "archive_info": {}},
        "pip install 'kvbm-core[remote] @ https://host/kvbm_core-0.1.0-py3-none-any.whl'",
    ),
    "a repository": (
        {"url": "https://host/kvbm.git", "vcs_info": {"vcs": "git", "commit_id": COMMIT}},
        f"pip install 'kvbm-core[remote] @ git+https://host/kvbm.git@{COMMIT}'",
    ),
    "a note that is no JSON": ("{", "pip install 'kvbm-core[remote]'"),
    "a note without an address": ({"dir_info": {}}, "pip install 'kvbm-core[remote]'"),
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install the package's metadata, with a note, ahead of what this run was installed from."""

    def install(note):
        folder = tmp_path / "kvbm_core-0.1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kvbm-core\nVersion: 0.1.0\n")
        if note is not None:
            (folder / "direct_url.json").write_text(note if isinstance(note, str) else json.dumps(note))
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.mark.parametrize(("note", "command"), ORIGINS.values(), ids=ORIGINS)
def test_the_command_installs_from_where_the_package_came(installed, note, command):
    installed(note)
    assert extra_command("remote") == command
    assert shlex.split(command)[:2] == ["pip", "install"]


def test_a_package_that_is_not_installed_at_all_is_named():
    # Without site-packages nothing is installed; the module needs the standard library alone.
    program = f"import runpy; print(runpy.run_path({extras.__file__!r})['extra_command']('remote'))"
    command = [sys.executable, "-I", "-S", "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "pip install 'kvbm-core[remote]'"
