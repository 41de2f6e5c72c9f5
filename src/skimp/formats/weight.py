"""How a matrix is stored: the format's description, and a matrix in it.

Every format here is ``w = (q - zero) * scale`` with q an integer or an 8-bit float, and one scale
(and, if asymmetric, one zero point) for each output and group of inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FP8_MAX = 448.0  # largest number of E4M3 (Micikevicius et al. 2022), the variant without infinity
SCALE_BITS = 16


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """A low-bit format. A dense matrix has none.

    ``kind`` "int" has 4 or 8 bits, "float" is fp8 E4M3. ``group_size`` is the number of inputs
    that share a scale; None means all of them (one scale an output). ``activations`` says to what
    the inputs of the product are rounded, each row with its own scale as it comes; None leaves
    them as they are.
    """

    kind: Literal["int", "float"]
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    activations: Literal["int8", "fp8"] | None = None

    def __post_init__(self) -> None:
        allowed = (4, 8) if self.kind == "int" else (8,)
        if self.kind not in ("int", "float") or self.bits not in allowed:
            raise ValueError(f"bits: {self.kind} weights have {allowed} bits, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size: at least 1, not {self.group_size}")
        if self.kind == "float" and not self.symmetric:
            raise ValueError("symmetric: fp8 weights have no zero point")
        if self.activations not in (None, "int8", "fp8"):
            raise ValueError(f"activations: {self.activations!r} is neither int8 nor fp8")

    @property
    def name(self) -> str:
        """Such as ``int4-g128``, ``int4-g128-asym``, ``int8-a8``, ``fp8-afp8``."""
        text = "fp8" if self.kind == "float" else f"int{self.bits}"
        text += "" if self.group_size is None else f"-g{self.group_size}"
        text += "" if self.symmetric else "-asym"
        return text + {None: "", "int8": "-a8", "fp8": "-afp8"}[self.activations]

    @classmethod
    def named(cls, name: str) -> WeightFormat:
        """The format of a :attr:`name`. Raises ValueError if none has it."""
        found = re.fullmatch(r"(int|fp)(4|8)(?:-g(\d{1,6}))?(-asym)?(?:-a(8|fp8))?", name)
        if found is not None:
            kind, bits, group, asymmetric, activations = found.groups()
            form = cls(
                kind="float" if kind == "fp" else "int",
                bits=int(bits),
                group_size=None if group is None else int(group),
                symmetric=asymmetric is None,
                activations={None: None, "8": "int8", "fp8": "fp8"}[activations],
            )
            if form.name == name:
                return form
        raise ValueError(f"{name!r} is no weight format")

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest value that is stored."""
        if self.kind == "float":
            return -FP8_MAX, FP8_MAX
        return float(-(1 << self.bits - 1)), float((1 << self.bits - 1) - 1)

    def groups(self, in_features: int) -> int:
        """Scales an output has; the last group may be short."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)

    def bits_per_weight(self, in_features: int) -> float:
        """Bits read for each weight, scales and zero points included."""
        extra = SCALE_BITS + (0 if self.symmetric else self.bits)
        return self.bits + extra * self.groups(in_features) / in_features


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A matrix [out_features N, in_features K] in a format.

    ``values``: int8 [N, K] for 8-bit integers; float8_e4m3fn [N, K] for fp8; for 4 bits uint8
    [N, ceil(K / 2)] of ``q + 8``, the even input in the low half of a byte (the bytes of
    compressed-tensors' int32 words, on a little-endian machine). ``scale``: float [N, groups].
    ``zero``: int8 [N, groups] in the range of q, or None. Tensors may be mapped from a file.
    """

    format: WeightFormat
    in_features: int
    values: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        import torch

        rows, columns = self.values.shape
        four = self.format.bits == 4
        dtype = torch.int8 if self.format.kind == "int" else torch.float8_e4m3fn
        assert self.values.dtype == (torch.uint8 if four else dtype), self.values.dtype
        assert columns == (-(-self.in_features // 2) if four else self.in_features)
        shape = (rows, self.format.groups(self.in_features))
        assert tuple(self.scale.shape) == shape and self.scale.is_floating_point()
        assert (self.zero is None) == self.format.symmetric
        assert self.zero is None or (tuple(self.zero.shape) == shape)
        assert self.zero is None or self.zero.dtype == torch.int8

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        zeros = 0 if self.zero is None else self.zero.nbytes
        return self.values.nbytes + self.scale.nbytes + zeros

    def tensors(self) -> Iterator[Tensor]:
        yield from (t for t in (self.values, self.scale, self.zero) if t is not None)

    def rows(self, index: Tensor) -> QuantizedWeight:
        """The matrix of these outputs alone, int64 [R]."""
        zero = None if self.zero is None else self.zero[index]
        return replace(self, values=self.values[index], scale=self.scale[index], zero=zero)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same matrix on a device."""
        zero = None if self.zero is None else self.zero.to(device)
        values, scale = self.values.to(device), self.scale.to(device)
        return replace(self, values=values, scale=scale, zero=zero)

    def stored(self) -> Tensor:
        """q as float32 [N, K]."""
        values = self.values
        if self.format.bits == 4:
            import torch

            pairs = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)
            return pairs[:, : self.in_features].float() - 8
        return values.float()

    def dequantize(self) -> Tensor:
        """The weights it stands for, float32 [N, K]."""
        size = self.format.group_size or self.in_features
        q = self.stored()
        if self.zero is not None:
            q = q - spread(self.zero.float(), size, self.in_features)
        return q * spread(self.scale.float(), size, self.in_features)


def spread(per_group: Tensor, size: int, in_features: int) -> Tensor:
    """[N, groups] to [N, in_features]: each group's number for each of its inputs."""
    return per_group.repeat_interleave(size, dim=1)[:, :in_features]


def grouped(weight: Tensor, size: int) -> Tensor:
    """[N, K] to [N, groups, size]; the last group is padded with its own last input."""
    import torch

    short = -weight.shape[1] % size
    if short:
        weight = torch.cat((weight, weight[:, -1:].expand(-1, short)), dim=1)
    return weight.unflatten(1, (-1, size))


def pack_nibbles(q: Tensor) -> Tensor:
    """Integers in -8..7 [N, K] to the bytes of a 4-bit ``QuantizedWeight.values``."""
    import torch

    u = (q + 8).to(torch.uint8)
    if u.shape[1] % 2:
        u = torch.nn.functional.pad(u, (0, 1))
    return u[:, 0::2] | (u[:, 1::2] << 4)


def round_to(
    weight: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor | None = None
) -> QuantizedWeight:
    """The nearest matrix with these scales and zero points ([N, groups]), ties to even."""
    import torch

    size = format.group_size or weight.shape[1]
    wide = spread(scale.float(), size, weight.shape[1])
    q = weight.float() / wide
    low, high = format.limits
    if format.kind == "float":
        values = q.clamp(low, high).to(torch.float8_e4m3fn)
    else:
        q = q.round() if zero is None else (q + spread(zero.float(), size, q.shape[1])).round()
        q = q.clamp(low, high)
        values = pack_nibbles(q) if format.bits == 4 else q.to(torch.int8)
    return QuantizedWeight(
        format=format,
        in_features=weight.shape[1],
        values=values,
        scale=scale,
        zero=None if zero is None else zero.to(torch.int8),
    )


def quantize(
    weight: Tensor, format: WeightFormat, *, scale_dtype: torch.dtype | None = None
) -> QuantizedWeight:
    """Round to nearest with scales that cover the range of each group: the baseline that every
    method in ``shrink/quantize`` must beat. ``scale_dtype`` defaults to the weight's."""
    import torch

    dtype = scale_dtype or (weight.dtype if weight.dtype != torch.float16 else torch.float32)
    groups = grouped(weight.float(), format.group_size or weight.shape[1])
    low, high = format.limits
    zero = None
    if format.symmetric:
        scale = groups.abs().amax(-1) / (high if format.kind == "float" else (high - low) / 2)
    else:
        least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (most - least) / (high - low)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).to(dtype)
    if not format.symmetric:
        zero = (low - least / scale.float()).round().clamp(low, high)
    return round_to(weight, format, scale, zero)
