"""The kernels of ``linear.py``: products of rows with dense and low-bit matrices.

Shape legend: M rows, K inputs, N outputs, G groups of inputs. Sums are float32.

A row of a low-bit matrix is chunks of 32 int16 words. Value ``i`` of word ``j`` (from the low bits
up) is input ``32 * i + j`` of the chunk: taking value ``i`` of every word gives 32 consecutive
inputs, and one 32-bit instruction turns two words into a bfloat16 pair. 4 bits hold ``q + 8``, 8
bits hold ``q + 128`` or an E4M3 byte. 16 rows make a panel, where the same chunk of all rows lies
together, so that what a warp reads at once is one kilobyte of memory in a row.

Both products end alike: scales, bias, gated activation and residual in one epilogue. The two
outputs of a gate/up pair lie side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DENSE, INT8, INT4, FP8 = 0, 1, 2, 3
NONE, SILU, GELU, GELU_TANH = 0, 1, 2, 3


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == 2:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # tanh(z) = 1 - 2 / (1 + exp(2 z)), which no large argument makes NaN.
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * z)))
    return y


@triton.jit
def decode_wide(bits, KIND: tl.constexpr):
    """One stored value in the low bits of an int32 to float32, exactly. Integers go through the
    mantissa of 2**23, since conversion instructions run at an eighth of the rate of additions."""
    if KIND == 2:
        value = ((bits & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    elif KIND == 1:
        value = ((bits & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    else:
        # The fields of E4M3 in those of float32; the factor mends the bias, subnormals included.
        placed = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
        value = placed.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return value


@triton.constexpr_function
def words_asm(kind, part, asym):
    """PTX that turns two int16 words, in one register, into the bfloat16 pair of their value
    ``part``, and adds the pair $2 if ``asym``."""
    head = "{.reg .b32 t, s, c, one; mov.b32 one, 0x3F803F80; "
    if kind == 2:
        # 0x4300 | nibble is the bfloat16 of 128 + nibble; -0x4308 is -136.
        body = f"shr.u32 t, $1, {4 * part}; lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; "
        if not asym:
            body += "mov.b32 c, 0xC308C308; fma.rn.bf16x2 t, t, one, c; "
    elif kind == 1:
        # q is the byte's low seven bits, less 128 if its top bit is 0: (128 + low) - (256 or 128).
        body = (
            f"shr.u32 t, $1, {8 * part}; lop3.b32 s, t, 0x00800080, 0x43004300, 0xAE; "
            "lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA; "
            "mov.b32 c, 0xBF80BF80; fma.rn.bf16x2 t, s, c, t; "
        )
    else:
        # The fields of E4M3 in those of bfloat16, then 2**120 for the bias.
        body = "shl.b32 s, $1, 8; shl.b32 t, $1, 4; " if part == 0 else "shr.u32 t, $1, 4; "
        body += (
            f"and.b32 s, {'s' if part == 0 else '$1'}, 0x80008000; "
            "lop3.b32 t, t, 0x07F007F0, s, 0xEA; mov.b32 s, 0x80008000; "
            "mov.b32 c, 0x7B807B80; fma.rn.bf16x2 t, t, c, s; "
        )
    return head + body + ("fma.rn.bf16x2 $0, t, one, $2;}" if asym else "mov.b32 $0, t;}")


@triton.jit
def decode_words(
    words, less, KIND: tl.constexpr, PART: tl.constexpr, ASYM: tl.constexpr, ASM: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Value PART of each int16 word. ``less`` is added to it if ASYM: minus the zero point (and,
    at 4 bits, minus 136)."""
    if ASM:
        if ASYM:
            return tl.inline_asm_elementwise(
                words_asm(KIND, PART, True), "=r,r,r", [words, less],
                dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                words_asm(KIND, PART, False), "=r,r", [words],
                dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        bits = words.to(tl.int32) & 0xFFFF
        value = decode_wide(bits >> ((4 if KIND == 2 else 8) * PART), KIND)
        if ASYM:
            value += less.to(tl.float32) + (136.0 if KIND == 2 else 0.0)
        return value.to(DTYPE)


@triton.jit
def finish(
    y, rows, columns, M, N,
    scale_ptr, row_scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_residual, stride_out,
    SCALED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The epilogue for sums ``y`` [rows, columns]; with an activation half as many are stored."""
    row_ok, column_ok = rows < M, columns < N
    if SCALED:
        y *= tl.load(scale_ptr + columns, mask=column_ok, other=0.0)[None, :].to(tl.float32)
    if row_scale_ptr is not None:
        y *= tl.load(row_scale_ptr + rows, mask=row_ok, other=0.0)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=column_ok, other=0.0)[None, :]
    if ACTIVATION:
        pairs = tl.reshape(y, (y.shape[0], y.shape[1] // 2, 2))
        gate, up = tl.split(pairs)
        y = activate(gate, ACTIVATION) * up
        first = tl.min(columns, 0) // 2
        columns = first + tl.arange(0, y.shape[1])
        column_ok = columns < N // 2
    ok = row_ok[:, None] & column_ok[None, :]
    wide = rows.to(tl.int64)[:, None]
    if residual_ptr is not None:
        place = residual_ptr + wide * stride_residual + columns[None, :]
        tl.store(place, tl.load(place, mask=ok, other=0.0) + y, mask=ok)
    else:
        place = out_ptr + wide * stride_out + columns[None, :]
        tl.store(place, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def await_inputs(lines):
    """Let the next kernel start, fetch these lines of the matrix, which no kernel writes, into
    the second-level cache, then wait for the kernel before."""
    gdc_launch_dependents()
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines.to(tl.int64, bitcast=True)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    gdc_wait()


@triton.jit
def row_input(
    x_ptr, factor, row, M, K, k, stride_x, NORM: tl.constexpr, EVEN_K: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """Inputs ``k`` of a row in float32: as they are, and times the norm's factor."""
    if EVEN_K and not CHECK:
        raw = tl.load(x_ptr + row * stride_x + k).to(tl.float32)
    else:
        raw = tl.load(x_ptr + row * stride_x + k, mask=(k < K) & (row < M), other=0.0)
        raw = raw.to(tl.float32)
    if NORM:
        return raw, raw * factor
    else:
        return raw, raw


@triton.jit
def _tile(w_rows, at, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(w_rows + at[None, :])
    else:
        return tl.load(w_rows + at[None, :], mask=(at < WIDTH)[None, :], other=0)


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x_ptr, factor_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr,
    M, N, stride_x, stride_residual, stride_out, eps,
    K: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """At most four rows and a dense matrix, without tensor cores: every thread adds up its own
    share of K for each output of the program, and shares meet once, at the end. The norm's root is
    taken there too. A tile of weights is asked for before the last one is used, the first before
    inputs are there."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(columns, N - 1).to(tl.int64)
    w_rows = w_ptr + inside[:, None] * K
    lanes = tl.arange(0, BLOCK_K)
    ahead = _tile(w_rows, lanes, K, EVEN_K)
    NORM: tl.constexpr = factor_ptr is not None
    SHARE: tl.constexpr = 8  # what a thread loads at once of an output
    if PDL:
        LINE: tl.constexpr = 128 // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
        lines = BLOCK_K + tl.arange(0, (BLOCK_K + LINE - 1) // LINE) * LINE
        await_inputs(w_rows + tl.minimum(lines, K - 1)[None, :])
    acc0 = tl.zeros((BLOCK_N, BLOCK_K // SHARE), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    square0 = tl.zeros((BLOCK_K,), tl.float32)
    square1, square2, square3 = square0, square0, square0
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + lanes
        w = ahead.to(tl.float32)
        if start + BLOCK_K < K:
            ahead = _tile(w_rows, k + BLOCK_K, K, EVEN_K)
        factor = k
        if NORM:
            if EVEN_K:
                factor = tl.load(factor_ptr + k)
            else:
                factor = tl.load(factor_ptr + k, mask=k < K, other=0.0)
        raw, x = row_input(x_ptr, factor, 0, M, K, k, stride_x, NORM, EVEN_K, False)
        # Neighbours, which one thread holds, are added at once, so that it keeps fewer sums.
        acc0 += tl.sum(tl.reshape(w * x[None, :], (BLOCK_N, BLOCK_K // SHARE, SHARE)), 2)
        if NORM:
            square0 += raw * raw
        if ROWS > 1:
            raw, x = row_input(x_ptr, factor, 1, M, K, k, stride_x, NORM, EVEN_K, False)
            acc1 += tl.sum(tl.reshape(w * x[None, :], (BLOCK_N, BLOCK_K // SHARE, SHARE)), 2)
            if NORM:
                square1 += raw * raw
        if ROWS > 2:
            raw, x = row_input(x_ptr, factor, 2, M, K, k, stride_x, NORM, EVEN_K, True)
            acc2 += tl.sum(tl.reshape(w * x[None, :], (BLOCK_N, BLOCK_K // SHARE, SHARE)), 2)
            if NORM:
                square2 += raw * raw
            raw, x = row_input(x_ptr, factor, 3, M, K, k, stride_x, NORM, EVEN_K, True)
            acc3 += tl.sum(tl.reshape(w * x[None, :], (BLOCK_N, BLOCK_K // SHARE, SHARE)), 2)
            if NORM:
                square3 += raw * raw
    for row in tl.static_range(ROWS):
        if row == 0:
            y, square = tl.sum(acc0, 1), square0
        elif row == 1:
            y, square = tl.sum(acc1, 1), square1
        elif row == 2:
            y, square = tl.sum(acc2, 1), square2
        else:
            y, square = tl.sum(acc3, 1), square3
        if NORM:
            y *= tl.rsqrt(tl.sum(square, 0) / K + eps)
        finish(
            y[None, :], row + tl.arange(0, 1), columns, M, N,
            None, None, bias_ptr, residual_ptr, out_ptr, stride_residual, stride_out,
            False, ACTIVATION,
        )  # fmt: skip


@triton.jit
def panel_offset(row, CHUNKS):
    """Where a row of a low-bit matrix begins, in int16 words; its chunks lie 512 apart."""
    return (row // 16).to(tl.int64) * (CHUNKS * 512) + row % 16 * 32


@triton.constexpr_function
def starts_group(part, group):
    """Whether value ``part`` of a chunk's words is the first whose scale and zero point differ
    from those before."""
    return part == 0 or (group != 0 and part * 32 % group == 0)


@triton.jit
def group_at(k, K, GROUP: tl.constexpr, EVEN_K: tl.constexpr):
    """The group of input k; past the end of a row, the last one."""
    if GROUP == 0:
        return 0
    elif EVEN_K:
        return k // GROUP
    else:
        return tl.minimum(k, K - 1) // GROUP


@triton.jit(do_not_specialize=["M", "steps", "steps_of_split"])
def dot_kernel(
    x_ptr, factor_ptr, w_ptr, scale_ptr, less_ptr, row_scale_ptr, bias_ptr, residual_ptr, out_ptr,
    partial_ptr, count_ptr, M, N, K, stride_x, stride_residual, stride_out, eps,
    steps, steps_of_split,
    KIND: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Tensor cores. The matrix is the left operand, so that a few rows are the narrow side and
    decoded weights go from registers to the tensor cores.

    Programs along axis 2 share K; the last of them to arrive adds all parts in their order, so
    the result does not depend on timing, and leaves the count as it was.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    inside = tl.minimum(columns, N - 1)
    row_ok = (rows < M)[:, None]
    if KIND == 0:
        w_rows = w_ptr + inside.to(tl.int64)[:, None] * K
    else:
        w_rows = w_ptr + panel_offset(inside, steps)[:, None]
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_x
    first = split * steps_of_split
    STEP: tl.constexpr = BLOCK_K if KIND == 0 else 32
    STRIDE: tl.constexpr = BLOCK_K if KIND == 0 else 512  # from one step's weights to the next's
    if PDL:
        if KIND == 0:
            LINE: tl.constexpr = 128 // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
            ahead = tl.minimum(first * STEP + tl.arange(0, 4) * LINE, K - 1)
        else:
            ahead = tl.minimum(first + tl.arange(0, 4), steps - 1) * STRIDE
        await_inputs(w_rows + ahead[None, :])
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    lanes = tl.arange(0, STEP)
    for step in tl.range(first, min(first + steps_of_split, steps), num_stages=STAGES):
        if KIND == 0 and not EVEN_K:
            in_row = (step * STEP + lanes < K)[None, :]
            w = tl.load(w_rows + (step * STEP + lanes)[None, :], mask=in_row, other=0.0)
        else:
            w = tl.load(w_rows + (step * STRIDE + lanes)[None, :])
        part = acc
        less = w
        for i in tl.static_range(PER):
            k0 = step * (STEP * PER) + i * 32
            k = k0 + lanes
            x_ok = row_ok if EVEN_K else row_ok & (k < K)[None, :]
            x = tl.load(x_rows + k[None, :], mask=x_ok, other=0.0)
            if factor_ptr is not None:
                square += tl.sum(x * x, 1)
                if EVEN_K:
                    factor = tl.load(factor_ptr + k)
                else:
                    factor = tl.load(factor_ptr + k, mask=k < K, other=0.0)
                x = (x * factor[None, :]).to(DTYPE)
            if KIND == 0:
                acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
            else:
                # Past the end of a row inputs are 0, but weights must stay numbers.
                if less_ptr is not None and starts_group(i, GROUP):
                    at = group_at(k0, K, GROUP, EVEN_K) * N + inside
                    column = tl.load(less_ptr + at).to(DTYPE)
                    less = tl.broadcast_to(column[:, None], (BLOCK_N, STEP))
                q = decode_words(w, less, KIND, i, less_ptr is not None, ASM, DTYPE)
                if GROUP == 0:
                    acc = tl.dot(q, tl.trans(x), acc, input_precision="ieee")
                elif starts_group(i, GROUP):
                    part = tl.dot(q, tl.trans(x), input_precision="ieee")
                else:
                    part = tl.dot(q, tl.trans(x), part, input_precision="ieee")
                if GROUP != 0 and (i == PER - 1 or starts_group(i + 1, GROUP)):
                    at = group_at(k0, K, GROUP, EVEN_K) * N + inside
                    acc += part * tl.load(scale_ptr + at)[:, None]
    SCALED: tl.constexpr = KIND != 0 and GROUP == 0
    if not SPLIT:
        y = tl.trans(acc)
        if factor_ptr is not None:
            y *= tl.rsqrt(square / K + eps)[:, None]
        finish(
            y, rows, columns, M, N,
            scale_ptr, row_scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_residual, stride_out,
            SCALED, ACTIVATION,
        )  # fmt: skip
    else:
        TILE: tl.constexpr = BLOCK_N * BLOCK_M + BLOCK_M
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        splits = tl.num_programs(2)
        parts = partial_ptr + tile.to(tl.int64) * splits * TILE
        own = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        last = BLOCK_N * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(parts + split * TILE + own, acc)
        if factor_ptr is not None:
            tl.store(parts + split * TILE + last, square)
        # The barrier puts every thread's part before the one thread's release.
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
        if arrived == splits - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            squares = tl.zeros((BLOCK_M,), tl.float32)
            for s in range(splits):
                total += tl.load(parts + s * TILE + own, cache_modifier=".cg")
                if factor_ptr is not None:
                    squares += tl.load(parts + s * TILE + last, cache_modifier=".cg")
            tl.store(count_ptr + tile, 0)
            y = tl.trans(total)
            if factor_ptr is not None:
                y *= tl.rsqrt(squares / K + eps)[:, None]
            finish(
                y, rows, columns, M, N,
                scale_ptr, row_scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_residual,
                stride_out, SCALED, ACTIVATION,
            )  # fmt: skip
