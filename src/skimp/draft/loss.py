"""What a guess is worth: the losses of a draft head, a few rows at a time.

p is the target's law of the next token over all V words, q the head's over the W that it can
guess. A drawn guess is accepted with probability ``sum min(p, q)`` (Leviathan et al. 2023), the
words that the head lacks counting as q = 0.

======  ==========================================================================================
``ce``  ``- sum p log q`` over the head's words: EAGLE-3's (2503.01840)
``tv``  ``1 - sum min(p, q)``: the refusal rate itself; its gradient is small where little agrees
``mix`` ``0.1 ce + 0.9 tv``: DSpark's (2607.05147)
``lk``  ``w ce + (1 - w) tv`` with ``w = exp(-3 a)``, where a is how much of this step's guesses is
        accepted now: CE while the head knows nothing, TV once it does (LK losses, 2602.23881)
======  ==========================================================================================

Shapes: P rows of all steps, D hidden size. Logits [P, V] never exist whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skimp.draft.options import Loss
from skimp.shrink.heal.loss import Logits, chunk_rows

FIXED: Final[dict[Loss, float]] = {"ce": 1.0, "tv": 0.0, "mix": 0.1}
ETA: Final = 3.0  # of ``lk``


def ce_share(loss: Loss, accepted: float) -> float:
    """The weight of CE beside TV where the share ``accepted`` of guesses is accepted now."""
    return FIXED[loss] if loss in FIXED else math.exp(-ETA * accepted)


@dataclass(frozen=True)
class Guesses:
    """Rows to be judged. ``target_rows``: the row of the target whose law each is about,
    ascending; ``steps``: of the unrolled head. Both int64 [P], on the CPU."""

    target_rows: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True)
class Judged:
    """``loss`` float32 []; ``accepted`` float32 [P]: probability that a drawn guess stands;
    ``agreed`` bool [P]: whether both would say the same greedily."""

    loss: Tensor
    accepted: Tensor
    agreed: Tensor


def judge(
    normed_PD: Tensor,
    weight_WD: Tensor,
    words: Tensor | None,
    target: Logits,
    guesses: Guesses,
    *,
    weights: Sequence[float],
    ce_shares: Sequence[float],
    chunk: int | None = None,
) -> Judged:
    """The sum over rows of ``weights[step] * (share * ce + (1 - share) * tv)``, the share of the
    row's step. ``words`` int64 [W]: what the output matrix guesses, None if all; ``target`` gives
    the target's logits. Gradients reach the rows and the output matrix, which must be dense."""
    device = normed_PD.device
    rows = chunk or chunk_rows(len(weight_WD), device.type)
    steps = torch.from_numpy(guesses.steps).to(device)
    per_row = [torch.tensor(values, device=device)[steps] for values in (weights, ce_shares)]
    loss, accepted, agreed = _Judge.apply(
        normed_PD,
        weight_WD,
        words,
        target,
        guesses.target_rows,
        *per_row,
        rows,
        torch.is_grad_enabled(),
    )
    return Judged(loss, accepted, agreed)


class _Judge(torch.autograd.Function):
    """The gradient of a chunk's logits is at hand when its loss is, so both matrices' gradients
    are made then, and no chunk is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        normed_PD: Tensor,
        weight_WD: Tensor,
        words: Tensor | None,
        target: Logits,
        target_rows: np.ndarray,
        weights: Tensor,
        ce_shares: Tensor,
        chunk: int,
        learns: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = normed_PD.device
        count = len(normed_PD)
        total = torch.zeros((), dtype=torch.float64, device=device)
        accepted = torch.empty(count, device=device)
        agreed = torch.empty(count, dtype=torch.bool, device=device)
        grad_x = torch.empty_like(normed_PD) if learns else None
        grad_weight = torch.zeros_like(weight_WD, dtype=torch.float32) if learns else None
        at = torch.from_numpy(target_rows).to(device)
        for first in range(0, count, chunk):
            last = min(first + chunk, count)
            begin, end = int(target_rows[first]), int(target_rows[last - 1]) + 1
            p = target(begin, end)
            best = p.argmax(-1)
            p = p.softmax(-1)
            if words is not None:
                p = p[:, words]
            of_row = at[first:last] - begin
            p = p[of_row]
            x = normed_PD[first:last].to(weight_WD.dtype)
            log_q = F.linear(x, weight_WD).float().log_softmax(-1)
            guess = log_q.argmax(-1)
            agreed[first:last] = (guess if words is None else words[guess]) == best[of_row]
            # A word that the target rules out weighs nothing, whatever the head makes of it.
            ce = -(p * log_q).masked_fill(p == 0, 0.0).sum(-1)
            q = log_q.exp_()
            own = torch.minimum(p, q).sum(-1)
            accepted[first:last] = own
            share, weight = ce_shares[first:last], weights[first:last]
            total += (weight * (share * ce + (1 - share) * (1 - own))).double().sum()
            if grad_x is None or grad_weight is None:
                continue
            ce_weight = (weight * share)[:, None]
            # d(tv)/dq is -1 where q < p; through the softmax: q * (that - its mean under q).
            short = (q < p).float()
            lost = (q * short).sum(-1, keepdim=True)
            slope = ((weight * (1 - share))[:, None] * (lost - short)).mul_(q)
            slope += ce_weight * (q * p.sum(-1, keepdim=True) - p)
            slope = slope.to(weight_WD.dtype)
            grad_x[first:last] = slope @ weight_WD
            grad_weight += slope.T @ x
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight_WD.dtype
        ctx.mark_non_differentiable(accepted, agreed)
        return total.float(), accepted, agreed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, (grad_weight * grad).to(ctx.weight_dtype), *(None,) * 7
