"""Shared by the tests of the native kernels."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from skimp.kernels import native
from skimp.kernels.native.library import library
from skimp.model.layers import Linear, RMSNorm
from skimp.model.spec import Activation

needs_native = pytest.mark.skipif(not native.available(), reason="native kernels are not built")

LEVELS = ["scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]
# What this CPU can run; the rest is skipped, not passed over in silence.
BEST = LEVELS.index(library().best_isa()) if native.available() else -1
ISAS = [
    pytest.param(name, marks=pytest.mark.skipif(level > BEST, reason=f"this CPU has no {name}"))
    for level, name in enumerate(LEVELS)
]
DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 15, 16, 17, 28, 31, 32, 33, 48, 64, 65, 70]


def make_linear(
    in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool = False, seed: int = 0
) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = Linear(in_features, out_features, bias=bias)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    linear.weight = torch.nn.Parameter(weight.to(dtype))
    if linear.bias is not None:
        bias_value = torch.randn(out_features, generator=generator)
        linear.bias = torch.nn.Parameter(bias_value.to(dtype))
    return linear


def make_norm(dim: int, *, plus_one: bool = False) -> RMSNorm:
    norm = RMSNorm(dim, eps=1e-6, plus_one=plus_one)
    norm.weight = torch.nn.Parameter(torch.rand(dim, generator=torch.Generator().manual_seed(5)))
    return norm


def make_rows(rows: int, width: int, *, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm: RMSNorm | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The product in float64, from the weights as they are stored."""
    x = x.double()
    if norm is not None:
        mean = x.square().mean(-1, keepdim=True)
        x = x * torch.rsqrt(mean + norm.eps) * norm.factor().double()
    parts = [x @ w.double().T + (0.0 if b is None else b.double()) for w, b in zip(weights, biases)]
    y = torch.cat(parts, dim=-1)
    if activation is not None:
        gate, up = y.chunk(2, dim=-1)
        acts = {
            "silu": torch.nn.functional.silu,
            "gelu": torch.nn.functional.gelu,
            "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        }
        y = acts[activation](gate) * up
    return y if residual is None else y + residual.double()


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value wanted; NaN if anything was left unwritten."""
    return float((got.double() - want).abs().max() / want.abs().max())


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-2
