"""Packed weights: one copy, in panels of 16 outputs, that serves every number of rows."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skimp.formats.weight import QuantizedWeight
from skimp.kernels.native import structs
from skimp.kernels.native.library import library
from skimp.kernels.native.lowbit import (
    LowBits,
    from_panels,
    in_panels,
    low_bits,
    panel_bytes,
    settle_formats,
)
from skimp.kernels.native.memory import PanelMemory
from skimp.kernels.ops import PackLayout
from skimp.model.layers import Linear


@dataclass(frozen=True)
class PackedMatrix:
    """``op.h`` describes the panels. ``sizes`` are the outputs of the Linears it was made of."""

    panels: Tensor  # [panels * 16 * padded in_features], flat; of a low-bit matrix uint8
    bias: Tensor | None  # float32 [panels * 16] in panel order
    in_features: int
    sizes: tuple[int, ...]
    gated: bool
    low: LowBits | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the panels: a low-bit matrix's (uint8) is not the dtype it is computed in."""
        return self.panels.dtype

    @property
    def out_features(self) -> int:
        """Columns of the product: of a gated matrix, those left after the activation."""
        return self.sizes[0] if self.gated else sum(self.sizes)

    @property
    def num_panels(self) -> int:
        return _num_panels(self.sizes, self.gated)

    @property
    def parts(self) -> tuple[PackedMatrix, ...]:
        """Itself; see :class:`PackedStack`."""
        return (self,)

    @property
    def nbytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.panels.nbytes + bias + (0 if self.low is None else self.low.nbytes)

    @property
    def low_struct(self) -> structs.LowBit:
        return structs.LowBit() if self.low is None else self.low.struct(self.in_features)

    def unpack(self) -> list[Tensor]:
        """The [out_features, in_features] matrices it was made of, bit for bit: in ``dtype``, or
        what low-bit ones stand for in float32."""
        if self.low is not None:
            return [weight.dequantize() for weight in self.quantized()]
        out = [torch.empty(size, self.in_features, dtype=self.dtype) for size in self.sizes]
        _run([self._op(index, rows, unpack=True) for index, rows in enumerate(out)])
        return out

    def quantized(self) -> list[QuantizedWeight]:
        """The low-bit matrices it was made of."""
        assert self.low is not None, "a dense matrix"
        format, sizes = self.low.format, self.sizes
        scales = from_panels(self.low.scales, sizes, self.gated)
        zeros: Sequence[Tensor | None] = [None] * len(sizes)
        if self.low.zeros is not None:
            offset = 1 << format.bits - 1
            stored = from_panels(self.low.zeros, sizes, self.gated)
            zeros = [(zero.int() - offset).to(torch.int8) for zero in stored]
        columns = self.in_features if format.bits == 8 else -(-self.in_features // 2)
        dtype = torch.uint8 if format.bits == 4 else torch.int8
        values = [torch.zeros(size, columns, dtype=dtype) for size in sizes]
        _run([self._op(index, rows, unpack=True) for index, rows in enumerate(values)])
        return [
            QuantizedWeight(
                format=format,
                in_features=self.in_features,
                values=rows if format.kind == "int" else rows.view(torch.float8_e4m3fn),
                scale=scale,
                zero=zero,
            )
            for rows, scale, zero in zip(values, scales, zeros)
        ]

    def _op(self, index: int, rows: Tensor, *, unpack: bool) -> structs.PackOp:
        low = self.low is not None
        return structs.PackOp(
            head=structs.OpHeader(structs.PACK, 0 if low else structs.DTYPES[self.dtype]),
            rows=rows.data_ptr(),
            panels=self.panels.data_ptr(),
            row_stride=rows.stride(0),
            rows_dtype=0 if low else structs.SOURCE_DTYPES[rows.dtype],
            n=rows.shape[0],
            k=self.in_features,
            first=0 if self.gated else sum(self.sizes[:index]),
            layout=1 + index if self.gated else 0,
            unpack=unpack,
            low_kind=0 if self.low is None else self.low.kind,
        )


@dataclass(frozen=True)
class PackedStack:
    """A stack whose members differ in format: products side by side in one result."""

    parts: tuple[PackedMatrix, ...]
    gated = False

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for part in self.parts for size in part.sizes)

    @property
    def out_features(self) -> int:
        return sum(self.sizes)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def unpack(self) -> list[Tensor]:
        return [matrix for part in self.parts for matrix in part.unpack()]


def pack(
    linears: Sequence[Linear],
    layout: PackLayout,
    dtype: torch.dtype | None,
    memory: PanelMemory,
) -> PackedMatrix | PackedStack:
    """Pack into ``memory``, taking each Linear's matrix away.

    Dense matrices are held in ``dtype``, float32 or bfloat16 (None: as they are, float16 as
    float32); sources may be float32, bfloat16 or float16, at any alignment (a mapped file).
    Low-bit ones are held as they are; what the kernels have no form for is converted with a
    :class:`~skimp.errors.SkimpWarning`.
    """
    if dtype is not None and dtype not in structs.DTYPES:
        raise ValueError(f"native kernels hold float32 or bfloat16 weights, not {dtype}")
    gated = layout == "gated"
    in_features = linears[0].in_features
    assert all(linear.in_features == in_features for linear in linears)
    assert not gated or (
        len(linears) == 2 and linears[0].out_features == linears[1].out_features
    ), "gated packs gate and up"
    settle_formats(linears, gated, dtype)
    same = [list(group) for _, group in itertools.groupby(linears, lambda m: m.format)]
    parts = tuple(_pack(group, gated, dtype, memory) for group in same)
    return parts[0] if len(parts) == 1 else PackedStack(parts)


def _pack(
    linears: Sequence[Linear], gated: bool, dtype: torch.dtype | None, memory: PanelMemory
) -> PackedMatrix:
    """Linears of one format."""
    sizes = tuple(linear.out_features for linear in linears)
    in_features = linears[0].in_features
    count = _num_panels(sizes, gated)
    low = None
    weights = [linear.quantized for linear in linears if linear.quantized is not None]
    if weights:
        low = low_bits(weights, gated)
        panels = memory.zeros(count * panel_bytes(low.format, in_features), torch.uint8)
        del weights
    else:
        first = linears[0].weight
        assert first is not None, "this matrix was packed before"
        if dtype is None:
            dtype = first.dtype if first.dtype in structs.DTYPES else torch.float32
        padded = -(-in_features // structs.K_ALIGN) * structs.K_ALIGN
        depth = padded if dtype == torch.bfloat16 else in_features
        panels = memory.zeros(count * structs.PANEL * depth, dtype)
    bias = _bias(linears, sizes, gated)
    matrix = PackedMatrix(panels, bias, in_features, sizes, gated, low)
    for index, linear in enumerate(linears):
        rows = _rows(linear.take())
        _run([matrix._op(index, rows, unpack=False)])
    return matrix


def _rows(matrix: Tensor | QuantizedWeight) -> Tensor:
    """Row-major elements, or bytes of a low-bit matrix."""
    if isinstance(matrix, QuantizedWeight):
        rows = matrix.values.view(torch.uint8)
    else:
        rows = matrix
        if rows.dtype not in structs.SOURCE_DTYPES:
            raise ValueError(f"cannot pack a {rows.dtype} weight on {rows.device}")
    if rows.device.type != "cpu":
        raise ValueError(f"cannot pack a {rows.dtype} weight on {rows.device}")
    return rows if rows.stride(1) == 1 else rows.contiguous()


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
    return in_panels([part[:, None] for part in parts], gated).flatten()


def _run(ops: Sequence[ctypes.Structure]) -> None:
    program = (ctypes.c_void_p * len(ops))(*(ctypes.addressof(op) for op in ops))
    library().run(ctypes.addressof(program), len(ops), 0, 0, 0)
