"""From heads of keys and values to latents: the linear algebra of the ``mla`` step, layer by layer.

After TransMLA (Meng et al. 2025): heads merged into one, rotations that commute with RoPE to bring
what positions matter for into few frequencies (RoRoPE, FreqFold), the rest left without positions,
and one joint projection of keys and values; with the projection that is best for calibration
activations, which is CARE's for equal ranks (2026).

Shape legend: D hidden size, H query heads, G key-value heads, d their size, P rotated numbers of
the latent form, f frequencies that are taken for one, S second moments of what the layer's
projections read, D x D. All arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skimp.model.spec import AttentionSpec, LatentAttentionSpec


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A layer's projections [out, D] and its spec."""

    spec: AttentionSpec
    queries: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor


@dataclass(frozen=True, kw_only=True)
class Split:
    """Keys as P numbers that are rotated, in pairs (re, im), and the rest.

    ``of_rotated`` [P, D] and ``of_rest`` [G d - P, D] make them. ``rotated`` [G, P, d] and ``rest``
    [G, G d - P, d] bring a query of each group to where its products with them are those with the
    group's keys.
    """

    of_rotated: Tensor
    of_rest: Tensor
    rotated: Tensor
    rest: Tensor
    kept: float  # of the keys' energy, by what is rotated


def split_keys(heads: Heads, moments: Tensor, *, rotated: int, fold: int) -> Split:
    """RoRoPE with ``fold`` neighbouring frequencies taken for one, of which every (d / rotated)-th
    is kept. Exact up to that, and to the rest's losing its rotation."""
    spec = heads.spec
    groups, half = spec.num_kv_heads, spec.head_dim // 2
    every = spec.head_dim // rotated
    # Half-split RoPE turns (x[j], x[j + half]).
    keys = heads.keys.unflatten(0, (groups, 2, half))  # [G, 2, half, D]
    first, rest = [], []
    to_first, to_rest = [], []
    energy = total = 0.0
    for begin in range(0, half, fold):
        part = keys[:, :, begin : begin + fold].transpose(1, 2).flatten(0, 1)  # [G f, 2, D]
        products = torch.einsum("apd,de,bpe->ab", part, moments, part)
        levels, turn = torch.linalg.eigh(products)
        levels, turn = levels.flip(0).clamp(min=0), turn.flip(1)  # [G f, components]
        turned = torch.einsum("as,apd->spd", turn, part)
        # A query of group g has d / 2 pairs, of which the f of this fold meet it.
        reach = torch.zeros(len(turn), groups, 2, 2, half, dtype=torch.float64)
        by_group = turn.T.unflatten(1, (groups, fold))  # [components, G, f]
        for pair in range(2):
            reach[:, :, pair, pair, begin : begin + fold] = by_group
        reach = reach.flatten(3)  # [components, G, 2, d]
        count = fold // every
        first.append(turned[:count])
        rest.append(turned[count:])
        to_first.append(reach[:count])
        to_rest.append(reach[count:])
        energy += float(levels[:count].sum())
        total += float(levels.sum())

    def rows(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).flatten(0, 1)

    def maps(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).transpose(0, 1).flatten(1, 2)

    return Split(
        of_rotated=rows(first),
        of_rest=rows(rest),
        rotated=maps(to_first),
        rest=maps(to_rest),
        kept=energy / total if total else 1.0,
    )


@dataclass(frozen=True, kw_only=True)
class Latents:
    """``down`` [L, D] makes a latent; ``rest`` [G d - P, L] and ``values`` [G d, L] come back."""

    down: Tensor
    rest: Tensor
    values: Tensor


def project(
    split: Split, heads: Heads, moments: Tensor, *, latent: int, calibrated: bool
) -> Latents:
    """One projection for keys without positions and values together. ``calibrated``: what loses
    least of them on the calibration text, keys scaled to the values' size first, so that the
    larger do not take every dimension; else what loses least of the matrices."""
    size = len(split.of_rest)
    matrix = torch.cat((split.of_rest, heads.values))
    balance = 1.0
    if calibrated and size:
        levels = torch.einsum("ad,de,ae->a", matrix, moments, matrix).clamp(min=0).sqrt()
        wanted, found = float(levels[size:].mean()), float(levels[:size].mean())
        balance = found / wanted if wanted and found else 1.0
    scaled = torch.cat((split.of_rest / balance, heads.values))
    products = scaled @ moments @ scaled.T if calibrated else scaled @ scaled.T
    _, vectors = torch.linalg.eigh((products + products.T) / 2)
    basis = vectors.flip(1)[:, :latent]
    if basis.shape[1] < latent:  # wider than all there is: the rest of the latent stays empty
        basis = torch.nn.functional.pad(basis, (0, latent - basis.shape[1]))
    return Latents(down=basis.T @ scaled, rest=balance * basis[:size], values=basis[size:])


def latent_layer(
    heads: Heads, target: LatentAttentionSpec, split: Split, latents: Latents
) -> dict[str, Tensor]:
    """The matrices of latent attention, by name: rows of a head's queries are (not rotated,
    rotated), those of ``kv_b_proj`` (key, value); the latent is not normed yet."""
    spec = heads.spec
    share = spec.num_heads // spec.num_kv_heads
    queries = heads.queries.unflatten(0, (spec.num_heads, -1)) * (spec.scale / target.scale)
    group = torch.arange(spec.num_heads) // share
    turned = split.rotated[group] @ queries  # [H, P, D]
    both = torch.cat((queries, turned), dim=1).flatten(0, 1)
    keys = split.rest.transpose(1, 2) @ latents.rest  # [G, d, L]
    values = latents.values.unflatten(0, (spec.num_kv_heads, -1))  # [G, d, L]
    made = torch.cat((keys, values), dim=1)[group].flatten(0, 1)
    return {
        "q_proj": both,
        "kv_a_proj": torch.cat((latents.down, split.of_rotated)),
        "kv_b_proj": made,
        "o_proj": heads.out,
    }


def largest_mean_square(down: Tensor) -> float:
    """What the mean square of ``down`` x [L, D] can be at most, for any x of a mean square of at
    most 1: what a norm hands on before its gain."""
    return float(torch.linalg.matrix_norm(down, 2)) ** 2 * down.shape[1] / down.shape[0]


def unnormed(
    matrices: dict[str, Tensor], target: LatentAttentionSpec, *, largest: float, below: float
) -> Tensor:
    """Make the norm of the latent do nothing, in place; returns its gain.

    Latents are divided by so large a power of two that the norm's epsilon outweighs their mean
    square: it then divides by the root of epsilon, whatever the latent. ``largest`` bounds the mean
    square, ``below`` what is to be left of it beside epsilon. The gain is a power of two, too; what
    is left of a factor goes to ``kv_b_proj``.
    """
    eps = target.latent_eps
    power = 0
    while largest * 4.0**-power > below * eps:
        power += 1
    root = eps**0.5
    gain = 2.0 ** round(torch.log2(torch.tensor(root * 2.0**power)).item())
    matrices["kv_a_proj"] = matrices["kv_a_proj"].clone()
    matrices["kv_a_proj"][: target.latent_dim] *= 2.0**-power
    matrices["kv_b_proj"] = matrices["kv_b_proj"] * (root * 2.0**power / gain)
    return torch.full((target.latent_dim,), gain, dtype=torch.float64)
