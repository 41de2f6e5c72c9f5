"""Attention over a paged cache on a GPU: norm, rotation, append and softmax, planned on the host.

A plan is made of what the host knows before a step (how many rows, of how many sequences, how
long at most), so a step neither waits for the GPU nor changes between replays of a CUDA graph:
the kernels read lengths and tables when they run. A step is one of

* single rows: one launch prepares, stores and attends; keys are split over programs;
* anything: one launch prepares and stores, one attends for sequences of few rows, one for more;
* deterministic: one prepares and stores, one attends, with tiles that do not depend on the step
  and key blocks at absolute positions, so a row's bits depend on nothing but its own past.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from skimp.cache.formats import hadamard_block
from skimp.kernels.ops import AttentionParams, LayerCache, StepInputs
from skimp.kernels.triton import vendor
from skimp.kernels.triton.append import append_kernel
from skimp.kernels.triton.attention_kernels import ONE_ROW, ONE_TILE, SEARCH, attention_kernel
from skimp.kernels.triton.cached_heads import FULL, INT4, KINDS
from skimp.kernels.triton.launch import multiprocessors, use_pdl
from skimp.kernels.triton.prepared import Prepared
from skimp.model.spec import AttentionSpec

MOST_SPLITS = 64
MOST_SUMMED = 8192  # numbers of one row's shares that a program can add up in its registers
BALANCED_ROWS = 1024  # up to here each program adds up all lengths to choose its share
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A program's block: query rows times heads, keys, and how it is compiled; ``per_processor``
    programs of it are to run on a multiprocessor at a time."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    per_processor: int = 2


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of the attention kernel; sequences shorter than ``least_rows`` are not its own.

    Keys are cut into up to ``splits`` shares of at least ``least_blocks`` blocks, but not where
    there are no more than ``lone_blocks``: adding shares up takes its time.
    """

    mode: int
    tile: Tile
    tiles: int
    least_rows: int = 1
    splits: int = 1
    least_blocks: int = 2
    lone_blocks: int = 4
    target: int = 1  # programs that fill the GPU


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """How one kind of layer attends in steps of one shape; see :func:`plan_attention`.

    Steps that run at the same time need plans of their own: the scratch memory is the plan's.
    """

    num_seqs: int
    rows: int
    most_rows: int
    context: int
    deterministic: bool
    fused: bool
    launches: tuple[Launch, ...]
    apart: bool = False  # shares are left for another kernel to add up
    whole: tuple[int, ...] = ()  # first rows of prompts that PyTorch's kernel takes, then the end
    partial: Tensor | None = field(default=None, compare=False, repr=False)
    levels: Tensor | None = field(default=None, compare=False, repr=False)
    counters: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def splits(self) -> int:
        """Most shares that the keys of one tile are cut into."""
        return max((launch.splits for launch in self.launches), default=1)


def plan_attention(
    spec: AttentionSpec,
    *,
    num_seqs: int,
    rows: int,
    most_rows: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    deterministic: bool = False,
    fused: bool = True,
    low_bit: bool = False,
    whole: tuple[int, ...] = (),
    splits: int | None = None,
    least_blocks: int | None = None,
    lone_blocks: int | None = None,
    most_splits: int | None = None,
    few: Tile | None = None,
    many: Tile | None = None,
) -> AttentionPlan:
    """A plan for steps of ``rows`` rows (padding included) of ``num_seqs`` sequences.

    ``whole`` are the first rows of the sequences, then their end, if all are causal prompts from
    position 0: PyTorch's own kernel then attends where it can. ``most_rows`` bounds the rows of
    one sequence, ``context`` any ``kv_end``; with ``most_rows`` 1, row i is a sequence of its own.
    ``dtype`` is that of the arithmetic, ``low_bit`` says that the cache's is narrower. With
    ``most_splits``, single rows' shares are left ``apart``, up to that many of a row. It allocates:
    call it outside of a graph's capture, and keep the plan as long as the graph. The other
    arguments are for tuning.
    """
    group = spec.num_heads // spec.num_kv_heads
    padded = triton.next_power_of_2(spec.head_dim)
    processors = multiprocessors(device)
    if spec.window is not None:
        context = min(context, spec.window + most_rows - 1)
    if deterministic:
        tile = many or _fixed_tile(padded, dtype, group)
        per_tile = tile.block_m // group
        launches = [Launch(mode=SEARCH, tile=tile, tiles=rows // per_tile + num_seqs)]
        fused = False
    else:
        alone = rows if most_rows == 1 else num_seqs
        few = few or _few_tile(
            padded,
            dtype,
            group,
            owners=alone * spec.num_kv_heads,
            processors=processors,
            low_bit=low_bit,
        )
        per_tile = few.block_m // group
        launches = []
        if not vendor.serves(spec, dtype, device):
            whole = ()
        if whole:
            fused = False
        elif most_rows == 1:
            launches.append(Launch(mode=ONE_ROW, tile=few, tiles=rows))
        else:
            fused = False
            if most_rows <= per_tile or num_seqs > 1:
                launches.append(Launch(mode=ONE_TILE, tile=few, tiles=num_seqs))
            if most_rows > per_tile:
                least = per_tile + 1 if num_seqs > 1 else 1
                tile = many or _many_tile(padded, dtype, group, most_rows * group)
                tiles = rows // (tile.block_m // group) + num_seqs
                launches.append(Launch(mode=SEARCH, tile=tile, tiles=tiles, least_rows=least))
    planned = [
        _shared(
            launch,
            1 if deterministic else splits,
            least_blocks,
            lone_blocks,
            kv_heads=spec.num_kv_heads,
            processors=processors,
            context=context,
            most=most_splits or min(MOST_SPLITS, MOST_SUMMED // padded),
        )
        for launch in launches
    ]
    shares = [(p.tiles * spec.num_kv_heads, p.splits, p.tile.block_m) for p in planned]
    vectors = max((owners * n * m if n > 1 else 0 for owners, n, m in shares), default=0)
    scratch: dict[str, Tensor] = {}
    if vectors:
        owners = max(owners for owners, _, _ in shares)
        scratch = {
            "partial": torch.empty(vectors * padded, dtype=torch.float32, device=device),
            "levels": torch.empty(2 * vectors, dtype=torch.float32, device=device),
            "counters": torch.zeros(owners, dtype=torch.int32, device=device),
        }
    return AttentionPlan(
        num_seqs=num_seqs,
        rows=rows,
        most_rows=most_rows,
        context=context,
        deterministic=deterministic,
        fused=fused,
        launches=tuple(planned),
        apart=most_splits is not None and any(launch.splits > 1 for launch in planned),
        whole=() if deterministic else whole,
        **scratch,
    )


def paged_attention(
    qkv: Tensor, params: AttentionParams, step: StepInputs, *, plan: AttentionPlan
) -> Tensor:
    """QK-norm, RoPE, append to the cache, attention: [R, q_dim + 2 kv_dim] to [R, q_dim].

    The same as ``PlainOps.attention`` with an arena; rows at positions below 0 are padding.
    """
    layer = _layer_of(params)
    rows = qkv.shape[0]
    assert rows == plan.rows and step.arena is not None
    if qkv.stride(1) != 1:
        qkv = qkv.contiguous()
    out = torch.empty((rows, layer.q_dim), dtype=qkv.dtype, device=qkv.device)
    if rows == 0:
        return out
    q, q_stride = qkv, qkv.stride(0)
    if not plan.fused:
        (arena, scales, recent), (table, recent_table), strides = _cache_of(layer, step)
        width = qkv.shape[1] if plan.whole else layer.q_dim
        q = torch.empty((rows, width), dtype=layer.dtype, device=qkv.device)
        block = 1 if rows <= 16 else 4 if rows <= 512 else 16
        if plan.deterministic:
            block = 4  # how many there are decides in what order a norm's squares are added
        append_kernel[(-(-rows // block), layer.heads)](
            qkv,
            q,
            out,
            arena,
            scales,
            table,
            recent,
            recent_table,
            step.positions,
            step.row_seq,
            layer.q_factor,
            layer.k_factor,
            layer.cos,
            layer.sin,
            rows,
            q_stride,
            *strides,
            **layer.append_constants,
            ALL=bool(plan.whole),
            BLOCK_R=block,
            num_warps=1 if block == 1 else 4,
        )
        if plan.whole:
            vendor.attend(q, out, params.spec, plan.whole)
            return out
        q_stride = layer.q_dim
    attend(layer, plan, q, q_stride, out, step, early=plan.fused)
    return out


def _cache_of(layer: Any, step: StepInputs) -> tuple[Any, tuple[Tensor, Tensor | None], Any]:
    """A layer's part of the cache: views of the arena; block tables of all and of the newest
    tokens; then the two tables' strides and the two offsets in the arena."""
    assert step.arena is not None
    table = step.block_tables[layer.group]
    recent = None if layer.recent_group is None else step.block_tables[layer.recent_group]
    recent_stride = 0 if recent is None else recent.stride(0)
    strides = (table.stride(0), recent_stride, layer.offset, layer.recent_offset)
    return layer.views(step.arena), (table, recent), strides


def attend(
    layer: Any,
    plan: AttentionPlan,
    q: Tensor,
    q_stride: int,
    out: Tensor,
    step: StepInputs,
    *,
    early: bool,
) -> None:
    """The launches of a plan, over what ``layer`` says of the cache, into ``out``. Shares that are
    to be ``apart`` stay in the plan's scratch memory instead. ``early``: a lone launch may begin
    while the kernel before it ends, as that one allows."""
    rows = out.shape[0]
    (arena, scales, recent), (table, recent_table), strides = _cache_of(layer, step)
    balanced = triton.next_power_of_2(rows) if rows <= BALANCED_ROWS else 0
    pdl = early and len(plan.launches) == 1 and use_pdl(out.device)
    for launch in plan.launches:
        tile = launch.tile
        attention_kernel[(launch.tiles, layer.kv_heads, launch.splits)](
            q,
            out,
            arena,
            scales,
            table,
            recent,
            recent_table,
            step.positions,
            step.row_seq,
            step.kv_end,
            step.seq_starts,
            layer.q_factor,
            layer.k_factor,
            layer.cos,
            layer.sin,
            layer.sinks,
            plan.partial,
            plan.levels,
            plan.counters,
            rows,
            plan.num_seqs,
            launch.least_rows,
            launch.target,
            q_stride,
            *strides,
            **layer.constants,
            FUSED=plan.fused,
            MODE=launch.mode,
            TWO_PHASE=launch.mode == SEARCH and not plan.deterministic,
            WORDS=launch.mode != SEARCH and layer.has_words,
            ASM=out.is_cuda and layer.dtype == torch.bfloat16,
            SPLITS=launch.splits,
            SPLITS_P=triton.next_power_of_2(launch.splits),
            APART=plan.apart and launch.splits > 1,
            LEAST_BLOCKS=launch.least_blocks,
            LONE_BLOCKS=launch.lone_blocks,
            ROWS_P=balanced if launch.mode == ONE_ROW and launch.splits > 1 else 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.warps,
            num_stages=tile.stages,
            PDL=pdl,
            **({"launch_pdl": True} if pdl else {}),
        )


class _Layer:
    """What a launch needs of one layer's parameters, worked out once."""

    def __init__(self, params: AttentionParams) -> None:
        spec, cache = params.spec, params.cache
        assert cache is not None, "the decoder was bound without a cache"
        recent = cache.recent
        if cache.page_tokens * _vector_elements(cache) % 2:
            raise ValueError(f"page_tokens: {cache.page_tokens} odd vectors of odd size in a page")
        assert recent is None or recent.page_tokens == cache.page_tokens
        self.heads = spec.num_heads + 2 * spec.num_kv_heads
        self.kv_heads = spec.num_kv_heads
        self.q_dim = spec.q_dim
        self.group = cache.group
        self.recent_group = None if recent is None else recent.group
        self.dtype: torch.dtype = getattr(torch, cache.spec.dtype)
        self.kind = KINDS[cache.spec.format]
        item = self.dtype.itemsize
        parts = {INT4: 4, FULL: 1}.get(self.kind, 2)  # numbers in two bytes
        # Tensor cores add up 16 products at a time.
        self.has_words = (
            self.kind != FULL
            and spec.head_dim % parts == 0
            and triton.next_power_of_2(spec.head_dim) // parts >= 16
        )
        self.offset = cache.offset // (2 if self.kind else item)
        self.recent_offset = 0 if recent is None else recent.offset // item
        normed = params.q_norm is not None and params.k_norm is not None
        self.q_factor, self.k_factor = (
            norm.factor().detach().contiguous() if norm is not None and normed else None
            for norm in (params.q_norm, params.k_norm)
        )
        rotated = params.rope is not None and spec.rope is not None
        self.cos = params.rope[0].contiguous() if params.rope is not None else None
        self.sin = params.rope[1].contiguous() if params.rope is not None else None
        self.sinks = None if params.sinks is None else params.sinks.detach().float().contiguous()
        self.append_constants: dict[str, Any] = {
            "EPS": params.q_norm.eps if params.q_norm is not None else params.norm_eps,
            "H": spec.num_heads,
            "G": spec.num_kv_heads,
            "D": spec.head_dim,
            "DP": triton.next_power_of_2(spec.head_dim),
            "NORM": normed,
            "ROTARY": 2 * params.rope[0].shape[1] if rotated and params.rope is not None else 0,
            "INTERLEAVED": spec.rope is not None and spec.rope.interleaved,
            "TURN": cache.spec.hadamard,
            "ROOT": 1 / math.sqrt(hadamard_block(spec.head_dim)),
            "KIND": self.kind,
            "RECENT": _horizon(recent),
            "PAGE": cache.page_tokens,
            "ITEM": item,
            "PLANE": spec.num_kv_heads * cache.page_tokens * _vector_elements(cache),
        }
        self.constants = self.append_constants | {
            "EXTRA": 0,
            "QK_SCALE": spec.scale,
            "CAP": spec.softcap or 0.0,
            "WINDOW": spec.window or 0,
            "SINKS": self.sinks is not None,
            "DTYPE": TRITON_DTYPES[self.dtype],
            "NATIVE_FP8": _converts_fp8(),
        }
        self._arena: tuple[int, int] = (0, 0)
        self._views: tuple[Tensor, Tensor | None, Tensor | None]

    def views(self, arena: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The arena as the elements of its vectors, of its scales, and of the newest tokens."""
        key = (arena.data_ptr(), arena.numel())
        if key != self._arena:
            whole = arena[: arena.numel() - arena.numel() % 4]
            exact = whole.view(self.dtype)
            if self.kind == FULL:
                self._views = exact, None, None
            else:
                newest = exact if self.recent_group is not None else None
                self._views = whole, whole.view(torch.bfloat16), newest
            self._arena = key
        return self._views


_layer_of = Prepared(_Layer)


def _horizon(recent: LayerCache | None) -> int:
    if recent is None:
        return 0
    assert recent.spec.horizon is not None
    return recent.spec.horizon


def _vector_elements(cache: LayerCache) -> int:
    dim = cache.spec.shape[1]
    return {None: dim, "int4": dim // 2 + 2}.get(cache.spec.format, dim + 2)


def _few_tile(
    padded: int,
    dtype: torch.dtype,
    group: int,
    *,
    owners: int,
    processors: int,
    low_bit: bool,
) -> Tile:
    """``owners``: programs there are before keys are split. As measured on an H200: large blocks
    are read quickest where programs are few; where they are many, several small ones on a
    multiprocessor hide each other's beginnings and ends."""
    block_m = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32:
        return Tile(block_m=block_m, block_n=32, warps=4, stages=2)
    if padded >= 256:
        return Tile(block_m=block_m, block_n=32, warps=4, stages=3, per_processor=3)
    if low_bit or owners <= processors:
        return Tile(block_m=block_m, block_n=128, warps=4, stages=2)
    if owners < 3 * processors:
        warps = 8 if padded == 128 else 4
        return Tile(block_m=block_m, block_n=64, warps=warps, stages=3, per_processor=1)
    return Tile(block_m=block_m, block_n=32, warps=4, stages=3, per_processor=3)


def _many_tile(padded: int, dtype: torch.dtype, group: int, lanes: int) -> Tile:
    """``lanes``: rows times query heads of a group that the longest sequence brings."""
    if dtype == torch.float32:
        block_m = max(32, triton.next_power_of_2(group))
        return Tile(block_m=block_m, block_n=32, warps=8, stages=2)
    if lanes <= 64:
        return Tile(block_m=32 if lanes <= 32 else 64, block_n=64, warps=4, stages=3)
    if padded >= 256:
        return Tile(block_m=128, block_n=64, warps=8, stages=2)
    return Tile(block_m=128, block_n=128 if padded <= 64 else 64, warps=8, stages=3)


def _fixed_tile(padded: int, dtype: torch.dtype, group: int) -> Tile:
    block_m = max(32 if dtype == torch.float32 else 64, triton.next_power_of_2(group))
    if dtype == torch.float32 or padded >= 256:
        return Tile(block_m=block_m, block_n=32, warps=4, stages=2)
    return Tile(block_m=block_m, block_n=64, warps=4, stages=3)


def _shared(
    launch: Launch,
    splits: int | None,
    least: int | None,
    lone: int | None,
    *,
    kv_heads: int,
    processors: int,
    context: int,
    most: int,
) -> Launch:
    """The launch with its keys in shares, so that the GPU is filled where that helps."""
    target = launch.tile.per_processor * processors
    large = launch.tile.block_m > 64
    least = least or (8 if large else 2)
    lone = lone or 2 * least
    if splits is None:
        owners = launch.tiles * kv_heads
        if large:
            splits = min(4, target // owners)
        elif owners < target:
            # Twice as many places where lengths may differ.
            splits = target // owners if launch.tiles == 1 else -(-2 * target // owners)
        else:
            splits = 1
        blocks = -(-context // launch.tile.block_n)
        splits = 1 if blocks <= lone else max(1, min(splits, -(-blocks // least), most))
    return replace(launch, splits=splits, least_blocks=least, lone_blocks=lone, target=target)


@functools.cache
def _converts_fp8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
