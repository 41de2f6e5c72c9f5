"""Mixtures of experts on a GPU: routing, grouping of rows by expert, and grouped products, all
launched without looking at what the router chose, so that a CUDA graph can hold them.

Shape legend: R rows, E experts, k experts of a row, P = R * k pairs of a row and an expert, D
hidden size, I inner size of an expert, M pairs of a tile, N outputs of a tile.

A pair's number is ``row * k + place``, where a row's experts are in ascending order. Few rows are
bound by the reading of weights: every pair reads its expert's by itself. More are put into groups
of the same expert, each cut into tiles; the launch has room for as many tiles as any choice could
need, and those left over end at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from skimp.kernels.ops import ExpertParams
from skimp.kernels.triton.linear import ACTIVATIONS, Matrix, linear, pack_matrix
from skimp.kernels.triton.products import activate
from skimp.kernels.triton.rows import rms_norm
from skimp.model.layers import FusedExperts
from skimp.model.spec import ClampedSwiGLU, ExpertsSpec

FEW_ROWS = 4  # up to here, rows seldom share an expert
CLAMPED = 4  # beside the activations of products.py
SCANNED = 1024  # pairs that a program of the grouping looks at together


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Of grouped products: pairs, outputs and inputs of a program's step."""

    block_m: int
    block_n: int = 64
    block_k: int = 64
    warps: int = 4
    stages: int = 3


SMALL, LARGE = Tile(block_m=16), Tile(block_m=64, block_n=128, warps=8)
LARGE_FROM = 32  # pairs of an expert on average


@dataclass(kw_only=True, eq=False)
class PackedExperts:
    """A mixture as :func:`pack_experts` leaves it; biases are float32, gate and up in turns."""

    spec: ExpertsSpec
    router: Matrix  # float32
    correction: Tensor | None
    gate_up: Tensor  # [E, 2 I, D]
    gate_up_bias: Tensor | None
    down: Tensor  # [E, D, I]
    down_bias: Tensor | None


def pack_experts(params: ExpertParams, dtype: torch.dtype) -> PackedExperts:
    """Dense experts in ``dtype``; the modules keep nothing of the matrices."""
    spec, experts, router = params.spec, params.experts, params.router
    bias = None if router.bias is None else router.bias.detach()
    logits = pack_matrix([router.take()], bias, gated=False, dtype=torch.float32)
    gate_up_bias = down_bias = None
    if isinstance(experts, FusedExperts):
        assert experts.gate_up_proj is not None and experts.down_proj is not None
        gate_up = experts.gate_up_proj.detach().to(dtype).transpose(1, 2).contiguous()
        down = experts.down_proj.detach().to(dtype).transpose(1, 2).contiguous()
        experts.release()
        if experts.gate_up_proj_bias is not None and experts.down_proj_bias is not None:
            gate_up_bias = experts.gate_up_proj_bias.detach().float()
            down_bias = experts.down_proj_bias.detach().float()
    else:
        gate, _, last = experts[0]
        device = None if gate.weight is None else gate.weight.device
        sizes = (gate.out_features, gate.in_features)
        pairs = torch.empty(spec.num_experts, sizes[0], 2, sizes[1], dtype=dtype, device=device)
        down = torch.empty(spec.num_experts, *sizes[::-1], dtype=dtype, device=device)
        for i, linears in enumerate(experts):
            for target, one in zip((pairs[i, :, 0], pairs[i, :, 1], down[i]), linears):
                taken = one.take()
                assert isinstance(taken, Tensor), "see lacks()"
                target.copy_(taken)
        gate_up = pairs.flatten(1, 2)
        if last.bias is not None:
            held = [[x.bias.detach().float() for x in e if x.bias is not None] for e in experts]
            gate_up_bias = torch.stack([torch.stack(e[:2], 1).flatten() for e in held])
            down_bias = torch.stack([e[2] for e in held])
    return PackedExperts(
        spec=spec,
        router=logits,
        correction=params.correction,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
    )


def mix_experts(
    x: Tensor,
    packed: PackedExperts,
    factor: Tensor,
    eps: float,
    *,
    deterministic: bool = False,
    pdl: bool = False,
) -> Tensor:
    """The experts of each row of the normed ``x`` float32 [R, D] with their weights: float32
    [R, D]. ``deterministic`` computes a row in one way, whatever the others."""
    rows, k = x.shape[0], packed.spec.experts_per_token
    out = torch.empty_like(x, dtype=torch.float32)
    if rows == 0:
        return out
    logits = linear(
        x,
        packed.router,
        norm_factor=factor,
        eps=eps,
        out_dtype=torch.float32,
        deterministic=deterministic,
        pdl=pdl,
    )
    chosen, weights = route(logits, packed.spec, packed.correction)
    normed = rms_norm(x, factor, eps, packed.gate_up.dtype, pdl=pdl)
    act, alpha, limit = _activation(packed.spec)
    inner, hidden = packed.spec.intermediate_size, x.shape[1]
    h = torch.empty(rows * k, inner, dtype=normed.dtype, device=x.device)
    common: dict[str, Any] = {"K": k, "num_warps": 4}
    if rows <= FEW_ROWS and not deterministic:
        block_n = 8
        _few_up_kernel[(triton.cdiv(2 * inner, block_n), rows * k)](
            normed, packed.gate_up, packed.gate_up_bias, chosen, h, 2 * inner, hidden, alpha, limit,
            ACTIVATION=act, BLOCK_N=block_n, BLOCK_D=_depth(hidden), **common,
        )  # fmt: skip
        _few_down_kernel[(triton.cdiv(hidden, block_n), rows)](
            h, packed.down, packed.down_bias, chosen, weights, out, hidden, inner,
            BLOCK_N=block_n, BLOCK_D=_depth(inner), **common,
        )  # fmt: skip
        return out
    order, starts = group(chosen, packed.spec.num_experts)
    tile = LARGE if rows * k >= LARGE_FROM * packed.spec.num_experts else SMALL
    tile = SMALL if deterministic else tile
    y = torch.empty(rows * k, hidden, dtype=torch.float32, device=x.device)
    _grouped(normed, packed.gate_up, packed.gate_up_bias, order, starts, None, h, k, act, alpha,
             limit, tile)  # fmt: skip
    _grouped(h, packed.down, packed.down_bias, order, starts, weights, y, k, 0, alpha, limit, tile)
    block = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(rows, triton.cdiv(hidden, block))](y, out, hidden, BLOCK=block, **common)
    return out


def _activation(spec: ExpertsSpec) -> tuple[int, float, float]:
    if isinstance(spec.activation, ClampedSwiGLU):
        return CLAMPED, spec.activation.alpha, spec.activation.limit
    return ACTIVATIONS[spec.activation], 0.0, 0.0


def _depth(inputs: int) -> int:
    """Inputs that a program of few rows takes at a time."""
    return min(512, max(32, triton.next_power_of_2(inputs)))


# ---- routing ----------------------------------------------------------------------------------


def route(logits: Tensor, spec: ExpertsSpec, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """As ``kernels/experts.py``: each row's experts, int32 [R, k], and their weights, float32."""
    rows, experts = logits.shape
    router, k = spec.router, spec.experts_per_token
    chosen = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(rows, k, dtype=torch.float32, device=logits.device)
    limited = router.groups_chosen < router.groups
    _route_kernel[(rows,)](
        logits, correction, chosen, weights, experts, router.normalize_eps, router.scale,
        K=k, SOFTMAX=router.scoring == "softmax", GROUPS=router.groups if limited else 1,
        GROUPS_CHOSEN=router.groups_chosen, TOP2=router.group_score == "top2",
        NORMALIZE=router.normalize, BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_G=triton.next_power_of_2(router.groups), num_warps=1 if experts <= 128 else 4,
    )  # fmt: skip
    return chosen, weights


@triton.jit
def _first_largest(x, at, SIZE: tl.constexpr):
    """The lowest of the indices ``at`` whose x is largest."""
    return tl.min(tl.where(x == tl.max(x, 0), at, SIZE - 1), 0)


@triton.jit
def _route_kernel(
    logit_ptr, correction_ptr, chosen_ptr, weight_ptr, E, eps, scale,
    K: tl.constexpr, SOFTMAX: tl.constexpr, GROUPS: tl.constexpr, GROUPS_CHOSEN: tl.constexpr,
    TOP2: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    ok = e < E
    logit = tl.load(logit_ptr + row * E + e, mask=ok, other=float("-inf"))
    if SOFTMAX:
        score = tl.exp(logit - tl.max(logit, 0))
        score = score / tl.sum(score, 0)
    else:
        score = 1.0 / (1.0 + tl.exp(-logit))
    rank = score
    if correction_ptr is not None:
        rank += tl.load(correction_ptr + e, mask=ok, other=0.0)
    # A row that is not a number still has to name experts that there are.
    rank = tl.where(rank != rank, float("inf"), rank)
    rank = tl.where(ok, rank, float("-inf"))
    if GROUPS > 1:
        g = tl.arange(0, BLOCK_G)
        own = e // (E // GROUPS)
        best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        for i in tl.static_range(GROUPS):
            inside = tl.where(own == i, rank, float("-inf"))
            value = tl.max(inside, 0)
            if TOP2:
                first = _first_largest(inside, e, BLOCK_E)
                value += tl.max(tl.where(e == first, float("-inf"), inside), 0)
            best = tl.where(g == i, value, best)
        opened = own < 0
        for _ in tl.static_range(GROUPS_CHOSEN):
            group = _first_largest(best, g, BLOCK_G)
            opened = opened | (own == group)
            best = tl.where(g == group, float("-inf"), best)
        rank = tl.where(opened, rank, float("-inf"))
    taken = e < 0
    for _ in tl.static_range(K):
        # What was taken is not the largest again, even where all that is left is closed.
        index = _first_largest(rank, tl.where(taken, BLOCK_E - 1, e), BLOCK_E)
        taken = taken | (e == index)
        rank = tl.where(e == index, float("-inf"), rank)
    weight = tl.where(taken, score, 0.0)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, 0) + eps)
    place = row * K + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(chosen_ptr + place, e, mask=taken)
    tl.store(weight_ptr + place, weight * scale, mask=taken)


# ---- grouping ---------------------------------------------------------------------------------


def group(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Pairs int32 [P] by expert, then by number, and where each expert's begin, int32 [E + 1]."""
    pairs = chosen.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=chosen.device)
    block = min(SCANNED, triton.next_power_of_2(pairs))
    _group_kernel[(experts,)](chosen, order, starts, pairs, experts, BLOCK=block, num_warps=4)
    return order, starts


@triton.jit(do_not_specialize=["P"])
def _group_kernel(chosen_ptr, order_ptr, start_ptr, P, E, BLOCK: tl.constexpr):
    """A program an expert: it counts the pairs of those before it, then places its own."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    at = 0
    for start in range(0, P, BLOCK):
        ids = tl.load(chosen_ptr + start + lane, mask=start + lane < P, other=E)
        at += tl.sum((ids < expert).to(tl.int32), 0)
    tl.store(start_ptr + expert, at)
    for start in range(0, P, BLOCK):
        ids = tl.load(chosen_ptr + start + lane, mask=start + lane < P, other=E)
        own = (ids == expert).to(tl.int32)
        tl.store(order_ptr + at + tl.cumsum(own, 0) - 1, start + lane, mask=own > 0)
        at += tl.sum(own, 0)
    if expert == E - 1:
        tl.store(start_ptr + E, P)


# ---- products ---------------------------------------------------------------------------------


@triton.jit
def _gate(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    if ACTIVATION == 4:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))
    else:
        return activate(gate, ACTIVATION) * up


@triton.jit
def _one_row(x_ptr, w_ptr, columns, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Products of a row with outputs ``columns`` of a matrix [N, D]: float32 [BLOCK_N]."""
    w_rows = w_ptr + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * D
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(w_rows + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
        acc += w * x[None, :]
    return tl.sum(acc, 1)


@triton.jit
def _few_up_kernel(
    x_ptr, w_ptr, bias_ptr, chosen_ptr, h_ptr, N, D, alpha, limit,
    K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A pair's gate and up; ``h`` is [P, N / 2]."""
    pair = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(chosen_ptr + pair).to(tl.int64)
    x_row, matrix = x_ptr + pair // K * D, w_ptr + expert * N * D
    y = _one_row(x_row, matrix, columns, N, D, BLOCK_N, BLOCK_D)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + expert * N + columns, mask=columns < N, other=0.0)
    gate, up = tl.split(tl.reshape(y, (BLOCK_N // 2, 2)))
    half = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    y = _gate(gate, up, alpha, limit, ACTIVATION)
    place = h_ptr + pair * (N // 2) + half
    tl.store(place, y.to(h_ptr.dtype.element_ty), mask=half < N // 2)


@triton.jit
def _few_down_kernel(
    h_ptr, w_ptr, bias_ptr, chosen_ptr, weight_ptr, out_ptr, N, D,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All experts of a row, one after another, added up with their weights."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for place in range(K):
        pair = row * K + place
        expert = tl.load(chosen_ptr + pair).to(tl.int64)
        y = _one_row(h_ptr + pair * D, w_ptr + expert * N * D, columns, N, D, BLOCK_N, BLOCK_D)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + expert * N + columns, mask=columns < N, other=0.0)
        total += y * tl.load(weight_ptr + pair)
    tl.store(out_ptr + row * N + columns, total, mask=columns < N)


def _grouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    out: Tensor,
    k: int,
    activation: int,
    alpha: float,
    limit: float,
    tile: Tile,
) -> None:
    pairs, (experts, n, d) = order.shape[0], weight.shape
    # As many tiles as there are if every expert that can have pairs leaves its last one unfilled.
    most = (pairs + min(pairs, experts) * (tile.block_m - 1)) // tile.block_m
    _grouped_kernel[(triton.cdiv(n, tile.block_n), most)](
        x, weight, bias, order, starts, weights, out, experts, n, d, alpha, limit,
        K=k, ACTIVATION=activation, EVEN_D=d % tile.block_k == 0, BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, BLOCK_D=tile.block_k, BLOCK_E=triton.next_power_of_2(experts),
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _grouped_kernel(
    x_ptr, w_ptr, bias_ptr, order_ptr, start_ptr, weight_ptr, out_ptr, E, N, D, alpha, limit,
    K: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of one expert's pairs. With an activation the inputs are rows of the step, and what
    comes out lies by place in the groups; without, the other way round, times the weights."""
    block = tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(start_ptr + e, mask=e < E, other=0)
    end = tl.load(start_ptr + e + 1, mask=e < E, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum(((upto <= block) & (e < E)).to(tl.int32), 0)
    if expert < E:
        here = e == expert
        first = tl.sum(tl.where(here, begin, 0), 0)
        last = tl.sum(tl.where(here, end, 0), 0)
        done = tl.sum(tl.where(here, upto - tiles, 0), 0)
        place = first + (block - done) * BLOCK_M + tl.arange(0, BLOCK_M)
        ok = place < last
        pair = tl.load(order_ptr + place, mask=ok, other=0).to(tl.int64)
        source = pair // K if ACTIVATION else place.to(tl.int64)
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        matrix = w_ptr + tl.cast(expert, tl.int64) * N * D
        w_rows = matrix + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * D
        x_rows = x_ptr + source[:, None] * D
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            d = start + tl.arange(0, BLOCK_D)
            if EVEN_D:
                w = tl.load(w_rows + d[None, :])
                x = tl.load(x_rows + d[None, :], mask=ok[:, None], other=0.0)
            else:
                w = tl.load(w_rows + d[None, :], mask=(d < D)[None, :], other=0.0)
                x = tl.load(x_rows + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        y = tl.trans(acc)
        if bias_ptr is not None:
            bias = bias_ptr + tl.cast(expert, tl.int64) * N
            y += tl.load(bias + columns, mask=columns < N, other=0.0)[None, :]
        if ACTIVATION:
            gate, up = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
            y = _gate(gate, up, alpha, limit, ACTIVATION)
            half = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            target = out_ptr + place.to(tl.int64)[:, None] * (N // 2) + half[None, :]
            mask = ok[:, None] & (half < N // 2)[None, :]
        else:
            y *= tl.load(weight_ptr + pair, mask=ok, other=0.0)[:, None]
            target = out_ptr + pair[:, None] * N + columns[None, :]
            mask = ok[:, None] & (columns < N)[None, :]
        tl.store(target, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(y_ptr, out_ptr, N, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(K):
        total += tl.load(y_ptr + (row * K + place) * N + columns, mask=columns < N, other=0.0)
    tl.store(out_ptr + row * N + columns, total, mask=columns < N)
