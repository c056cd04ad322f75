"""The conformance suite: what every tier must do, by its capabilities.

    from kvbm_core.testing.suite import TierSuite

    class TestShelf(TierSuite):
        backend = "shelf"

        def settings(self, folder):
            return {"path": str(folder), "capacity": "4MiB"}

Run it with pytest. Each test is named for the line of the contract that it proves. A test cannot be
overridden; one that a backend cannot pass is waived, with the reason, and must then fail:

    waivers = {"test_wake_is_called_when_there_is_something_to_poll": "the vendor's library has no callback"}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.testing._bound_tests import BoundTests
from kvbm_core.testing._call_tests import CallTests
from kvbm_core.testing._lending_tests import LendingTests
from kvbm_core.testing._life_tests import LifeTests
from kvbm_core.testing._machine import run_machine
from kvbm_core.testing._medium_tests import MediumTests
from kvbm_core.testing._needs import bounded, needs, writable
from kvbm_core.testing._place_tests import PlaceTests
from kvbm_core.testing._process_tests import ProcessTests
from kvbm_core.testing._queue_tests import QueueTests
from kvbm_core.testing._restart_tests import RestartTests
from kvbm_core.testing._rig import Rig, lengths
from kvbm_core.testing._room_tests import RoomTests
from kvbm_core.testing._sharing_tests import SharingTests
from kvbm_core.testing._transfer_tests import TransferTests
from kvbm_core.testing._whole import WholeSuite, insist_on_the_whole
from kvbm_core.tier import CONTRACT_VERSION, Addressable, Backend, Capabilities, Tier

__all__ = ["TierSuite", "needs"]


class TierSuite(
    TransferTests,
    CallTests,
    QueueTests,
    RoomTests,
    BoundTests,
    LifeTests,
    RestartTests,
    PlaceTests,
    SharingTests,
    LendingTests,
    MediumTests,
    ProcessTests,
    WholeSuite,
):
    """Subclass it, name a backend, give settings for a small tier, and run pytest."""

    backend: ClassVar[str | Backend]
    """The name of an entry point, or a `Backend`."""
    waivers: ClassVar[Mapping[str, str]] = {}
    """Tests that this backend cannot pass, and why. Each must fail, else the waiver is out of date."""
    members = frozenset({"backend", "settings", "waivers", "fill", "broken_medium", "max_bytes", "programs"})
    max_bytes: ClassVar[int] = 16 * 1024 + 96
    """Length of the longest object; not a multiple of a page, as in service. Others are shorter."""
    _capabilities: ClassVar[Capabilities]
    programs: ClassVar[int] = 60
    """Random programs that the last test runs. Each opens a tier: fewer where that takes long."""

    def settings(self, folder: Path) -> Mapping[str, Any]:
        """Give the settings as an operator would write them, for a tier of some dozen of the longest objects.

        Args:
            folder: Of the test's own, empty at its start.
        """
        raise NotImplementedError("write a method `settings`")

    def fill(self, folder: Path, namespace: Namespace, objects: Mapping[BlockKey, bytes]) -> None:
        """Put objects where a `read_only` tier finds them when it is opened. Not called for others.

        Args:
            folder: As in `settings`.
            namespace: 16 bytes; see `TierContext.namespace`.
            objects: Key to bytes.
        """
        raise NotImplementedError("write a method `fill`: the tier is read_only, so the suite cannot store")

    @pytest.fixture
    def rig(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
        """Give the test its tiers, and close them."""
        insist_on_the_whole(type(self))
        folders = [tmp_path / name for name in ("look", "tier")]
        for folder in folders:
            folder.mkdir()
        look, rig = (
            Rig(self.backend, self.settings, folder, self.max_bytes, self.fill) for folder in folders
        )
        what, having = getattr(request.function, "needs", ("", lambda capabilities: True))
        try:
            if not having(self._looked(look)):
                if request.function.__name__ in self.waivers:
                    pytest.fail(f"waived, but not run for a tier that is not {what}: remove the waiver")
                pytest.skip(f"left out: the tier is not {what}")
            yield rig
        finally:
            rig.close_all()

    def _looked(self, rig: Rig) -> Capabilities:
        """Say what the tiers can do; a class has one kind, and opening one may take long."""
        if "_capabilities" not in vars(type(self)):
            type(self)._capabilities = rig.capabilities()
        return type(self)._capabilities

    # The backend.

    def test_the_backend_is_what_the_core_expects(self, rig: Rig) -> None:
        """Its name is its entry point's, its contract ours, its tiers are tiers."""
        assert rig.backend.contract_version == CONTRACT_VERSION
        assert isinstance(self.backend, Backend) or rig.backend.name == self.backend
        tier = rig.open()
        assert isinstance(tier, Tier)
        assert isinstance(tier, Addressable) is tier.capabilities.addressable
        assert "\n" not in repr(tier)

    def test_check_accepts_what_can_be_opened_and_changes_nothing(self, rig: Rig) -> None:
        """See `Backend.check`."""
        before = _listing(rig.folder)
        rig.backend.check(rig.config())
        assert _listing(rig.folder) == before

    @bounded
    def test_charges_grow_with_the_length_and_cover_it(self, rig: Rig) -> None:
        """Of no bytes there is none; the longest object has room."""
        capabilities = rig.open().capabilities
        assert capabilities.unit_bytes >= 1
        assert capabilities.overhead_bytes >= 0
        sizes = sorted({0, *range(1, rig.max_bytes, 97), *lengths(rig.max_bytes)})
        charges = [capabilities.charge(nbytes) for nbytes in sizes]
        assert charges[0] == 0
        assert charges == sorted(charges), "a longer object takes less room"
        short = [nbytes for nbytes, charge in zip(sizes, charges, strict=True) if charge < nbytes]
        assert not short, f"objects of {short[:3]} bytes take less room than they have bytes"
        assert charges[-1] <= (capabilities.capacity_bytes or 0)

    # All together.

    @writable
    def test_any_sequence_of_calls_agrees_with_the_memory_tier(self, rig: Rig) -> None:
        """Random programs; hypothesis prints the shortest that fails."""
        run_machine(rig, self.programs)


def _listing(folder: Path) -> list[tuple[str, int]]:
    # Not the times of folders: whoever tries whether he may write there changes them.
    found = ((path, path.stat()) for path in folder.rglob("*"))
    return sorted((str(path), 0 if path.is_dir() else status.st_mtime_ns) for path, status in found)
