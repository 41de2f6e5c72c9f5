"""The kernel that prepares and stores heads, where that is a launch of its own.

Shape legend: R rows, H query heads, G key-value heads, D head size and DP its power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skimp.kernels.triton.cached_heads import (
    pages_of,
    prepared_heads,
    slots,
    store_heads,
    turned,
)


@triton.jit(do_not_specialize=["rows"])
def append_kernel(
    qkv_ptr,
    q_ptr,
    out_ptr,
    arena_ptr,
    scales_ptr,
    table_ptr,
    recent_ptr,
    recent_table_ptr,
    positions_ptr,
    row_seq_ptr,
    q_factor_ptr,
    k_factor_ptr,
    cos_ptr,
    sin_ptr,
    rows,
    qkv_stride,
    table_stride,
    recent_stride,
    offset,
    recent_offset,
    EPS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TURN: tl.constexpr,
    ROOT: tl.constexpr,
    KIND: tl.constexpr,
    RECENT: tl.constexpr,
    PAGE: tl.constexpr,
    ITEM: tl.constexpr,
    PLANE: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One head of BLOCK_R rows: queries go to ``q``, keys and values to the cache and, if ALL, to
    ``q`` as well, whose rows then are as wide as those of ``qkv``."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    head = tl.program_id(1)
    dims = tl.arange(0, DP)
    inside = row < rows
    position = tl.load(positions_ptr + row, mask=inside, other=-1)
    ok = position >= 0
    wide = row.to(tl.int64)
    if head < H:
        x = prepared_heads(
            qkv_ptr, wide * qkv_stride + head * D, position, ok, q_factor_ptr, cos_ptr, sin_ptr,
            EPS, D, DP, NORM, ROTARY, INTERLEAVED,
        )  # fmt: skip
        if TURN:
            x = turned(x, BLOCK_R, D, DP, ROOT)
        real = (dims < D)[None, :]
        width: tl.constexpr = (H + 2 * G if ALL else H) * D
        to = (wide * width + head * D)[:, None] + dims[None, :]
        tl.store(q_ptr + to, x.to(q_ptr.dtype.element_ty), mask=ok[:, None] & real)
        to = (wide * (H * D) + head * D)[:, None] + dims[None, :]
        zeros = tl.zeros((BLOCK_R, DP), out_ptr.dtype.element_ty)
        tl.store(out_ptr + to, zeros, mask=(inside & (position < 0))[:, None] & real)
    else:
        vector = head - H  # of [2, kv_heads]
        start = wide * qkv_stride + head * D
        if head < H + G:
            x = prepared_heads(
                qkv_ptr, start, position, ok, k_factor_ptr, cos_ptr, sin_ptr,
                EPS, D, DP, NORM, ROTARY, INTERLEAVED,
            )  # fmt: skip
        else:
            x = prepared_heads(
                qkv_ptr, start, position, ok, k_factor_ptr, cos_ptr, sin_ptr,
                EPS, D, DP, False, 0, False,
            )  # fmt: skip
        if TURN:
            x = turned(x, BLOCK_R, D, DP, ROOT)
        if ALL:
            to = (wide * ((H + 2 * G) * D) + head * D)[:, None] + dims[None, :]
            tl.store(
                q_ptr + to, x.to(q_ptr.dtype.element_ty), mask=ok[:, None] & (dims < D)[None, :]
            )
        seq = tl.load(row_seq_ptr + row, mask=ok, other=0).to(tl.int64)
        table = table_ptr + seq * table_stride
        at, scale_at = slots(
            pages_of(table, position, ok, PAGE), position, offset, vector, KIND, D, PAGE, ITEM
        )
        store_heads(x, arena_ptr, scales_ptr, at, scale_at, ok, BLOCK_R, KIND, D, DP)
        if RECENT > 0:
            table = recent_table_ptr + seq * recent_stride
            at, scale_at = slots(
                pages_of(table, position, ok, PAGE),
                position,
                recent_offset,
                vector,
                0,
                D,
                PAGE,
                ITEM,
            )
            store_heads(x, recent_ptr, scales_ptr, at, scale_at, ok, BLOCK_R, 0, D, DP)
