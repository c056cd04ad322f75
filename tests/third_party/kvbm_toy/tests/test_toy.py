import stat

import pytest

from kvbm_core import TierOpenError
from kvbm_core.testing._rig import Rig
from kvbm_core.testing.suite import TierSuite


class TestToy(TierSuite):
    backend = "toy"

    def settings(self, folder):
        return {"path": str(folder / "kv"), "capacity": "2MiB"}


@pytest.fixture
def rig(tmp_path):
    rig = Rig("toy", lambda folder: {"path": str(folder / "kv"), "capacity": "2MiB"}, tmp_path, 100_000)
    yield rig
    rig.close_all()
