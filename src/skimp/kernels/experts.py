"""Routing of a mixture of experts in PyTorch: the reference of every backend.

Shape legend: R rows, E experts, k experts of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skimp.model.spec import ExpertsSpec


def route(
    logits_RE: Tensor, spec: ExpertsSpec, correction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each row's experts, int64 [R, k] in ascending order, and their weights, float32 [R, k].

    ``logits`` are float32; ``correction`` float32 [E] is added to the scores for the choice alone
    (Wang et al. 2024). Of equal scores the first counts, so that every backend chooses alike.
    """
    router = spec.router
    scores = logits_RE.softmax(-1) if router.scoring == "softmax" else logits_RE.sigmoid()
    ranks = scores if correction is None else scores + correction
    if router.groups_chosen < router.groups:  # DeepSeek-V2 and V3, group-limited routing
        grouped = ranks.unflatten(-1, (router.groups, -1))
        best = grouped.topk(2 if router.group_score == "top2" else 1, dim=-1).values.sum(-1)
        closed = torch.ones_like(best, dtype=torch.bool)
        closed.scatter_(-1, _largest(best, router.groups_chosen), False)
        ranks = grouped.masked_fill(closed[..., None], -math.inf).flatten(-2)
    chosen = _largest(ranks, spec.experts_per_token).sort(-1).values
    weights = scores.gather(-1, chosen)
    if router.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + router.normalize_eps)
    return chosen, weights * router.scale


def _largest(x: Tensor, count: int) -> Tensor:
    """Indices of the largest along the last axis; topk would take any of equals."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :count]
