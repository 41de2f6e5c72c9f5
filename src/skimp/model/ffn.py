"""The feed-forward sublayer: one gated network, or a mixture of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skimp.kernels.ops import ExpertParams, Ops
from skimp.model.layers import FusedExperts, Linear, RMSNorm
from skimp.model.spec import ExpertsSpec, FFNSpec, GatedFFNSpec


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


class Experts(nn.Module):
    """A router and its experts, each with matrices of its own or, if fused, all in two tensors."""

    out: None = None  # there is no one last matrix: ``hidden`` is what is added

    def __init__(self, spec: ExpertsSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        count, inner = spec.num_experts, spec.intermediate_size
        self.router = Linear(hidden_size, count, bias=spec.router.bias)
        self.correction = nn.Parameter(torch.empty(count)) if spec.router.correction else None
        self.experts: FusedExperts | nn.ModuleList
        if spec.fused:
            self.experts = FusedExperts(count, hidden_size, inner, bias=spec.bias)
        else:
            one = GatedFFNSpec(intermediate_size=inner, bias=spec.bias)
            self.experts = nn.ModuleList(GatedFFN(one, hidden_size) for _ in range(count))
        self.shared = None if spec.shared is None else GatedFFN(spec.shared, hidden_size)

    def bind(self, ops: Ops) -> None:
        params = ExpertParams(
            spec=self.spec,
            router=self.router,
            correction=None if self.correction is None else self.correction.float(),
            experts=self.experts if isinstance(self.experts, FusedExperts) else self._each(),
        )
        self._experts: Any = ops.pack_experts(params)
        if self.shared is not None:
            self.shared.bind(ops)

    def _each(self) -> list[tuple[Linear, Linear, Linear]]:
        found = []
        for expert in self.experts.children():
            assert isinstance(expert, GatedFFN)
            found.append((expert.gate_proj, expert.up_proj, expert.down_proj))
        return found

    def hidden(self, x_RD: Tensor, norm: RMSNorm, ops: Ops) -> Tensor:
        """float32 [R, D]: what the experts of each row add up to."""
        y_RD = ops.experts(x_RD, self._experts, norm)
        if self.shared is None:
            return y_RD
        return ops.matmul(self.shared.hidden(x_RD, norm, ops), self.shared.out, residual=y_RD)


def make_ffn(spec: FFNSpec, hidden_size: int) -> GatedFFN | Experts:
    """The module of a feed-forward spec, without weights."""
    if isinstance(spec, ExpertsSpec):
        return Experts(spec, hidden_size)
    return GatedFFN(spec, hidden_size)
