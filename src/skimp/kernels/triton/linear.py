"""Linear layers on a GPU: a matrix is packed once, then multiplied by one row or by thousands.

Shape legend: M rows, K inputs, N outputs, G groups of inputs. ``products.py`` says how low-bit
weights lie, ``tuning.py`` which kernel and tiles a number of rows gets. Few rows are bound by the
reading of weights: norm, bias, gated activation and residual then ride along in one kernel. With
many, cuBLAS multiplies and the rest is a second kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from skimp.formats.weight import QuantizedWeight, WeightFormat
from skimp.kernels.triton.products import (
    DENSE,
    FP8,
    GELU,
    GELU_TANH,
    INT4,
    INT8,
    NONE,
    SILU,
    dot_kernel,
    gemv_kernel,
)
from skimp.kernels.triton.rows import expand, finish_rows, rms_norm, round_rows
from skimp.kernels.triton.tuning import (
    DETERMINISTIC,
    STAGED_BYTES,
    Config,
    Problem,
    bucket,
    choose,
)

try:
    from skimp.kernels.triton.few_rows import few_rows_kernel
except ImportError:  # a Triton without Gluon, or with another one
    few_rows_kernel = None

ACTIVATIONS = {None: NONE, "silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}
PER = {DENSE: 1, INT8: 2, INT4: 4, FP8: 2}  # values in an int16 word
FUSED_NORM_ROWS = 16  # more rows are normed once, before the product
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(kw_only=True, eq=False)
class Segment:
    """Neighbouring outputs in one format."""

    kind: int
    format: WeightFormat | None  # None for a dense matrix
    start: int  # first output, in the order of storage
    outputs: int
    inputs: int
    weight: Tensor  # dense [N, K], or int16 [N padded to 16 / 16, chunks, 16, 32]
    scale: Tensor | None = None  # float32 [G, N]
    less: Tensor | None = None  # float32 [G, N]: minus the zero point (less 136 more at 4 bits)
    group: int = 0  # 0: one scale an output
    bias: Tensor | None = None  # float32 [N]
    counts: Tensor  # int32, all 0 between products: arrivals at each tile
    problem: Problem
    configs: dict[int, Config] = field(default_factory=dict)

    @property
    def rounding(self) -> Literal["int8", "fp8"] | None:
        return None if self.format is None else self.format.activations

    def config(self, rows: int) -> Config:
        rows = bucket(rows)
        found = self.configs.get(rows)
        if found is None:
            found = self.configs[rows] = choose(self.problem, rows, self.weight.device)
        return found

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weights in ``dtype`` [N, K], but for the scale where an output has only one: what is
        stored is then exact in bfloat16, and the product takes the scale."""
        if self.kind == DENSE:
            return self.weight
        out = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.weight.device)
        expand(
            self.weight,
            self.scale if self.group else None,
            self.less,
            out,
            outputs=self.outputs,
            kind=self.kind,
            per=PER[self.kind],
            group=self.group,
        )
        return out


@dataclass(kw_only=True, eq=False)
class Matrix:
    """Matrices that share their input, as :func:`pack_matrix` leaves them."""

    segments: list[Segment]
    dtype: torch.dtype  # of the rows it multiplies
    inputs: int
    outputs: int  # columns of a product: of a gated matrix, half of what is stored
    gated: bool
    interleaved: bool  # gate and up in turns

    @property
    def nbytes(self) -> int:
        tensors = [(s.weight, s.scale, s.less, s.bias) for s in self.segments]
        return sum(t.nbytes for t in itertools.chain(*tensors) if t is not None)


def pack_matrix(
    parts: Sequence[Tensor | QuantizedWeight],
    bias: Tensor | None,
    *,
    gated: bool,
    dtype: torch.dtype,
) -> Matrix:
    """Matrices [N_i, K] side by side; ``bias`` is for all their outputs. ``gated`` takes two of
    the same shape, gate and up. A format whose groups no kernel takes (those of neither 32 nor 64
    nor a multiple of 128 inputs) is expanded to ``dtype`` here."""
    inputs = parts[0].shape[1]
    outputs = sum(part.shape[0] for part in parts)
    assert not gated or (len(parts) == 2 and parts[0].shape == parts[1].shape)
    parts = [
        part.dequantize().to(dtype)
        if isinstance(part, QuantizedWeight) and _group(part) is None
        else part
        for part in parts
    ]
    runs = [list(run) for _, run in itertools.groupby(parts, key=_format)]
    interleaved = gated and len(runs) == 1
    if bias is not None:
        bias = bias.detach().float()
        if interleaved:
            bias = bias.view(2, -1).T.reshape(-1)
    segments, start = [], 0
    for run in runs:
        segment = _segment(run, start, interleaved, gated, dtype)
        stop = start + segment.outputs
        segment.bias = None if bias is None else bias[start:stop].contiguous()
        segments.append(segment)
        start = stop
    return Matrix(
        segments=segments,
        dtype=dtype,
        inputs=inputs,
        outputs=outputs // 2 if gated else outputs,
        gated=gated,
        interleaved=interleaved,
    )


def _format(part: Tensor | QuantizedWeight) -> WeightFormat | None:
    return part.format if isinstance(part, QuantizedWeight) else None


def _group(weight: QuantizedWeight) -> int | None:
    """Inputs of a group, 0 for all, None where the kernels cannot follow its borders."""
    size = weight.format.group_size
    if size is None or size >= weight.in_features:
        return 0
    chunk = 128 if weight.format.bits == 4 else 64
    fits = size % 32 == 0 and (size % chunk == 0 or chunk % size == 0)
    return size if fits else None


def _segment(
    run: list[Tensor | QuantizedWeight],
    start: int,
    interleaved: bool,
    gated: bool,
    dtype: torch.dtype,
) -> Segment:
    def beside(tensors: Sequence[Tensor]) -> Tensor:
        if interleaved:
            return torch.stack(tuple(tensors), dim=1).flatten(0, 1).contiguous()
        return torch.cat(tuple(tensors)) if len(tensors) > 1 else tensors[0].contiguous()

    form, inputs = _format(run[0]), run[0].shape[1]
    outputs = sum(part.shape[0] for part in run)
    scale = less = None
    group = 0
    if form is None:
        kind = DENSE
        weight = beside([part.detach().to(dtype) for part in run if isinstance(part, Tensor)])
    else:
        low_bit = [part for part in run if isinstance(part, QuantizedWeight)]
        kind = FP8 if form.kind == "float" else INT4 if form.bits == 4 else INT8
        group = _group(low_bit[0]) or 0
        weight = _panels(beside([_words(part) for part in low_bit]))
        scale = beside([part.scale.float() for part in low_bit]).T.contiguous()
        if form.symmetric is False:
            zeros = [part.zero for part in low_bit if part.zero is not None]
            less = -beside(zeros).float().T.contiguous() - (136 if kind == INT4 else 0)
    problem = Problem(
        format=str(dtype).removeprefix("torch.") if form is None else form.name,
        outputs=outputs,
        inputs=inputs,
        gated=gated,
        few=few_rows_kernel is not None and _few_rows_fit(weight, kind, less, dtype),
    )
    return Segment(
        kind=kind,
        format=form,
        start=start,
        outputs=outputs,
        inputs=inputs,
        weight=weight,
        scale=scale,
        less=less,
        group=group,
        counts=torch.zeros(max(1024, outputs // 4), dtype=torch.int32, device=weight.device),
        problem=problem,
    )


def _few_rows_fit(weight: Tensor, kind: int, less: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether ``few_rows.py`` takes such a matrix; Triton's interpreter does not run Gluon."""
    return (
        kind != DENSE
        and less is None
        and dtype == torch.bfloat16
        and weight.is_cuda
        and torch.cuda.get_device_capability(weight.device)[0] >= 8
    )


def _words(weight: QuantizedWeight) -> Tensor:
    """The stored values as int16 [N, chunks, 32], in the order ``products.py`` describes."""
    rows, k = weight.shape
    if weight.format.bits == 4:
        per, bits = 4, 4
        pairs = torch.stack((weight.values & 15, weight.values >> 4), dim=-1).flatten(1)[:, :k]
    else:
        per, bits = 2, 8
        pairs = weight.values.view(torch.uint8)
        pairs = pairs ^ 128 if weight.format.kind == "int" else pairs
    chunk = 32 * per
    pairs = F.pad(pairs, (0, -k % chunk)).view(rows, -1, per, 32)
    words = torch.zeros(rows, pairs.shape[1], 32, dtype=torch.int16, device=pairs.device)
    for i in range(per):
        words |= pairs[:, :, i].to(torch.int16) << (bits * i)
    return words


def _panels(words: Tensor) -> Tensor:
    """int16 [N, chunks, 32] to [N padded to 16 / 16, chunks, 16, 32]."""
    words = F.pad(words, (0, 0, 0, 0, 0, -words.shape[0] % 16))
    return words.unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def linear(
    x: Tensor,
    matrix: Matrix,
    *,
    norm_factor: Tensor | None = None,
    eps: float = 0.0,
    activation: Literal["silu", "gelu", "gelu_tanh"] | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    pdl: bool = False,
) -> Tensor:
    """``norm(x) @ matrix.T + bias``, [M, N]; of a gated matrix ``activation(gate) * up``.

    ``x`` is [M, K]: float32 if ``norm_factor`` (float32 [K]) is given, ``matrix.dtype`` otherwise.
    ``residual`` float32 [M, N] is added to in place and returned. ``deterministic`` computes every
    row in one order of sums, whatever the other rows. ``pdl`` (Hopper and later) lets the kernel
    start while the one before it in the stream ends.
    """
    assert (activation is not None) == matrix.gated
    rows = x.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    if residual is not None:
        out = residual
    else:
        dtype = out_dtype or matrix.dtype
        out = torch.empty(rows, matrix.outputs, dtype=dtype, device=x.device)
    if rows == 0:
        return out
    source = _Inputs(x, norm_factor, eps, matrix.dtype, pdl)
    act = ACTIVATIONS[activation]
    if matrix.gated and not matrix.interleaved:
        y = torch.empty(rows, 2 * matrix.outputs, dtype=torch.float32, device=x.device)
        for segment in matrix.segments:
            part = y[:, segment.start : segment.start + segment.outputs]
            _product(source, segment, part, False, NONE, deterministic, pdl)
        finish_rows(y, out, activation=act, halves=True, add=residual is not None, pdl=pdl)
        return out
    for segment in matrix.segments:
        part = out
        if len(matrix.segments) > 1:
            part = out[:, segment.start : segment.start + segment.outputs]
        _product(source, segment, part, residual is not None, act, deterministic, pdl)
    return out


class _Inputs:
    """A product's input rows in the forms that segments ask for, each made once."""

    def __init__(
        self, x: Tensor, factor: Tensor | None, eps: float, dtype: torch.dtype, pdl: bool
    ) -> None:
        self.x, self.factor, self.eps, self.dtype, self.pdl = x, factor, eps, dtype, pdl
        self._normed: Tensor | None = None
        self._rounded: dict[str, tuple[Tensor, Tensor]] = {}

    def normed(self) -> Tensor:
        if self._normed is None:
            if self.factor is None:
                self._normed = self.x if self.x.dtype == self.dtype else self.x.to(self.dtype)
            else:
                self._normed = rms_norm(self.x, self.factor, self.eps, self.dtype, pdl=self.pdl)
        return self._normed

    def rounded(self, to: Literal["int8", "fp8"]) -> tuple[Tensor, Tensor]:
        if to not in self._rounded:
            # Rounded as the reference does it: from rows in the dtype of products.
            self._rounded[to] = round_rows(self.normed(), to, self.dtype, pdl=self.pdl)
        return self._rounded[to]


def _product(
    source: _Inputs,
    segment: Segment,
    out: Tensor,
    add: bool,
    activation: int,
    deterministic: bool,
    pdl: bool,
    config: Config | None = None,
) -> None:
    rows = out.shape[0]
    if config is None:
        config = DETERMINISTIC if deterministic else segment.config(rows)
    fuse = (
        source.factor is not None
        and segment.rounding is None
        and not deterministic
        and _fuses_norm(config, rows, segment.inputs)
    )
    row_scale = None
    if fuse:
        x = source.x
    elif segment.rounding is not None:
        x, row_scale = source.rounded(segment.rounding)
    else:
        x = source.normed()
    if config.kind == "library":
        _library(x, row_scale, segment, out, add, activation, pdl)
        return
    residual, target = (out, None) if add else (None, out)
    factor = source.factor if fuse else None
    n, k, kind = segment.outputs, segment.inputs, segment.kind
    asm = out.is_cuda and source.dtype == torch.bfloat16
    extra = {"launch_pdl": True} if pdl else {}
    weight, per = segment.weight, PER[kind]
    if config.kind == "gemv":
        gemv_kernel[(-(-n // config.block_n),)](
            x, factor, weight, segment.bias, residual, target,
            rows, n, x.stride(0), out.stride(0), out.stride(0), source.eps,
            K=k, ACTIVATION=activation, EVEN_K=k % config.block_k == 0,
            ROWS=rows if rows <= 2 else 4, BLOCK_N=config.block_n, BLOCK_K=config.block_k, PDL=pdl,
            num_warps=config.warps, **extra,
        )  # fmt: skip
        return
    if config.kind == "few":
        few_rows_kernel[(-(-n // config.block_n),)](
            x, factor, weight, segment.scale, row_scale, segment.bias, residual, target,
            rows, n, x.stride(0), out.stride(0), out.stride(0), source.eps,
            K=k, CHUNKS=weight.shape[1], KIND=kind, PER=per, GROUP=segment.group,
            ACTIVATION=activation, ROWS=bucket(rows), SLICES=config.split, BLOCK_N=config.block_n,
            AHEAD=config.stages, PDL=pdl, num_warps=config.warps, **extra,
        )  # fmt: skip
        return
    depth = config.block_k if kind == DENSE else 32 * per  # inputs of a step
    steps = -(-k // depth)
    tiles = (-(-n // config.block_n), -(-rows // config.block_m))
    split = min(config.split, steps) if tiles[0] * tiles[1] <= segment.counts.shape[0] else 1
    of_split = -(-steps // split)
    partial = None
    if split > 1:
        tile = (config.block_n + 1) * config.block_m
        partial = torch.empty(
            tiles[0] * tiles[1] * split * tile, dtype=torch.float32, device=x.device
        )
    dot_kernel[(*tiles, split)](
        x, factor, weight, segment.scale, segment.less, row_scale, segment.bias, residual, target,
        partial, segment.counts, rows, n, k, x.stride(0), out.stride(0),
        out.stride(0), source.eps, steps, of_split,
        KIND=kind, PER=per, GROUP=segment.group, ACTIVATION=activation, EVEN_K=k % depth == 0,
        SPLIT=split > 1, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        STAGES=config.stages, DTYPE=TRITON_DTYPES[source.dtype], ASM=asm, PDL=pdl,
        num_warps=config.warps, num_stages=config.stages, **extra,
    )  # fmt: skip


def _fuses_norm(config: Config, rows: int, inputs: int) -> bool:
    if config.kind == "few":  # eight bfloat16 columns of a slice's inputs
        return 16 * inputs // config.split <= STAGED_BYTES
    return config.kind == "gemv" or (config.kind == "dot" and rows <= FUSED_NORM_ROWS)


def _library(
    x: Tensor,
    row_scale: Tensor | None,
    segment: Segment,
    out: Tensor,
    add: bool,
    activation: int,
    pdl: bool,
) -> None:
    weight = segment.expanded(x.dtype)
    scale = None if segment.group else segment.scale
    if scale is None and row_scale is None and segment.bias is None and activation == NONE:
        # cuBLAS itself adds to the residual, or leaves its sums as they are.
        wider = x.is_cuda and out.dtype == torch.float32 != x.dtype
        if wider and add:
            torch.addmm(out, x, weight.T, out_dtype=torch.float32, out=out)
            return
        if wider:
            torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
            return
        if out.dtype == x.dtype and not add:
            torch.mm(x, weight.T, out=out)
            return
    y = F.linear(x, weight)
    finish_rows(
        y,
        out,
        scale=scale,
        row_scale=row_scale,
        bias=segment.bias,
        activation=activation,
        add=add,
        pdl=pdl,
    )


def embed(ids: Tensor, table: Matrix, scale: float = 1.0) -> Tensor:
    """Rows ``ids`` (int32 [R]) of a matrix times ``scale``: float32 [R, D]."""
    (segment,) = table.segments
    out = torch.empty(ids.shape[0], table.inputs, dtype=torch.float32, device=ids.device)
    expand(
        segment.weight,
        segment.scale,
        segment.less,
        out,
        outputs=segment.outputs,
        kind=segment.kind,
        per=PER[segment.kind],
        group=segment.group,
        ids=ids,
        factor=scale,
    )
    return out
