"""What the methods know of a matrix's inputs."""

from __future__ import annotations

import torch
from torch import Tensor


class Inputs:
    """Second moments and mean magnitude of the inputs [K] of a group of matrices."""

    def __init__(self, in_features: int) -> None:
        self._moments = torch.zeros(in_features, in_features, dtype=torch.float64)
        self._magnitude = torch.zeros(in_features, dtype=torch.float64)
        self._count = 0

    def add(self, x: Tensor) -> None:
        """Rows [R, K]. A product of single precision, summed over calls in double."""
        x = x.float()
        self._moments += x.T @ x
        self._magnitude += x.abs().sum(0)
        self._count += len(x)

    @property
    def moments(self) -> Tensor:
        """Mean of x xᵀ, float64 [K, K]."""
        return self._moments / max(1, self._count)

    @property
    def magnitude(self) -> Tensor:
        """Mean of |x|, float64 [K]."""
        return self._magnitude / max(1, self._count)
