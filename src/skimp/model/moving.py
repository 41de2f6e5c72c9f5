"""From files to a GPU: weights that are mapped go through pinned memory, one piece while the last
one is on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from skimp.model.layers import Linear

PIECE_BYTES = 64 << 20
PIECES = 3


def move_decoder(decoder: nn.Module, device: torch.device | str) -> None:
    """Every parameter and low-bit matrix of ``decoder`` onto ``device``, in place.

    What is there already stays. Each tensor of the host is let go as soon as it is copied, so that
    no more of the files than a few pieces has to be in memory.
    """
    device = torch.device(device)
    if device.type != "cuda":
        decoder.to(device)
        return
    move = Pipeline(device)
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            moved = nn.Parameter(move(parameter.detach()), requires_grad=False)
            setattr(module, name, moved)
        if isinstance(module, Linear) and module.quantized is not None:
            old = module.quantized
            module.quantized = replace(
                old,
                values=move(old.values),
                scale=move(old.scale),
                zero=None if old.zero is None else move(old.zero),
            )
    torch.cuda.synchronize(device)


class Pipeline:
    """Copies tensors to ``device`` through a few pinned pieces, asynchronously. The caller waits
    for the device before the pieces go."""

    def __init__(
        self, device: torch.device, *, piece_bytes: int = PIECE_BYTES, pieces: int = PIECES
    ) -> None:
        pinned = device.type == "cuda"
        self._device = device
        self._pieces = [
            torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(pieces)
        ]
        self._free: list[Callable[[], None] | None] = [None] * pieces
        self._next = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor.to(self._device)
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        size = self._pieces[0].numel()
        source = tensor.contiguous().view(-1).view(torch.uint8)
        for part, place in zip(source.split(size), target.view(-1).view(torch.uint8).split(size)):
            wait = self._free[self._next]
            if wait is not None:
                wait()
            piece = self._pieces[self._next][: part.numel()]
            piece.copy_(part)
            place.copy_(piece, non_blocking=True)
            if self._device.type == "cuda":
                copied = torch.cuda.Event()
                copied.record()
                self._free[self._next] = copied.synchronize
            self._next = (self._next + 1) % len(self._pieces)
        return target
