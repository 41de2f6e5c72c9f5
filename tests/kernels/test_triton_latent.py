"""Latent attention in Triton against the plain backend: on a GPU where there is one, and elsewhere
in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from hopper import ptx_of  # noqa: E402
from packed_rows import Rows, packed_step  # noqa: E402

from skimp.cache.layout import CacheLayout  # noqa: E402
from skimp.kernels.ops import LatentParams  # noqa: E402
from skimp.kernels.plain import PlainOps  # noqa: E402
from skimp.kernels.triton.attention import Tile  # noqa: E402
from skimp.kernels.triton.latent import (  # noqa: E402
    as_attention,
    latent_attention,
    plan_latent_attention,
)
from skimp.model.layers import Linear, RMSNorm  # noqa: E402
from skimp.model.mixers.latent import cache_spec  # noqa: E402
from skimp.model.rope import rope_tables  # noqa: E402
from skimp.model.spec import LatentAttentionSpec, RopeSpec  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]


def latent(heads: int = 4, interleaved: bool = True, **sizes: int) -> LatentAttentionSpec:
    fields = {"latent_dim": 48, "rope_dim": 16, "nope_dim": 24, "value_dim": 40} | sizes
    return LatentAttentionSpec(
        num_heads=heads,
        rope=RopeSpec(theta=1e4, rotary_dim=fields["rope_dim"], interleaved=interleaved),
        scale=0.2,
        **fields,
    )


class Twins:
    """Sequences with given queries and latents, fed to both backends."""

    def __init__(
        self,
        spec: LatentAttentionSpec,
        lengths: Sequence[int],
        dtype: torch.dtype = torch.float32,
        page: int = 16,
    ) -> None:
        self.spec, self.lengths, self.dtype = spec, list(lengths), dtype
        draw = torch.Generator().manual_seed(sum(lengths))
        widths = spec.query_dim, spec.cached_dim
        self.given = [
            tuple(torch.randn(n, w, generator=draw).to(dtype) for w in widths) for n in lengths
        ]
        layout = CacheLayout.from_specs([cache_spec(spec, dtype)] * 2, page_tokens=page)
        norm = RMSNorm(spec.latent_dim, eps=1e-6)
        norm.weight = torch.nn.Parameter(torch.rand(spec.latent_dim, generator=draw) + 0.5)
        assert spec.rope is not None
        cos, sin = rope_tables(spec.rope, max(lengths))
        self.wanted_params = LatentParams(
            spec=spec, latent_norm=norm, rope=(cos, sin), cache=layout.layer_cache(1)
        )
        on_device = RMSNorm(spec.latent_dim, eps=1e-6)
        on_device.weight = torch.nn.Parameter(norm.weight.detach().to(DEVICE))
        self.params = dataclasses.replace(
            self.wanted_params, latent_norm=on_device, rope=(cos.to(DEVICE), sin.to(DEVICE))
        )
        shape = spec.matrices(8)["kv_b_proj"]
        self.linear = Linear(*shape)
        weight = torch.randn(shape[1], shape[0], generator=draw) * shape[0] ** -0.5
        self.linear.weight = torch.nn.Parameter(weight.to(dtype))
        unit = layout.groups[0].page_bytes // 64 + 1
        pages = max(-(-n // page) for n in lengths)
        count = len(lengths) * pages
        order = torch.randperm(count, generator=draw) + 1
        self.tables = ((order * unit).int().view(len(lengths), pages),)
        nothing = torch.full(((count + 1) * unit * 64,), 0xFF, dtype=torch.uint8)
        self.arena, self.wanted_arena = nothing.to(DEVICE), nothing.clone()

    def rows(self, rows: Sequence[Rows]) -> list[Tensor]:
        parts = [[x[max(p, 0) : max(p, 0) + n] for x in self.given[seq]] for seq, p, n in rows]
        return [torch.cat(columns) for columns in zip(*parts)]

    def found(self, rows: Sequence[Rows], ends: Tensor | None = None, **options: object) -> Tensor:
        step = packed_step(rows, ends, self.arena, self.tables).to(DEVICE)
        defaults: dict[str, object] = {"least_blocks": 1, "lone_blocks": 1}
        if self.dtype == torch.float32:
            group = self.spec.num_heads // as_attention(self.spec).num_kv_heads
            lanes = max(16, triton.next_power_of_2(group))
            small = Tile(block_m=lanes, block_n=16, warps=4, stages=1)
            defaults |= {"few": small, "many": small}
        plan = plan_latent_attention(
            self.spec,
            num_seqs=len(rows),
            rows=len(step.positions),
            most_rows=max(n for _, _, n in rows),
            context=max(self.lengths),
            device=DEVICE,
            dtype=self.dtype,
            **(defaults | options),  # type: ignore[arg-type]
        )
        assert self.linear.weight is not None
        heads = self.linear.weight.detach().to(DEVICE).unflatten(0, (self.spec.num_heads, -1))
        queries, latents = (x.to(DEVICE) for x in self.rows(rows))
        both = torch.cat((queries, latents), dim=1)  # neither is contiguous
        queries, latents = both.split((queries.shape[1], latents.shape[1]), dim=1)
        found = latent_attention(queries, latents, heads, self.params, step, plan=plan)
        if plan.attention.counters is not None:
            assert not plan.attention.counters.any()
        assert found.dtype == self.dtype
        return found.cpu()

    def wanted(self, rows: Sequence[Rows], ends: Tensor | None = None) -> Tensor:
        """Zeros for padding; else what the plain backend makes of its own pages."""
        real = [(seq, p, n) for seq, p, n in rows if p >= 0 and n]
        use = torch.cat([torch.full((n,), p >= 0) for _, p, n in rows])
        step = packed_step(
            real, None if ends is None else ends[use], self.wanted_arena, self.tables
        )
        out = torch.zeros(len(use), self.spec.out_dim)
        ops = PlainOps()
        with torch.no_grad():
            heads = ops.pack_latent(self.linear, self.spec)
            queries, latents = (x.float() for x in self.rows(real))
            out[use] = ops.latent_attention(queries, latents, heads, self.wanted_params, step)
        return out

    def check(self, rows: Sequence[Rows], ends: Tensor | None = None, **options: object) -> None:
        wanted, found = self.wanted(rows, ends), self.found(rows, ends, **options).float()
        error = float((found - wanted).abs().max() / wanted.abs().max())
        assert error < (1e-5 if self.dtype == torch.float32 else 2e-2), f"{error:.1e} at {rows}"


SHAPES = [
    latent(),
    latent(2, False, latent_dim=64, rope_dim=8, nope_dim=16, value_dim=16),
    latent(80, latent_dim=16, nope_dim=16, value_dim=16),  # two groups of heads
]
GPU_SHAPES = [
    latent(32, latent_dim=512, rope_dim=64, nope_dim=128, value_dim=128),
    latent(40, False, latent_dim=256, rope_dim=32, nope_dim=64, value_dim=64),
    latent(128, latent_dim=512, rope_dim=64, nope_dim=128, value_dim=128),
]


# Many heads take the interpreter half a minute.
CASES = [
    pytest.param(spec, page, id=f"{spec.num_heads}-{page}")
    for spec in SHAPES + GPU_SHAPES * ON_GPU
    for page in (16, 32, 64)
    if ON_GPU or spec.num_heads < 64 or page == 16
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "page"), CASES)
def test_steps(spec: LatentAttentionSpec, page: int, dtype: torch.dtype) -> None:
    """Prefill, then chunks and generation mixed, then generation alone, with padding and a
    sequence without rows."""
    twins = Twins(spec, [37, 50, 5], dtype, page)
    twins.check([(0, 0, 34), (1, 0, 41)])
    twins.check([(0, 34, 1), (0, 0, 0), (1, 41, 7), (2, 0, 3), (2, -1, 2)])
    twins.check([(1, 48, 1), (0, 35, 1), (2, -1, 1), (2, 3, 1)])
    twins.check([(2, 4, 1), (1, 49, 1), (0, 36, 1)], splits=3)


def test_rows_that_see_ahead() -> None:
    twins = Twins(latent(), [40, 21])
    twins.check([(0, 0, 20), (1, 0, 9)])
    ends = torch.tensor([28] * 8 + [36] * 8 + [21] * 6 + [9] * 6)
    ends[3] = 17
    twins.check([(0, 20, 16), (1, 9, 12)], ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_rows(dtype: torch.dtype) -> None:
    """A row's bits: whole or in chunks, alone or beside others, prefilled or generated."""
    twins = Twins(latent(), [45, 30], dtype)
    options = {"deterministic": True, "few": None}
    whole = twins.found([(0, 0, 45)], **options)
    assert torch.allclose(whole.float(), twins.wanted([(0, 0, 45)]), atol=5e-2)
    twins.arena.fill_(0xFF)
    first = twins.found([(1, 0, 11), (0, 0, 23)], **options)[11:]
    second = twins.found([(0, 23, 20), (1, 11, 1)], **options)[:20]
    third = twins.found([(1, 12, 3), (0, 43, 1)], **options)[3:]
    last = twins.found([(0, 44, 1)], **options)
    assert torch.equal(torch.cat((first, second, third, last)), whole)


@pytest.mark.skipif(not ON_GPU, reason="PyTorch's kernels for a GPU")
@pytest.mark.parametrize("spec", GPU_SHAPES, ids=lambda s: f"{s.num_heads}")
def test_whole_prompts_are_expanded(spec: LatentAttentionSpec) -> None:
    twins = Twins(spec, [300, 200], torch.bfloat16)
    rows = [(0, 0, 290), (1, 0, 200)]
    twins.check(rows, whole=(0, 290, 490))
    twins.check([(0, 290, 1)])  # what it stored


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """Blocks come asynchronously, and nothing of them goes through registers."""
    ptx = ptx_of("compile_latent.py", cache=tmp_path)
    assert ptx.count("cp.async.cg") >= 36 and ptx.count("mma.sync") > 100
    assert ".local" not in ptx
