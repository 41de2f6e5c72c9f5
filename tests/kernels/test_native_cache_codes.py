"""Native low-bit caches: the codes are those of ``cache/formats.py`` bit by bit, attention makes of
them what the plain backend makes, and nothing but a row's own past changes a result."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from native_support import BEST, LEVELS, needs_native
from torch import Tensor

from skimp.cache.formats import hadamard, quantize
from skimp.cache.layout import CacheLayout
from skimp.cache.spec import FORMAT_BITS, SCALE_BYTES
from skimp.kernels import cache_rows
from skimp.kernels.native import NativeOps
from skimp.kernels.native.library import instruction_set
from skimp.kernels.ops import AttentionParams, StepInputs
from skimp.kernels.plain import PlainOps
from skimp.model.mixers.attention import cache_spec
from skimp.model.spec import AttentionSpec

pytestmark = needs_native
ISAS = LEVELS[: BEST + 1]
FORMATS = sorted(FORMAT_BITS)
BLOCK = 16  # tokens whose keys, or values, lie together in a page
CAPACITY = 1400  # rows of the longest step
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.5e-2}
Rows = tuple[int, int, int]  # sequence, first position, number


def attention(dim: int = 64, **fields: object) -> AttentionSpec:
    defaults = {"num_heads": 6, "num_kv_heads": 2, "rope": None, "scale": dim**-0.5}
    return AttentionSpec(head_dim=dim, **(defaults | fields))  # type: ignore[arg-type]


class Twins:
    """Sequences with given queries, keys and values, fed to both backends."""

    def __init__(
        self,
        spec: AttentionSpec,
        lengths: Sequence[int],
        format: str,
        *,
        dtype: torch.dtype = torch.float32,
        recent: int = 0,
        turned: bool = False,
        page: int = 16,
        seed: int = 0,
    ) -> None:
        self.spec, self.lengths, self.dtype = spec, list(lengths), dtype
        draw = torch.Generator().manual_seed(seed)
        width = spec.q_dim + 2 * spec.kv_dim
        self.qkv = [torch.randn(n, width, generator=draw) for n in lengths]
        # Sizes of all kinds, so that scales matter; but scores that bfloat16 queries can give.
        for rows in self.qkv:
            keys, values = rows[:, spec.q_dim :].chunk(2, dim=1)
            keys *= (torch.randn(len(rows), 1, generator=draw) / 3).exp()
            values *= torch.randn(len(rows), 1, generator=draw).exp()
        sinks = torch.randn(spec.num_heads, generator=draw) if spec.sinks else None
        memory = cache_spec(spec, dtype).rounded(format, recent=recent, hadamard=turned)
        self.layout = CacheLayout.from_specs([memory], page_tokens=page)
        self.cache = self.layout.layer_cache(0)
        self.params = AttentionParams(
            spec=spec,
            norm_eps=1e-6,
            q_norm=None,
            k_norm=None,
            sinks=sinks,
            rope=None,
            cache=self.cache,
        )
        self.scatter(seed)
        self.capture()

    def scatter(self, seed: int) -> None:
        """Pages of all groups at random addresses; every byte that is not written is 0xff."""
        groups, tokens = self.layout.groups, self.layout.page_tokens
        pages = max(-(-n // tokens) for n in self.lengths)
        unit = max(group.page_bytes for group in groups) // 64 + 1
        count = len(groups) * len(self.lengths) * pages
        raw = torch.full(((count + 1) * unit * 64 + 64,), 0xFF, dtype=torch.uint8)
        skip = -raw.data_ptr() % 64
        self.arena = raw[skip : skip + (count + 1) * unit * 64]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 99)) + 1
        tables = (order * unit).int().view(len(groups), len(self.lengths), pages)
        self.tables = tuple(tables.contiguous())

    def capture(self) -> None:
        self.inputs = {
            name: torch.zeros(CAPACITY, dtype=torch.int32)
            for name in ("positions", "row_seq", "kv_end")
        }
        self.buffer = torch.zeros(CAPACITY, self.spec.q_dim + 2 * self.spec.kv_dim)
        none = torch.zeros(0, dtype=torch.int32)
        step = StepInputs(
            token_ids=none,
            seq_starts=none,
            logit_rows=none,
            arena=self.arena,
            block_tables=self.tables,
            **self.inputs,
        )
        ops = NativeOps()
        with ops.capture(CAPACITY, len(self.lengths), 1) as program:
            self.out = ops.attention(self.buffer, self.params, step)
        self.program = program

    def step(self, rows: Sequence[Rows]) -> StepInputs:
        positions = torch.cat([torch.arange(first, first + n) for _, first, n in rows]).int()
        seqs = torch.cat([torch.full((n,), seq) for seq, _, n in rows]).int()
        starts = torch.tensor([0, *itertools.accumulate(n for _, _, n in rows)], dtype=torch.int32)
        return StepInputs(
            token_ids=positions,
            positions=positions,
            row_seq=seqs,
            kv_end=positions + 1,
            seq_starts=starts,
            logit_rows=starts,
            arena=self.arena,
            block_tables=self.tables,
        )

    def rows(self, rows: Sequence[Rows]) -> Tensor:
        return torch.cat([self.qkv[seq][first : first + n] for seq, first, n in rows])

    def native(self, rows: Sequence[Rows], isa: str = ISAS[-1], threads: int = 1) -> Tensor:
        step, count = self.step(rows), sum(n for _, _, n in rows)
        for name, buffer in self.inputs.items():
            buffer[:count] = getattr(step, name)
        self.buffer[:count] = self.rows(rows)
        self.out[:count] = math.nan
        with instruction_set(isa):
            self.program.run(count, len(self.lengths), threads=threads)
        return self.out[:count].clone()

    def fill(self) -> None:
        """Write every token."""
        for seq, length in enumerate(self.lengths):
            self.native([(seq, 0, length)])

    def plain(self, rows: Sequence[Rows]) -> Tensor:
        """The same from pages of the plain backend's own."""
        mine, self.arena = self.arena, torch.full_like(self.arena, 0xFF)
        spec = self.spec
        whole = [(seq, 0, length) for seq, length in enumerate(self.lengths)]
        _, k, v = self.rows(whole).split((spec.q_dim, spec.kv_dim, spec.kv_dim), dim=1)
        k, v = (x.unflatten(1, (spec.num_kv_heads, spec.head_dim)) for x in (k, v))
        if self.cache.spec.hadamard:
            k, v = hadamard(k), hadamard(v)
        cache_rows.write((k, v), self.cache, self.step(whole))
        out = PlainOps().attention(self.rows(rows), self.params, self.step(rows))
        self.arena = mine
        return out

    def stored(self, seq: int) -> Tensor:
        """uint8 [2, kv_heads, length, vector bytes] that the native backend has written."""
        cache, heads = self.cache, self.spec.num_kv_heads
        tokens, length = cache.page_tokens, self.lengths[seq]
        width = self.spec.head_dim * FORMAT_BITS[str(cache.spec.format)] // 8
        pages = []
        for index in range(-(-length // tokens)):
            start = 64 * int(self.tables[cache.group][seq, index]) + cache.offset
            size = 2 * heads * tokens * width
            codes = self.arena[start : start + size].view(2, heads, tokens // BLOCK, -1)
            keys = codes[0].unflatten(2, (width, BLOCK)).transpose(2, 3)
            values = codes[1].unflatten(2, (BLOCK, width))
            scales = self.arena[start + size : start + size + 2 * heads * tokens * SCALE_BYTES]
            scales = scales.view(2, heads, tokens, SCALE_BYTES)
            pages.append(torch.cat((torch.stack((keys, values)).flatten(2, 3), scales), dim=-1))
        return torch.cat(pages, dim=2)[:, :, :length]

    def wanted(self, seq: int) -> Tensor:
        spec = self.spec
        _, k, v = self.qkv[seq].split((spec.q_dim, spec.kv_dim, spec.kv_dim), dim=1)
        x = torch.stack((k, v)).unflatten(2, (spec.num_kv_heads, spec.head_dim)).transpose(1, 2)
        turned = hadamard(x) if self.cache.spec.hadamard else x
        return quantize(turned, str(self.cache.spec.format))


def same_codes(found: Tensor, wanted: Tensor) -> None:
    """Any NaN of a scale is as good as any other."""
    parts = found[..., -SCALE_BYTES:], wanted[..., -SCALE_BYTES:]
    scales = [part.contiguous().view(torch.bfloat16) for part in parts]
    assert torch.equal(found[..., :-SCALE_BYTES], wanted[..., :-SCALE_BYTES])
    assert torch.equal(scales[0].isnan(), scales[1].isnan())
    either = scales[0].isnan()
    bits = [scale.masked_fill(either, 0).view(torch.int16) for scale in scales]
    assert torch.equal(bits[0], bits[1])


@pytest.mark.parametrize("turned", [False, True], ids=["as is", "turned"])
@pytest.mark.parametrize("dim", [2, 16, 20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("format", FORMATS)
def test_codes(format: str, dim: int, turned: bool) -> None:
    for isa in ISAS:
        twins = Twins(attention(dim), [100, 33, 1], format, turned=turned, page=32)
        twins.native([(0, 0, 70), (2, 0, 1)], isa, threads=2)
        twins.native([(0, 70, 30), (1, 0, 33)], isa, threads=3)
        for seq in range(3):
            same_codes(twins.stored(seq), twins.wanted(seq))


@pytest.mark.parametrize("format", FORMATS)
def test_codes_of_strange_vectors(format: str) -> None:
    spec = attention(32, num_heads=1, num_kv_heads=1)
    twins = Twins(spec, [600], format, seed=3)
    vectors = twins.qkv[0][:, spec.q_dim :].unflatten(1, (2, 32))
    draw = torch.Generator().manual_seed(4)
    sizes = torch.randint(-140, 127, (500, 1, 1), generator=draw).double()
    vectors[:500] = (torch.randn(500, 2, 32, generator=draw).double() * 2.0**sizes).float()
    most = 7.0 if format == "int4" else 127.0  # numbers half way between two codes, and whole ones
    ties = torch.randint(-int(2 * most), int(2 * most), (60, 2, 32), generator=draw) / 2
    vectors[500:560] = ties.clamp(-most, most)
    vectors[500:560, :, 0] = -8.0 if format == "int4" else 127.0
    vectors[560], vectors[561], vectors[562] = 0.0, -0.0, 1e-45
    vectors[563, :, 5], vectors[564, :, 5] = math.inf, -math.inf
    vectors[565, :, 5], vectors[566] = math.nan, math.nan
    vectors[567, :, 7], vectors[567, :, 9] = math.inf, math.nan
    vectors[568, :, 0], vectors[568, :, 1] = 3.0, -3.0
    vectors[569, :, 0], vectors[569, :, 1] = -3.0, 3.0
    vectors[570] = torch.finfo(torch.float32).max
    vectors[571] = 2.0**-100 * 127
    small = torch.arange(32) / 512 * 0.11  # of fp8: numbers below the smallest normal one
    vectors[572, :], vectors[572, :, 31] = small, 448.0
    twins.qkv[0][:, spec.q_dim :] = vectors.flatten(1)
    for isa in ISAS:
        twins.scatter(1)
        twins.capture()
        twins.native([(0, 0, 600)], isa)
        same_codes(twins.stored(0), twins.wanted(0))


def check(twins: Twins, rows: Sequence[Rows]) -> None:
    wanted = twins.plain(rows)
    sizes = wanted.abs().amax(dim=1, keepdim=True).clamp_min(1.0)
    for isa in ISAS:
        found = twins.native(rows, isa, threads=2).float()
        worst = ((found - wanted).abs() / sizes).max()
        assert worst < TOLERANCE[twins.dtype], (isa, worst)


LENGTHS = [100, 613, 1, 732]
MIXED: list[Rows] = [(0, 30, 70), (1, 612, 1), (2, 0, 1), (3, 729, 3)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 20, 33, 46, 64, 80, 128, 256])
@pytest.mark.parametrize("format", FORMATS)
def test_attention(format: str, dim: int, dtype: torch.dtype) -> None:
    if format == "int4" and dim % 2:
        pytest.skip("int4 needs pairs")
    twins = Twins(attention(dim), LENGTHS, format, dtype=dtype)
    twins.fill()
    check(twins, MIXED)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {"window": 200},
        {"softcap": 2.0, "sinks": True},
        {"window": 45, "softcap": 30.0, "sinks": True},
        {"num_heads": 20, "num_kv_heads": 1},
        {"num_heads": 4, "num_kv_heads": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("recent", [0, 5, 64])
@pytest.mark.parametrize("format", FORMATS)
def test_newest_tokens_and_turns(
    format: str, recent: int, fields: dict, dtype: torch.dtype
) -> None:
    options = {"dtype": dtype, "recent": recent, "turned": True, "page": 48}
    twins = Twins(attention(**fields), LENGTHS, format, **options)
    if "window" in fields and fields["window"] <= recent:
        assert twins.cache.spec.format is None
    twins.fill()
    check(twins, MIXED)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("recent, window", [(0, None), (64, None), (33, 530), (64, 50)])
@pytest.mark.parametrize("format", FORMATS)
def test_exact(format: str, recent: int, window: int | None, dtype: torch.dtype) -> None:
    """Chunks, company, threads and addresses change no bit."""
    for isa in ISAS:
        length = 1100
        spec = attention(64, num_heads=3, num_kv_heads=1, window=window)
        options = {"dtype": dtype, "recent": recent, "turned": True, "seed": 3}
        twins = Twins(spec, [length, 77, 1300], format, **options)
        whole = twins.native([(0, 0, length)], isa)
        assert not whole.isnan().any()
        for threads in (2, 3, 5):
            assert torch.equal(twins.native([(0, 0, length)], isa, threads), whole)
        for chunk in (1, 7, 150):
            first = length - 5 * chunk - 2
            parts = [
                twins.native([(0, i, min(chunk, length - i))], isa, threads=1 + i % 3)
                for i in range(first, length, chunk)
            ]
            assert torch.equal(torch.cat(parts), whole[first:])
        twins.fill()
        company = [(1, 70, 7), (0, length - 33, 33), (2, 1299, 1)]
        alone = [twins.native([rows], isa, threads=t) for rows, t in zip(company, (3, 2, 7))]
        assert torch.equal(torch.cat(alone), twins.native(company, isa, threads=2))
        assert torch.equal(alone[1], whole[-33:])
        twins.scatter(17)
        twins.capture()
        halves = [(0, 0, 500), (0, 500, length - 500)]
        assert torch.equal(torch.cat([twins.native([rows], isa, 2) for rows in halves]), whole)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_large_batch_is_exact(format: str, dtype: torch.dtype) -> None:
    """Where there are many sequences a thread takes several heads of each in turn."""
    lengths = [1 + 37 * i % 230 for i in range(40)]
    twins = Twins(attention(48, num_kv_heads=6), lengths, format, dtype=dtype, recent=20)
    twins.fill()
    rows: list[Rows] = [(seq, n - 1, 1) for seq, n in enumerate(lengths)]
    check(twins, rows)
    for isa in ISAS:
        together = twins.native(rows, isa, threads=2)
        for seq in (0, 7, 23, 39):
            assert torch.equal(twins.native([rows[seq]], isa), together[seq : seq + 1])
