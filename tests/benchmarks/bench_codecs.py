"""The codecs zstd and crypt against the bare libraries, on the KV of SmolLM2 and on random numbers.

    python tests/benchmarks/bench_codecs.py [--brief]

The KV is that of a story's first tokens, block by block of 32 tokens as a tier gets it. One thread; its own
processor time, so that other work on the machine counts little. Bare and codec alternate; medians. What
encrypts or signs bare draws a nonce from the kernel, as the library's page does. What signs bare copies the
block too, as a codec must. If `blosc2` is installed, it is in the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cryptography
import numpy as np
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvbm_core import Codec, CodecContext
from kvbm_crypt import CryptCodec, CryptConfig, KeySource
from kvbm_zstd import ZstdCodec, ZstdConfig

KEY = bytes(32)
BLOCK_TOKENS = 32
CONTEXT = CodecContext(bytes(16), 4 << 20, "bench")


def kv_of_smollm2(tokens: int) -> dict[str, tuple[int, list[bytes]]]:
    """Compute the KV of a story, in three dtypes: name to bytes of a number, and blocks."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "plugins"))
    import torch
    from engines import story_tokens
    from transformers import AutoModelForCausalLM

    folder, story = story_tokens()
    found: dict[str, tuple[int, list[bytes]]] = {"fp8": (1, [])}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.inference_mode():
            layers = model(torch.tensor([story[:tokens]]), use_cache=True).past_key_values.layers
        kv = torch.stack([part[0] for layer in layers for part in (layer.keys, layer.values)])
        blocks = [part.contiguous() for part in kv.split(BLOCK_TOKENS, dim=2)]
        found[name] = dtype.itemsize, [each.view(torch.uint8).numpy().tobytes() for each in blocks]
        if name == "bfloat16":
            found["fp8"][1].extend(
                each.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes() for each in blocks
            )
    return found


def speeds(blocks: Sequence[bytes], works: Sequence[Callable[[int], object]], repeats: int) -> list[float]:
    """Run each work over all blocks, in turns; give GB/s of the blocks' bytes."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, times in zip(works, seconds, strict=True):
            start_s = time.thread_time()
            for at in range(len(blocks)):
                work(at)
            times.append(time.thread_time() - start_s)
    return [sum(map(len, blocks)) / statistics.median(times) / 1e9 for times in seconds]


def through(codec: Codec, blocks: Sequence[bytes]) -> tuple[Callable, Callable, int]:
    """Give what encodes and what decodes a block, and the length of all of them encoded."""
    room = memoryview(bytearray(codec.max_bytes(max(map(len, blocks)))))
    views = [memoryview(block) for block in blocks]
    made = [bytes(room[: codec.encode(KEY, view, room)]) for view in views]
    return (
        lambda at: codec.encode(KEY, views[at], room),
        lambda at: codec.decode(KEY, memoryview(made[at]), room),
        sum(map(len, made)),
    )


def bench_zstd(name: str, element_bytes: int, blocks: Sequence[bytes], repeats: int) -> None:
    total = sum(map(len, blocks))
    encode, decode, length = through(ZstdCodec(ZstdConfig(element_bytes=element_bytes), CONTEXT), blocks)
    bares = {f"zstd {level}": bare_zstd(level, blocks) for level in (1, 3)}
    if importlib.util.find_spec("blosc2"):
        bares["Blosc2"] = bare_blosc2(element_bytes, blocks)
    for bare, (bare_encode, bare_decode, bare_length) in bares.items():
        found = speeds(blocks, [bare_encode, encode, bare_decode, decode], repeats)
        ratios = f"{total / bare_length:.3f} | {total / length:.3f}"
        print(f"| {name} | {bare} | {ratios} | " + " | ".join(f"{speed:.2f}" for speed in found) + " |")


def bare_zstd(level: int, blocks: Sequence[bytes]) -> tuple[Callable, Callable, int]:
    """As `through`, for the library alone."""
    compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    frames = [compressor.compress(block) for block in blocks]
    return (
        lambda at: compressor.compress(blocks[at]),
        lambda at: decompressor.decompress(frames[at]),
        sum(map(len, frames)),
    )


def bare_blosc2(element_bytes: int, blocks: Sequence[bytes]) -> tuple[Callable, Callable, int]:
    """As `through`, for a library that knows planes itself: of twelve settings the one that was best."""
    import blosc2

    def compress(at: int) -> bytes:
        filters = [blosc2.Filter.SHUFFLE]
        return blosc2.compress2(
            blocks[at], codec=blosc2.Codec.ZSTD, filters=filters, clevel=1, typesize=element_bytes, nthreads=1
        )

    chunks = [compress(at) for at in range(len(blocks))]
    return compress, lambda at: blosc2.decompress2(chunks[at], nthreads=1), sum(map(len, chunks))


def bench_crypt(blocks: Sequence[bytes], repeats: int) -> None:
    bare, nonce = AESGCM(bytes(32)), os.urandom(12)
    sealed = [bare.encrypt(nonce, block, KEY) for block in blocks]
    tags = [bare.encrypt(nonce, b"", block) for block in blocks]
    loaded = [bytes(bytearray(block)) for block in blocks]  # No nearer in the cache than the codec's.
    room = bytearray(len(blocks[0]))

    def sign(at: int) -> None:
        room[:] = blocks[at]  # A tier stores other memory than a block's.
        bare.encrypt(os.urandom(12), b"", blocks[at])

    def verify(at: int) -> None:
        bare.decrypt(nonce, tags[at], loaded[at])
        room[:] = loaded[at]

    bares = {
        "encrypt": (
            lambda at: bare.encrypt(os.urandom(12), blocks[at], KEY),
            lambda at: bare.decrypt(nonce, sealed[at], KEY),
        ),
        "sign": (sign, verify),
    }
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(32))
        file.flush()
        for mode, (seal, unseal) in bares.items():
            config = CryptConfig(keys=(KeySource(file=file.name),), mode=mode)
            encode, decode, _ = through(CryptCodec(config, CONTEXT), blocks)
            found = speeds(blocks, [seal, encode, unseal, decode], 5 * repeats)
            ratios = [found[at + 1] / found[at] for at in (0, 2)]
            print(
                f"| {mode} | {len(blocks[0]):,} | "
                + " | ".join(f"{speed:.2f}" for speed in found)
                + f" | {ratios[0]:.2f}, {ratios[1]:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brief", action="store_true", help="a quick look, without the model")
    options = parser.parse_args()
    repeats = 3 if options.brief else 15
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, zstandard {zstandard.__version__} (zstd "
        f"{'.'.join(map(str, zstandard.ZSTD_VERSION))}), cryptography {cryptography.__version__}, "
        f"numpy {np.__version__}; GB/s of one thread's processor time\n"
    )
    data = {} if options.brief else kv_of_smollm2(1024)
    data["random"] = 2, [os.urandom(737_280) for _ in range(8)]
    print("| data | bare | ratio bare | ours | encode bare | ours | decode bare | ours |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (element_bytes, blocks) in data.items():
        bench_zstd(name, element_bytes, blocks[:16], repeats)
    print("\n| mode | bytes | encode bare | ours | decode bare | ours | ratios |")
    print("|---|---|---|---|---|---|---|")
    for nbytes in (64 << 10, 1 << 20, 4 << 20):
        bench_crypt([os.urandom(nbytes) for _ in range((8 << 20) // nbytes)], repeats)


if __name__ == "__main__":
    main()
