"""Kernels that go over rows once: norms, rounding, what follows a product made elsewhere, and the
expansion of stored weights to numbers.

Shape legend: M or R rows, K inputs, N outputs, D hidden size.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from skimp.kernels.triton.launch import let_next_start, wait_for_inputs
from skimp.kernels.triton.products import activate, decode_wide, panel_offset

ROUNDINGS: dict[str | None, int] = {None: 0, "int8": 1, "fp8": 2}


@triton.jit
def _to_fp8(v):
    """The nearest E4M3 number, ties to even, of one within its range."""
    magnitude = tl.abs(v)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    # Below 2**-6 the numbers lie 2**-9 apart, as float32 does at 1.5 * 2**14.
    small = (magnitude + 24576.0) - 24576.0
    rounded = tl.where(magnitude < 0.015625, small, normal.to(tl.float32, bitcast=True))
    return tl.where(v < 0, -rounded, rounded)


@triton.jit
def _norm_kernel(
    x_ptr, base_ptr, factor_ptr, out_ptr, row_scale_ptr, K, stride_x, stride_base, stride_out, eps,
    ROUND: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    ok = k < K
    let_next_start(PDL)
    wait_for_inputs(PDL)
    y = tl.load(x_ptr + row * stride_x + k, mask=ok, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        y *= tl.rsqrt(tl.sum(y * y, 0) / K + eps)
        y *= tl.load(factor_ptr + k, mask=ok, other=0.0)
    if base_ptr is not None:
        y += tl.load(base_ptr + row * stride_base + k, mask=ok, other=0.0)
    if ROUND:
        most = tl.maximum(tl.max(tl.abs(y), 0), 1e-12)
        scale = tl.div_rn(most, 127.5 if ROUND == 1 else 448.0)
        tl.store(row_scale_ptr + row, scale)
        y = tl.div_rn(y, tl.zeros_like(y) + scale)
        if ROUND == 1:
            # Adding 1.5 * 2**23 rounds to an integer, ties to even.
            y = tl.minimum(tl.maximum((y + 12582912.0) - 12582912.0, -128.0), 127.0)
        else:
            y = _to_fp8(tl.minimum(tl.maximum(y, -448.0), 448.0))
    tl.store(out_ptr + row * stride_out + k, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _scaled(y_ptr, scale_ptr, bias_ptr, row_scale, columns, ok):
    y = tl.load(y_ptr + columns, mask=ok, other=0.0).to(tl.float32) * row_scale
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + columns, mask=ok, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=ok, other=0.0)
    return y


@triton.jit
def _finish_kernel(
    y_ptr, scale_ptr, row_scale_ptr, bias_ptr, residual_ptr, out_ptr,
    N, stride_y, stride_residual, stride_out,
    ACTIVATION: tl.constexpr, HALVES: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    let_next_start(PDL)
    wait_for_inputs(PDL)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = columns < N
    row_scale = 1.0
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row)
    if ACTIVATION and not HALVES:
        # Both of a pair in one read, so that reads are whole.
        wide = tl.program_id(1) * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
        y = _scaled(y_ptr + row * stride_y, scale_ptr, bias_ptr, row_scale, wide, wide < 2 * N)
        gate, up = tl.split(tl.reshape(y, (BLOCK_N, 2)))
        y = activate(gate, ACTIVATION) * up
    elif ACTIVATION:
        gate = _scaled(y_ptr + row * stride_y, scale_ptr, bias_ptr, row_scale, columns, ok)
        up = _scaled(y_ptr + row * stride_y, scale_ptr, bias_ptr, row_scale, columns + N, ok)
        y = activate(gate, ACTIVATION) * up
    else:
        y = _scaled(y_ptr + row * stride_y, scale_ptr, bias_ptr, row_scale, columns, ok)
    if residual_ptr is not None:
        place = residual_ptr + row * stride_residual + columns
        tl.store(place, tl.load(place, mask=ok, other=0.0) + y, mask=ok)
    else:
        place = out_ptr + row * stride_out + columns
        tl.store(place, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _expand_kernel(
    id_ptr, w_ptr, scale_ptr, less_ptr, out_ptr, N, K, stride_out, factor,
    KIND: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = row
    if id_ptr is not None:
        source = tl.load(id_ptr + row).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ok = k < K
    if KIND == 0:
        value = tl.load(w_ptr + source * K + k, mask=ok, other=0.0).to(tl.float32)
    else:
        word = (k // (32 * PER)) * 512 + k % 32
        w_row = w_ptr + panel_offset(source, (K + 32 * PER - 1) // (32 * PER))
        bits = tl.load(w_row + word, mask=ok, other=0)
        bits = bits.to(tl.int32) & 0xFFFF
        value = decode_wide(bits >> ((k // 32) % PER * (16 // PER)), KIND)
        at = (k // GROUP if GROUP else k * 0) * N + source
        if less_ptr is not None:
            if KIND == 2:
                value += 136.0
            value += tl.load(less_ptr + at, mask=ok, other=0.0)
        if scale_ptr is not None:
            value *= tl.load(scale_ptr + at, mask=ok, other=0.0)
    value *= factor
    tl.store(out_ptr + row * stride_out + k, value.to(out_ptr.dtype.element_ty), mask=ok)


def _normed(
    x: Tensor,
    factor: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    base: Tensor | None = None,
    to: str | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    rows, k = x.shape
    out = torch.empty(rows, k, dtype=dtype, device=x.device)
    row_scale = torch.empty(rows if to else 0, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(k)
        extra = {"launch_pdl": True} if pdl else {}
        _norm_kernel[(rows,)](
            x, base, factor, out, row_scale, k, x.stride(0),
            0 if base is None else base.stride(0), out.stride(0), eps,
            ROUND=ROUNDINGS[to], BLOCK_K=block, PDL=pdl,
            num_warps=min(16, max(1, block // 512)), **extra,
        )  # fmt: skip
    return out, row_scale


def rms_norm(
    x: Tensor, factor: Tensor, eps: float, dtype: torch.dtype, *, pdl: bool = False
) -> Tensor:
    """Each row of ``x`` [M, K] over its root mean square, times ``factor`` float32 [K]."""
    return _normed(x, factor, eps, dtype, pdl=pdl)[0]


def add_norm(x: Tensor, y: Tensor, factor: Tensor, eps: float) -> Tensor:
    """``x + rms_norm(y)`` in float32; ``x`` is float32."""
    return _normed(y, factor, eps, torch.float32, base=x)[0]


def round_rows(
    x: Tensor,
    to: Literal["int8", "fp8"],
    dtype: torch.dtype,
    *,
    factor: Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each row at 8 bits after its norm, if ``factor`` is given: what is stored, held in ``dtype``,
    and the scales, float32 [M]. The rule is that of ``kernels/lowbit.py``."""
    return _normed(x, factor, eps, dtype, to=to, pdl=pdl)


def finish_rows(
    y: Tensor,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: int = 0,
    halves: bool = False,
    add: bool = False,
    pdl: bool = False,
) -> None:
    """Scales, bias and activation after a product ``y``, into ``out`` or, if ``add``, on top of
    it. Gate and up lie in turns or, if ``halves``, one after the other."""
    rows, n = out.shape
    block = min(1024, triton.next_power_of_2(n))
    _finish_kernel[(rows, triton.cdiv(n, block))](
        y, scale, row_scale, bias, out if add else None, None if add else out,
        n, y.stride(0), out.stride(0), out.stride(0),
        ACTIVATION=activation, HALVES=halves, BLOCK_N=block, PDL=pdl, num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def expand(
    weight: Tensor,
    scale: Tensor | None,
    less: Tensor | None,
    out: Tensor,
    *,
    outputs: int,
    kind: int,
    per: int,
    group: int,
    ids: Tensor | None = None,
    factor: float = 1.0,
) -> None:
    """Rows ``ids`` (or all) of a stored matrix [outputs, K] as numbers times ``factor``, into
    ``out`` [R, K]."""
    rows, k = out.shape
    if rows == 0:
        return
    block = min(1024, triton.next_power_of_2(k))
    _expand_kernel[(rows, triton.cdiv(k, block))](
        ids, weight, scale, less, out, outputs, k, out.stride(0), factor,
        KIND=kind, PER=per, GROUP=group, BLOCK_K=block, num_warps=4,
    )  # fmt: skip


@triton.jit
def _part_max_kernel(
    x_ptr, top_ptr, best_ptr, V, stride_x, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + column, mask=column < V, other=float("-inf"))
    top = tl.max(x, 0)
    top = tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), top)
    best = tl.min(tl.where((x == top) & (column < V), column, V), 0)
    tl.store(top_ptr + row * PARTS + part, top)
    tl.store(best_ptr + row * PARTS + part, best)


@triton.jit
def _whole_max_kernel(
    part_top_ptr, part_best_ptr, top_ptr, best_ptr, V, PARTS: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0)
    part = tl.arange(0, SIZE)
    ok = part < PARTS
    tops = tl.load(part_top_ptr + row * PARTS + part, mask=ok, other=float("-inf"))
    bests = tl.load(part_best_ptr + row * PARTS + part, mask=ok, other=V)
    top = tl.max(tops, 0)
    top = tl.where(tl.max((tops != tops).to(tl.int32), 0) > 0, float("nan"), top)
    best = tl.min(tl.where(tops == top, bests, V), 0)
    tl.store(top_ptr + row, top)
    tl.store(best_ptr + row, tl.minimum(best, V - 1))


def row_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of float32 [R, V], NaN if there is one, and the lowest index int32
    that has it (in rows with a NaN, any)."""
    rows, v = x.shape
    block = 4096
    parts = triton.cdiv(v, block)
    tops = torch.empty(rows, parts, dtype=torch.float32, device=x.device)
    bests = torch.empty(rows, parts, dtype=torch.int32, device=x.device)
    top = torch.empty(rows, dtype=torch.float32, device=x.device)
    best = torch.empty(rows, dtype=torch.int32, device=x.device)
    if rows:
        _part_max_kernel[(rows, parts)](
            x, tops, bests, v, x.stride(0), PARTS=parts, BLOCK=block, num_warps=8
        )
        size = triton.next_power_of_2(parts)
        _whole_max_kernel[(rows,)](tops, bests, top, best, v, PARTS=parts, SIZE=size, num_warps=1)
    return top, best


@triton.jit
def _pick_kernel(ids_ptr, source_ptr, drawn_ptr, R, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + row, mask=row < R, other=-1)
    late = tl.load(drawn_ptr + source, mask=source >= 0, other=0)
    tl.store(ids_ptr + row, late, mask=source >= 0)


def pick_drawn(token_ids: Tensor, source: Tensor, drawn: Tensor) -> None:
    """``token_ids[i] = drawn[source[i]]`` where the source is not negative; all int32 [R]."""
    rows = token_ids.shape[0]
    _pick_kernel[(triton.cdiv(rows, 256),)](token_ids, source, drawn, rows, BLOCK=256)
