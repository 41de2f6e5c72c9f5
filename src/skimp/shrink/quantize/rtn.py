"""Round to nearest, with scales searched for the least error instead of covering the range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from skimp.formats.weight import QuantizedWeight, WeightFormat, grouped, round_to

STEPS: Final = 64  # scales tried
NARROWEST: Final = 0.4  # of the scale that covers the range
CHUNK: Final = 1 << 17  # weights searched at once: their temporaries stay in the core's cache
ZERO_SHIFTS: Final = (-1.0, 0.0, 1.0)  # zero points tried around the one that follows the range


def rtn(
    weight: Tensor,
    format: WeightFormat,
    *,
    scale_dtype: torch.dtype = torch.float32,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """The nearest matrix under :func:`search_scales`; ``weight`` [N, K]."""
    scale, zero = search_scales(weight, format, scale_dtype=scale_dtype, importance=importance)
    return round_to(weight, format, scale, zero)


def search_scales(
    weight: Tensor,
    format: WeightFormat,
    *,
    scale_dtype: torch.dtype = torch.float32,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point [N, groups] of least squared error among a grid of shrunken ranges.

    ``importance`` is None, [K] (what an input's squared error counts), or [groups, size, size]
    (the second moments of each group's inputs: what counts is the error of the product). Scales
    are rounded to ``scale_dtype`` before they are judged.
    """
    step = max(1, CHUNK // weight.shape[1])
    parts = [_search(rows, format, scale_dtype, importance) for rows in weight.float().split(step)]
    scale = torch.cat([scale for scale, _ in parts])
    zeros = [zero for _, zero in parts if zero is not None]
    return scale, torch.cat(zeros) if zeros else None


def _search(
    weight: Tensor, format: WeightFormat, dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    groups = grouped(weight, format.group_size or weight.shape[1])
    loss = group_loss(groups, weight.shape[1], importance)
    best: Tensor | None = None
    scale = zero = torch.empty(0)
    for try_scale, try_zero in _candidates(groups, format, dtype):
        error = loss(rounded(groups, format, try_scale, try_zero) - groups)
        if best is None:
            best, scale, zero = error, try_scale, try_zero
            continue
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, try_scale, scale), torch.where(better, try_zero, zero)
    return scale, None if format.symmetric else zero


def _candidates(
    groups: Tensor, format: WeightFormat, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    low, high = format.limits
    least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    peak = torch.maximum(most, -least)
    whole = peak / high if format.symmetric else (most - least) / (high - low)
    for factor in torch.linspace(1.0, NARROWEST, STEPS).tolist():
        scale = usable(factor * whole, dtype)
        if format.symmetric:
            yield scale, torch.zeros_like(whole)
            continue
        zero = (low - factor * least / scale.float()).round()
        for shift in ZERO_SHIFTS:
            yield scale, (zero + shift).clamp(low, high)


def usable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` as stored: rounded, and 1 where it would be nought (a group of zeros)."""
    scale = scale.to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def rounded(groups: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor) -> Tensor:
    """What the weights [N, groups, size] become under scale and zero point [N, groups]."""
    wide, shift = scale.float().unsqueeze(-1), zero.unsqueeze(-1)
    return (stored(groups, format, scale, zero) - shift) * wide


def stored(groups: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor) -> Tensor:
    """q of the weights [N, groups, size], float32."""
    low, high = format.limits
    q = groups / scale.float().unsqueeze(-1)
    if format.kind == "float":
        return q.clamp(low, high).to(torch.float8_e4m3fn).float()
    return (q + zero.unsqueeze(-1)).round().clamp(low, high)


def group_loss(
    groups: Tensor, in_features: int, importance: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """A function from errors [N, groups, size] to what each group loses [N, groups]. Inputs that
    pad a short last group count nothing."""
    count, size = groups.shape[1:]
    if importance is not None and importance.dim() == 3:
        moments = importance.to(groups.dtype)

        def product_loss(error: Tensor) -> Tensor:
            error = error.transpose(0, 1)
            return (torch.bmm(error, moments) * error).sum(-1).T

        return product_loss
    weights = torch.zeros(count * size)
    weights[:in_features] = 1.0 if importance is None else importance.float()
    weights = weights.view(count, size)
    return lambda error: (error.square() * weights).sum(-1)


def moment_blocks(moments: Tensor, format: WeightFormat) -> Tensor:
    """The importance of :func:`search_scales` from the second moments [K, K] of all inputs: a
    block a group, or the diagonal where a group is the whole row (a block would cost K per weight
    and scale)."""
    size = format.group_size
    if size is None:
        return moments.diagonal().clone()
    width = moments.shape[0]
    padded = torch.nn.functional.pad(moments, (0, -width % size, 0, -width % size))
    return torch.stack([padded[i : i + size, i : i + size] for i in range(0, width, size)])


def stored_scale_dtype(weight: Tensor) -> torch.dtype:
    """Scales have the checkpoint's dtype, but for float16, whose range is too small."""
    return torch.float32 if weight.dtype in (torch.float16, torch.float64) else weight.dtype
