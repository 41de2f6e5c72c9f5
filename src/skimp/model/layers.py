"""The parameter holders every mixer and ffn is built from. Their maths lives in ``kernels``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from skimp.formats.weight import QuantizedWeight, WeightFormat


class Linear(nn.Module):
    """``y = x @ weight.T + bias``; weight is [out_features, in_features].

    Kept separate from ``nn.Linear`` because a serving backend takes the weight away once it has
    packed its own copy (see ``Ops.pack``), and because the matrix may be in a low-bit format:
    then ``weight`` is None and ``quantized`` holds it.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features))
        self.quantized: QuantizedWeight | None = None
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def format(self) -> WeightFormat | None:
        """None for a dense matrix."""
        return None if self.quantized is None else self.quantized.format

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Linear:
        """Moves the matrix with the module; its numbers keep their dtypes."""
        super()._apply(fn, recurse)
        if self.quantized is not None:
            device = fn(torch.empty(0, device=self.quantized.values.device)).device
            self.quantized = self.quantized.to(device)
        return self

    def take(self) -> Tensor | QuantizedWeight:
        """Hand the matrix over to a backend; the module keeps nothing of it."""
        matrix = self.weight if self.quantized is None else self.quantized
        assert matrix is not None, "this matrix was packed before"
        self.weight = self.quantized = None
        return matrix.detach() if isinstance(matrix, Tensor) else matrix


class FusedExperts(nn.Module):
    """The experts of a layer in two tensors, as gpt-oss stores them: inputs come before outputs,
    and gate and up lie in turns. ``gate_up_proj`` is [experts, in_features, 2 * inner],
    ``down_proj`` [experts, inner, in_features]."""

    def __init__(self, experts: int, in_features: int, inner: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj: nn.Parameter | None = nn.Parameter(
            torch.empty(experts, in_features, 2 * inner)
        )
        self.gate_up_proj_bias: nn.Parameter | None = None
        self.down_proj: nn.Parameter | None = nn.Parameter(torch.empty(experts, inner, in_features))
        self.down_proj_bias: nn.Parameter | None = None
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(experts, 2 * inner))
            self.down_proj_bias = nn.Parameter(torch.empty(experts, in_features))

    def gate_up(self, expert: int) -> tuple[Tensor, Tensor | None]:
        """[2 * inner, in_features], all of gate before all of up, and the bias; differentiable."""
        assert self.gate_up_proj is not None, "these experts were packed before"
        weight, bias = self.gate_up_proj[expert].T, self.gate_up_proj_bias
        apart = None if bias is None else torch.cat((bias[expert, 0::2], bias[expert, 1::2]))
        return torch.cat((weight[0::2], weight[1::2])), apart

    def down(self, expert: int) -> tuple[Tensor, Tensor | None]:
        """[in_features, inner] and the bias; differentiable."""
        assert self.down_proj is not None, "these experts were packed before"
        bias = self.down_proj_bias
        return self.down_proj[expert].T, None if bias is None else bias[expert]

    def release(self) -> None:
        """A backend holds its own copy: the module keeps nothing of the matrices."""
        self.gate_up_proj = self.down_proj = None


def stacked_bias(linears: Sequence[Linear]) -> Tensor | None:
    """Biases one after another, zeros for those without; None if there is none."""
    given = [linear.bias.detach() for linear in linears if linear.bias is not None]
    if not given:
        return None
    parts = [
        torch.zeros(linear.out_features, device=given[0].device)
        if linear.bias is None
        else linear.bias.detach()
        for linear in linears
    ]
    return torch.cat(parts)


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
