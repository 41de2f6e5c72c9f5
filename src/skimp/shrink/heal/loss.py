"""The loss that heals: KL(original || student) over the whole vocabulary, a few rows at a time.

Shapes: R rows, D hidden size, V vocabulary. Logits [R, V] of neither model ever exist whole, so
memory does not grow with the number of rows times the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from skimp.kernels.ops import Ops, StepInputs
from skimp.kernels.plain import rms_norm
from skimp.model.decoder import Decoder

# Logits of one model held at once: on a CPU what its caches share, on a GPU what keeps it busy.
CHUNK_VALUES: Final = {"cpu": 1 << 22, "cuda": 1 << 26}
Logits = Callable[[int, int], Tensor]  # of rows [a, b): float32 [b - a, V]


def chunk_rows(vocab_size: int, device: str) -> int:
    """Rows whose logits are made together."""
    return max(1, CHUNK_VALUES[device] // vocab_size)


def divergence(
    x_RD: Tensor, student: Decoder, teacher: Logits, *, chunk: int | None = None
) -> Tensor:
    """Sum over rows of KL(teacher || student) in nats, float32 [], at temperature 1.

    ``x_RD`` float32 is what left the student's last layer; gradients reach it, the final norm and
    the output matrix, which must be dense.
    """
    head = student.head
    assert head.weight is not None and head.bias is None
    spec = student.spec
    assert spec.logit_softcap is None or spec.logit_scale == 1.0, "no class has both"
    normed = rms_norm(x_RD, student.norm) * spec.logit_scale
    rows = chunk or chunk_rows(len(head.weight), x_RD.device.type)
    total: Tensor = _ChunkedDivergence.apply(normed, head.weight, teacher, spec.logit_softcap, rows)
    return total


def teacher_logits(decoder: Decoder, step: StepInputs, ops: Ops) -> Logits:
    """The logits of a decoder that learns nothing, for :func:`divergence`."""
    with torch.no_grad():
        x_RD = decoder.states(step, ops)
    return logits_of(decoder, x_RD, step, ops)


def logits_of(decoder: Decoder, x_RD: Tensor, step: StepInputs, ops: Ops) -> Logits:
    """The same of ``x_RD``, what left its last layer."""

    def logits(first: int, last: int) -> Tensor:
        rows = torch.arange(first, last, dtype=torch.int32, device=x_RD.device)
        with torch.no_grad():
            return decoder.logits(x_RD, dataclasses.replace(step, logit_rows=rows), ops)

    return logits


class _ChunkedDivergence(torch.autograd.Function):
    """The gradient of a chunk's logits z is softmax(z) - softmax(teacher): it is at hand when the
    loss is, so both matrices' gradients are made then, and no chunk is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        normed_RD: Tensor,
        weight_VD: Tensor,
        teacher: Logits,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float64, device=normed_RD.device)
        grad_x = torch.zeros_like(normed_RD) if wants_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        for first in range(0, len(normed_RD), chunk):
            last = min(first + chunk, len(normed_RD))
            x = normed_RD[first:last].to(weight_VD.dtype)
            z = F.linear(x, weight_VD).float()
            bend = None
            if softcap is not None:
                z = torch.tanh(z.div_(softcap))
                bend = 1.0 - z.square()  # the derivative of cap * tanh(z / cap)
                z = z.mul_(softcap)
            log_q = z.log_softmax(-1)
            log_p = teacher(first, last).log_softmax(-1)
            p = log_p.exp()
            # What the teacher rules out weighs nothing, whatever the student makes of it.
            gaps = log_p.sub_(log_q).masked_fill_(p == 0, 0.0)
            total += gaps.mul_(p).sum(-1).double().sum()
            if grad_x is None and grad_weight is None:
                continue
            slope = log_q.exp_().sub_(p)
            if bend is not None:
                slope = slope.mul_(bend)
            slope = slope.to(weight_VD.dtype)
            if grad_x is not None:
                grad_x[first:last] = slope @ weight_VD
            if grad_weight is not None:
                grad_weight += slope.T @ x
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad,
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )
