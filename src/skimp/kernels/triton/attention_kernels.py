"""The kernel that attends, and where rows are single also prepares and stores heads.

Shape legend: R rows, H query heads, G key-value heads, D head size and DP its power of two. A tile
holds ROWS rows of one sequence times the GROUP query heads of one key-value head, so keys are read
once for all of them. Peaks and scores count in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skimp.kernels.triton.cached_heads import (
    pages_of,
    prepared,
    raw_heads,
    slots,
    store_heads,
    turned,
)
from skimp.kernels.triton.launch import let_next_start, wait_for_inputs
from skimp.kernels.triton.shares import add_shares
from skimp.kernels.triton.softmax import over_latents, over_memory, score_of

# How a program finds its rows.
ONE_ROW, ONE_TILE, SEARCH = 0, 1, 2


@triton.jit
def _prefetch(vectors, D: tl.constexpr, ITEM: tl.constexpr):
    """Bring the vectors at these addresses [M] to the second-level cache."""
    LINES: tl.constexpr = triton.cdiv(D * ITEM, 128)
    within = tl.minimum(tl.arange(0, triton.next_power_of_2(LINES)), LINES - 1) * (128 // ITEM)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [(vectors[:, None] + within[None, :]).to(tl.int64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["rows", "num_seqs", "least_rows", "target"])
def attention_kernel(
    q_ptr,
    out_ptr,
    arena_ptr,
    scales_ptr,
    table_ptr,
    recent_ptr,
    recent_table_ptr,
    positions_ptr,
    row_seq_ptr,
    kv_end_ptr,
    seq_starts_ptr,
    q_factor_ptr,
    k_factor_ptr,
    cos_ptr,
    sin_ptr,
    sinks_ptr,
    partial_ptr,
    level_ptr,
    counter_ptr,
    rows,
    num_seqs,
    least_rows,
    target,
    q_stride,
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
    EXTRA: tl.constexpr,
    QK_SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    FUSED: tl.constexpr,
    MODE: tl.constexpr,
    TWO_PHASE: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_P: tl.constexpr,
    APART: tl.constexpr,
    LEAST_BLOCKS: tl.constexpr,
    LONE_BLOCKS: tl.constexpr,
    ROWS_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile's share of its keys; the last program to end adds the shares, in their order.

    ``FUSED`` (single rows only): ``q`` is the whole qkv, and the first split also stores the new
    key and value, which nobody reads from the cache in this launch. ``EXTRA``: see ``softmax.py``;
    all groups of heads then read the same latents. ``APART``: shares are left for another kernel
    to add up, those without keys with a total of 0.
    """
    GROUP: tl.constexpr = H // G
    ROWS: tl.constexpr = 1 if MODE == 0 else BLOCK_M // GROUP
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if MODE == 0:
        first = tile
        end = tile + 1
    elif MODE == 1:
        first = tl.load(seq_starts_ptr + tile)
        end = tl.load(seq_starts_ptr + tile + 1)
        if end - first > ROWS:
            end = first  # left to the launch for longer ones
    else:
        # Sequence i owns tiles from starts[i] // ROWS + i on; the last tiles, with the most keys,
        # go first.
        tile = tl.num_programs(0) - 1 - tile
        left = 0
        right = num_seqs
        while left < right:
            middle = (left + right) // 2
            if tl.load(seq_starts_ptr + middle) // ROWS + middle <= tile:
                left = middle + 1
            else:
                right = middle
        start = tl.load(seq_starts_ptr + left - 1)
        end = tl.load(seq_starts_ptr + left)
        first = start + (tile - (start // ROWS + left - 1)) * ROWS
        if end - start < least_rows:
            end = first
    if first >= end:
        return
    seq = tl.load(row_seq_ptr + first).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    row = first + lane // GROUP
    q_head = head * GROUP + lane % GROUP
    ok = (lane < ROWS * GROUP) & (row < end)
    position = tl.load(positions_ptr + row, mask=ok, other=-1)
    row_end = tl.load(kv_end_ptr + row, mask=ok, other=0)
    dims = tl.arange(0, DP)
    out_at = (row.to(tl.int64) * (H * D) + q_head * D)[:, None] + dims[None, :]
    if FUSED and (tl.max(position) < 0) & (split == 0):
        wait_for_inputs(PDL)
        zeros = tl.zeros((BLOCK_M, DP), out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_at, zeros, mask=ok[:, None] & (dims < D)[None, :])
    ok = ok & (position >= 0)
    tile_end = tl.max(tl.where(ok, row_end, 0))
    if WINDOW > 0:
        row_low = tl.maximum(position - (WINDOW - 1), 0)
        tile_low = tl.min(tl.where(ok, row_low, 0x7FFFFFFF))
        tile_low = tl.minimum(tile_low, tile_end) // BLOCK_N * BLOCK_N
    else:
        row_low = tl.zeros((BLOCK_M,), tl.int32)
        tile_low = 0
    start = tile_low
    stop = tile_end
    active = 1
    if SPLITS > 1:
        blocks = tl.cdiv(tile_end - tile_low, BLOCK_N)
        share = tl.maximum(tl.cdiv(blocks, SPLITS), LEAST_BLOCKS)
        if ROWS_P > 0:
            # Shares of about one size over all sequences, so that a long one does not lag.
            every = tl.arange(0, ROWS_P)
            lengths = tl.load(kv_end_ptr + every, mask=every < rows, other=0)
            used = tl.load(positions_ptr + every, mask=every < rows, other=-1) >= 0
            if WINDOW > 0:
                lengths = tl.minimum(lengths, WINDOW)
            lengths = tl.where(used, tl.cdiv(lengths, BLOCK_N), 0)
            share = tl.maximum(share, tl.cdiv(tl.sum(lengths) * G, target))
        if blocks <= LONE_BLOCKS:
            share = LONE_BLOCKS  # adding shares up would cost more than they save
        active = tl.maximum(tl.cdiv(blocks, share), 1)
        start = tile_low + split * share * BLOCK_N
        stop = tl.minimum(start + share * BLOCK_N, tile_end)
    if (split >= active) | (tl.max(position) < 0):
        if APART:
            place = ((tile * G + head).to(tl.int64) * SPLITS + split) * (2 * BLOCK_M) + lane
            tl.store(level_ptr + place, tl.full((BLOCK_M,), float("-inf"), tl.float32))
            tl.store(level_ptr + place + BLOCK_M, tl.zeros((BLOCK_M,), tl.float32))
        return
    table = table_ptr + seq * table_stride
    if RECENT > 0:
        recent_table = recent_table_ptr + seq * recent_stride

    q_at = row.to(tl.int64) * q_stride + q_head * (D + EXTRA)
    vector = 0 if EXTRA > 0 else head  # whose keys these are
    if PDL and KIND == 0:
        # Keys and values of earlier steps are on their way while the kernel before ends.
        near = start + tl.arange(0, BLOCK_N)
        near_at, _ = slots(
            pages_of(table, near, near < stop, PAGE), near, offset, vector, KIND, D + EXTRA, PAGE,
            ITEM,
        )  # fmt: skip
        _prefetch(arena_ptr + near_at, D + EXTRA, ITEM)
        if EXTRA == 0:
            _prefetch(arena_ptr + near_at + PLANE, D, ITEM)
    wait_for_inputs(PDL)  # all that was read so far the host has sent
    let_next_start(PDL)
    if FUSED:
        raw_q = raw_heads(
            q_ptr, q_at, position, ok, q_factor_ptr, cos_ptr, sin_ptr,
            D, DP, NORM, ROTARY, INTERLEAVED,
        )  # fmt: skip
        one = tl.arange(0, 1)
        here = tl.load(positions_ptr + first + one)
        new_end = tl.load(kv_end_ptr + first)
        new_at = (first + one).to(tl.int64) * q_stride + (H + head) * D
        raw_k = raw_heads(
            q_ptr, new_at, here, one == 0, k_factor_ptr, cos_ptr, sin_ptr,
            D, DP, NORM, ROTARY, INTERLEAVED,
        )  # fmt: skip
        raw_v = raw_heads(
            q_ptr, new_at + G * D, here, one == 0, k_factor_ptr, cos_ptr, sin_ptr,
            D, DP, False, 0, False,
        )  # fmt: skip
        q = prepared(raw_q, EPS, D, DP, NORM, ROTARY, INTERLEAVED)
        if TURN:
            q = turned(q, BLOCK_M, D, DP, ROOT)
        q = q.to(DTYPE)
    else:
        inside = ok[:, None] & (dims < D)[None, :]
        q = tl.load(q_ptr + q_at[:, None] + dims[None, :], mask=inside, other=0.0)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DP), tl.float32)
    if split == 0:
        if SINKS:
            peak = tl.load(sinks_ptr + q_head, mask=ok, other=0.0) * 1.4426950408889634
            total += 1.0
        if FUSED:
            k = prepared(raw_k, EPS, D, DP, NORM, ROTARY, INTERLEAVED)
            v = prepared(raw_v, EPS, D, DP, False, 0, False)
            if TURN:
                k = turned(k, 1, D, DP, ROOT)
                v = turned(v, 1, D, DP, ROOT)
            at, scale_at = slots(
                pages_of(table, here, one == 0, PAGE), here, offset, head, KIND, D, PAGE, ITEM
            )
            new_k = store_heads(k, arena_ptr, scales_ptr, at, scale_at, one == 0, 1, KIND, D, DP)
            new_v = store_heads(
                v, arena_ptr, scales_ptr, at + PLANE, scale_at + PLANE // 2, one == 0,
                1, KIND, D, DP,
            )  # fmt: skip
            if RECENT > 0:
                pages = pages_of(recent_table, here, one == 0, PAGE)
                at, scale_at = slots(pages, here, recent_offset, head, 0, D, PAGE, ITEM)
                new_k = store_heads(k, recent_ptr, scales_ptr, at, scale_at, one == 0, 1, 0, D, DP)
                new_v = store_heads(
                    v, recent_ptr, scales_ptr, at + G * PAGE * D, scale_at, one == 0, 1, 0, D, DP
                )
            raw = tl.sum(q.to(tl.float32) * new_k, 1)
            visible = ok & (tl.max(here) < new_end)
            score = tl.where(visible, score_of(raw, QK_SCALE, CAP), float("-inf"))
            new_peak = tl.maximum(peak, score)
            level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            weight = tl.exp2(score - level)
            total = total * tl.exp2(peak - level) + weight
            peak = new_peak
            acc = weight[:, None] * new_v

    skip = tl.max(position)
    if EXTRA > 0:
        more = tl.arange(0, max(16, triton.next_power_of_2(EXTRA)))
        q_extra = tl.load(
            q_ptr + q_at[:, None] + (D + more)[None, :],
            mask=ok[:, None] & (more < EXTRA)[None, :],
            other=0.0,
        )
        peak, total, acc = over_latents(
            q, q_extra, peak, total, acc, start, stop, row_end, ok, arena_ptr, table, offset,
            TWO_PHASE, QK_SCALE, D, DP, PAGE, ITEM, EXTRA, BLOCK_N,
        )  # fmt: skip
    elif RECENT > 0:
        edge = tl.maximum(position - (RECENT - 1), row_low)
        peak, total, acc = over_memory(
            q, peak, total, acc, start, stop, row_low, tl.minimum(edge, row_end), ok, skip,
            arena_ptr, scales_ptr, table, offset, vector, TWO_PHASE, WINDOW > 0, FUSED, QK_SCALE,
            CAP, KIND, D, DP, PAGE, ITEM, PLANE, BLOCK_N, NATIVE_FP8, WORDS, ASM,
        )  # fmt: skip
        peak, total, acc = over_memory(
            q, peak, total, acc, start, stop, edge, row_end, ok, skip,
            recent_ptr, scales_ptr, recent_table, recent_offset, vector, TWO_PHASE, True, FUSED,
            QK_SCALE, CAP, 0, D, DP, PAGE, ITEM, G * PAGE * D, BLOCK_N,
            NATIVE_FP8, WORDS, ASM,
        )  # fmt: skip
    else:
        peak, total, acc = over_memory(
            q, peak, total, acc, start, stop, row_low, row_end, ok, skip,
            arena_ptr, scales_ptr, table, offset, vector, TWO_PHASE, WINDOW > 0, FUSED, QK_SCALE,
            CAP, KIND, D, DP, PAGE, ITEM, PLANE, BLOCK_N, NATIVE_FP8, WORDS, ASM,
        )  # fmt: skip

    if (active == 1) & (not APART):
        x = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        if TURN:
            x = turned(x, BLOCK_M, D, DP, ROOT)
        x = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_at, x, mask=ok[:, None] & (dims < D)[None, :])
    elif SPLITS > 1:
        owner = tl.program_id(0) * G + head
        base = owner.to(tl.int64) * SPLITS
        place = (base + split) * BLOCK_M + lane
        tl.store(level_ptr + place + (base + split) * BLOCK_M, peak, mask=ok)
        tl.store(level_ptr + place + (base + split + 1) * BLOCK_M, total, mask=ok)
        tl.store(partial_ptr + place[:, None] * DP + dims[None, :], acc, mask=ok[:, None])
        if not APART:
            add_shares(
                partial_ptr, level_ptr, counter_ptr, out_ptr, positions_ptr, out_at, owner, base,
                active, first, end, head, ok, lane, ROWS, GROUP, H, D, DP, TURN, ROOT, SPLITS_P,
                BLOCK_M,
            )  # fmt: skip
