"""Attention over a paged cache of latents on a GPU (MLA, DeepSeek-V2, 2024).

Few rows attend in the latent: queries are brought there (``latent_rows_kernel``, which also stores
the step's latents), the attention kernel reads a latent once for all heads of a tile, as key and as
value, and ``latent_values_kernel`` makes values of what was mixed. Long prompts from position 0
are expanded: keys and values of all heads, and PyTorch's own attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from skimp.kernels.ops import LatentParams, StepInputs
from skimp.kernels.triton import vendor
from skimp.kernels.triton.attention import (
    TRITON_DTYPES,
    AttentionPlan,
    Tile,
    attend,
    plan_attention,
)
from skimp.kernels.triton.cached_heads import FULL
from skimp.kernels.triton.latent_kernels import latent_rows_kernel, latent_values_kernel
from skimp.kernels.triton.launch import use_pdl
from skimp.kernels.triton.prepared import Prepared
from skimp.kernels.triton.shares import shares_kernel
from skimp.model.spec import AttentionSpec, LatentAttentionSpec

MOST_SPLITS = 32  # what shares_kernel adds up in registers
ROWS_AT_ONCE = 4  # that a program rotates, norms and stores
MOST_LANES = 64  # heads of a tile: its sums of latents fill the registers


@dataclass(frozen=True, kw_only=True)
class LatentPlan:
    """How latent layers of one kind attend in steps of one shape."""

    attention: AttentionPlan
    whole: tuple[int, ...] = ()  # as in AttentionPlan


def plan_latent_attention(
    spec: LatentAttentionSpec,
    *,
    num_seqs: int,
    rows: int,
    most_rows: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    deterministic: bool = False,
    whole: tuple[int, ...] = (),
    few: Tile | None = None,
    many: Tile | None = None,
    **options: Any,
) -> LatentPlan:
    """See :func:`~skimp.kernels.triton.attention.plan_attention`, whose arguments these are."""
    seen = as_attention(spec)
    group = seen.num_heads // seen.num_kv_heads
    if whole and not deterministic and vendor.serves_latent(spec, dtype, device):
        nothing = AttentionPlan(
            num_seqs=num_seqs, rows=rows, most_rows=most_rows, context=context,
            deterministic=False, fused=False, launches=(),
        )  # fmt: skip
        return LatentPlan(attention=nothing, whole=whole)
    plan = plan_attention(
        seen,
        num_seqs=num_seqs,
        rows=rows,
        most_rows=most_rows,
        context=context,
        device=device,
        dtype=dtype,
        deterministic=deterministic,
        fused=False,
        few=few or tile_of(group, dtype),
        many=many or tile_of(max(group, 64), dtype),
        most_splits=MOST_SPLITS if most_rows == 1 else None,
        **options,
    )
    return LatentPlan(attention=plan)


def as_attention(spec: LatentAttentionSpec) -> AttentionSpec:
    """The attention in the latent: few enough heads to a group that a tile holds their sums. All
    groups read the same latents."""
    group = max(n for n in range(1, MOST_LANES + 1) if spec.num_heads % n == 0)
    return AttentionSpec(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_heads // group,
        head_dim=spec.latent_dim,
        rope=None,
        scale=spec.scale,
    )


def latent_attention(
    queries: Tensor,
    latents: Tensor,
    heads: Tensor,
    params: LatentParams,
    step: StepInputs,
    *,
    plan: LatentPlan,
) -> Tensor:
    """``Ops.latent_attention`` with an arena; ``heads`` is [H, N + V, L] in the rows' dtype."""
    layer = layer_of(params)
    spec, rows = params.spec, queries.shape[0]
    assert queries.stride(1) == latents.stride(1) == 1 and step.arena is not None
    out = queries.new_empty(rows, spec.out_dim)
    if rows == 0:
        return out
    expand = bool(plan.whole)
    width = spec.nope_dim + spec.rope_dim if expand else spec.cached_dim
    q = queries.new_empty(rows, spec.num_heads * width)
    cached = queries.new_empty(rows, spec.cached_dim) if expand else None
    arena, _, _ = layer.views(step.arena)
    table = step.block_tables[layer.group]
    pdl = use_pdl(queries.device)
    launch: dict[str, Any] = {"PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    block = 16 if rows <= 32 or plan.attention.deterministic else 64
    blocks = triton.cdiv(rows, block)
    parts = block // ROWS_AT_ONCE + (0 if expand else triton.cdiv(spec.latent_dim, layer.block_l))
    latent_rows_kernel[(spec.num_heads, parts, blocks)](
        queries,
        latents,
        heads,
        q,
        cached,
        arena,
        table,
        step.positions,
        step.row_seq,
        layer.factor,
        layer.cos,
        layer.sin,
        rows,
        queries.stride(0),
        latents.stride(0),
        table.stride(0),
        layer.offset,
        **layer.row_constants,
        EXPAND=expand,
        BLOCK_R=block,
        BLOCK_L=layer.block_l,
        STEP_R=ROWS_AT_ONCE,
        num_warps=4,
        **launch,
    )
    if cached is not None:
        _attend_whole(q, cached, heads, out, spec, plan.whole)
        return out
    mixed = queries.new_empty(rows, spec.num_heads * spec.latent_dim)
    attend(layer, plan.attention, q, q.stride(0), mixed, step, early=True)
    last = plan.attention.launches[-1]
    if plan.attention.apart:
        shares_kernel[(rows, spec.num_heads)](
            plan.attention.partial,
            plan.attention.levels,
            mixed,
            step.positions,
            rows,
            **layer.share_constants,
            SPLITS=last.splits,
            SPLITS_P=triton.next_power_of_2(last.splits),
            BLOCK_M=last.tile.block_m,
            num_warps=8,
            **launch,
        )
    block_v = min(32, triton.next_power_of_2(spec.value_dim))
    latent_values_kernel[(spec.num_heads, triton.cdiv(spec.value_dim, block_v), blocks)](
        mixed,
        heads,
        out,
        step.positions,
        rows,
        **layer.value_constants,
        BLOCK_R=block,
        BLOCK_V=max(16, block_v),
        BLOCK_L=min(128, triton.next_power_of_2(spec.latent_dim)),
        num_warps=4,
        num_stages=4,
        **launch,
    )
    return out


def _attend_whole(
    q: Tensor,
    cached: Tensor,
    heads: Tensor,
    out: Tensor,
    spec: LatentAttentionSpec,
    starts: tuple[int, ...],
) -> None:
    """Prompts from position 0, with keys and values of every head."""
    latents, rotated = cached.split((spec.latent_dim, spec.rope_dim), dim=1)
    made = F.linear(latents, heads.flatten(0, 1)).unflatten(1, (spec.num_heads, -1))
    nope, values = made.split((spec.nope_dim, spec.value_dim), dim=2)
    keys = torch.cat((nope, rotated[:, None].expand(-1, spec.num_heads, -1)), dim=2)
    vendor.attend_made(q.unflatten(1, (spec.num_heads, -1)), keys, values, out, spec, starts)


class _Layer:
    """What launches need of one layer's parameters, worked out once."""

    def __init__(self, params: LatentParams) -> None:
        spec, cache = params.spec, params.cache
        assert cache is not None, "the decoder was bound without a cache"
        seen = as_attention(spec)
        self.group, self.recent_group = cache.group, None
        self.dtype: torch.dtype = getattr(torch, cache.spec.dtype)
        item = self.dtype.itemsize
        self.offset, self.recent_offset = cache.offset // item, 0
        self.kv_heads, self.has_words = seen.num_kv_heads, False
        self.q_factor = self.k_factor = self.sinks = None
        self.factor = params.latent_norm.factor().detach().contiguous()
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None
        if params.rope is not None:
            self.cos, self.sin = params.rope[0].contiguous(), params.rope[1].contiguous()
        rotary = 0 if params.rope is None else 2 * params.rope[0].shape[1]
        padded = max(16, triton.next_power_of_2(spec.latent_dim))
        self.block_l = min(128, padded)
        shape = {"H": spec.num_heads, "L": spec.latent_dim, "N": spec.nope_dim, "V": spec.value_dim}
        self.value_constants: dict[str, Any] = shape
        self.row_constants: dict[str, Any] = shape | {
            "EPS": params.latent_norm.eps,
            "NP": max(16, triton.next_power_of_2(spec.nope_dim)),
            "P": spec.rope_dim,
            "PP": triton.next_power_of_2(spec.rope_dim),
            "LP": padded,
            "ROTARY": rotary,
            "INTERLEAVED": spec.rope is not None and spec.rope.interleaved,
            "PAGE": cache.page_tokens,
            "ITEM": item,
        }
        sizes = {"H": spec.num_heads, "G": seen.num_kv_heads, "D": spec.latent_dim, "DP": padded}
        self.share_constants: dict[str, Any] = sizes
        self.constants: dict[str, Any] = sizes | {
            "EPS": 0.0,
            "NORM": False,
            "ROTARY": 0,
            "INTERLEAVED": False,
            "TURN": False,
            "ROOT": 1.0,
            "KIND": FULL,
            "RECENT": 0,
            "PAGE": cache.page_tokens,
            "ITEM": item,
            "PLANE": 0,
            "EXTRA": spec.rope_dim,
            "QK_SCALE": spec.scale,
            "CAP": 0.0,
            "WINDOW": 0,
            "SINKS": False,
            "DTYPE": TRITON_DTYPES[self.dtype],
            "NATIVE_FP8": False,
        }

    def views(self, arena: Tensor) -> tuple[Tensor, None, None]:
        """The arena as elements."""
        return arena[: arena.numel() - arena.numel() % 4].view(self.dtype), None, None


layer_of = Prepared(_Layer)


def tile_of(lanes: int, dtype: torch.dtype) -> Tile:
    """``lanes``: rows times heads that a program is to have."""
    block_m = max(16, triton.next_power_of_2(lanes))
    if dtype == torch.float32:
        return Tile(block_m=block_m, block_n=16, warps=8, stages=1, per_processor=1)
    # What shared memory holds: queries of more heads lie in it too.
    stages = 3 if block_m <= 32 else 2
    return Tile(block_m=block_m, block_n=64, warps=8, stages=stages, per_processor=1)
