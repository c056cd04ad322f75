"""What moves bytes between memory and slab files: NIXL, or threads.

    tier ── post(io) ──► engine ── its own thread or threads
    tier ◄── take() ──── engine ── notify() when there is something to take

An `Io` is one object in whole pages: `FILE` offset and length are multiples of 4096, and so is the address,
as O_DIRECT and the contract have it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import logging
import os
import queue
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvbm_core.errors import TierOpenError
from kvbm_core.tier import PAGE_BYTES

__all__ = ["Io", "IoEngine", "NixlIo", "ThreadIo", "load_nixl", "open_engine"]

_NIXL_MODULES: Final = ("nixl._api", "nixl_cu13._api", "nixl_cu12._api")
_LEAST_NIXL: Final = (1, 5)
"""Releases before it report a short read as done."""
_THREADS: Final = 8
_GROUP: Final = 4
"""Blocks that share a handle: less work for each, and a block waits for three others at most."""
_WATCH_S: Final = 50e-6
"""Between two looks at transfers in flight. Without a pause a core is burnt, with more latency grows."""
_ADDRESS_SPACE_BYTES: Final = 1 << 47
_POINTER_DEVICE_ORDINAL: Final = 9

_agents = itertools.count(1)


@dataclass(slots=True, eq=False)
class Io:
    """One object's way between memory and a file."""

    token: Any
    """Whatever the tier knows it by. Referenced for as long as the engine works on it."""
    write: bool
    fd: int
    offset: int
    address: int
    nbytes: int
    """Of the object's pages: the memory behind them is not touched."""
    on_device: bool = False
    error: str = ""
    """Set by the engine; empty if every byte was moved."""
    code: int = 0
    """The error's number, where the engine knows it."""

    def __post_init__(self) -> None:
        assert self.offset % PAGE_BYTES == 0, "O_DIRECT"
        assert self.address % PAGE_BYTES == 0, "a region starts on a page"
        assert self.nbytes % PAGE_BYTES == 0, "and owns its pages whole"


class IoEngine(ABC):
    """Moves blocks. Called from one thread."""

    @abstractmethod
    def add_file(self, fd: int, nbytes: int) -> None:
        """Make an open file known before it is used."""

    @abstractmethod
    def post(self, ios: Sequence[Io]) -> None:
        """Start them. Each is taken once, whatever becomes of it."""

    @abstractmethod
    def take(self) -> list[Io]:
        """Give those that have ended since the last call."""

    @abstractmethod
    def close(self, wait_s: float) -> bool:
        """Wait for what is in flight. False if it was not over in time: then files must stay open."""


class ThreadIo(IoEngine):
    """``preadv`` and ``pwritev`` in threads; works everywhere."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._inbox: queue.SimpleQueue[Io | None] = queue.SimpleQueue()
        self._ended: deque[Io] = deque()
        self._threads = [
            threading.Thread(target=self._run, name=f"kvbm-gds-io{at}", daemon=True) for at in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def add_file(self, fd: int, nbytes: int) -> None:
        """See `IoEngine.add_file`."""

    def post(self, ios: Sequence[Io]) -> None:
        """See `IoEngine.post`."""
        for io in ios:
            self._inbox.put(io)

    def take(self) -> list[Io]:
        """See `IoEngine.take`."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def close(self, wait_s: float) -> bool:
        """See `IoEngine.close`."""
        for _ in self._threads:
            self._inbox.put(None)
        give_up_s = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, give_up_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (io := self._inbox.get()) is not None:
            try:
                move_bytes(io)
            except Exception as error:  # noqa: BLE001 - the thread's top: it becomes the block's outcome
                io.error = getattr(error, "strerror", None) or str(error) or type(error).__name__
                io.code = getattr(error, "errno", None) or 0
            self._ended.append(io)
            self._notify()


def move_bytes(io: Io) -> None:
    """Read or write one block, and wait for it.

    Raises:
        OSError: If it did not work, or only a part of it.
    """
    view = memoryview((ctypes.c_ubyte * io.nbytes).from_address(io.address)).cast("B")
    call, done = (os.pwritev if io.write else os.preadv), 0
    while done < io.nbytes:
        count = call(io.fd, [view[done:]], io.offset + done)
        if count <= 0:
            raise OSError(errno.EIO, "short transfer")
        done += count


def load_nixl() -> Any:
    """Import NIXL's Python interface.

    Raises:
        TierOpenError: If it is not installed, or too old to be trusted.
    """
    import importlib
    from importlib import metadata

    for name in _NIXL_MODULES:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            break
    else:
        raise TierOpenError(
            "engine: NIXL is not installed; run `pip install nixl-cu13` (or nixl-cu12 for CUDA 12), or write "
            "engine: threads",
            operation="open", tier="gds",
        )  # fmt: skip
    module.logger.setLevel(logging.WARNING)  # It says at INFO which agents are made.
    distribution = name.split(".")[0].replace("_", "-")
    with contextlib.suppress(metadata.PackageNotFoundError):
        version = metadata.version(distribution)
        # A release candidate's numbers are followed by letters.
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _LEAST_NIXL:
            raise TierOpenError(
                f"engine: {distribution} {version} reports short reads as complete; install 1.5 or newer",
                operation="open", tier="gds",
            )  # fmt: skip
    return module


class NixlIo(IoEngine):
    """One of NIXL's plug-ins.

    Behaviour:
        - Each block has an outcome of its own: blocks of a handle that failed are tried once more, alone:
          those in host memory by threads, which say what the kernel says.
        - A handle that NIXL still works on is never released: that is undefined, and the kernel
          would go on writing to the region.
    """

    def __init__(self, plugin: str, parameters: dict[str, str], notify: Callable[[], None]) -> None:
        api = load_nixl()
        bindings = __import__(api.__name__.replace("_api", "_bindings"), fromlist=["nixlBackendError"])
        # NIXL's errors have no common base of their own.
        self._errors = tuple(
            getattr(bindings, name)
            for name in dir(bindings)
            if name.startswith("nixl") and name.endswith("Error")
        )
        config = api.nixl_agent_config(backends=[], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW)
        self._agent: Any = api.nixl_agent(f"kvbm-{os.getpid()}-{next(_agents)}", config)
        try:
            self._agent.create_backend(plugin, parameters)
        except self._errors as error:
            raise TierOpenError(
                f"engine: NIXL's plug-in {plugin} does not start: {error}", operation="open", tier="gds"
            ) from error
        self._direct = plugin.startswith("GDS")
        if not self._direct:
            # The POSIX plug-in tells the kernel nothing of memory: one entry stands for all of it.
            self._agent.register_memory([(0, _ADDRESS_SPACE_BYTES, 0, "")], "DRAM")
        self._registered: dict[int, Any] = {}
        """Address to what NIXL was told lies there."""
        self._notify = notify
        self._ended: deque[Io] = deque()
        self._threads: ThreadIo | None = None
        """For what NIXL has failed at. Started with the first."""
        self._flying: dict[Any, Sequence[Io]] = {}
        self._closing = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="kvbm-gds-nixl", daemon=True)
        self._thread.start()

    def add_file(self, fd: int, nbytes: int) -> None:
        """See `IoEngine.add_file`."""
        try:
            self._agent.register_memory([(0, nbytes, fd, "")], "FILE")
        except self._errors as error:
            raise TierOpenError(
                f"engine: NIXL refuses a file: {error}; write engine: posix", operation="open", tier="gds"
            ) from error

    def post(self, ios: Sequence[Io]) -> None:
        """See `IoEngine.post`."""
        kinds = [[io for io in ios if io.write is write] for write in (False, True)]
        groups = [kind[at : at + _GROUP] for kind in kinds for at in range(0, len(kind), _GROUP)]
        started = [flight for group in groups for flight in self._start(group)]
        with self._condition:
            self._flying.update(started)
            self._condition.notify()
        if self._ended:
            self._notify()

    def take(self) -> list[Io]:
        """See `IoEngine.take`."""
        ended = [self._ended.popleft() for _ in range(len(self._ended))]
        return ended + self._threads.take() if self._threads else ended

    def close(self, wait_s: float) -> bool:
        """See `IoEngine.close`."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(wait_s)
        if self._thread.is_alive() or self._flying:
            return False
        if self._threads and not self._threads.close(wait_s):
            return False
        # With it the kernel's queues go, and what it was told of the files, before these are closed.
        self._agent = None
        return True

    def _start(self, ios: Sequence[Io]) -> list[tuple[Any, Sequence[Io]]]:
        """Start I/Os of one operation together; one by one if NIXL refuses them together."""
        try:
            handle = self._prepare(ios)
            state = self._agent.transfer(handle)
        except (*self._errors, OSError) as error:
            return self._split(ios, str(error) or type(error).__name__)
        if state == "PROC":
            return [(handle, ios)]
        return self._end(handle, ios, state)

    def _split(self, ios: Sequence[Io], error: str) -> list[tuple[Any, Sequence[Io]]]:
        """Try each alone: NIXL says of a handle that it failed, not which block of it, nor why."""
        if not ios[0].on_device:
            with self._condition:
                self._threads = self._threads or ThreadIo(self._notify)
            self._threads.post(ios)
            return []
        if len(ios) > 1:
            return [flight for io in ios for flight in self._start([io])]
        ios[0].error = error
        self._ended.append(ios[0])
        return []

    def _prepare(self, ios: Sequence[Io]) -> Any:
        memory = "VRAM" if ios[0].on_device else "DRAM"
        device = device_of(ios[0].address) if ios[0].on_device else 0
        for io in ios if self._direct else ():
            self._register(io, device, memory)
        local = self._agent.get_xfer_descs([(io.address, io.nbytes, device) for io in ios], memory)
        remote = self._agent.get_xfer_descs([(io.offset, io.nbytes, io.fd) for io in ios], "FILE")
        operation = "WRITE" if ios[0].write else "READ"
        return self._agent.initialize_xfer(operation, local, remote, self._agent.name)

    def _register(self, io: Io, device: int, memory: str) -> None:
        """Tell NIXL of memory. cuFile takes no address twice: a longer object replaces what was told of it.

        Nothing else uses the memory meanwhile: a region is its transfer's alone.
        """
        known = self._registered.get(io.address)
        if known is not None and known[0][1] >= io.nbytes:
            return
        if known is not None:
            del self._registered[io.address]
            self._agent.deregister_memory(known)
        self._registered[io.address] = self._agent.register_memory(
            [(io.address, io.nbytes, device, "")], memory
        )

    def _end(self, handle: Any, ios: Sequence[Io], state: str) -> list[tuple[Any, Sequence[Io]]]:
        """Take in what is over; give what is tried once more."""
        with contextlib.suppress(*self._errors):
            handle.release()
        if state != "DONE":
            return self._split(ios, state)
        self._ended.extend(ios)
        return []

    def _watch(self) -> None:
        while True:
            with self._condition:
                while not self._flying and not self._closing:
                    self._condition.wait()
                if not self._flying:
                    return
                flying = list(self._flying.items())
            for handle, ios in flying:
                try:
                    state = self._agent.check_xfer_state(handle)
                    if state == "PROC":
                        continue
                    again = self._end(handle, ios, state)
                except Exception as error:  # noqa: BLE001 - the thread's top: it becomes the blocks' outcome
                    again = self._split(ios, str(error) or type(error).__name__)
                with self._condition:
                    del self._flying[handle]
                    self._flying.update(again)
            if self._ended:
                self._notify()
            time.sleep(_WATCH_S)


def device_of(address: int) -> int:
    """Say which accelerator a device address belongs to."""
    driver, ordinal = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    status = driver.cuPointerGetAttribute(
        ctypes.byref(ordinal), _POINTER_DEVICE_ORDINAL, ctypes.c_uint64(address)
    )
    if status != 0:
        raise OSError(f"cuPointerGetAttribute gave {status}")
    return ordinal.value


def open_engine(name: str, notify: Callable[[], None]) -> IoEngine:
    """Open an engine by the probe's name for it.

    Args:
        name: ``gds_mt``, ``gds``, ``io_uring``, ``libaio`` or ``threads``.
        notify: Called, from any thread, when `IoEngine.take` has something to give.
    """
    if name == "threads":
        return ThreadIo(notify)
    plugin, parameters = _PLUGINS[name]
    return NixlIo(plugin, parameters, notify)


# posix_aio is left out: after one failed transfer every later one fails, too.
_PLUGINS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "gds_mt": ("GDS_MT", {}),
    "gds": ("GDS", {}),
    "io_uring": ("POSIX", {"use_uring": "true", "ios_pool_size": "4096", "kernel_queue_size": "256"}),
    "libaio": ("POSIX", {"use_aio": "true", "ios_pool_size": "4096", "kernel_queue_size": "256"}),
}
