"""Mixtures of experts, packed: a gated and a last matrix an expert, and the router in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skimp.kernels.native import matrix as packed
from skimp.kernels.native.matrix import PackedMatrix
from skimp.kernels.native.memory import PanelMemory
from skimp.kernels.ops import ExpertParams
from skimp.model.layers import FusedExperts, Linear
from skimp.model.spec import ExpertsSpec


@dataclass(frozen=True)
class PackedExperts:
    spec: ExpertsSpec
    router: PackedMatrix
    correction: Tensor | None
    each: list[tuple[PackedMatrix, PackedMatrix]]


def pack_experts(
    params: ExpertParams, dtype: torch.dtype | None, memory: PanelMemory
) -> PackedExperts:
    """Pack into ``memory``, taking each matrix away; ``dtype`` as in :func:`matrix.pack`."""
    router = packed.pack((params.router,), "stack", torch.float32, memory)
    assert isinstance(router, PackedMatrix)
    each = []
    for gate, up, down in _linears(params):
        first = packed.pack((gate, up), "gated", dtype, memory)
        last = packed.pack((down,), "stack", dtype, memory)
        assert isinstance(first, PackedMatrix) and isinstance(last, PackedMatrix)
        each.append((first, last))
    if isinstance(params.experts, FusedExperts):
        params.experts.release()
    return PackedExperts(params.spec, router, params.correction, each)


def _linears(params: ExpertParams) -> Iterator[tuple[Linear, Linear, Linear]]:
    """Each expert's gate, up and down."""
    experts = params.experts
    if not isinstance(experts, FusedExperts):
        yield from experts
        return
    with torch.no_grad():
        for index in range(params.spec.num_experts):
            weight, bias = experts.gate_up(index)
            gate, up = weight.chunk(2)
            biases = (None, None) if bias is None else bias.chunk(2)
            last, last_bias = experts.down(index)
            yield (
                _linear(gate, biases[0]),
                _linear(up, biases[1]),
                _linear(last.contiguous(), last_bias),
            )


def _linear(weight: Tensor, bias: Tensor | None) -> Linear:
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear
