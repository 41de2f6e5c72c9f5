"""HQQ: half-quadratic quantization (Badri & Shaji 2023), which needs no data.

The weights' error is measured in an l_p norm with p < 1, which forgives outliers. Splitting the
error into a sparse part and the rest gives two easy steps, in turn: the sparse part by shrinkage,
then scale and zero point so that the rest is nought. The paper's zero points are real numbers and
its scales stay those of the range; here zero points are integers, as checkpoints store them, and
the second step fits scale and zero point together by least squares.

The norm guides the iterations; which of them a group keeps is judged by squared error. Judged by
the norm too, groups without outliers are clipped far too hard: on the embedded model that lost more
than rounding to nearest.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from skimp.formats.weight import QuantizedWeight, WeightFormat, grouped, round_to
from skimp.shrink.quantize.rtn import CHUNK, rounded, search_scales, stored, usable

ITERATIONS: Final = 20
BETA: Final = 10.0  # weight of the rest's square; the errors are in units of the mean scale
KAPPA: Final = 1.01  # growth of beta


def hqq(
    weight: Tensor,
    format: WeightFormat,
    *,
    scale_dtype: torch.dtype = torch.float32,
    norm: float = 0.7,
) -> QuantizedWeight:
    """``weight`` [N, K]. Starts from the searched scales of ``rtn``; a group keeps what squared
    error is least with, of all that the iterations in the l_p norm came by."""
    if not 0 < norm <= 1:
        raise ValueError(f"norm: between 0 and 1, not {norm}")
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for rows in weight.float().split(max(1, CHUNK // weight.shape[1])):
        scale, zero = _fit(rows, format, scale_dtype, norm)
        scales.append(scale)
        zeros.append(zero)
    return round_to(
        weight, format, torch.cat(scales), None if format.symmetric else torch.cat(zeros)
    )


def _fit(
    weight: Tensor, format: WeightFormat, dtype: torch.dtype, norm: float
) -> tuple[Tensor, Tensor]:
    groups = grouped(weight, format.group_size or weight.shape[1])
    inputs = torch.zeros(groups.shape[1] * groups.shape[2])
    inputs[: weight.shape[1]] = 1.0
    inputs = inputs.view(groups.shape[1:])  # 0 where a short last group is padded
    low, high = format.limits
    scale, found = search_scales(weight, format, scale_dtype=dtype)
    zero = torch.zeros_like(scale, dtype=torch.float32) if found is None else found
    best_scale, best_zero = scale, zero
    best = torch.full(scale.shape, torch.inf)
    beta = BETA
    for iteration in range(ITERATIONS + 1):
        error = groups - rounded(groups, format, scale, zero)
        loss = (error.square() * inputs).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        if iteration == ITERATIONS:
            break
        unit = scale.float().unsqueeze(-1)
        target = groups - shrink(error / unit, beta, norm) * unit
        q = stored(groups, format, scale, zero)
        slope, shift = _line(q, target, inputs, symmetric=format.symmetric)
        sound = (slope > 0) & slope.isfinite()
        scale = usable(torch.where(sound, slope, scale.float()), dtype)
        if not format.symmetric:
            moved = torch.where(sound, -shift / scale.float(), zero)
            zero = moved.round().clamp(low, high)
        beta *= KAPPA
    return best_scale, best_zero


def shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """The proximal step of ``|x|^norm`` with weight ``beta``: towards nought, and small x to it."""
    size = x.abs().clamp(min=1e-12)
    return x.sign() * (size - size.pow(norm - 1) / beta).clamp(min=0)


def _line(q: Tensor, target: Tensor, inputs: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Least squares of ``slope * q + shift = target`` in each group; no shift if symmetric."""
    if symmetric:
        slope = (q * target * inputs).sum(-1) / (q * q * inputs).sum(-1)
        return slope, torch.zeros_like(slope)
    count = inputs.sum(-1)
    q_mean, target_mean = (q * inputs).sum(-1) / count, (target * inputs).sum(-1) / count
    centred = (q - q_mean.unsqueeze(-1)) * inputs
    slope = (centred * target).sum(-1) / (centred * q).sum(-1)
    return slope, target_mean - slope * q_mean
