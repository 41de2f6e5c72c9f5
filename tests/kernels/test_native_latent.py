"""Native latent attention against the plain backend's, its two forms, and its exactness."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch
from native_support import ISAS, needs_native
from torch import Tensor

from skimp.cache.spec import CacheSpec
from skimp.formats.weight import WeightFormat, quantize
from skimp.kernels import native
from skimp.kernels.native.latent import PackedLatent, groups_of_heads
from skimp.kernels.ops import LatentParams, LayerCache, StepInputs
from skimp.kernels.plain import PlainOps
from skimp.model.layers import Linear, RMSNorm
from skimp.model.mixers.latent import cache_spec
from skimp.model.rope import rope_tables
from skimp.model.spec import LatentAttentionSpec, RopeSpec

pytestmark = needs_native
PAGE, OFFSET, MOST = 16, 128, 400  # OFFSET: another layer's share of a page
LENGTHS = (300, 1, 37, 150)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest number


def make_spec(
    heads: int, latent: int, rope: int, nope: int, value: int, *, interleaved: bool = False
) -> LatentAttentionSpec:
    return LatentAttentionSpec(
        num_heads=heads,
        latent_dim=latent,
        rope_dim=rope,
        nope_dim=nope,
        value_dim=value,
        rope=RopeSpec(theta=1e4, rotary_dim=rope, interleaved=interleaved),
        scale=(nope + rope) ** -0.5,
    )


SPECS = [
    make_spec(4, 512, 64, 128, 128),
    make_spec(6, 20, 6, 10, 14, interleaved=True),
    make_spec(3, 64, 32, 16, 64),
    make_spec(40, 48, 16, 32, 16),  # in groups
    make_spec(17, 33, 2, 7, 5),  # odd sizes, more heads than a tile has rows
]


class Layer:
    """Whole sequences, computed at once by the plain backend, and natively step by step."""

    def __init__(self, spec: LatentAttentionSpec, dtype: torch.dtype, *, expand: bool = False):
        draw = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw)

        self.spec, self.dtype = spec, dtype
        self.queries = [random(n, spec.query_dim) for n in LENGTHS]
        self.latents = [random(n, spec.cached_dim) for n in LENGTHS]
        inputs, outputs = spec.matrices(8)["kv_b_proj"]
        self.weight = (random(outputs, inputs) * inputs**-0.5).to(dtype)
        norm = RMSNorm(spec.latent_dim, eps=1e-6)
        norm.weight = torch.nn.Parameter(0.5 + torch.rand(spec.latent_dim, generator=draw))
        assert spec.rope is not None
        tables = rope_tables(spec.rope, max(LENGTHS))
        self.params = LatentParams(spec=spec, latent_norm=norm, rope=tables, cache=None)
        self.capture(expand)

    def linear(self, dtype: torch.dtype) -> Linear:
        linear = Linear(self.weight.shape[1], self.weight.shape[0])
        linear.weight = torch.nn.Parameter(self.weight.to(dtype))
        return linear

    def capture(self, expand: bool) -> None:
        cached: CacheSpec = cache_spec(self.spec, self.dtype)
        cache = LayerCache(spec=cached, group=0, offset=OFFSET, page_tokens=PAGE)
        lines = -(-(OFFSET + cached.bytes_per_token * PAGE) // 64)
        pages = [-(-n // PAGE) for n in LENGTHS]
        order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(1)) * lines
        self.table = torch.full((len(LENGTHS), max(pages)), -(10**6), dtype=torch.int32)
        for seq, part in enumerate(order.split(pages)):
            self.table[seq, : len(part)] = part
        nan = torch.full((lines * sum(pages) * 64 + 64,), torch.nan, dtype=self.dtype)
        self.arena = nan.view(torch.uint8)[-nan.data_ptr() % 64 :]
        ints = [torch.zeros(MOST, dtype=torch.int32) for _ in range(6)]
        self.step = StepInputs(*ints, arena=self.arena, block_tables=(self.table,))
        self.q = torch.empty(MOST, self.spec.query_dim)
        self.c = torch.empty(MOST, self.spec.cached_dim)
        ops = native.NativeOps()
        heads: PackedLatent = ops.pack_latent(self.linear(self.dtype), self.spec)
        if expand:  # float32 too, where it is no option
            heads = dataclasses.replace(heads, expanding=self.weight)
        params = dataclasses.replace(self.params, cache=cache)
        with torch.no_grad(), ops.capture(MOST, len(LENGTHS), 1) as self.program:
            self.out = ops.latent_attention(self.q, self.c, heads, params, self.step)

    def run(
        self, parts: Sequence[tuple[int, int, int]], threads: int = 1, deterministic: bool = False
    ) -> list[Tensor]:
        """One step of rows ``first .. last`` of some sequences; the results of each."""
        rows = [(seq, at) for seq, first, last in parts for at in range(first, last)]
        for row, (seq, at) in enumerate(rows):
            self.q[row], self.c[row] = self.queries[seq][at], self.latents[seq][at]
            self.step.positions[row], self.step.row_seq[row] = at, seq
            self.step.kv_end[row] = at + 1
        self.out.fill_(torch.nan)
        self.program.run(len(rows), len(parts), 0, threads, deterministic)
        sizes = [last - first for _, first, last in parts]
        return [part.float().clone() for part in self.out[: len(rows)].split(sizes)]

    def chunked(self, chunk: int, threads: int = 1, deterministic: bool = False) -> list[Tensor]:
        """All sequences side by side, each ``chunk`` rows a step."""
        done: list[list[Tensor]] = [[] for _ in LENGTHS]
        for first in range(0, max(LENGTHS), chunk):
            open_ = [seq for seq, n in enumerate(LENGTHS) if first < n]
            parts = [(seq, first, min(first + chunk, LENGTHS[seq])) for seq in open_]
            for seq, out in zip(open_, self.run(parts, threads, deterministic)):
                done[seq].append(out)
        return [torch.cat(parts) for parts in done]

    @torch.no_grad()
    def expected(self) -> list[Tensor]:
        ops = PlainOps(serving=True)
        heads = ops.pack_latent(self.linear(torch.float32), self.spec)
        results = []
        for queries, latents in zip(self.queries, self.latents):
            at = torch.arange(len(queries), dtype=torch.int32)
            starts = torch.tensor([0, len(queries)], dtype=torch.int32)
            step = StepInputs(at, at, at * 0, at + 1, starts, at)
            results.append(ops.latent_attention(queries, latents, heads, self.params, step))
        return results


def check(layer: Layer, found: Sequence[Tensor], tolerance: float | None = None) -> None:
    tolerance = TOLERANCE[layer.dtype] if tolerance is None else tolerance
    for got, want in zip(found, layer.expected()):
        assert float((got - want).abs().max() / want.abs().max()) <= tolerance


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.num_heads}x{s.latent_dim}")
def test_as_the_plain_backend(spec: LatentAttentionSpec, dtype: torch.dtype, isa: str) -> None:
    with native.instruction_set(isa):
        layer = Layer(spec, dtype)
        check(layer, layer.chunked(70, threads=2))
        check(layer, [layer.run([(0, 0, LENGTHS[0])])[0]])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS[:4], ids=lambda s: f"{s.num_heads}x{s.latent_dim}")
def test_absorbed_is_expanded(spec: LatentAttentionSpec, dtype: torch.dtype, isa: str) -> None:
    """Rows of whole prompts and of long chunks are expanded, and beside them few rows are not."""
    with native.instruction_set(isa):
        layer = Layer(spec, dtype, expand=True)
        first, alone = layer.run([(0, 0, 250), (3, 0, 150)], threads=2)
        rest, single, other = layer.run([(0, 250, 300), (1, 0, 1), (2, 0, 37)], threads=2)
        check(layer, [torch.cat((first, rest)), single, other, alone])
        absorbed = layer.run([(0, 0, 250)], deterministic=True)[0]
    assert not torch.equal(first, absorbed)
    bound = TOLERANCE[dtype]
    assert float((first - absorbed).abs().max() / absorbed.abs().max()) <= bound


@pytest.mark.parametrize("rows", range(1, 9))
def test_few_rows(rows: int) -> None:
    layer = Layer(SPECS[0], torch.float32)
    layer.run([(0, 0, 290)])
    found = layer.run([(0, 290, 290 + rows)], threads=2)[0]
    want = layer.expected()[0][290 : 290 + rows]
    assert float((found - want).abs().max() / want.abs().max()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3], SPECS[4]], ids=lambda s: f"{s.num_heads}")
def test_a_row_depends_on_no_other(spec: LatentAttentionSpec, dtype: torch.dtype, isa: str) -> None:
    """However prompts are cut, whatever is beside them, on any number of threads: the same bits."""
    mode = dtype == torch.bfloat16  # float32 needs no deterministic mode
    with native.instruction_set(isa):
        layer = Layer(spec, dtype)
        want = [layer.run([(seq, 0, n)], 1, mode)[0] for seq, n in enumerate(LENGTHS)]
        for chunk, threads in itertools.product((1, 7, 100), (1, 3)):
            found = layer.chunked(chunk, threads, mode)
            assert all(map(torch.equal, found, want)), (chunk, threads)


def test_low_bit_heads_become_dense() -> None:
    spec = SPECS[0]
    linear, dense = (Layer(spec, torch.bfloat16).linear(torch.bfloat16) for _ in range(2))
    assert linear.weight is not None
    form = WeightFormat(kind="int", bits=8, group_size=64)
    linear.quantized, linear.weight = quantize(linear.weight.detach(), form), None
    weight = linear.quantized.dequantize().to(linear.quantized.scale.dtype)
    dense.weight = torch.nn.Parameter(weight)
    ours, theirs = (native.NativeOps().pack_latent(x, spec) for x in (linear, dense))
    assert torch.equal(ours.to_latent.panels, theirs.to_latent.panels)
    assert torch.equal(ours.from_latent.panels, theirs.from_latent.panels)
    assert linear.quantized is None


def test_groups_of_heads() -> None:
    counts = {1: 1, 12: 1, 16: 1, 17: 1, 20: 2, 40: 4, 64: 4, 128: 8}
    for heads, groups in counts.items():
        assert groups_of_heads(dataclasses.replace(SPECS[0], num_heads=heads)) == groups
