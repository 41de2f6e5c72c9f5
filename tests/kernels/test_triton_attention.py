"""Paged attention in Triton against the plain backend: on a GPU where there is one, and elsewhere
in Triton's interpreter (float32: it is not to be trusted with bfloat16 products)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from hopper import ptx_of  # noqa: E402
from packed_rows import Rows, packed_step  # noqa: E402

from skimp.cache.formats import dequantize, hadamard, quantize  # noqa: E402
from skimp.cache.layout import CacheLayout  # noqa: E402
from skimp.kernels.ops import AttentionParams  # noqa: E402
from skimp.kernels.plain import PlainOps  # noqa: E402
from skimp.kernels.triton.attention import Tile, paged_attention, plan_attention  # noqa: E402
from skimp.model.layers import RMSNorm  # noqa: E402
from skimp.model.mixers.attention import cache_spec  # noqa: E402
from skimp.model.rope import rope_tables  # noqa: E402
from skimp.model.spec import AttentionSpec, RopeSpec  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]
SMALL = Tile(block_m=16, block_n=16, warps=4, stages=2)
MANY = Tile(block_m=32, block_n=16, warps=4, stages=2)


def attention(dim: int = 64, **fields: object) -> AttentionSpec:
    defaults = {"num_heads": 4, "num_kv_heads": 2, "rope": None, "scale": dim**-0.5}
    return AttentionSpec(head_dim=dim, **(defaults | fields))  # type: ignore[arg-type]


def rope(dim: int, interleaved: bool = False) -> RopeSpec:
    return RopeSpec(theta=10000.0, rotary_dim=dim, interleaved=interleaved)


class Twins:
    """Sequences with given queries, keys and values, fed to both backends."""

    def __init__(
        self,
        spec: AttentionSpec,
        lengths: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        format: str | None = None,
        recent: int = 0,
        turned: bool = False,
        page: int = 16,
        layers: int = 2,
    ) -> None:
        self.spec, self.lengths, self.dtype = spec, list(lengths), dtype
        draw = torch.Generator().manual_seed(sum(lengths) + spec.head_dim)
        width = spec.q_dim + 2 * spec.kv_dim
        self.qkv = [torch.randn(n, width, generator=draw).to(dtype) for n in lengths]
        memory = cache_spec(spec, dtype)
        if format is not None:
            memory = memory.rounded(format, recent=recent, hadamard=turned)
        self.low_bit = format is not None
        layout = CacheLayout.from_specs([memory] * layers, page_tokens=page)
        self.layout, self.cache = layout, layout.layer_cache(layers - 1)
        norms = [RMSNorm(spec.head_dim, eps=1e-6) for _ in range(2)] if spec.qk_norm else []
        for norm in norms:
            norm.weight = torch.nn.Parameter(torch.rand(spec.head_dim, generator=draw) + 0.5)
        tables = None if spec.rope is None else rope_tables(spec.rope, max(lengths))
        self.wanted_params = AttentionParams(
            spec=spec,
            norm_eps=1e-6,
            q_norm=norms[0] if norms else None,
            k_norm=norms[1] if norms else None,
            sinks=torch.randn(spec.num_heads, generator=draw) if spec.sinks else None,
            rope=tables,
            cache=self.cache,
        )
        moved = self.wanted_params
        self.params = replace(
            moved,
            q_norm=None if moved.q_norm is None else moved.q_norm.to(DEVICE),
            k_norm=None if moved.k_norm is None else moved.k_norm.to(DEVICE),
            sinks=None if moved.sinks is None else moved.sinks.to(DEVICE),
            rope=None if tables is None else (tables[0].to(DEVICE), tables[1].to(DEVICE)),
        )
        # The reference computes in float32, from the same stored numbers.
        if DEVICE.type == "cuda" and norms:
            self.wanted_params = replace(moved, q_norm=_copy(norms[0]), k_norm=_copy(norms[1]))
        pages = max(-(-n // page) for n in lengths)
        unit = max(group.page_bytes for group in layout.groups) // 64 + 1
        count = len(layout.groups) * len(lengths) * pages
        order = torch.randperm(count, generator=draw) + 1
        self.tables = tuple((order * unit).int().view(len(layout.groups), len(lengths), pages))
        nothing = torch.full(((count + 1) * unit * 64,), 0xFF, dtype=torch.uint8)
        self.nothing = nothing  # every bit set is NaN in every format that has one
        self.arena, self.wanted_arena = nothing.to(DEVICE), nothing.clone()

    def rows(self, rows: Sequence[Rows]) -> Tensor:
        parts = [self.qkv[seq][max(p, 0) : max(p, 0) + n] for seq, p, n in rows]
        return torch.cat(parts)

    def found(self, rows: Sequence[Rows], ends: Tensor | None = None, **options: object) -> Tensor:
        step = packed_step(rows, ends, self.arena, self.tables).to(DEVICE)
        defaults: dict[str, object] = {"least_blocks": 1, "lone_blocks": 1}
        if self.dtype == torch.float32:
            defaults |= {"few": SMALL, "many": MANY}
        plan = plan_attention(
            self.spec,
            num_seqs=len(rows),
            rows=len(step.positions),
            most_rows=max(n for _, _, n in rows),
            context=max(self.lengths),
            device=DEVICE,
            dtype=self.dtype,
            **(defaults | options),  # type: ignore[arg-type]
        )
        qkv = self.rows(rows).to(DEVICE)
        found = paged_attention(qkv, self.params, step, plan=plan)
        if plan.counters is not None:
            assert not plan.counters.any()
        assert found.dtype == self.dtype
        return found.cpu()

    def wanted(self, rows: Sequence[Rows], ends: Tensor | None = None) -> Tensor:
        """Zeros for padding; else what the plain backend makes of its own pages."""
        real = [(seq, p, n) for seq, p, n in rows if p >= 0 and n]
        use = torch.cat([torch.full((n,), p >= 0) for _, p, n in rows])
        step = packed_step(
            real, None if ends is None else ends[use], self.wanted_arena, self.tables
        )
        out = torch.zeros(len(use), self.spec.q_dim)
        with torch.no_grad():
            out[use] = (
                PlainOps().attention(self.rows(real).float(), self.wanted_params, step).float()
            )
        return out

    def check(self, rows: Sequence[Rows], ends: Tensor | None = None, **options: object) -> None:
        wanted, found = self.wanted(rows, ends), self.found(rows, ends, **options).float()
        error = float((found - wanted).abs().max() / wanted.abs().max())
        # A bfloat16 ulp before rounding may pick the next code of four or eight bits.
        limit = 1e-5 if self.dtype == torch.float32 else 5e-2 if self.low_bit else 1e-2
        assert error < limit, f"error {error:.1e} at {rows}"

    def steps(self) -> None:
        """Prefill, then chunks and generation mixed, then generation alone, with padding and a
        sequence without rows."""
        a, b, c = self.lengths
        self.check([(0, 0, a - 3), (1, 0, b - 9)])
        self.check([(0, a - 3, 1), (0, 0, 0), (1, b - 9, 7), (2, 0, c - 2), (2, -1, 2)])
        self.check([(1, b - 2, 1), (0, a - 2, 1), (2, -1, 1), (2, c - 2, 1)])
        self.check([(2, c - 1, 1), (1, b - 1, 1), (0, a - 1, 1)], splits=3)


def _copy(norm: RMSNorm) -> RMSNorm:
    other = RMSNorm(norm.weight.shape[0], eps=norm.eps)
    other.weight = torch.nn.Parameter(norm.weight.detach().cpu().clone())
    return other


SHAPES = [
    attention(64, num_heads=2, num_kv_heads=2, rope=rope(64)),
    attention(80, num_heads=3, num_kv_heads=1, rope=rope(32)),
    attention(96, num_heads=4, num_kv_heads=2, rope=rope(96, True), softcap=5.0),
    attention(128, num_heads=8, num_kv_heads=2, rope=rope(128), qk_norm=True),
    attention(256, num_heads=8, num_kv_heads=1, rope=rope(128, True), qk_norm=True, sinks=True),
    attention(64, window=20, sinks=True, softcap=3.0, rope=rope(64)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("spec", SHAPES, ids=range(len(SHAPES)))
def test_steps(spec: AttentionSpec, page: int, dtype: torch.dtype) -> None:
    if DEVICE.type == "cpu" and page == 32 and spec.head_dim != 64:
        pytest.skip("slow in the interpreter")
    Twins(spec, [37, 50, 5], page=page, dtype=dtype).steps()


CACHES = [
    ("int8", 0, False, 64),
    ("fp8", 0, False, 64),
    ("int4", 16, True, 64),
    ("int4", 7, True, 80),
    ("int8", 30, False, 64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("format", "recent", "turned", "dim"), CACHES)
def test_low_bit_caches(
    format: str, recent: int, turned: bool, dim: int, dtype: torch.dtype
) -> None:
    window = 33 if recent == 7 else None
    spec = attention(dim, num_heads=2, num_kv_heads=1, window=window)
    twins = Twins(spec, [37, 50, 5], format=format, recent=recent, turned=turned, dtype=dtype)
    twins.steps()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where sizes are extreme
@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_codes_are_those_of_the_format(format: str) -> None:
    """What lies in the pages, scale included, is what ``quantize`` makes, bit by bit."""
    dim, tokens = 96, 16
    spec = attention(dim, num_heads=1, num_kv_heads=1)
    twins = Twins(spec, [tokens], format=format, turned=format == "int4", layers=1)
    draw = torch.Generator().manual_seed(1)
    sizes = torch.randn(tokens, 1, generator=draw).mul(9).exp()
    sizes[3:6] = torch.tensor([[0.0], [1e-38], [3e38]])
    ties = torch.arange(dim).sub(40).div(2)
    twins.qkv[0] = torch.randn(tokens, 3 * dim, generator=draw) * sizes
    twins.qkv[0][6, dim:] = torch.cat((ties * 2.0**-7, ties * -(2.0**5)))
    twins.found([(0, 0, tokens)])
    table = int(twins.tables[0][0, 0]) * 64
    width = dim // 2 if format == "int4" else dim
    for plane, x in enumerate(twins.qkv[0][:, dim:].split(dim, dim=1)):
        wanted = quantize(hadamard(x) if format == "int4" else x, format)
        block = twins.arena.cpu()[table + plane * tokens * (width + 2) :][: tokens * (width + 2)]
        codes = block[: tokens * width].view(tokens, width)
        scales = block[tokens * width :].view(tokens, 2)
        found = torch.cat((codes, scales), dim=1)
        broken = dequantize(wanted, format).isnan().all(1)
        if format == "int4":  # a byte holds neighbours here, and there numbers half a vector apart
            numbers = torch.cat((wanted[:, :width] & 15, wanted[:, :width] >> 4), dim=1)
            pairs = numbers[:, 0::2] | numbers[:, 1::2] << 4
            wanted = torch.cat((pairs, wanted[:, width:]), dim=1)
        same = (found == wanted).all(1) | broken
        assert same.all(), f"{plane}: {same.logical_not().nonzero().tolist()}"


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_low_bits_go_to_tensor_cores_as_words(format: str, tmp_path: Path) -> None:
    """What the interpreter cannot show, and the compiler can without a GPU."""
    ptx = ptx_of("compile_attention.py", format, cache=tmp_path)
    assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in ptx
    assert "ld.shared.b8" not in ptx and "ld.shared.u8" not in ptx
    assert "cp.async" in ptx


def test_rows_that_see_ahead() -> None:
    """A block of diffusion: every row sees the end of its block, some not even themselves."""
    twins = Twins(attention(64, window=30), [40, 21])
    twins.check([(0, 0, 20), (1, 0, 9)])
    ends = torch.tensor([28] * 8 + [36] * 8 + [21] * 6 + [9] * 6)
    ends[3] = 17
    rows = [(0, 20, 16), (1, 9, 12)]
    twins.check(rows, ends)
    twins.check([(0, 36, 1), (1, 9, 1)], torch.tensor([30, 21]))


def test_sixteen_lanes_of_long_shares() -> None:
    """Few rows of one sequence, keys in shares; then more rows than share a row's own sum."""
    twins = Twins(attention(64, sinks=True), [90])
    twins.check([(0, 0, 70)])
    twins.check([(0, 70, 4)], splits=5)
    twins.check([(0, 74, 16)], splits=3)


FREE = [
    ({"window": 20, "sinks": True, "rope": rope(64)}, None, 0),
    ({"softcap": 4.0, "qk_norm": True}, "int8", 10),
]


@pytest.mark.parametrize(("fields", "format", "recent"), FREE)
def test_deterministic_rows(fields: dict, format: str | None, recent: int) -> None:
    """A row's bits: whole or in chunks, alone or beside others, prefilled or generated."""
    for dtype in DTYPES:
        spec = attention(64, **fields)
        twins = Twins(spec, [45, 30], dtype=dtype, format=format, recent=recent)
        many = {"deterministic": True, "many": MANY} if dtype == torch.float32 else {}
        options = {"deterministic": True, "few": None} | many
        whole = twins.found([(0, 0, 45)], **options)
        assert torch.allclose(whole.float(), twins.wanted([(0, 0, 45)]), atol=5e-2)
        twins.arena = twins.nothing.to(DEVICE)
        first = twins.found([(1, 0, 11), (0, 0, 23)], **options)[11:]
        second = twins.found([(0, 23, 20), (1, 11, 1)], **options)[:20]
        third = twins.found([(1, 12, 3), (0, 43, 1)], **options)[3:]
        last = twins.found([(0, 44, 1)], **options)
        assert torch.equal(torch.cat((first, second, third, last)), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter would take minutes")
def test_deterministic_rows_of_large_steps() -> None:
    """More rows than those for which the tiles of norms once changed."""
    spec = attention(128, qk_norm=True, rope=rope(128))
    twins = Twins(spec, [600, 200], dtype=torch.bfloat16)
    options = {"deterministic": True, "few": None}
    whole = twins.found([(1, 0, 200), (0, 0, 600)], **options)[200:]
    twins.arena = twins.nothing.to(DEVICE)
    chunks = [twins.found([(0, a, b - a)], **options) for a, b in ((0, 9), (9, 310), (310, 600))]
    assert torch.equal(torch.cat(chunks), whole)


def test_nothing_but_the_step_is_written() -> None:
    twins = Twins(attention(64), [20])
    twins.found([(0, 0, 5)])
    before = twins.arena.clone()
    twins.found([(0, -1, 3)])
    twins.found([(0, -1, 1)])
    assert torch.equal(before, twins.arena)
