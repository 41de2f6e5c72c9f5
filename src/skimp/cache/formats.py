"""Low-bit keys and values: what is stored, and what it stands for.

One vector is one head's key or value of one token, in float32; it is stored as codes and one
bfloat16 scale::

    int8   code = round(x / s) in [-127, 127]            s = max|x| / 127
    fp8    code = E4M3 of x / s, at most 448             s = max|x| / 448
    int4   code = round(x / s) + 8 in [0, 15]            s = -(the x of largest |x|) / 8

Every rounding is to nearest even, of x times the float32 reciprocal of the rounded scale. The
signed scale of int4 spends all sixteen codes: the largest number is exact, its opposite is cut.
A vector that holds infinities or NaNs gets such a scale, and so reads as not a number throughout;
one too small for a reciprocal reads as zeros. Native kernels compute the same codes bit by bit.

A Hadamard turn first (QuaRot, Ashkboos et al. 2024) spreads a few large dimensions over all, which
is what four bits need; q and k turned alike have the same products, v is turned back afterwards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skimp.cache.spec import FORMAT_BITS, SCALE_BYTES

SMALLEST_SCALE = 2.0**-100


def hadamard_block(head_dim: int) -> int:
    """Size of the Walsh-Hadamard blocks of a vector: the power of two in ``head_dim``."""
    return head_dim & -head_dim


def hadamard(x: Tensor) -> Tensor:
    """``x`` [..., head_dim] times an orthonormal, symmetric Walsh-Hadamard matrix, in blocks of
    :func:`hadamard_block`; it undoes itself."""
    size = hadamard_block(x.shape[-1])
    y, half = x, 1
    while half < size:
        low, high = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    # Rounded to float32 first: in a product with a float64 the last bit would differ.
    return y * torch.tensor(1 / math.sqrt(size), dtype=torch.float32).item()


def quantize(x: Tensor, format: str) -> Tensor:
    """Vectors float32 [..., head_dim] as bytes uint8 [..., vector_bytes]: codes, then the scale.

    int4 holds dimension i in the low half of byte i and dimension i + head_dim / 2 in the high.
    """
    x = x.float()
    if format == "int4":
        high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
        scale = torch.where(high >= -low, high, low) / -8
    else:
        scale = x.abs().amax(-1, keepdim=True) * (1 / (127 if format == "int8" else 448))
    scale = scale.to(torch.bfloat16).float()
    usable = scale.isfinite() & (scale.abs() >= SMALLEST_SCALE)
    x = torch.where(usable, x * torch.where(usable, scale, 1).reciprocal(), 0)
    scale = torch.where(usable | ~scale.isfinite(), scale, 0).to(torch.bfloat16)
    if format == "int8":
        codes = x.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    elif format == "fp8":
        codes = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        low, high = (x.round().clamp(-8, 7) + 8).to(torch.uint8).chunk(2, dim=-1)
        codes = low | (high << 4)
    return torch.cat((codes, scale.view(torch.uint8)), dim=-1)


def dequantize(stored: Tensor, format: str) -> Tensor:
    """Bytes uint8 [..., vector_bytes] as float32 [..., head_dim]."""
    count = stored.shape[-1] - SCALE_BYTES
    codes, scale = stored[..., :count].contiguous(), stored[..., count:].contiguous()
    if format == "int8":
        x = codes.view(torch.int8).float()
    elif format == "fp8":
        x = codes.view(torch.float8_e4m3fn).float()
    else:
        assert FORMAT_BITS[format] == 4
        x = torch.cat((codes & 15, codes >> 4), dim=-1).float() - 8
    return x * scale.view(torch.bfloat16).float()
