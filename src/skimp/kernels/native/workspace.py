"""Buffers of a captured program, reused as soon as nobody holds them."""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

LINE = 64  # bytes of a cache line


class Workspace:
    """Hands out tensors and takes their memory back when the last view of them is gone.

    Ops run in the order they were captured, so memory that no Python object refers to any more at
    capture time is free for the ops that follow.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, list[Tensor]] = {}  # free, by size
        self._all: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(block.numel() for block in self._all)

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width], zeroed when first allocated. Rows start at cache lines and lie an odd
        number of lines apart, so that the rows of a tile do not compete for one cache set."""
        row_bytes = (-(-width * dtype.itemsize // LINE) | 1) * LINE
        block = self._take(rows * row_bytes)
        # A fresh owner for each use: PyTorch's storage keeps it alive, its end frees the block.
        owner = (ctypes.c_char * block.numel()).from_address(block.data_ptr())
        weakref.finalize(owner, self._blocks[block.numel()].append, block)
        flat = torch.frombuffer(owner, dtype=dtype)
        return flat.as_strided((rows, width), (row_bytes // dtype.itemsize, 1))

    def owns(self, tensor: Tensor) -> bool:
        address = tensor.data_ptr()
        return any(b.data_ptr() <= address < b.data_ptr() + b.numel() for b in self._all)

    def _take(self, nbytes: int) -> Tensor:
        free = self._blocks.setdefault(nbytes, [])
        if free:
            return free.pop()
        block = torch.zeros(nbytes + LINE, dtype=torch.uint8)
        shift = -block.data_ptr() % LINE
        block = block[shift : shift + nbytes]
        self._all.append(block)
        return block
