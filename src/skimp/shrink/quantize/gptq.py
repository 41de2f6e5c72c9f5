"""GPTQ (Frantar et al. 2023): columns are rounded one by one, and the columns still to come make up
for the error in the product, as the inputs' second moments say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from skimp.formats.weight import QuantizedWeight, WeightFormat, pack_nibbles, spread
from skimp.shrink.quantize.rtn import moment_blocks, rtn, search_scales

RETRIES: Final = (1.0, 10.0, 100.0)  # multiples of the damping, until the factorisation works


def gptq(
    weight: Tensor,
    format: WeightFormat,
    moments: Tensor,
    *,
    scale_dtype: torch.dtype = torch.float32,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = True,
    note: Callable[[str], None] | None = None,
) -> QuantizedWeight:
    """``weight`` [N, K] for inputs with second moments ``moments`` = mean of x xᵀ [K, K].

    ``act_order``: columns go in falling order of their inputs' energy, while groups and scales
    stay those of the unsorted matrix, so that the result needs no index. ``damping`` is a share
    of the mean diagonal. ``note`` is told of every fallback.
    """
    tell = note or (lambda text: None)
    hessian = moments.double().clone()
    dead = hessian.diagonal() == 0
    w = weight.float().clone()
    hessian[dead, dead] = 1.0
    w[:, dead] = 0.0
    importance = moment_blocks(moments.float(), format)
    scale, zero = search_scales(w, format, scale_dtype=scale_dtype, importance=importance)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    else:
        order = torch.arange(len(hessian))
    factor = _factor(hessian[order][:, order], damping, tell)
    if factor is None:
        return rtn(weight, format, scale_dtype=scale_dtype, importance=moments.diagonal())
    size = format.group_size or w.shape[1]
    wide_scale = spread(scale.float(), size, w.shape[1])[:, order]
    wide_zero = torch.zeros_like(wide_scale)
    if zero is not None:
        wide_zero = spread(zero, size, w.shape[1])[:, order]
    q = _round_columns(w[:, order], format, factor, wide_scale, wide_zero, block)
    return _stored(q[:, torch.argsort(order)], format, scale, zero)


def _factor(hessian: Tensor, damping: float, tell: Callable[[str], None]) -> Tensor | None:
    """Upper U with Uᵀ U = H⁻¹, float32; None if not even strong damping makes H invertible."""
    mean = hessian.diagonal().mean()
    for retry in RETRIES:
        share = damping * retry
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and bool(upper.isfinite().all()):
            if retry > 1:
                tell(f"inputs nearly dependent, damping {share:g} instead of {damping:g}")
            return upper.float()
    tell(f"inputs dependent even with damping {share:g}, rounded to nearest instead")
    return None


def _round_columns(
    w: Tensor, format: WeightFormat, upper: Tensor, scale: Tensor, zero: Tensor, block: int
) -> Tensor:
    """q [N, K], float32. Columns are worked on as rows, which are adjacent in memory."""
    w, scale, zero = w.T.contiguous(), scale.T.contiguous(), zero.T.contiguous()
    low, high = format.limits
    q = torch.empty_like(w)
    for first in range(0, len(w), block):
        last = min(first + block, len(w))
        errors = torch.empty_like(w[first:last])
        for i in range(first, last):
            if format.kind == "float":
                value = (w[i] / scale[i]).clamp(low, high).to(torch.float8_e4m3fn).float()
            else:
                value = (w[i] / scale[i] + zero[i]).round().clamp(low, high)
            q[i] = value
            error = (w[i] - (value - zero[i]) * scale[i]) / upper[i, i]
            errors[i - first] = error
            w[i + 1 : last] -= upper[i, i + 1 : last, None] * error
        w[last:] -= upper[first:last, last:].T @ errors
    return q.T.contiguous()


def _stored(q: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor | None) -> QuantizedWeight:
    if format.kind == "float":
        values = q.to(torch.float8_e4m3fn)
    else:
        values = pack_nibbles(q) if format.bits == 4 else q.to(torch.int8)
    return QuantizedWeight(
        format=format,
        in_features=q.shape[1],
        values=values,
        scale=scale,
        zero=None if zero is None else zero.to(torch.int8),
    )
