"""Native rope/append and attention against plain float32 PyTorch, and their exactness."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from skimp.kernels import native

if not native.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

from skimp.kernels.native import structs
from skimp.kernels.native.library import instruction_set, library

ISAS = ["scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]
ISAS = ISAS[: ISAS.index(library().best_isa()) + 1]
F32_ISAS = [isa for isa in ISAS if isa in ("scalar", "avx2", "avx512")]
BLOCK = 16  # tokens whose keys, or values, lie together in a page
# One rounding of probabilities and one of the result, relative to values of about 1.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.5e-2}


@dataclass(frozen=True, kw_only=True)
class Shape:
    heads: int = 6
    kv_heads: int = 2
    dim: int = 64
    page: int = 16
    dtype: torch.dtype = torch.float32
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    scale: float | None = None

    @property
    def factor(self) -> float:
        return self.dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class Rows:
    """Query rows ``first .. first + count`` of a sequence; causal unless ``kv_end`` is given."""

    seq: int
    first: int
    count: int
    kv_end: int | None = None


@pytest.fixture(autouse=True)
def quiet_torch() -> Iterator[None]:
    """PyTorch's own threads spin for a while after each operation, beside those under test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blocks_of_keys(rows: Tensor) -> Tensor:
    """[heads, tokens, dim] as op.h stores it: [heads, tokens / 16, 16 * dim]."""
    heads, tokens, dim = rows.shape
    rows = rows.view(heads, tokens // BLOCK, BLOCK, dim)
    if rows.dtype == torch.float32:
        return rows.transpose(2, 3).flatten(2)
    paired = rows[..., : dim // 2 * 2].unflatten(3, (-1, 2)).transpose(2, 3).flatten(2)
    return torch.cat([paired, rows[..., dim // 2 * 2 :].flatten(2)], 2)


def blocks_of_values(rows: Tensor) -> Tensor:
    heads, tokens, dim = rows.shape
    if rows.dtype == torch.float32:
        return rows.view(heads, tokens // BLOCK, BLOCK * dim)
    paired = rows.view(heads, tokens // BLOCK, BLOCK // 2, 2, dim).transpose(3, 4)
    return paired.flatten(2)


def rows_of_keys(blocks: Tensor, dim: int) -> Tensor:
    if blocks.dtype == torch.float32:
        return blocks.unflatten(2, (dim, BLOCK)).transpose(2, 3).flatten(1, 2)
    paired, last = blocks.split([dim // 2 * 2 * BLOCK, dim % 2 * BLOCK], 2)
    rows = paired.unflatten(2, (dim // 2, BLOCK, 2)).transpose(2, 3).flatten(3)
    return torch.cat([rows, last.unflatten(2, (BLOCK, dim % 2))], 3).flatten(1, 2)


def rows_of_values(blocks: Tensor, dim: int) -> Tensor:
    if blocks.dtype == torch.float32:
        return blocks.unflatten(2, (BLOCK, dim)).flatten(1, 2)
    return blocks.unflatten(2, (BLOCK // 2, dim, 2)).transpose(3, 4).flatten(1, 3)


class Past:
    """Sequences with known keys and values, in pages scattered over a poisoned arena."""

    def __init__(self, shape: Shape, lengths: Sequence[int], seed: int = 0, capacity: int = 0):
        self.shape = shape
        draw = torch.Generator().manual_seed(seed)
        kv, dim = shape.kv_heads, shape.dim

        def random(heads: int, length: int) -> Tensor:
            return torch.randn(heads, length, dim, generator=draw).to(shape.dtype)

        self.keys = [random(kv, n) for n in lengths]
        self.values = [random(kv, n) for n in lengths]
        self.queries = [torch.randn(max(n, 1), shape.heads, dim, generator=draw) for n in lengths]
        self.sinks = torch.randn(shape.heads, generator=draw) if shape.sinks else None
        self.lengths = list(lengths)
        self.scatter(seed)
        for seq in range(len(lengths)):
            self.fill(seq)

    def scatter(self, seed: int) -> None:
        """Gives every page a random address; everything holds NaN."""
        shape = self.shape
        kv, dim, size = shape.kv_heads, shape.dim, shape.dtype.itemsize
        pages = [max(1, -(-n // shape.page)) for n in self.lengths]
        self.offset = 128  # another layer's share
        page_bytes = -(-(self.offset + 2 * kv * shape.page * dim * size) // 64) * 64 + 64
        total = sum(pages) + 3
        nan = torch.full((total * page_bytes // size + 64,), math.nan, dtype=shape.dtype)
        skip = -nan.data_ptr() % 64
        self.arena = nan.view(torch.uint8)[skip : skip + total * page_bytes]
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed + 99))
        self.table = torch.full((len(pages), max(pages) + 2), -(10**6), dtype=torch.int32)
        first = 0
        for seq, n in enumerate(pages):
            self.table[seq, :n] = (order[first : first + n] * (page_bytes // 64)).int()
            first += n
        self.pages = pages

    def page(self, seq: int, index: int) -> Tensor:
        """[2, kv_heads, page / 16, 16 * dim]: a page's blocks of keys and values, a view."""
        shape = self.shape
        start = 64 * int(self.table[seq, index]) + self.offset
        count = 2 * shape.kv_heads * shape.page * shape.dim
        flat = self.arena[start : start + count * shape.dtype.itemsize].view(shape.dtype)
        return flat.view(2, shape.kv_heads, shape.page // BLOCK, BLOCK * shape.dim)

    def fill(self, seq: int) -> None:
        size = self.shape.page
        for index in range(self.pages[seq]):
            part = slice(index * size, (index + 1) * size)
            keys, values = self.keys[seq][:, part], self.values[seq][:, part]
            page = self.page(seq, index)
            rows = torch.full((2, self.shape.kv_heads, size, self.shape.dim), math.nan)
            rows = rows.to(self.shape.dtype)
            rows[0, :, : keys.shape[1]] = keys
            rows[1, :, : values.shape[1]] = values
            page[0] = blocks_of_keys(rows[0])
            page[1] = blocks_of_values(rows[1])

    def stored(self, seq: int) -> tuple[Tensor, Tensor]:
        """[kv_heads, length, dim] of keys and of values, as rows."""
        pages = [self.page(seq, i) for i in range(self.pages[seq])]
        n, dim = self.lengths[seq], self.shape.dim
        keys = torch.cat([rows_of_keys(page[0], dim) for page in pages], dim=1)
        values = torch.cat([rows_of_values(page[1], dim) for page in pages], dim=1)
        return keys[:, :n], values[:, :n]

    def meta(self, rows: Sequence[Rows]) -> tuple[structs.RowMeta, list[Tensor]]:
        positions = [p for r in rows for p in range(r.first, r.first + r.count)]
        seqs = [r.seq for r in rows for _ in range(r.count)]
        ends = [
            r.first + i + 1 if r.kv_end is None else r.kv_end for r in rows for i in range(r.count)
        ]
        arrays = [torch.tensor(x, dtype=torch.int32) for x in (positions, seqs, ends)]
        meta = structs.RowMeta(*(x.data_ptr() for x in arrays), self.arena.data_ptr())
        return meta, arrays

    def cache(self) -> structs.CachePages:
        table = self.table
        return structs.CachePages(
            table.data_ptr(), table.stride(0), self.offset, 0, self.shape.page
        )

    def attend(self, rows: Sequence[Rows], *, isa: str, threads: int = 1) -> Tensor:
        shape = self.shape
        q = torch.cat([self.queries[r.seq][r.first : r.first + r.count] for r in rows])
        count = q.shape[0]
        stride = shape.heads * shape.dim + 24
        packed = torch.full((count, stride), math.nan)
        packed[:, : shape.heads * shape.dim] = q.flatten(1)
        out = torch.full((count, stride), math.nan, dtype=shape.dtype)
        meta, alive = self.meta(rows)
        op = structs.AttendOp()
        op.head = structs.OpHeader(structs.ATTEND, structs.DTYPES[shape.dtype])
        op.meta, op.cache = meta, self.cache()
        op.q, op.q_stride = packed.data_ptr(), stride
        op.out, op.out_stride = out.data_ptr(), stride
        op.sinks = None if self.sinks is None else self.sinks.data_ptr()
        op.scale, op.softcap = shape.factor, shape.softcap
        op.num_heads, op.num_kv_heads = shape.heads, shape.kv_heads
        op.head_dim, op.window = shape.dim, shape.window
        run(op, count, len(self.lengths), isa, threads)
        del alive
        assert out[:, shape.heads * shape.dim :].isnan().all()
        return out[:, : shape.heads * shape.dim].unflatten(1, (shape.heads, shape.dim))

    def reference(self, rows: Sequence[Rows]) -> Tensor:
        """[rows, heads, dim], in float32, one row after another."""
        shape = self.shape
        results = []
        for r in rows:
            keys = self.keys[r.seq].float().repeat_interleave(shape.heads // shape.kv_heads, 0)
            values = self.values[r.seq].float().repeat_interleave(shape.heads // shape.kv_heads, 0)
            for position in range(r.first, r.first + r.count):
                end = position + 1 if r.kv_end is None else r.kv_end
                start = max(0, position - shape.window + 1) if shape.window else 0
                if start >= end:
                    results.append(torch.zeros(shape.heads, shape.dim))
                    continue
                q = self.queries[r.seq][position].to(shape.dtype).float()
                scores = torch.einsum("hd,hjd->hj", q, keys[:, start:end]) * shape.factor
                if shape.softcap:
                    scores = shape.softcap * torch.tanh(scores / shape.softcap)
                if self.sinks is not None:
                    scores = torch.cat([scores, self.sinks[:, None]], 1)
                weights = scores.softmax(-1)[:, : end - start]
                results.append(torch.einsum("hj,hjd->hd", weights, values[:, start:end]))
        return torch.stack(results)


def run(op: ctypes.Structure, rows: int, seqs: int, isa: str, threads: int) -> None:
    program = (ctypes.c_void_p * 1)(ctypes.addressof(op))
    with instruction_set(isa):
        library().run(ctypes.addressof(program), 1, rows, seqs, 0, threads)


def check(past: Past, rows: Sequence[Rows], isa: str, tolerance: float | None = None) -> None:
    got = past.attend(rows, isa=isa, threads=2).float()
    assert not got.isnan().any()
    if tolerance is None:
        tolerance = TOLERANCE[past.shape.dtype]
    torch.testing.assert_close(got, past.reference(rows), rtol=0, atol=tolerance)


MIXED = [Rows(0, 30, 70), Rows(1, 612, 1), Rows(2, 0, 1), Rows(3, 1029, 3)]
MIXED_LENGTHS = [100, 613, 1, 1032]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 15, 16, 20, 33, 48, 64, 72, 80, 96, 128, 256])
def test_head_sizes(dim: int, dtype: torch.dtype, isa: str) -> None:
    check(Past(Shape(dim=dim, dtype=dtype), MIXED_LENGTHS), MIXED, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads, kv_heads", [(1, 1), (4, 4), (4, 2), (9, 3), (8, 2), (16, 2), (20, 1)]
)
def test_grouped_heads(heads: int, kv_heads: int, dtype: torch.dtype, isa: str) -> None:
    check(Past(Shape(heads=heads, kv_heads=kv_heads, dtype=dtype), MIXED_LENGTHS), MIXED, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 1, 5, 33, 200, 600])
@pytest.mark.parametrize("softcap, sinks", [(0.0, False), (2.0, False), (0.0, True), (30.0, True)])
def test_windows_caps_and_sinks(
    window: int, softcap: float, sinks: bool, dtype: torch.dtype, isa: str
) -> None:
    shape = Shape(dtype=dtype, window=window, softcap=softcap, sinks=sinks, page=48)
    check(Past(shape, MIXED_LENGTHS), MIXED, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("page", [16, 32, 48, 112, 2048])
def test_page_sizes(page: int, isa: str) -> None:
    check(Past(Shape(page=page, dtype=torch.bfloat16), MIXED_LENGTHS), MIXED, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_sees_its_own_future(dtype: torch.dtype, isa: str) -> None:
    """Diffusion: all rows of a block see the whole block; and a row may see no key at all."""
    past = Past(Shape(dtype=dtype, window=40), [64, 96])
    rows = [Rows(0, 32, 32, 64), Rows(1, 80, 4, 96), Rows(1, 84, 1, 10), Rows(1, 85, 1, 96)]
    check(past, rows, isa)
    assert (past.attend(rows, isa=isa)[36] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores(isa: str) -> None:
    """Scores far apart neither overflow nor leave the largest key without its weight."""
    for scale in (40.0, -40.0):  # scores of about 1000 are known to 1e-4 only
        check(Past(Shape(scale=scale), [300]), [Rows(0, 250, 50)], isa, tolerance=2e-3)


@pytest.mark.parametrize("isa", F32_ISAS)
@pytest.mark.parametrize("softcap, sinks", [(0.0, False), (3.0, True)])
@pytest.mark.parametrize("window", [0, 45, 530])
@pytest.mark.parametrize("dim", [20, 64, 128])
def test_float32_is_exact(dim: int, window: int, softcap: float, sinks: bool, isa: str) -> None:
    """Chunks, company, threads and addresses change no bit."""
    shape = Shape(dim=dim, window=window, softcap=softcap, sinks=sinks)
    exact(shape, isa, 200)


@pytest.mark.parametrize("isa", F32_ISAS)
@pytest.mark.parametrize("window", [0, 45, 530])
def test_float32_is_exact_over_spans(window: int, isa: str) -> None:
    exact(Shape(heads=3, kv_heads=1, dim=32, window=window), isa, 1300)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [0, 45])
@pytest.mark.parametrize("dim", [64, 80])
def test_bfloat16_is_exact(dim: int, window: int, isa: str) -> None:
    exact(Shape(dim=dim, window=window, dtype=torch.bfloat16), isa, 200)
    exact(Shape(dim=dim, window=window, dtype=torch.bfloat16), isa, 1300)


def exact(shape: Shape, isa: str, length: int) -> None:
    past = Past(shape, [length, 77, 1500], seed=3)
    whole = past.attend([Rows(0, 0, length)], isa=isa)
    torch.testing.assert_close(
        whole.float(), past.reference([Rows(0, 0, length)]), rtol=0, atol=TOLERANCE[shape.dtype]
    )

    def same(got: Tensor, wanted: Tensor) -> None:
        assert torch.equal(got, wanted), (got.float() - wanted.float()).abs().max()

    for chunk in (1, 7, 64, 150):
        first = 0 if chunk > 7 and length < 500 else length - 5 * chunk - 2
        parts = [
            past.attend([Rows(0, i, min(chunk, length - i))], isa=isa, threads=1 + i % 3)
            for i in range(first, length, chunk)
        ]
        same(torch.cat(parts), whole[first:])
    for threads in (2, 3, 5):
        same(past.attend([Rows(0, 0, length)], isa=isa, threads=threads), whole)
    company = [Rows(1, 70, 7), Rows(0, length - 33, 33), Rows(2, 1499, 1)]
    alone = [past.attend([r], isa=isa, threads=t) for r, t in zip(company, (3, 2, 7))]
    same(torch.cat(alone), past.attend(company, isa=isa, threads=2))
    same(alone[1], whole[-33:])
    past.scatter(17)
    for seq in range(3):
        past.fill(seq)
    same(past.attend([Rows(0, 0, length)], isa=isa, threads=2), whole)
    # Only what a row sees matters: earlier keys may be gone, and a longer cache changes nothing.
    if shape.window:
        gone = length - 1 - shape.window
        past.keys[0][:, : max(0, gone)] = math.nan
        past.values[0][:, : max(0, gone)] = math.nan
        past.fill(0)
        same(past.attend([Rows(0, length - 1, 1)], isa=isa), whole[-1:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, dim", [(9, 3, 64), (6, 6, 48), (20, 20, 16), (8, 4, 33)])
def test_a_large_batch_is_exact(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, isa: str
) -> None:
    """Where there are many sequences a thread takes several heads of each in turn."""
    lengths = [1 + 37 * i % 230 for i in range(40)]
    past = Past(Shape(heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype), lengths)
    rows = [Rows(seq, n - 1, 1) for seq, n in enumerate(lengths)]
    check(past, rows, isa)
    together = past.attend(rows, isa=isa, threads=2)
    for seq in (0, 7, 23, 39):
        assert torch.equal(past.attend([rows[seq]], isa=isa), together[seq : seq + 1])


def rope_reference(
    x: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool
) -> Tensor:
    """x: [rows, heads, dim]; cos, sin: [rows, rotary_dim / 2]."""
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm
    if cos is None or sin is None:
        return x
    rotary = 2 * cos.shape[1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned.chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    pair = (a * c - b * s, b * c + a * s)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "dim, rotary, interleaved",
    [(64, 64, False), (64, 64, True), (80, 20, False), (33, 32, False), (20, 0, False)],
)
def test_rope_append(
    dim: int, rotary: int, interleaved: bool, norm: bool, dtype: torch.dtype, isa: str
) -> None:
    if isa not in ISAS:
        pytest.skip("this CPU has no such instructions")
    shape = Shape(heads=6, kv_heads=2, dim=dim, page=32, dtype=dtype)
    past = Past(shape, [40, 9])
    past.scatter(5)
    rows = [Rows(0, 13, 27), Rows(1, 8, 1)]
    positions = [*range(13, 40), 8]
    draw = torch.Generator().manual_seed(1)
    stride = (shape.heads + 2 * shape.kv_heads) * dim + 8
    qkv = torch.randn(28, stride, generator=draw)
    q, k, v, rest = (x.clone() for x in qkv.split([6 * dim, 2 * dim, 2 * dim, 8], 1))
    q, k, v = (x.unflatten(1, (-1, dim)) for x in (q, k, v))
    factors = torch.randn(2, dim, generator=draw) if norm else None
    angles = torch.randn(64, rotary // 2, generator=draw) if rotary else None
    cos, sin = (angles.cos(), angles.sin()) if angles is not None else (None, None)
    op = structs.RopeAppendOp()
    op.head = structs.OpHeader(structs.ROPE_APPEND, structs.DTYPES[dtype])
    op.meta, alive = past.meta(rows)
    op.cache = past.cache()
    op.qkv, op.qkv_stride = qkv.data_ptr(), stride
    if factors is not None:
        op.q_norm, op.k_norm = factors[0].data_ptr(), factors[1].data_ptr()
    if cos is not None and sin is not None:
        op.cos, op.sin = cos.data_ptr(), sin.data_ptr()
    op.norm_eps = 1e-6
    op.num_heads, op.num_kv_heads, op.head_dim = 6, 2, dim
    op.rotary_dim, op.interleaved = rotary, interleaved
    before = past.arena.clone()
    run(op, 28, 2, isa, threads=3)
    del alive

    at = None if cos is None else cos[positions], None if sin is None else sin[positions]
    wanted_q = rope_reference(q, None if factors is None else factors[0], *at, interleaved)
    wanted_k = rope_reference(k, None if factors is None else factors[1], *at, interleaved)
    got_q = qkv[:, : 6 * dim].unflatten(1, (6, dim))
    torch.testing.assert_close(got_q, wanted_q, rtol=1e-5, atol=1e-5)
    assert torch.equal(qkv[:, -8:], rest)
    got_k, got_v = (
        torch.cat([x[:, 13:], y[:, 8:]], 1) for x, y in zip(past.stored(0), past.stored(1))
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        got_k.transpose(0, 1).float(), wanted_k, rtol=tolerance, atol=tolerance
    )
    assert torch.equal(got_v.transpose(0, 1), v.to(dtype))
    # Nothing else was touched.
    for row in rows:
        slots = range(row.first, row.first + row.count)
        for index in range(past.pages[row.seq]):
            page = past.page(row.seq, index)
            keys, values = rows_of_keys(page[0], dim), rows_of_values(page[1], dim)
            for slot in slots:
                if slot // 32 == index:
                    keys[:, slot % 32] = values[:, slot % 32] = math.nan
            page[0], page[1] = blocks_of_keys(keys), blocks_of_values(values)
    assert torch.equal(past.arena, before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [33, 48, 64])
def test_append_then_attend(dim: int, dtype: torch.dtype, isa: str) -> None:
    """Sequences that grow by random chunks, each attended as soon as it is appended."""
    lengths = [90, 531, 47]
    past = Past(Shape(dim=dim, dtype=dtype), lengths, seed=8)
    past.scatter(4)  # nothing is written yet: unwritten slots are NaN
    draw = torch.Generator().manual_seed(dim)
    done = [0, 0, 0]
    while done != lengths:
        rows = []
        for seq, length in enumerate(lengths):
            left = length - done[seq]
            chunk = int(torch.randint(0, 40, (1,), generator=draw)) if left < 400 else left - 60
            if min(chunk, left) > 0:
                rows.append(Rows(seq, done[seq], min(chunk, left)))
        if rows:
            append(past, rows, isa)
            for row in rows:
                done[row.seq] += row.count
            check(past, rows, isa)
    for seq in range(len(lengths)):
        keys, values = past.stored(seq)
        assert torch.equal(keys, past.keys[seq]) and torch.equal(values, past.values[seq])


def append(past: Past, rows: Sequence[Rows], isa: str) -> None:
    """Writes the rows' keys and values as they are, without rotation."""
    shape = past.shape
    parts = []
    for r in rows:
        part = slice(r.first, r.first + r.count)
        kv = (x[r.seq][:, part].float() for x in (past.keys, past.values))
        heads = (x.transpose(0, 1).flatten(1) for x in kv)
        parts.append(torch.cat([past.queries[r.seq][part].flatten(1), *heads], 1))
    qkv = torch.cat(parts)
    op = structs.RopeAppendOp()
    op.head = structs.OpHeader(structs.ROPE_APPEND, structs.DTYPES[shape.dtype])
    op.meta, alive = past.meta(rows)
    op.cache = past.cache()
    op.qkv, op.qkv_stride = qkv.data_ptr(), qkv.stride(0)
    op.num_heads, op.num_kv_heads, op.head_dim = shape.heads, shape.kv_heads, shape.dim
    run(op, len(qkv), len(past.lengths), isa, threads=3)
    del alive


def test_no_rows() -> None:
    past = Past(Shape(), [5])
    op = structs.AttendOp()
    op.head = structs.OpHeader(structs.ATTEND, 0)
    op.num_heads, op.num_kv_heads, op.head_dim = 6, 2, 64
    op.cache = past.cache()
    run(op, 0, len(past.lengths), ISAS[-1], 2)


@pytest.mark.parametrize("isa", ISAS)
def test_the_cache_may_hold_infinities_elsewhere(isa: str) -> None:
    """A key out of every row's sight is never multiplied, whatever it is."""
    past = Past(replace(Shape(), window=20, dtype=torch.bfloat16), [90])
    past.keys[0][:, :40] = math.inf
    past.values[0][:, :40] = -math.inf
    past.fill(0)
    check(past, [Rows(0, 60, 30)], isa)
