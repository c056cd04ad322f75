"""The kernel that moves pages, in Triton. Imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["move_pages_kernel"]


@triton.jit(do_not_specialize=["jobs", "total"])  # type: ignore[untyped-decorator]
def move_pages_kernel(  # type: ignore[no-untyped-def]
    table, jobs, stride_bytes, page_words, total,
    VIEWS: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr, WORD_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    kind = (
        tl.int64
        if WORD_BYTES == 8
        else tl.int32
        if WORD_BYTES == 4
        else tl.int16
        if WORD_BYTES == 2
        else tl.int8
    )
    pairs = jobs.to(tl.pointer_type(tl.int64))
    lane = tl.arange(0, WORDS)
    for chunk in range(tl.program_id(0), total, tl.num_programs(0)):
        view = (chunk // CHUNKS) % VIEWS
        job = chunk // (CHUNKS * VIEWS)
        page = tl.load(table + view * 2) + tl.load(pairs + job * 2) * stride_bytes
        flat = tl.load(pairs + job * 2 + 1) + tl.load(table + view * 2 + 1)
        if ALIGNED:
            page = tl.multiple_of(page, 16)
            flat = tl.multiple_of(flat, 16)
        word = (chunk % CHUNKS) * WORDS + lane
        there = word < page_words
        paged = page.to(tl.pointer_type(kind)) + word
        flattened = flat.to(tl.pointer_type(kind)) + word
        if GATHER:
            tl.store(flattened, tl.load(paged, mask=there), mask=there)
        else:
            tl.store(paged, tl.load(flattened, mask=there), mask=there)
