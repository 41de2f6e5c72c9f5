"""A tile of queries over the keys and values of a memory: online softmax, block by block.

Shape legend: M query rows times heads, N keys of a block, D head size and DP its power of two.
Peaks and scores count in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skimp.kernels.triton.cached_heads import (
    apart,
    load_heads,
    load_words,
    pages_of,
    slots,
    together,
    word_slots,
)
from skimp.kernels.triton.products import decode_words


@triton.jit
def score_of(raw, QK_SCALE: tl.constexpr, CAP: tl.constexpr):
    """Products as scores in powers of two."""
    if CAP > 0:
        # tanh(x) = 1 - 2 / (1 + e**2x)
        power = tl.exp2(raw * (QK_SCALE * 2.8853900817779268 / CAP))
        return (CAP * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + power))
    else:
        return raw * (QK_SCALE * 1.4426950408889634)


@triton.jit
def _in_share(keys, low, stop, skip, SKIP: tl.constexpr):
    ok = (keys < stop) & (keys >= low)
    if SKIP:
        ok = ok & (keys != skip)
    return ok


@triton.jit
def _weigh(
    raw,
    peak,
    total,
    keys,
    ok,
    row_low,
    row_end,
    MASKED: tl.constexpr,
    LOWER: tl.constexpr,
    QK_SCALE: tl.constexpr,
    CAP: tl.constexpr,
):
    """One block of the online softmax (Milakov & Gimelshein 2018): its weights, and by how much
    what was added up before shrinks."""
    scores = score_of(raw, QK_SCALE, CAP)
    if MASKED:
        seen = ok[None, :] & (keys[None, :] < row_end[:, None])
        if LOWER:
            seen = seen & (keys[None, :] >= row_low[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # Before a row's first visible key its peak is -inf, and differences would be NaN.
    level = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = tl.exp2(scores - level[:, None])
    shrink = tl.exp2(peak - level)
    return new_peak, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def _over_keys(
    q,
    peak,
    total,
    acc,
    start,
    stop,
    row_low,
    row_end,
    tile_low,
    skip,
    arena_ptr,
    scales_ptr,
    table,
    offset,
    head,
    MASKED: tl.constexpr,
    LOWER: tl.constexpr,
    SKIP: tl.constexpr,
    QK_SCALE: tl.constexpr,
    CAP: tl.constexpr,
    KIND: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    ITEM: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """The keys [start, stop). Not ``MASKED``: whole blocks, and every row sees all of them."""
    columns = tl.arange(0, BLOCK_N)
    if MASKED:
        ok = _in_share(start + columns, tile_low, stop, skip, SKIP)
    else:
        ok = None
    pages = pages_of(table, start + columns, ok, PAGE)
    for first in tl.range(start, stop, BLOCK_N):
        keys = first + columns
        at, scale_at = slots(pages, keys, offset, head, KIND, D, PAGE, ITEM)
        here = ok
        # A block's pages are asked for one block early: a load whose place is still to be loaded
        # would be issued later than the stages allow.
        later = keys + BLOCK_N
        if MASKED:
            ok = _in_share(later, tile_low, stop, skip, SKIP)
            pages = pages_of(table, later, ok, PAGE)
        else:
            pages = pages_of(table, later, later < stop, PAGE)
        k = load_heads(arena_ptr, at, here, MASKED, KIND, D, DP, q.dtype, NATIVE_FP8)
        raw = tl.dot(q, tl.trans(k), input_precision="ieee")
        if KIND > 0:
            if MASKED:
                k_scale = tl.load(scales_ptr + scale_at, mask=here, other=0.0)
                v_scale = tl.load(scales_ptr + scale_at + PLANE // 2, mask=here, other=0.0)
            else:
                k_scale = tl.load(scales_ptr + scale_at)
                v_scale = tl.load(scales_ptr + scale_at + PLANE // 2)
            raw = raw * k_scale.to(tl.float32)[None, :]
        peak, total, weights, shrink = _weigh(
            raw, peak, total, keys, here, row_low, row_end, MASKED, LOWER, QK_SCALE, CAP
        )
        v = load_heads(arena_ptr, at + PLANE, here, MASKED, KIND, D, DP, q.dtype, NATIVE_FP8)
        if KIND > 0:
            weights = weights * v_scale.to(tl.float32)[None, :]
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return peak, total, acc


@triton.jit
def _over_latents(
    q,
    q_extra,
    peak,
    total,
    acc,
    start,
    stop,
    row_end,
    arena_ptr,
    table,
    offset,
    MASKED: tl.constexpr,
    QK_SCALE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    ITEM: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """:func:`_over_keys` for latents."""
    columns = tl.arange(0, BLOCK_N)
    # A block inside a page needs one place; else each token has its own.
    WITHIN: tl.constexpr = PAGE % BLOCK_N == 0
    near = start if WITHIN else start + columns
    pages = pages_of(table, near, near < stop, PAGE)
    for first in tl.range(start, stop, BLOCK_N):
        keys = first + columns
        here = keys < stop if MASKED else None
        at = _latents_at(pages, first, offset, D + EXTRA, PAGE, ITEM, BLOCK_N, WITHIN)
        later = (first if WITHIN else keys) + BLOCK_N  # asked for a block early, see _over_keys
        pages = pages_of(table, later, later < stop, PAGE)
        c = load_heads(arena_ptr, at, here, MASKED, 0, D, DP, q.dtype, False)
        more = load_heads(
            arena_ptr, at + D, here, MASKED, 0, EXTRA, q_extra.shape[1], q.dtype, False
        )
        raw = tl.dot(q, tl.trans(c), input_precision="ieee")
        raw = tl.dot(q_extra, tl.trans(more), raw, input_precision="ieee")
        peak, total, weights, shrink = _weigh(
            raw, peak, total, keys, here, row_end, row_end, MASKED, False, QK_SCALE, 0.0
        )
        acc = tl.dot(weights.to(q.dtype), c, acc * shrink[:, None], input_precision="ieee")
    return peak, total, acc


@triton.jit
def _latents_at(
    pages,
    first,
    offset,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ITEM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WITHIN: tl.constexpr,
):
    """Where the latents of a block begin, [BLOCK_N]; ``pages`` are its tokens', or its only one."""
    columns = tl.arange(0, BLOCK_N)
    if WITHIN:
        at, _ = slots(pages, first, offset, 0, 0, WIDTH, PAGE, ITEM)
        return at + columns * WIDTH
    else:
        at, _ = slots(pages, first + columns, offset, 0, 0, WIDTH, PAGE, ITEM)
        return at


@triton.jit
def _scores_of(q, k, raw, PART: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr):
    """``raw`` and the products of queries with number PART of each word of the keys."""
    numbers = decode_words(k, k, CODE, PART, False, ASM, q.dtype)
    return tl.dot(q, tl.trans(numbers), raw, input_precision="ieee")


@triton.jit
def _mix(w, v, acc, PART: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr):
    """``acc`` and number PART of each word of the values, weighed."""
    numbers = decode_words(v, v, CODE, PART, False, ASM, w.dtype)
    return tl.dot(w, numbers, acc, input_precision="ieee")


@triton.jit
def _over_words(
    q,
    peak,
    total,
    acc,
    start,
    stop,
    row_low,
    row_end,
    tile_low,
    skip,
    words_ptr,
    scales_ptr,
    table,
    offset,
    head,
    LOWER: tl.constexpr,
    SKIP: tl.constexpr,
    QK_SCALE: tl.constexpr,
    CAP: tl.constexpr,
    KIND: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASM: tl.constexpr,
):
    """:func:`_over_keys` for low bits and few rows: codes go from shared memory to tensor cores two
    bytes at a time, and each number of a word has a product of its own."""
    PARTS: tl.constexpr = 4 if KIND == 3 else 2
    CODE: tl.constexpr = 2 if KIND == 3 else 3 if KIND == 2 else 1  # that of products.py
    q0, q1, q2, q3 = apart(q, q.shape[0], DP, PARTS)
    acc0, acc1, acc2, acc3 = apart(acc, q.shape[0], DP, PARTS)
    columns = tl.arange(0, BLOCK_N)
    ok = _in_share(start + columns, tile_low, stop, skip, SKIP)
    pages = pages_of(table, start + columns, ok, PAGE)
    for first in tl.range(start, stop, BLOCK_N):
        keys = first + columns
        at, scale_at = word_slots(pages, keys, offset, head, KIND, D, PAGE)
        here = ok
        ok = _in_share(keys + BLOCK_N, tile_low, stop, skip, SKIP)
        pages = pages_of(table, keys + BLOCK_N, ok, PAGE)
        k = load_words(words_ptr, at, here, KIND, D, DP)
        raw = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
        raw = _scores_of(q0, k, raw, 0, CODE, ASM)
        raw = _scores_of(q1, k, raw, 1, CODE, ASM)
        if PARTS == 4:
            raw = _scores_of(q2, k, raw, 2, CODE, ASM)
            raw = _scores_of(q3, k, raw, 3, CODE, ASM)
        k_scale = tl.load(scales_ptr + scale_at, mask=here, other=0.0)
        v_scale = tl.load(scales_ptr + scale_at + PLANE // 2, mask=here, other=0.0)
        raw = raw * k_scale.to(tl.float32)[None, :]
        peak, total, weights, shrink = _weigh(
            raw, peak, total, keys, here, row_low, row_end, True, LOWER, QK_SCALE, CAP
        )
        w = (weights * v_scale.to(tl.float32)[None, :]).to(q.dtype)
        v = load_words(words_ptr, at + PLANE // 2, here, KIND, D, DP)
        acc0 = _mix(w, v, acc0 * shrink[:, None], 0, CODE, ASM)
        acc1 = _mix(w, v, acc1 * shrink[:, None], 1, CODE, ASM)
        if PARTS == 4:
            acc2 = _mix(w, v, acc2 * shrink[:, None], 2, CODE, ASM)
            acc3 = _mix(w, v, acc3 * shrink[:, None], 3, CODE, ASM)
    return peak, total, together(acc0, acc1, acc2, acc3, q.shape[0], DP, PARTS)


@triton.jit
def over_memory(
    q,
    peak,
    total,
    acc,
    start,
    stop,
    row_low,
    row_end,
    ok,
    skip,
    arena_ptr,
    scales_ptr,
    table,
    offset,
    head,
    TWO_PHASE: tl.constexpr,
    LOWER: tl.constexpr,
    SKIP: tl.constexpr,
    QK_SCALE: tl.constexpr,
    CAP: tl.constexpr,
    KIND: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    ITEM: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
):
    """One memory's keys: row i sees [row_low, row_end) of it, this program those in
    [start, stop), of which ``start`` is a multiple of BLOCK_N."""
    some = ok & (row_low < row_end)
    tile_low = tl.min(tl.where(some, row_low, 0x7FFFFFFF))
    tile_end = tl.max(tl.where(some, row_end, 0))
    start = tl.maximum(start, tl.minimum(tile_low, tile_end) // BLOCK_N * BLOCK_N)
    stop = tl.minimum(stop, tile_end)
    if TWO_PHASE:
        # Whole blocks that every row sees need no masks.
        all_low = tl.max(tl.where(ok, row_low, 0)) if LOWER else 0
        all_end = tl.min(tl.where(ok, row_end, 0x7FFFFFFF))
        middle = tl.minimum(tl.cdiv(all_low, BLOCK_N) * BLOCK_N, stop)
        middle = tl.maximum(middle, start)
        late = tl.maximum(tl.minimum(all_end, stop) // BLOCK_N * BLOCK_N, middle)
        if LOWER:
            peak, total, acc = _over_keys(
                q, peak, total, acc, start, middle, row_low, row_end, tile_low, skip,
                arena_ptr, scales_ptr, table, offset, head, True, LOWER, SKIP, QK_SCALE, CAP,
                KIND, D, DP, PAGE, ITEM, PLANE, BLOCK_N, NATIVE_FP8,
            )  # fmt: skip
        peak, total, acc = _over_keys(
            q, peak, total, acc, middle, late, row_low, row_end, tile_low, skip,
            arena_ptr, scales_ptr, table, offset, head, False, LOWER, SKIP, QK_SCALE, CAP,
            KIND, D, DP, PAGE, ITEM, PLANE, BLOCK_N, NATIVE_FP8,
        )  # fmt: skip
        start = late
    if WORDS and KIND > 0:
        words_ptr = arena_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        peak, total, acc = _over_words(
            q, peak, total, acc, start, stop, row_low, row_end, tile_low, skip,
            words_ptr, scales_ptr, table, offset, head, LOWER, SKIP, QK_SCALE, CAP,
            KIND, D, DP, PAGE, PLANE, BLOCK_N, ASM,
        )  # fmt: skip
    else:
        peak, total, acc = _over_keys(
            q, peak, total, acc, start, stop, row_low, row_end, tile_low, skip,
            arena_ptr, scales_ptr, table, offset, head, True, LOWER, SKIP, QK_SCALE, CAP,
            KIND, D, DP, PAGE, ITEM, PLANE, BLOCK_N, NATIVE_FP8,
        )  # fmt: skip
    return peak, total, acc


@triton.jit
def over_latents(
    q,
    q_extra,
    peak,
    total,
    acc,
    start,
    stop,
    row_end,
    ok,
    arena_ptr,
    table,
    offset,
    TWO_PHASE: tl.constexpr,
    QK_SCALE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    ITEM: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """:func:`over_memory` where a token is one latent of D numbers and EXTRA more: all of them are
    its key, and the D are its value too."""
    if TWO_PHASE:
        all_end = tl.min(tl.where(ok, row_end, 0x7FFFFFFF))
        late = tl.maximum(tl.minimum(all_end, stop) // BLOCK_N * BLOCK_N, start)
        peak, total, acc = _over_latents(
            q, q_extra, peak, total, acc, start, late, row_end, arena_ptr, table, offset, False,
            QK_SCALE, D, DP, PAGE, ITEM, EXTRA, BLOCK_N,
        )  # fmt: skip
        start = late
    peak, total, acc = _over_latents(
        q, q_extra, peak, total, acc, start, stop, row_end, arena_ptr, table, offset, True,
        QK_SCALE, D, DP, PAGE, ITEM, EXTRA, BLOCK_N,
    )  # fmt: skip
    return peak, total, acc
