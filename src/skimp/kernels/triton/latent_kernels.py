"""Before and after attention over latents: queries brought to the latent, what is remembered
prepared and stored, values of heads made of mixed latents.

Shape legend: R rows, H heads, N nope_dim, P rope_dim, V value_dim, L latent_dim; a trailing P is
the next power of two. The matrix of heads is [H, N + V, L].
"""

from __future__ import annotations

import triton
import triton.language as tl

from skimp.kernels.triton.cached_heads import pages_of, prepared_heads
from skimp.kernels.triton.launch import let_next_start, wait_for_inputs


@triton.jit
def _to_latent(
    queries_ptr,
    heads_ptr,
    q_ptr,
    positions_ptr,
    rows,
    queries_stride,
    head,
    row,
    to,
    H: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    PDL: tl.constexpr,
):
    """Numbers ``to`` of the queries that meet latents, of rows ``row`` of one head."""
    nope = tl.arange(0, NP)
    weights = tl.load(
        heads_ptr + (head * (N + V) + nope)[:, None] * L + to[None, :],
        mask=(nope < N)[:, None] & (to < L)[None, :],
        other=0.0,
    )
    position = tl.load(positions_ptr + row, mask=row < rows, other=-1)
    ok = position >= 0
    wait_for_inputs(PDL)
    let_next_start(PDL)
    at = row.to(tl.int64) * queries_stride + head * (N + P)
    q = tl.load(
        queries_ptr + at[:, None] + nope[None, :],
        mask=ok[:, None] & (nope < N)[None, :],
        other=0.0,
    )
    y = tl.dot(q, weights, input_precision="ieee")
    out = (row.to(tl.int64) * H + head) * (L + P)
    tl.store(
        q_ptr + out[:, None] + to[None, :],
        y.to(q_ptr.dtype.element_ty),
        mask=ok[:, None] & (to < L)[None, :],
    )


@triton.jit
def _what_is_left(
    queries_ptr,
    latents_ptr,
    q_ptr,
    cached_ptr,
    arena_ptr,
    table_ptr,
    positions_ptr,
    row_seq_ptr,
    factor_ptr,
    cos_ptr,
    sin_ptr,
    rows,
    queries_stride,
    latents_stride,
    table_stride,
    offset,
    head,
    row,
    EPS: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    L: tl.constexpr,
    LP: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr,
    ITEM: tl.constexpr,
    EXPAND: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotates the queries of rows ``row`` of one head, and with the first head norms, rotates and
    stores these rows' latents."""
    KEPT: tl.constexpr = N if EXPAND else L  # of a query before what is rotated
    wait_for_inputs(PDL)
    let_next_start(PDL)
    dims = tl.arange(0, PP)
    wide = row.to(tl.int64)
    position = tl.load(positions_ptr + row, mask=row < rows, other=-1)
    ok = position >= 0
    x = prepared_heads(
        queries_ptr, wide * queries_stride + head * (N + P) + N, position, ok, factor_ptr,
        cos_ptr, sin_ptr, EPS, P, PP, False, ROTARY, INTERLEAVED,
    )  # fmt: skip
    out = (wide * H + head) * (KEPT + P) + KEPT
    real = ok[:, None] & (dims < P)[None, :]
    tl.store(q_ptr + out[:, None] + dims[None, :], x.to(q_ptr.dtype.element_ty), mask=real)
    if EXPAND:
        nope = tl.arange(0, NP)
        kept = ok[:, None] & (nope < N)[None, :]
        at = wide * queries_stride + head * (N + P)
        y = tl.load(queries_ptr + at[:, None] + nope[None, :], mask=kept)
        tl.store(q_ptr + (out - N)[:, None] + nope[None, :], y, mask=kept)
    if head == 0:
        all_dims = tl.arange(0, LP)
        c = prepared_heads(
            latents_ptr, wide * latents_stride, position, ok, factor_ptr, cos_ptr, sin_ptr,
            EPS, L, LP, True, 0, False,
        )  # fmt: skip
        key = prepared_heads(
            latents_ptr, wide * latents_stride + L, position, ok, factor_ptr, cos_ptr,
            sin_ptr, EPS, P, PP, False, ROTARY, INTERLEAVED,
        )  # fmt: skip
        seq = tl.load(row_seq_ptr + row, mask=ok, other=0).to(tl.int64)
        pages = pages_of(table_ptr + seq * table_stride, position, ok, PAGE).to(tl.int64)
        at = pages * (64 // ITEM) + offset + (position % PAGE) * (L + P)
        stored = arena_ptr.dtype.element_ty
        tl.store(
            arena_ptr + at[:, None] + all_dims[None, :], c.to(stored),
            mask=ok[:, None] & (all_dims < L)[None, :],
        )  # fmt: skip
        tl.store(arena_ptr + (at + L)[:, None] + dims[None, :], key.to(stored), mask=real)
        if EXPAND:
            at = wide * (L + P)
            tl.store(
                cached_ptr + at[:, None] + all_dims[None, :], c.to(stored),
                mask=ok[:, None] & (all_dims < L)[None, :],
            )  # fmt: skip
            tl.store(cached_ptr + (at + L)[:, None] + dims[None, :], key.to(stored), mask=real)


@triton.jit(do_not_specialize=["rows"])
def latent_rows_kernel(
    queries_ptr,
    latents_ptr,
    heads_ptr,
    q_ptr,
    cached_ptr,
    arena_ptr,
    table_ptr,
    positions_ptr,
    row_seq_ptr,
    factor_ptr,
    cos_ptr,
    sin_ptr,
    rows,
    queries_stride,
    latents_stride,
    table_stride,
    offset,
    EPS: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    LP: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr,
    ITEM: tl.constexpr,
    EXPAND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STEP_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Queries [R, H, L + P] for the attention kernel, and the step's latents into the cache.

    A program makes BLOCK_L numbers of the queries that meet latents, of BLOCK_R rows of one head,
    or takes STEP_R of these rows and does what is left: rotates, norms, stores. ``EXPAND``: queries
    stay as they are but for their rotation, [R, H, N + P], and what the cache gets goes to
    ``cached`` as well.
    """
    head = tl.program_id(0)
    part = tl.program_id(1)
    first = tl.program_id(2) * BLOCK_R
    PARTS: tl.constexpr = 0 if EXPAND else (L + BLOCK_L - 1) // BLOCK_L
    if part < PARTS:
        _to_latent(
            queries_ptr, heads_ptr, q_ptr, positions_ptr, rows, queries_stride, head,
            first + tl.arange(0, BLOCK_R), part * BLOCK_L + tl.arange(0, BLOCK_L), H, N, NP, P, V,
            L, PDL,
        )  # fmt: skip
    else:
        _what_is_left(
            queries_ptr, latents_ptr, q_ptr, cached_ptr, arena_ptr, table_ptr, positions_ptr,
            row_seq_ptr, factor_ptr, cos_ptr, sin_ptr, rows, queries_stride, latents_stride,
            table_stride, offset, head, first + (part - PARTS) * STEP_R + tl.arange(0, STEP_R),
            EPS, H, N, NP, P, PP, L, LP, ROTARY, INTERLEAVED, PAGE, ITEM, EXPAND, PDL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def latent_values_kernel(
    mixed_ptr,
    heads_ptr,
    out_ptr,
    positions_ptr,
    rows,
    H: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_V numbers of BLOCK_R rows' values of one head, [R, H * V], of mixed latents [R, H, L];
    zeros for padding."""
    head = tl.program_id(0)
    value = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    place = head * (N + V) + N + value
    position = tl.load(positions_ptr + row, mask=row < rows, other=-1)
    ok = position >= 0
    wait_for_inputs(PDL)
    let_next_start(PDL)
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, L, BLOCK_L):
        dims = start + tl.arange(0, BLOCK_L)
        weights = tl.load(
            heads_ptr + dims[:, None] + place[None, :] * L,
            mask=(dims < L)[:, None] & (value < V)[None, :],
            other=0.0,
        )
        x = tl.load(
            mixed_ptr + (row.to(tl.int64) * H + head)[:, None] * L + dims[None, :],
            mask=ok[:, None] & (dims < L)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, weights, acc, input_precision="ieee")
    tl.store(
        out_ptr + row.to(tl.int64)[:, None] * (H * V) + (head * V + value)[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(row < rows)[:, None] & (value < V)[None, :],
    )
