"""Latent attention in PyTorch, for one sequence: the reference of its two exact forms.

Shape legend: R rows, T tokens that are seen, H heads, N nope_dim, P rope_dim, V value_dim,
L latent_dim, C = L + P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skimp.model.spec import LatentAttentionSpec


@dataclass(frozen=True)
class LatentHeads:
    """What makes heads of a latent."""

    keys_HNL: Tensor
    values_HVL: Tensor


def split_heads(weight: Tensor, spec: LatentAttentionSpec) -> LatentHeads:
    """Of ``kv_b_proj`` [H * (N + V), L]; differentiable."""
    heads = weight.unflatten(0, (spec.num_heads, -1))
    keys, values = heads.split((spec.nope_dim, spec.value_dim), dim=1)
    return LatentHeads(keys, values)


def expands(rows: int, spec: LatentAttentionSpec) -> bool:
    """Whether making every head's keys and values costs less than attending to latents does more:
    H (N + V) L a token seen against H (2 L - N - V) a pair."""
    made = spec.nope_dim + spec.value_dim
    return rows * (2 * spec.latent_dim - made) > made * spec.latent_dim


def to_latent(nope_RHN: Tensor, heads: LatentHeads) -> Tensor:
    """Queries that meet latents: [R, H, L]."""
    return torch.einsum("rhn,hnl->rhl", nope_RHN, heads.keys_HNL.float())


def from_latent(mixed_RHL: Tensor, heads: LatentHeads) -> Tensor:
    """Mixed values of heads, of mixed latents: [R, H, V]."""
    return torch.einsum("rhl,hvl->rhv", mixed_RHL, heads.values_HVL.float())


def absorbed(
    nope_RHN: Tensor,
    rotated_RHP: Tensor,
    cached_TC: Tensor,
    mask_RT: Tensor,
    heads: LatentHeads,
    spec: LatentAttentionSpec,
) -> Tensor:
    """[R, H, V] with keys and values left in the latent."""
    c, key = cached_TC.split((spec.latent_dim, spec.rope_dim), dim=-1)
    scores = torch.einsum("rhl,tl->hrt", to_latent(nope_RHN, heads), c)
    scores = (scores + torch.einsum("rhp,tp->hrt", rotated_RHP, key)) * spec.scale
    weights = scores.masked_fill(~mask_RT, -math.inf).softmax(-1)
    return from_latent(torch.einsum("hrt,tl->rhl", weights, c), heads)


def expanded(
    nope_RHN: Tensor,
    rotated_RHP: Tensor,
    cached_TC: Tensor,
    mask_RT: Tensor,
    heads: LatentHeads,
    spec: LatentAttentionSpec,
) -> Tensor:
    """[R, H, V] with every head's keys and values made."""
    keys, values = made_heads(cached_TC, heads, spec)
    queries = torch.cat((nope_RHN, rotated_RHP), dim=-1)
    scores = torch.einsum("rhk,thk->hrt", queries, keys) * spec.scale
    weights = scores.masked_fill(~mask_RT, -math.inf).softmax(-1)
    return torch.einsum("hrt,thv->rhv", weights, values)


def made_heads(
    cached_TC: Tensor, heads: LatentHeads, spec: LatentAttentionSpec
) -> tuple[Tensor, Tensor]:
    """Keys [T, H, N + P] and values [T, H, V] of all heads."""
    c, key = cached_TC.split((spec.latent_dim, spec.rope_dim), dim=-1)
    nope = torch.einsum("tl,hnl->thn", c, heads.keys_HNL.to(c.dtype))
    values = torch.einsum("tl,hvl->thv", c, heads.values_HVL.to(c.dtype))
    rotated = key[:, None].expand(-1, spec.num_heads, -1)
    return torch.cat((nope, rotated), dim=-1), values
