"""Products with low-bit matrices on a GPU: the packed weights are read as they are.

The reference is :meth:`QuantizedWeight.dequantize` and, where the format rounds activations, the
rounding of ``kernels/plain.py``. Shape legend: M rows, K inputs, N outputs, G groups of inputs.

A program owns BLOCK_N outputs and at most BLOCK_M rows and walks K in blocks that never straddle
two groups. Inside a block integers are multiplied as they are (exact in bfloat16, or in int8 where
the rows are int8 too); the block's sum takes the group's scale in float32. Few rows split K over
programs, whose parts are added by a second, ordered sum, so a row's result does not depend on
timing.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from skimp.formats.weight import QuantizedWeight

INT8, INT4, FP8 = 0, 1, 2
FEW_ROWS = 16  # up to here memory decides, and K is split until every multiprocessor has work


@triton.jit
def _fp8_to_float(bits):
    """E4M3 bytes to float32, exactly, by shifting the fields into place."""
    wide = bits.to(tl.int32)
    sign = tl.where(wide >= 128, -1.0, 1.0)
    exponent = (wide >> 3) & 15
    mantissa = wide & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    return sign * tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)


@triton.jit
def _lowbit_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    zero_ptr,
    row_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    G,
    group,
    stride_x,
    stride_values,
    stride_split,
    steps,
    KIND: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    INT8_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row_ok, column_ok = rows < M, columns < N
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_x
    value_rows = values_ptr + columns.to(tl.int64)[None, :] * stride_values
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    blocks = tl.cdiv(group, BLOCK_K)  # of a group
    for step in range(split * steps, min((split + 1) * steps, G * blocks)):
        g = step // blocks
        k0 = g * group + (step % blocks) * BLOCK_K
        end = min(K, (g + 1) * group)
        scale = tl.load(scale_ptr + columns * G + g, mask=column_ok, other=0.0).to(tl.float32)
        if HAS_ZERO:
            zero = tl.load(zero_ptr + columns * G + g, mask=column_ok, other=0)
        if KIND == 1:
            # A byte holds an even input and the odd one after it: two products of half the depth,
            # with rows whose even inputs come first.
            pairs = k0 // 2 + tl.arange(0, BLOCK_K // 2)
            even, odd = 2 * pairs, 2 * pairs + 1
            odd_rows = x_rows + (K + 1) // 2
            packed = tl.load(
                value_rows + pairs[:, None],
                mask=column_ok[None, :] & (even < end)[:, None],
                other=0x88,
            )
            low = (packed & 15).to(tl.int8) - 8
            high = (packed >> 4).to(tl.int8) - 8
            if HAS_ZERO:
                low = low - zero[None, :]
                high = high - zero[None, :]
            x_even = tl.load(
                x_rows + pairs[None, :], mask=row_ok[:, None] & (even < end)[None, :], other=0
            )
            x_odd = tl.load(
                odd_rows + pairs[None, :], mask=row_ok[:, None] & (odd < end)[None, :], other=0
            )
            if INT8_ROWS:
                part = tl.dot(x_even, low, out_dtype=tl.int32)
                part += tl.dot(x_odd, high, out_dtype=tl.int32)
            else:
                part = tl.dot(x_even, low.to(x_even.dtype), input_precision="ieee")
                part += tl.dot(x_odd, high.to(x_odd.dtype), input_precision="ieee")
        else:
            k = k0 + tl.arange(0, BLOCK_K)
            values = tl.load(
                value_rows + k[:, None], mask=column_ok[None, :] & (k < end)[:, None], other=0
            )
            x = tl.load(x_rows + k[None, :], mask=row_ok[:, None] & (k < end)[None, :], other=0)
            if KIND == 2:
                part = tl.dot(x, _fp8_to_float(values).to(x.dtype), input_precision="ieee")
            elif INT8_ROWS and not HAS_ZERO:
                part = tl.dot(x, values, out_dtype=tl.int32)
            else:
                # An int8 less a zero point needs nine bits: exact in no int8, but in any float.
                wide = values.to(tl.float32)
                if HAS_ZERO:
                    wide -= zero.to(tl.float32)[None, :]
                if INT8_ROWS:
                    part = tl.dot(x.to(tl.float32), wide, input_precision="ieee")
                else:
                    part = tl.dot(x, wide.to(x.dtype), input_precision="ieee")
        acc += part.to(tl.float32) * scale[None, :]
    if INT8_ROWS or KIND == 2:
        row_scale = tl.load(row_scale_ptr + rows, mask=row_ok, other=0.0)
        acc *= row_scale[:, None]
    place = out_ptr + split * stride_split + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(place, acc, mask=row_ok[:, None] & column_ok[None, :])


def lowbit_matmul(x: Tensor, weight: QuantizedWeight, row_scale: Tensor | None = None) -> Tensor:
    """``x @ weight.T`` in float32 [M, N], all on one GPU.

    ``x`` is [M, K] in bfloat16, float16 or float32; or, with ``row_scale`` float32 [M], rows
    rounded beforehand: int8 for an integer format, fp8 values held in bfloat16 for an fp8 one.
    """
    assert x.dim() == 2 and x.shape[1] == weight.in_features
    x = x if x.stride(1) == 1 else x.contiguous()
    m, k = x.shape
    n = weight.out_features
    out = torch.empty(m, n, dtype=torch.float32, device=x.device)
    if m == 0:
        return out
    kind = {("int", 8): INT8, ("int", 4): INT4, ("float", 8): FP8}[
        weight.format.kind, weight.format.bits
    ]
    if kind == INT4 and weight.format.group_size is not None and weight.format.group_size % 2:
        raise ValueError(f"group_size: {weight.format.group_size} is odd, which no kernel takes")
    if kind == INT4:
        x = torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)
    values = weight.values.view(torch.uint8) if kind == FP8 else weight.values
    groups = weight.scale.shape[1]
    group = weight.format.group_size or k
    int8_rows = x.dtype == torch.int8
    # Tensor cores take int8 in steps of 32, and a block of pairs is half as deep.
    block_m, block_n, block_k = _blocks(m, group, least=64 if int8_rows and kind == INT4 else 32)
    steps = groups * -(-group // block_k)
    grid = (-(-n // block_n), -(-m // block_m))
    splits = _splits(grid, steps, x.device) if m <= FEW_ROWS else 1
    target = out if splits == 1 else out.new_empty(splits, m, n)
    if row_scale is None:
        row_scale = torch.ones(m, dtype=torch.float32, device=x.device)
    _lowbit_kernel[(*grid, splits)](
        x,
        values,
        weight.scale,
        weight.zero,
        row_scale,
        target,
        m,
        n,
        k,
        groups,
        group,
        x.stride(0),
        values.stride(0),
        m * n,
        -(-steps // splits),
        KIND=kind,
        HAS_ZERO=weight.zero is not None,
        INT8_ROWS=int8_rows,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return out if splits == 1 else target.sum(0)


def _blocks(rows: int, group: int, least: int) -> tuple[int, int, int]:
    """Rows, outputs and inputs of a program's block. What lies beyond a group is masked."""
    block_k = min(128, max(least, triton.next_power_of_2(group)))
    if rows <= FEW_ROWS:
        return 16, 32, block_k
    return (32 if rows <= 32 else 64), 64, min(block_k, 64)


def _splits(grid: tuple[int, int], steps: int, device: torch.device) -> int:
    """Parts of K, so that about two programs run on every multiprocessor."""
    wanted = 2 * _multiprocessors(device.index or 0) if device.type == "cuda" else 4
    return max(1, min(steps, wanted // (grid[0] * grid[1])))


@functools.cache
def _multiprocessors(index: int) -> int:
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count
