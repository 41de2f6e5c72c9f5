"""AWQ (Lin et al. 2024): inputs that are loud get finer weights, by a rescaling that is exact
before rounding, and ranges are clipped where that helps the product.

The error of a product over the calibration inputs is ``tr(E M Eᵀ)`` with M their second moments,
so no input has to be kept.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from skimp.formats.weight import WeightFormat, quantize

GRID: Final = 20  # exponents tried


def search_factors(
    weight: Tensor, format: WeightFormat, moments: Tensor, magnitude: Tensor
) -> Tensor:
    """s [K] of least error when ``weight * s`` [N, K] is rounded and the inputs divided by s.

    ``moments`` [K, K] is the mean of x xᵀ, ``magnitude`` [K] that of |x|. Tried are the powers
    0 to 1 of the inputs' magnitude, alone and over that of the weights; ones are among them, so
    the result is never worse than no scaling.
    """
    loud = _levelled(magnitude.float())
    weight = weight.float()
    peak = weight.abs().amax(0)
    rows = weight.abs().amax(1, keepdim=True).clamp(min=1e-30)
    heavy = _levelled((weight.abs() / rows).mean(0))
    usable = (magnitude > 0) & (peak > 0)
    best = torch.ones_like(loud)
    best_loss = product_loss(quantize(weight, format).dequantize() - weight, moments)
    for step in range(GRID):
        power = step / GRID
        for s in (loud**power, loud**power / heavy ** (1 - power)):
            s = s / (s.max() * s.min()).sqrt()
            s = torch.where(usable & s.isfinite() & (s > 0), s, torch.ones_like(s))
            loss = product_loss(quantize(weight * s, format).dequantize() / s - weight, moments)
            if loss < best_loss:
                best, best_loss = s, loss
    return best


def product_loss(error: Tensor, moments: Tensor) -> float:
    """Mean squared error of the outputs, summed over them, that an error [N, K] makes."""
    return float(((error @ moments.float()) * error).sum())


def _levelled(x: Tensor) -> Tensor:
    return x.clamp(min=1e-4 * float(x.max()) + 1e-30) / x.max().clamp(min=1e-30)
