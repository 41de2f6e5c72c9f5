"""The parameter holders every mixer and ffn is built from. Their maths lives in ``kernels``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """``y = x @ weight.T + bias``; weight is [out_features, in_features].

    Kept separate from ``nn.Linear`` because a serving backend takes the weight away once it has
    packed its own copy (see ``Ops.pack``), and a weight format may hold something else than a
    dense matrix.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019); the factor is ``weight`` or ``1 + weight``."""

    def __init__(self, dim: int, *, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.plus_one = plus_one

    def factor(self) -> Tensor:
        """The multiplier as float32 [dim]."""
        weight = self.weight.float()
        return 1.0 + weight if self.plus_one else weight
