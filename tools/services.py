"""Starts etcd and Prometheus on this machine, without containers: for development and for tests.

python3 tools/services.py fetch    get the programs, if they are not there
python3 tools/services.py run      and start both, until Ctrl-C

A program is taken from the environment of the Python that runs this, then from the PATH, then from
Debian's package, which is unpacked into .cache/services and not installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
CACHE: Final = ROOT / ".cache" / "services"
DEPLOY: Final = ROOT / "plugins" / "kvbm_metrics" / "deploy"
PACKAGES: Final = {"etcd": "etcd-server", "prometheus": "prometheus", "promtool": "prometheus"}
"""Debian's package of each program."""
READY: Final = {"etcd": "http://127.0.0.1:2379/health", "prometheus": "http://127.0.0.1:9090/-/ready"}
READY_LIMIT_S: Final = 60


class ServiceError(Exception):
    """A service cannot be had; the message says what the user can do."""


def find(program: str) -> Path | None:
    """Return the program's path, or None if it is nowhere."""
    beside, unpacked = Path(sys.executable).with_name(program), CACHE / "usr" / "bin" / program
    if beside.exists():
        return beside
    found = shutil.which(program)
    return Path(found) if found else unpacked if unpacked.exists() else None


def fetch(program: str) -> Path:
    """Return the program's path; get it first if it is nowhere.

    Raises:
        ServiceError: If it cannot be had.
    """
    found = find(program)
    if found:
        return found
    package = PACKAGES[program]
    if not shutil.which("apt-get"):
        raise ServiceError(f"{program} is not installed: put it on the PATH")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        if not _succeeds(["apt-get", "download", "-q", package], folder):
            # The list of packages may be old, or there may be none yet.
            _succeeds(["apt-get", "update", "-q"], folder)
            if not _succeeds(["apt-get", "download", "-q", package], folder):
                raise ServiceError(f"Debian's package {package} cannot be had: put {program} on the PATH")
        [archive] = Path(folder).glob("*.deb")
        _succeeds(["dpkg-deb", "-x", str(archive), str(CACHE)], folder)
    found = find(program)
    if not found:
        raise ServiceError(f"Debian's package {package} has no {program}: put it on the PATH")
    return found


def commands(data: Path) -> dict[str, list[str]]:
    """Return the command line of each service; all listen on the loopback interface alone."""
    client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
    etcd = [
        str(fetch("etcd")), "--name", "kvbm", f"--data-dir={data / 'etcd'}",
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=kvbm={peer}", "--logger=zap",
    ]  # fmt: skip
    prometheus = [
        str(fetch("prometheus")), f"--config.file={DEPLOY / 'prometheus.yml'}",
        "--web.listen-address=127.0.0.1:9090", f"--storage.tsdb.path={data / 'prometheus'}",
        f"--web.console.templates={data}", f"--web.console.libraries={data}",
    ]  # fmt: skip
    return {"etcd": etcd, "prometheus": prometheus}


def run() -> None:
    """Start every service, say where it is, and wait; stop all with the first that ends.

    Raises:
        ServiceError: If one cannot be had, or ends.
    """
    data = CACHE / "data"
    data.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands(data).items():
            with open(data / f"{name}.log", "wb") as log:
                running[name] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            _await_ready(name, running[name], data)
        print("Ctrl-C stops both. Their logs and data: .cache/services/data", flush=True)
        while all(process.poll() is None for process in running.values()):
            time.sleep(0.5)
        ended = ", ".join(name for name, process in running.items() if process.poll() is not None)
        raise ServiceError(f"{ended} has ended: see .cache/services/data")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def main(arguments: Sequence[str]) -> int:
    """Do what the first argument says."""
    if list(arguments) not in (["fetch"], ["run"]):
        print(__doc__)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments[0] == "run":
            run()
        else:
            for program in PACKAGES:
                fetch(program)
    except ServiceError as error:
        print(f"services: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _succeeds(command: Sequence[str], folder: str) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return done.returncode == 0


def _await_ready(name: str, process: subprocess.Popen[bytes], data: Path) -> None:
    give_up_s = time.monotonic() + READY_LIMIT_S
    while process.poll() is None and time.monotonic() < give_up_s:
        try:
            with urllib.request.urlopen(READY[name], timeout=1):
                print(f"{name} is ready: {READY[name].rsplit('/', 1)[0].removesuffix('/-')}", flush=True)
                return
        except OSError:
            time.sleep(0.1)
    said = (data / f"{name}.log").read_text(errors="replace").strip().splitlines()[-3:]
    raise ServiceError("\n".join([f"{name} does not start; is its port taken?", *said]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
