"""Engines whose blocks leave and come as a GPU's do: late, beside the computation, and behind fences.

The GPU is simulated. Its copies run at random times between the engine's steps, in any order that streams
allow: a state or a window's block that the engine gives to others too early is stored with their bytes.
`tests/gpu/test_cuda_hybrid.py` has the same on a real one.
"""

import ctypes
import mmap
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from engines import drain, generate, loaded, make_engine
from hybrid import (
    boundary_of,
    failed_loads,
    make_prompt,
    mended,
    needed_of,
    options_of,
    own_answer,
    restored,
    watching,
)
from models import write_model

sys.path.insert(0, str(Path(__file__).parent.parent / "backends"))
from simulated_gpu import SimulatedGpu

from kvbm_core.tier import Region
from kvbm_device import StagedDevice, layout_of
from kvbm_device._link import Method, Way

pytestmark = pytest.mark.engine

CPU = {"backend": "cpu", "capacity": "256MiB"}
OTHERS = ("granite4", "qwen3_next")
"""These run where -m names `soak`."""
LENGTHS = (2016, 2017, 2350, 3003, 3555)
"""Of prompts, in tokens."""
FEW_BLOCKS = {"gemma3": 400, "granite4": 96}
"""A prompt gets some that are still to be stored, or loaded into, for the one before."""


class GpuBesideAnEngine(SimulatedGpu):
    """A GPU on which an engine computes when it is called: what was put on its stream before is done."""

    def __init__(self, seed, *, eager):
        super().__init__(seed, eager=eager)
        self.lock = threading.Lock()

    def step(self):
        with self.lock:  # The engine's thread and the one that copies.
            return super().step()

    def record(self, stream):
        return {"passed": True} if stream is self.engine else super().record(stream)

    def wait(self, stream, event):
        self.wait_here(event) if stream is self.engine else super().wait(stream, event)

    def wait_here(self, event):
        while not event["passed"]:
            assert self.step() or event["passed"], "nothing can run, and the event has not come"


class Device(StagedDevice):
    """Counts the blocks that an engine gives to others before they were read."""

    late = 0

    def claim(self, blocks, *, wait=False):
        blocks = {*blocks}
        with self._lock:
            waits = [*self._waits, *(wait for piece in self._pieces for wait in piece.waits)]
        self.late += len(blocks & {block for wait in waits for block in wait.blocks})
        return super().claim(blocks, wait=wait)


def simulate(monkeypatch, eager):
    """Have engines copy as on a GPU, with little staging; the devices that are opened from now on."""
    devices = []

    def open_simulated(tensors, num_blocks, *, copy, staging_bytes):
        layout = layout_of(tensors, num_blocks)
        gpu = GpuBesideAnEngine(len(devices), eager=eager)
        device = Device(gpu, layout, 8 * max(layout.block_bytes))
        device.use(Method(Way.STAGED), Method(Way.STAGED))
        devices.append(device)
        return device

    monkeypatch.setattr("kvbm_vllm._worker.open_device", open_simulated)
    return devices


@contextmanager
def zeros_in_place_of(group):
    """Have zeros loaded in place of a group's objects."""
    scatter = StagedDevice.scatter
    memory = mmap.mmap(-1, 4 << 20)  # Read after `scatter` has returned.
    zeros = Region(ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory), owner=memory)

    def scatter_zeros(device, regions, blocks, fence=None, number=0):
        regions = [zeros] * len(regions) if number == group else regions
        return scatter(device, regions, blocks, fence, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StagedDevice, "scatter", scatter_zeros)
        yield


@contextmanager
def running(model, tiers, **options):
    """Run an engine, and leave nothing of it: neither memory of a GPU nor what it read of the environment."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = make_engine(model, tiers, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def settled(llm, answer):
    """Have all that an answer left to be stored stored."""
    drain(llm)
    return answer


def assert_restored(llm, watch, prompts, own):
    """Same answers, hits that end where vLLM's own do, and of each group the objects that the rules say."""
    for prompt, answer in zip(prompts, own, strict=True):
        tokens = boundary_of(llm, prompt)
        assert restored(llm, watch, prompt) == (answer, tokens, needed_of(llm, tokens)), len(prompt)
    assert failed_loads(llm) == 0


def prove(kind, folder, **options):
    """Restore a family's prompts from host memory, and after a restart from a disk."""
    model = write_model(folder / "model", kind)
    disk = {"backend": "lmdb", "capacity": "256MiB", "path": str(folder / "lmdb")}
    options = options_of(kind, extra={"load_deadline_s": 60}, **options)
    prompts = [make_prompt(length, seed=length) for length in LENGTHS]
    with watching() as watch, mended(kind):
        with running(model, [CPU, disk], **options) as llm:
            own = [settled(llm, own_answer(llm, prompt)) for prompt in prompts]
            assert len({boundary_of(llm, prompt) for prompt in prompts}) >= 3
            assert_restored(llm, watch, prompts, own)
            for group in needed_of(llm, boundary_of(llm, prompts[-1])):
                with zeros_in_place_of(group):
                    said, *_ = restored(llm, watch, prompts[-1])
                assert said != own[-1], f"the answer does not depend on what is loaded of group {group}"
            drain(llm)
        with running(model, [disk], **options) as llm:
            assert_restored(llm, watch, prompts, own)


@pytest.mark.parametrize("kind", ["gemma3", *(pytest.param(kind, marks=pytest.mark.soak) for kind in OTHERS)])
def test_restored_by_copies_that_run_late_as_from_vllms_own_cache(kind, monkeypatch, tmp_path):
    simulated = simulate(monkeypatch, eager=0.3)
    prove(kind, tmp_path)
    assert len(simulated) == 2


@pytest.mark.parametrize("kind", FEW_BLOCKS)
def test_blocks_are_given_to_others_while_copies_of_them_run_late(kind, monkeypatch, tmp_path):
    simulated = simulate(monkeypatch, eager=0.02)
    model = write_model(tmp_path / "model", kind)
    prompts = [make_prompt(length, seed=length) for length in range(400, 1500, 75)]
    room = {"max_model_len": 3712, "num_gpu_blocks_override": FEW_BLOCKS[kind], "max_num_batched_tokens": 256}
    with mended(kind), running(model, [CPU], **options_of(kind, **room)) as llm:
        reference = [generate(llm, [prompt])[0] for prompt in prompts]
        for _ in range(3):
            assert generate(llm, prompts) == reference
        assert sum(loaded(llm).values()) > 0
        assert failed_loads(llm) == 0
    assert [device.late > 0 for device in simulated] == [True], "no copy was late"
