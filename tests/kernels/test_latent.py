"""Latent attention in the plain backend: its two forms, rows by themselves, and gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from skimp.kernels import latent
from skimp.kernels.ops import LatentParams, StepInputs
from skimp.kernels.plain import PlainOps
from skimp.model.layers import Linear, RMSNorm
from skimp.model.rope import rope_tables
from skimp.model.spec import LatentAttentionSpec, RopeSpec

SPECS = [
    LatentAttentionSpec(
        num_heads=heads,
        latent_dim=latent_dim,
        rope_dim=rope_dim,
        nope_dim=nope_dim,
        value_dim=value_dim,
        rope=RopeSpec(theta=1e4, rotary_dim=rope_dim),
        scale=(nope_dim + rope_dim) ** -0.5,
    )
    for heads, latent_dim, rope_dim, nope_dim, value_dim in (
        (4, 512, 64, 128, 128),
        (6, 20, 6, 10, 14),
        (3, 64, 32, 16, 64),
    )
]


def heads_of(spec: LatentAttentionSpec) -> latent.LatentHeads:
    inputs, outputs = spec.matrices(8)["kv_b_proj"]
    return latent.split_heads(torch.randn(outputs, inputs) * inputs**-0.5, spec)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.latent_dim}")
@pytest.mark.parametrize("rows", range(1, 9))
def test_absorbed_is_expanded(spec: LatentAttentionSpec, rows: int) -> None:
    torch.manual_seed(rows)
    tokens, heads = 37, heads_of(spec)
    nope = torch.randn(rows, spec.num_heads, spec.nope_dim)
    rotated = torch.randn(rows, spec.num_heads, spec.rope_dim)
    cached = torch.randn(tokens, spec.cached_dim)
    ends = torch.arange(tokens - rows, tokens)[:, None] + 1
    mask = torch.arange(tokens) < ends
    one = latent.absorbed(nope, rotated, cached, mask, heads, spec)
    other = latent.expanded(nope, rotated, cached, mask, heads, spec)
    assert float((one - other).abs().max() / other.std()) < 1e-5


def test_many_rows_are_expanded_and_few_are_not() -> None:
    assert not latent.expands(8, SPECS[0])
    assert latent.expands(512, SPECS[0])
    large = dataclasses.replace(SPECS[1], value_dim=40)  # heads of more than two latents
    assert not latent.expands(10**6, large)


def test_gradients_reach_everything() -> None:
    """Training goes through the same code: compared with finite differences."""
    torch.manual_seed(0)
    spec = SPECS[1]
    norm = RMSNorm(spec.latent_dim, eps=1e-6)
    norm.weight = torch.nn.Parameter(torch.rand(spec.latent_dim) + 0.5)
    linear = Linear(*spec.matrices(8)["kv_b_proj"])
    linear.weight = torch.nn.Parameter(torch.randn(linear.out_features, linear.in_features))
    assert spec.rope is not None
    params = LatentParams(spec=spec, latent_norm=norm, rope=rope_tables(spec.rope, 8), cache=None)
    positions = torch.tensor([0, 1, 2, 3, 0, 1], dtype=torch.int32)
    step = StepInputs(
        token_ids=positions,
        positions=positions,
        row_seq=torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.int32),
        kv_end=positions + 1,
        seq_starts=torch.tensor([0, 4, 6], dtype=torch.int32),
        logit_rows=positions,
    )
    queries = torch.randn(6, spec.query_dim, requires_grad=True)
    latents = torch.randn(6, spec.cached_dim, requires_grad=True)
    ops = PlainOps()
    weights = torch.randn(6, spec.out_dim)

    def loss() -> torch.Tensor:
        heads = ops.pack_latent(linear, spec)
        out = ops.latent_attention(queries, latents, heads, params, step)
        return (out * weights).double().sum()

    leaves = [queries, latents, norm.weight, linear.weight]
    slopes = torch.autograd.grad(loss(), leaves)
    for leaf, slope in zip(leaves, slopes):
        direction = torch.randn_like(leaf)
        direction /= direction.norm()
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                leaf += sign * 1e-2 * direction
                ends.append(loss())
                leaf -= sign * 1e-2 * direction
        measured = float((ends[0] - ends[1]) / 2e-2)
        assert measured == pytest.approx(float((slope * direction).sum()), rel=2e-2, abs=2e-2)
