"""The optimiser, and what PyTorch is set to while it works."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from skimp.errors import ShrinkError

MOMENTS: Final = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over masters; norms and biases do not decay. Gradients
    longer than ``clip`` are cut to it."""

    def __init__(
        self,
        masters: dict[str, Tensor],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
    ) -> None:
        self._masters, self._clip = masters, clip
        self.updates = 0
        matrices = [m for m in masters.values() if m.dim() > 1]
        others = [m for m in masters.values() if m.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=betas, fused=True
        )

    def update(self, lr: float, where: str) -> None:
        """One step down the gradients, which are gone after it."""
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self._clip)
        if not bool(norm.isfinite()):
            raise ShrinkError(f"lr: the gradient is not finite at {where}; lower it")
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad()
        self.updates += 1

    def tensors(self) -> dict[str, Tensor]:
        """The moments, to be saved."""
        return {
            f"{name}:{moment}": self._adamw.state[master][moment]
            for name, master in self._masters.items()
            for moment in MOMENTS
        }

    def load(self, tensors: Any, updates: int) -> None:
        """Inverse of :meth:`tensors`."""
        self.updates = updates
        for name, master in self._masters.items():
            moments = {m: tensors[f"{name}:{m}"].to(master.device, copy=True) for m in MOMENTS}
            count = torch.tensor(float(updates), device=master.device)
            self._adamw.state[master] = {"step": count, **moments}


@contextlib.contextmanager
def training_settings(device: torch.device) -> Iterator[None]:
    """No time is spent on filling new memory; on a GPU products need not repeat bit for bit."""
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    strict = torch.are_deterministic_algorithms_enabled()
    settings.fill_uninitialized_memory = False
    if device.type == "cuda":
        torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(strict)
