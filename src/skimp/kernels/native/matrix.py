"""Packed weights: one copy, in panels of 16 outputs, that serves every number of rows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skimp.kernels.native import structs
from skimp.kernels.native.library import library
from skimp.kernels.ops import PackLayout
from skimp.model.layers import Linear


@dataclass(frozen=True)
class PackedMatrix:
    """``op.h`` describes the panels. ``sizes`` are the outputs of the Linears it was made of."""

    panels: Tensor  # [panels * 16 * padded in_features], flat
    bias: Tensor | None  # float32 [panels * 16] in panel order
    in_features: int
    sizes: tuple[int, ...]
    gated: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.panels.dtype

    @property
    def out_features(self) -> int:
        """Columns of the product: of a gated matrix, those left after the activation."""
        return self.sizes[0] if self.gated else sum(self.sizes)

    @property
    def num_panels(self) -> int:
        return _num_panels(self.sizes, self.gated)

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def unpack(self) -> list[Tensor]:
        """The [out_features, in_features] matrices it was made of, bit for bit (in ``dtype``)."""
        out = [torch.empty(size, self.in_features, dtype=self.dtype) for size in self.sizes]
        _run([self._op(index, rows, unpack=True) for index, rows in enumerate(out)])
        return out

    def _op(self, index: int, rows: Tensor, *, unpack: bool) -> structs.PackOp:
        return structs.PackOp(
            head=structs.OpHeader(structs.PACK, structs.DTYPES[self.dtype]),
            rows=rows.data_ptr(),
            panels=self.panels.data_ptr(),
            row_stride=rows.stride(0),
            rows_dtype=structs.SOURCE_DTYPES[rows.dtype],
            n=rows.shape[0],
            k=self.in_features,
            first=0 if self.gated else sum(self.sizes[:index]),
            layout=1 + index if self.gated else 0,
            unpack=unpack,
        )


def pack(linears: Sequence[Linear], layout: PackLayout, dtype: torch.dtype) -> PackedMatrix:
    """Pack in ``dtype`` (float32 or bfloat16) and set each ``linear.weight`` to None.

    Sources may be float32, bfloat16 or float16, at any alignment (a mapped file).
    """
    if dtype not in structs.DTYPES:
        raise ValueError(f"native kernels hold float32 or bfloat16 weights, not {dtype}")
    gated = layout == "gated"
    sizes = tuple(linear.out_features for linear in linears)
    in_features = linears[0].in_features
    assert all(linear.in_features == in_features for linear in linears)
    assert not gated or (len(sizes) == 2 and sizes[0] == sizes[1]), "gated packs gate and up"
    padded = -(-in_features // structs.K_ALIGN) * structs.K_ALIGN
    depth = padded if dtype == torch.bfloat16 else in_features
    count = _num_panels(sizes, gated) * structs.PANEL * depth
    panels = torch.empty(count, dtype=dtype)
    library().advise_huge(panels.data_ptr(), panels.nbytes)
    matrix = PackedMatrix(panels.zero_(), _bias(linears, sizes, gated), in_features, sizes, gated)
    for index, linear in enumerate(linears):
        weight = linear.weight
        assert weight is not None, "this matrix was packed before"
        if weight.device.type != "cpu" or weight.dtype not in structs.SOURCE_DTYPES:
            raise ValueError(f"cannot pack a {weight.dtype} weight on {weight.device}")
        rows = weight.detach()
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        _run([matrix._op(index, rows, unpack=False)])
        linear.weight = None
    return matrix


def _num_panels(sizes: Sequence[int], gated: bool) -> int:
    if gated:
        return 2 * -(-sizes[0] // structs.PANEL)
    return -(-sum(sizes) // structs.PANEL)


def _bias(linears: Sequence[Linear], sizes: Sequence[int], gated: bool) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    parts = [
        torch.zeros(size) if linear.bias is None else linear.bias.detach().float()
        for linear, size in zip(linears, sizes)
    ]
    if gated:
        short = -sizes[0] % structs.PANEL
        halves = [torch.nn.functional.pad(p, (0, short)).view(-1, 1, structs.PANEL) for p in parts]
        return torch.cat(halves, dim=1).flatten().contiguous()
    bias = torch.cat(parts)
    return torch.nn.functional.pad(bias, (0, -bias.shape[0] % structs.PANEL)).contiguous()


def _run(ops: Sequence[ctypes.Structure]) -> None:
    program = (ctypes.c_void_p * len(ops))(*(ctypes.addressof(op) for op in ops))
    library().run(ctypes.addressof(program), len(ops), 0, 0, 0)
