"""Muon for the matrices of the layers, AdamW for the embedding and the norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: about the nearest orthogonal matrix of each (rows <= columns)."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon_direction(gradients: Tensor, momentum: Tensor, beta: float) -> Tensor:
    """Update `momentum` in place; returns the step, of root mean square 0.2."""
    momentum.lerp_(gradients, 1 - beta)
    blend = gradients.lerp(momentum, beta)
    return orthogonalise(blend).float() * (0.2 * max(gradients.shape[-2:]) ** 0.5)


class Optimizer:
    """Both optimizers behind one `step`; matrices of one shape are updated together."""

    def __init__(
        self,
        model: nn.Module,
        matrix_rate: float,
        other_rate: float,
        decay: float,
        momentum: float = 0.95,
        compiled: bool = False,
    ) -> None:
        self.matrix_rate, self.other_rate = matrix_rate, other_rate
        self.decay, self.momentum = decay, momentum
        groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        other: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                small, large = sorted(parameter.shape)
                groups.setdefault((small, large), []).append(parameter)
            else:
                other.append(parameter)
        self.groups: list[list[Tensor]] = [list(group) for group in groups.values()]
        self.buffers = [
            torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in groups.items()
        ]
        embedding = [p for p in other if p.dim() == 2]
        norms = [p for p in other if p.dim() < 2]
        self.adam = torch.optim.AdamW(
            [{"params": embedding, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}],
            lr=other_rate,
            betas=(0.9, 0.95),
            eps=1e-10,
            fused=other[0].is_cuda,
        )
        self.direction: Callable[[Tensor, Tensor, float], Tensor] = muon_direction
        if compiled:
            self.direction = torch.compile(muon_direction, dynamic=False)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update with every rate times `factor`; the gradients are then cleared."""
        for options in self.adam.param_groups:
            options["lr"] = self.other_rate * factor
        self.adam.step()
        rate = self.matrix_rate * factor
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            wide = [_wide(p.grad) for p in group if p.grad is not None]
            step = self.direction(torch.stack(wide), buffer, self.momentum)
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_([_wide(p) for p in group], list(step.unbind()), alpha=-rate)
        for parameter in (p for group in self.groups for p in group):
            parameter.grad = None
        self.adam.zero_grad()

    def state(self) -> dict:
        """What a later run needs to go on."""
        return {"adam": self.adam.state_dict(), "muon": self.buffers}

    def restore(self, state: dict) -> None:
        """Take over what `state()` gave."""
        self.adam.load_state_dict(state["adam"])
        for buffer, saved in zip(self.buffers, state["muon"], strict=True):
            buffer.copy_(saved)


def _wide(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, whichever has no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def rate_factor(done: float, warm: float = 0.01, flat: float = 0.4) -> float:
    """The schedule: linear up, flat until `flat` of the run, then linearly to zero."""
    if done < warm:
        return max(done, 1e-4) / warm
    return 1.0 if done < flat else max(0.0, (1 - done) / (1 - flat))
