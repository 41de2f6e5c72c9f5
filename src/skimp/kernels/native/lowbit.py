"""What low-bit matrices are made into before the native kernels take them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skimp.errors import SkimpWarning
from skimp.formats.weight import QuantizedWeight, WeightFormat, pack_nibbles, spread
from skimp.kernels.native import structs
from skimp.model.layers import Linear


@dataclass(frozen=True, kw_only=True, eq=False)
class LowBits:
    """Scales and zero points of a low-bit matrix, in the order of its panels."""

    format: WeightFormat
    scales: Tensor  # [panels, groups, 16], bfloat16 where that is exact, else float32
    zeros: Tensor | None  # uint8 [panels, groups, 16], with the offset that stored weights have

    @property
    def nbytes(self) -> int:
        return self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    @property
    def kind(self) -> int:
        return structs.LOW_KINDS[self.format.kind, self.format.bits]

    def struct(self, in_features: int) -> structs.LowBit:
        return structs.LowBit(
            scales=self.scales.data_ptr(),
            zeros=None if self.zeros is None else self.zeros.data_ptr(),
            kind=self.kind,
            rounding=structs.ROUNDINGS[self.format.activations],
            scale_dtype=structs.DTYPES[self.scales.dtype],
            group=self.format.group_size or _aligned(in_features),
            groups=self.scales.shape[1],
        )


def panel_bytes(format: WeightFormat, in_features: int) -> int:
    """Of the weights of 16 outputs."""
    return _aligned(in_features) * structs.PANEL * format.bits // 8


def low_bits(weights: Sequence[QuantizedWeight], gated: bool) -> LowBits:
    """The scales and zero points of matrices in one format that are packed together."""
    format = weights[0].format
    scales = in_panels([weight.scale.float() for weight in weights], gated)
    half = scales.bfloat16()
    zeros = [w.zero.int() + (1 << format.bits - 1) for w in weights if w.zero is not None]
    return LowBits(
        format=format,
        scales=half if torch.equal(half.float(), scales) else scales,
        zeros=in_panels(zeros, gated).to(torch.uint8) if zeros else None,
    )


def in_panels(parts: Sequence[Tensor], gated: bool) -> Tensor:
    """[outputs, width] of each part to [panels, width, 16], zero where a panel has no output."""

    def panels(rows: Tensor) -> Tensor:
        short = -rows.shape[0] % structs.PANEL
        rows = torch.nn.functional.pad(rows, (0, 0, 0, short))
        return rows.unflatten(0, (-1, structs.PANEL)).transpose(1, 2)

    if gated:
        return torch.stack([panels(part) for part in parts], dim=1).flatten(0, 1).contiguous()
    return panels(torch.cat(list(parts))).contiguous()


def from_panels(panels: Tensor, sizes: Sequence[int], gated: bool) -> list[Tensor]:
    """The inverse of :func:`in_panels`."""
    rows = panels.transpose(1, 2)
    if gated:
        return [rows[i::2].flatten(0, 1)[:size] for i, size in enumerate(sizes)]
    return list(rows.flatten(0, 1)[: sum(sizes)].split(list(sizes)))


def settle_formats(linears: Sequence[Linear], gated: bool, dtype: torch.dtype | None) -> None:
    """Give the Linears matrices that the kernels take, in place, with a warning where that costs
    memory: groups of any multiple of 8 inputs, and one format for a gate and its up matrix.

    Integers are held in finer groups or more bits, exactly, where that makes the pair alike. Else
    both become dense, in ``dtype``, or that of their scales or of the dense one of them.
    """
    formats = {linear.format for linear in linears}
    odd = {f for f in formats if f is not None and (f.group_size or 8) % structs.LOW_ALIGN}
    if odd:
        which = [linear for linear in linears if linear.format in odd]
        names = ", ".join(sorted(f.name for f in odd))
        _warn(f"{names}: native kernels need groups of a multiple of {structs.LOW_ALIGN}", which)
        _make_dense(linears if gated else which, dtype)
    elif gated and len(formats) > 1:
        names = " and ".join(_name(linear.format) for linear in linears)
        common = _common([linear.format for linear in linears])
        if common is None:
            _warn(f"a gate and its up matrix differ in format ({names})", linears)
            _make_dense(linears, dtype)
        else:
            _warn(f"a gate and its up matrix differ in format ({names})", linears, common)
            for linear in linears:
                if linear.quantized is not None:
                    linear.quantized = _as_format(linear.quantized, common)


def _name(format: WeightFormat | None) -> str:
    return "dense" if format is None else format.name


def _warn(why: str, linears: Sequence[Linear], held: WeightFormat | None = None) -> None:
    sizes = ", ".join(f"{linear.out_features} x {linear.in_features}" for linear in linears)
    rounded = held is None and any(f is not None and f.activations for f in map(_format, linears))
    form = f"as {_name(held)}" + (", their inputs unrounded" if rounded else "")
    warnings.warn(f"{why}: {sizes} held {form}", SkimpWarning, stacklevel=5)


def _format(linear: Linear) -> WeightFormat | None:
    return linear.format


def _make_dense(linears: Sequence[Linear], dtype: torch.dtype | None) -> None:
    dense = [linear.weight.dtype for linear in linears if linear.weight is not None]
    for linear in linears:
        weight = linear.quantized
        if weight is not None:
            to = dtype or (dense[0] if dense else weight.scale.dtype)
            linear.quantized = None
            linear.weight = torch.nn.Parameter(
                weight.dequantize().to(to if to in structs.DTYPES else torch.float32),
                requires_grad=False,
            )


def _common(formats: Sequence[WeightFormat | None]) -> WeightFormat | None:
    """A format that holds matrices in any of these exactly, if there is a cheap one."""
    known = [f for f in formats if f is not None and f.kind == "int"]
    if len(known) < len(formats) or len({f.activations for f in known}) > 1:
        return None
    sizes = sorted({f.group_size for f in known if f.group_size is not None})
    if any(size % sizes[0] for size in sizes):
        return None
    return replace(
        known[0],
        bits=max(f.bits for f in known),
        group_size=sizes[0] if sizes else None,
        symmetric=all(f.symmetric for f in known),
    )


def _as_format(weight: QuantizedWeight, format: WeightFormat) -> QuantizedWeight:
    """The same integers in a format from :func:`_common`."""
    groups, k = format.groups(weight.in_features), weight.in_features

    def finer(per_group: Tensor) -> Tensor:
        inputs = spread(per_group, weight.format.group_size or k, k)
        return inputs[:, :: format.group_size or k].contiguous()

    q, zero = weight.stored(), None
    if not format.symmetric:
        zeros = torch.zeros(weight.out_features, groups, dtype=torch.int8)
        zero = zeros if weight.zero is None else finer(weight.zero)
    return QuantizedWeight(
        format=format,
        in_features=k,
        values=pack_nibbles(q) if format.bits == 4 else q.to(torch.int8),
        scale=finer(weight.scale),
        zero=zero,
    )


def _aligned(in_features: int) -> int:
    return -(-in_features // structs.LOW_ALIGN) * structs.LOW_ALIGN
