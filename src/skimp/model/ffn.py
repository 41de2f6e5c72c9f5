"""The feed-forward sublayer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from skimp.kernels.ops import Ops
from skimp.model.layers import Linear, RMSNorm
from skimp.model.spec import GatedFFNSpec


class GatedFFN(nn.Module):
    def __init__(self, spec: GatedFFNSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.gate_proj = Linear(hidden_size, spec.intermediate_size, bias=spec.bias)
        self.up_proj = Linear(hidden_size, spec.intermediate_size, bias=spec.bias)
        self.down_proj = Linear(spec.intermediate_size, hidden_size, bias=spec.bias)

    def bind(self, ops: Ops) -> None:
        self._gate_up: Any = ops.pack((self.gate_proj, self.up_proj), "gated")
        self._down: Any = ops.pack((self.down_proj,))

    def hidden(self, x_RD: Tensor, norm: RMSNorm, ops: Ops) -> Tensor:
        """[R, intermediate_size]: what enters the last product."""
        return ops.matmul(x_RD, self._gate_up, norm=norm, activation=self.spec.activation)

    @property
    def out(self) -> Any:
        """The last matrix as the backend holds it."""
        return self._down
