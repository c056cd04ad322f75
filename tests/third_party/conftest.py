"""What strangers write is tested as theirs: installed, and in a process of its own."""

import importlib
import sys

import pytest
from toy_install import install

PARTS = ("kvbm_pack", "kvbm_aes_gcm", "kvbm_arc", "kvbm_learned", "kvbm_chooser")

collect_ignore = ["kvbm_toy", *PARTS]
"""Strangers' codecs and policies: installed, found, tested by their own tests, used in a stack."""


@pytest.fixture(scope="session")
def parts_site(tmp_path_factory):
    """A folder with all that strangers have written, for ``sys.path``."""
    return install(tmp_path_factory.mktemp("parts") / "site", "kvbm_toy", *PARTS)


@pytest.fixture
def installed(parts_site, monkeypatch):
    """Strangers' packages are installed while a test runs."""
    monkeypatch.syspath_prepend(str(parts_site))
    importlib.invalidate_caches()
    yield parts_site
    for name in ("kvbm_toy", *PARTS):
        sys.modules.pop(name, None)
