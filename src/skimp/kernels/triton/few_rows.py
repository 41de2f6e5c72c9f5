"""At most eight rows times a low-bit matrix on tensor cores, weights multiplied as they lie.

Eight neighbouring int16 words of a row (``products.py`` says what they hold) are what one thread of
a tensor-core product holds of its left operand's row, up to the order of inputs, which is free as
long as the rows' is the same. So a load of 16 bytes becomes operands without passing through shared
memory, which only explicit layouts can say: this is Gluon, not Triton.

The right operand has eight columns. With fewer rows they hold the rows once for every *slice* of K,
and each warp multiplies its own slice: of its sums only the columns of that slice are kept.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from skimp.kernels.triton import tuning
from skimp.kernels.triton.launch import let_next_start, wait_for_inputs
from skimp.kernels.triton.products import activate, panel_offset, starts_group, words_asm

MOST_STAGED = gl.constexpr(tuning.STAGED_BYTES)
MOST_UNROLLED = gl.constexpr(16)  # chunks of weights


@gluon.jit
def _place(tall, first, N, OF_SLICE: gl.constexpr, SLICES: gl.constexpr, WARPS: gl.constexpr):
    """The output that a row of the left operand belongs to and the chunk it begins at. A warp has
    16 rows, then the same of the next repetition."""
    warp = tall // 16 % WARPS
    output = (tall // (16 * WARPS) * (WARPS // SLICES) + warp // SLICES) * 16 + tall % 16
    return gl.minimum(first + output, N - 1), warp % SLICES * OF_SLICE


@gluon.jit
def _words(w_rows, first, chunk, end, CHUNKS: gl.constexpr, EVEN: gl.constexpr):
    """[rows, 32] int16: chunk ``chunk`` of every row's slice, which begins at ``first``; zeros from
    ``end`` on, if that is given."""
    if EVEN and end is None:
        return gl.load(w_rows + chunk * 512)
    elif EVEN:
        return gl.load(w_rows + chunk * 512, mask=chunk < end, other=0)
    elif end is None:
        return gl.load(w_rows + chunk * 512, mask=first + chunk < CHUNKS, other=0)
    else:
        ok = (first + chunk < CHUNKS) & (chunk < end)
        return gl.load(w_rows + chunk * 512, mask=ok, other=0)


@gluon.jit
def _columns(
    x_ptr, factor_ptr, chunk: gl.constexpr, M, K: gl.constexpr, stride_x, ROWS: gl.constexpr,
    SLICES: gl.constexpr, OF_SLICE: gl.constexpr, DEPTH: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """[8, DEPTH]: the right operand's columns for chunk ``chunk`` of each slice, times the norm's
    factor, and what they were."""
    column = gl.arange(0, 8, gl.SliceLayout(1, WIDE))[:, None]
    k = (column // ROWS * OF_SLICE + chunk) * DEPTH
    k += gl.arange(0, DEPTH, gl.SliceLayout(0, WIDE))[None, :]
    ok = (column % ROWS < M) & (column // ROWS < SLICES) & (k < K) & (chunk < OF_SLICE)
    raw = gl.load(x_ptr + column % ROWS * stride_x + k, mask=ok, other=0.0)
    if factor_ptr is not None:
        factor = gl.load(factor_ptr + k, mask=k < K, other=0.0)
        return (raw * factor).to(gl.bfloat16), raw
    else:
        return raw, raw


@gluon.jit
def _stage(
    shared, chunk: gl.constexpr, x, raw, squares, OF_SLICE: gl.constexpr, NORM: gl.constexpr
):
    if chunk < OF_SLICE:
        shared.index(chunk).store(x)
        if NORM:
            squares += raw * raw
    return squares


@gluon.jit(do_not_specialize=["M"])
def few_rows_kernel(
    x_ptr, factor_ptr, w_ptr, scale_ptr, row_scale_ptr, bias_ptr, residual_ptr, out_ptr,
    M, N, stride_x, stride_residual, stride_out, eps,
    K: gl.constexpr, CHUNKS: gl.constexpr, KIND: gl.constexpr, PER: gl.constexpr,
    GROUP: gl.constexpr, ACTIVATION: gl.constexpr, ROWS: gl.constexpr, SLICES: gl.constexpr,
    BLOCK_N: gl.constexpr, AHEAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """``BLOCK_N`` outputs a program, K in ``SLICES`` parts; ``ROWS`` (1, 2, 4 or 8) times
    ``SLICES`` is at most eight. ``AHEAD`` chunks of weights are under way at a time."""
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    TALL: gl.constexpr = BLOCK_N * SLICES  # rows of the left operand
    # A loop's turn is long, because numbers of 16 bits that it hands on are packed again.
    TURNS: gl.constexpr = (CHUNKS + SLICES * MOST_UNROLLED - 1) // (SLICES * MOST_UNROLLED)
    UNROLLED: gl.constexpr = (
        (CHUNKS + SLICES * TURNS * AHEAD - 1) // (SLICES * TURNS * AHEAD) * AHEAD
    )
    OF_SLICE: gl.constexpr = TURNS * UNROLLED
    EVEN: gl.constexpr = OF_SLICE * SLICES * 32 * PER == K
    DEPTH: gl.constexpr = 32 * PER  # inputs of a chunk
    GROUPS: gl.constexpr = WARPS // SLICES  # of warps, each with other outputs

    first = gl.program_id(0) * BLOCK_N
    tall = gl.arange(0, TALL, gl.SliceLayout(1, LEFT))
    inside, start = _place(tall, first, N, OF_SLICE, SLICES, WARPS)
    start = start[:, None]
    word = gl.arange(0, 32, gl.SliceLayout(0, LEFT))
    w_rows = w_ptr + panel_offset(inside, CHUNKS)[:, None] + start * 512 + word[None, :]
    tall = gl.arange(0, TALL, gl.SliceLayout(1, MMA))
    scale_rows, scale_start = _place(tall, first, N, OF_SLICE, SLICES, WARPS)

    w0 = _words(w_rows, start, 0, None, CHUNKS, EVEN)
    w1, w2, w3 = w0, w0, w0
    if AHEAD > 1:
        w1 = _words(w_rows, start, 1, None, CHUNKS, EVEN)
    if AHEAD > 2:
        w2 = _words(w_rows, start, 2, None, CHUNKS, EVEN)
        w3 = _words(w_rows, start, 3, None, CHUNKS, EVEN)
    let_next_start(PDL)
    wait_for_inputs(PDL)

    column = gl.arange(0, 8, gl.SliceLayout(0, RIGHT))
    part_k = gl.arange(0, 32, gl.SliceLayout(1, RIGHT))
    x_start = column // ROWS * (OF_SLICE * DEPTH)
    x_columns = x_ptr + (column % ROWS).to(gl.int64) * stride_x + x_start
    NORM: gl.constexpr = factor_ptr is not None
    STAGED: gl.constexpr = NORM or OF_SLICE * 16 * DEPTH <= MOST_STAGED
    if STAGED:
        SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        shared = gl.allocate_shared_memory(gl.bfloat16, [OF_SLICE, 8, DEPTH], SHARED)
        WIDE: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
        squares = gl.zeros((8, DEPTH), gl.float32, WIDE)
    if STAGED and EVEN and not NORM:
        COPY: gl.constexpr = gl.BlockedLayout(
            [1, 8], [256 // DEPTH, DEPTH // 8], [WARPS, 1], [1, 0]
        )
        wide = gl.arange(0, 8, gl.SliceLayout(1, COPY))
        x_rows = (wide % ROWS).to(gl.int64) * stride_x + wide // ROWS * (OF_SLICE * DEPTH)
        x_tile = x_ptr + x_rows[:, None] + gl.arange(0, DEPTH, gl.SliceLayout(0, COPY))[None, :]
        given = ((wide % ROWS < M) & (wide // ROWS < SLICES))[:, None]
        for chunk in gl.static_range(OF_SLICE):
            async_copy.async_copy_global_to_shared(
                shared.index(chunk), x_tile + chunk * DEPTH, given
            )
        async_copy.commit_group()
        async_copy.wait_group(0)
    elif STAGED:
        for four in gl.static_range(0, OF_SLICE, 4):
            # All are asked for before the first is used.
            # fmt: off
            x0, raw0 = _columns(
                x_ptr, factor_ptr, four, M, K, stride_x, ROWS, SLICES, OF_SLICE, DEPTH, WIDE)
            x1, raw1 = _columns(
                x_ptr, factor_ptr, four + 1, M, K, stride_x, ROWS, SLICES, OF_SLICE, DEPTH, WIDE)
            x2, raw2 = _columns(
                x_ptr, factor_ptr, four + 2, M, K, stride_x, ROWS, SLICES, OF_SLICE, DEPTH, WIDE)
            x3, raw3 = _columns(
                x_ptr, factor_ptr, four + 3, M, K, stride_x, ROWS, SLICES, OF_SLICE, DEPTH, WIDE)
            # fmt: on
            squares = _stage(shared, four, x0, raw0, squares, OF_SLICE, NORM)
            squares = _stage(shared, four + 1, x1, raw1, squares, OF_SLICE, NORM)
            squares = _stage(shared, four + 2, x2, raw2, squares, OF_SLICE, NORM)
            squares = _stage(shared, four + 3, x3, raw3, squares, OF_SLICE, NORM)

    acc = gl.zeros((TALL, 8), gl.float32, MMA)
    for turn in range(TURNS):
        for ring in gl.static_range(UNROLLED):
            t = turn * UNROLLED + ring
            w = w0
            if ring % AHEAD == 1:
                w = w1
            elif ring % AHEAD == 2:
                w = w2
            elif ring % AHEAD == 3:
                w = w3
            if ring + AHEAD < UNROLLED or TURNS > 1:
                end = OF_SLICE if ring + AHEAD >= UNROLLED else None
                later = _words(w_rows, start, t + AHEAD, end, CHUNKS, EVEN)
                if ring % AHEAD == 0:
                    w0 = later
                elif ring % AHEAD == 1:
                    w1 = later
                elif ring % AHEAD == 2:
                    w2 = later
                else:
                    w3 = later
            for i in gl.static_range(PER):
                if STAGED:
                    x = shared.index(t).slice(i * 32, 32, 1).permute((1, 0)).load(RIGHT)
                else:
                    k = t * DEPTH + i * 32 + part_k
                    ok = (column % ROWS < M) & (column // ROWS < SLICES)
                    if EVEN:
                        x = gl.load(x_columns[None, :] + k[:, None], mask=ok[None, :], other=0.0)
                    else:
                        fits = ok[None, :] & (k[:, None] + x_start[None, :] < K)
                        x = gl.load(x_columns[None, :] + k[:, None], mask=fits, other=0.0)
                q = gl.inline_asm_elementwise(
                    words_asm(KIND, i, False), "=r,r", [w], dtype=gl.bfloat16, is_pure=True, pack=2
                )
                if GROUP == 0:
                    acc = mma_v2(q, x, acc)
                else:
                    if starts_group(i, GROUP):
                        part = gl.zeros((TALL, 8), gl.float32, MMA)
                    part = mma_v2(q, x, part)
                    if i == PER - 1 or starts_group(i + 1, GROUP):
                        group = ((scale_start + t) * DEPTH + i * 32) // GROUP
                        place = scale_ptr + group * N + scale_rows
                        if EVEN:
                            scale = gl.load(place)
                        else:
                            scale = gl.load(place, mask=group * GROUP < K, other=0.0)
                        acc += part * scale[:, None]

    # A column's sums count where its slice is the warp's.
    sums = gl.arange(0, 8, gl.SliceLayout(0, MMA)) // ROWS
    own = tall // 16 % WARPS % SLICES
    acc = gl.where(own[:, None] == sums[None, :], acc, 0.0)
    y = gl.reshape(acc, (BLOCK_N // (16 * GROUPS) * GROUPS, SLICES, 16, 8 // ROWS, ROWS))
    y = gl.sum(gl.sum(y, 3), 1)
    OUT: gl.constexpr = gl.BlockedLayout([2, 1], [32, 1], [WARPS, 1], [0, 1])
    y = gl.convert_layout(gl.reshape(y, (BLOCK_N, ROWS)), OUT)
    rows = gl.arange(0, ROWS, gl.SliceLayout(0, OUT))
    columns = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT))
    if NORM:
        square = gl.sum(gl.reshape(gl.sum(squares, 1), (8 // ROWS, ROWS)), 0)
        y *= gl.rsqrt(gl.convert_layout(square, gl.SliceLayout(0, OUT)) / K + eps)[None, :]
    row_ok, column_ok = rows < M, columns < N
    if GROUP == 0:
        y *= gl.load(scale_ptr + columns, mask=column_ok, other=0.0)[:, None]
    if row_scale_ptr is not None:
        y *= gl.load(row_scale_ptr + rows, mask=row_ok, other=0.0)[None, :]
    if bias_ptr is not None:
        y += gl.load(bias_ptr + columns, mask=column_ok, other=0.0)[:, None]
    if ACTIVATION:
        pairs = gl.permute(gl.reshape(y, (BLOCK_N // 2, 2, ROWS)), (0, 2, 1))
        gate, up = gl.split(pairs)
        y = gl.convert_layout(activate(gate, ACTIVATION) * up, OUT)
        columns = first // 2 + gl.arange(0, BLOCK_N // 2, gl.SliceLayout(1, OUT))
        column_ok = columns < N // 2
    ok = column_ok[:, None] & row_ok[None, :]
    if residual_ptr is not None:
        place = residual_ptr + rows[None, :] * stride_residual + columns[:, None]
        gl.store(place, gl.load(place, mask=ok, other=0.0) + y, mask=ok)
    else:
        place = out_ptr + rows[None, :] * stride_out + columns[:, None]
        gl.store(place, y.to(out_ptr.dtype.element_ty), mask=ok)
