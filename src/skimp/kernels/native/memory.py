"""Where packed weights lie."""

from __future__ import annotations

import torch
from torch import Tensor

from skimp.kernels.native.library import advise_huge

_BLOCK_BYTES = 64 << 20
_LINE = 64  # bytes of a cache line


class PanelMemory:
    """Places matrices one after another in a few large buffers.

    A step streams hundreds of matrices, most of them smaller than a huge page. Each in memory of
    its own they would lie in 4 KiB pages, and reading them would wait for address translation.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """[count] zeros from the start of a cache line."""
        nbytes = count * dtype.itemsize
        start = self._used + -(self._block.data_ptr() + self._used) % _LINE
        if start + nbytes > self._block.nbytes:
            self._block = torch.empty(max(nbytes + _LINE, _BLOCK_BYTES), dtype=torch.uint8)
            advise_huge(self._block)
            start = -self._block.data_ptr() % _LINE
        self._used = start + nbytes
        return self._block[start : self._used].view(dtype).zero_()
