"""Products with low-bit matrices in PyTorch: the reference of the native and Triton kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skimp.formats.weight import FP8_MAX, QuantizedWeight


def lowbit_linear(x: Tensor, weight: QuantizedWeight, *, split_rows: bool = False) -> Tensor:
    """``x @ weight.T`` in the dtype of ``x`` [R, K]; rows are rounded first if the format says so.

    Weights are expanded to the dtype of ``x`` where that is all the format asks for, and to
    float32 for rounded rows, whose products are then exact but for the sum. ``split_rows``
    multiplies row by row, so that none depends on how many there are.
    """
    kind = weight.format.activations
    dense = weight.dequantize()
    rows = round_rows(x, kind) if kind is not None else x
    dense = dense.to(rows.dtype)
    if not split_rows:
        return F.linear(rows, dense).to(x.dtype)
    parts = [F.linear(row, dense) for row in rows.split(1)]
    return (torch.cat(parts) if parts else F.linear(rows, dense)).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row at int8, ties to even, and its scale [R, 1]: the row's range is that of int8 to
    both sides, as compressed-tensors computes it, so the largest number may become 127 or -128."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127.5
    return (x / scale).round().clamp(-128, 127).to(torch.int8), scale


def round_rows(x: Tensor, to: str) -> Tensor:
    """Each row of ``x`` [R, K] at 8 bits ("int8" or "fp8") with a scale of its own, float32."""
    if to == "int8":
        q, scale = quantize_rows(x)
        return q.float() * scale
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
