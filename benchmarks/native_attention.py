"""Speed of native attention: cache bytes read a second in generation, FLOP/s in prefill.

    python benchmarks/native_attention.py [--heads 9 --kv-heads 3 --dim 64] [--dtype bfloat16]
    python benchmarks/native_attention.py --only formats        # low-bit caches beside dense ones

Prefill stands beside PyTorch's scaled_dot_product_attention, generation beside the machine's
read bandwidth and beside SDPA with the query heads that share a kv head made rows. Figures are
medians of rounds in which the contestants take turns; the spread is that of the middle half.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from skimp.cache.spec import vector_bytes
from skimp.kernels.native import structs
from skimp.kernels.native.library import describe, library

FORMATS_BYTES = 256 << 20  # of dense keys and values, read in turn


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    page: int
    dtype: torch.dtype
    format: str | None = None  # of a low-bit cache

    @property
    def vector_bytes(self) -> int:
        if self.format is None:
            return self.dim * self.dtype.itemsize
        return vector_bytes(self.dim, self.format)


class Case:
    """``batch`` sequences of ``context`` tokens, of which the last ``rows`` are queries."""

    def __init__(self, shape: Shape, batch: int, context: int, rows: int) -> None:
        self.shape, self.batch, self.context, self.rows = shape, batch, context, rows
        kv, dim = shape.kv_heads, shape.dim
        pages = -(-context // shape.page)
        page_bytes = -(-2 * kv * shape.page * shape.vector_bytes // 64) * 64
        count = batch * pages * page_bytes
        if shape.format is None:
            numbers = torch.randn(1 << 16).to(shape.dtype)
            numbers = numbers.repeat(count // shape.dtype.itemsize // (1 << 16) + 2)
        else:  # codes, and scales of about 0.05, whatever stands for what
            numbers = torch.full((count + 64,), 0x3D, dtype=torch.uint8)
        skip = -numbers.data_ptr() % 64 // numbers.element_size()
        self.arena = numbers[skip:]
        order = torch.randperm(batch * pages).int() * (page_bytes // 64)
        self.table = order.view(batch, pages).contiguous()
        positions = torch.arange(context - rows, context, dtype=torch.int32)
        self.positions = positions.repeat(batch)
        self.ends = self.positions + 1
        self.seqs = torch.arange(batch, dtype=torch.int32).repeat_interleave(rows)
        self.q = torch.randn(batch * rows, shape.heads * dim)
        self.out = torch.zeros(batch * rows, shape.heads * dim, dtype=shape.dtype)
        self.op = op = structs.AttendOp()
        op.head = structs.OpHeader(structs.ATTEND, structs.DTYPES[shape.dtype])
        arrays = (self.positions, self.seqs, self.ends, self.arena)
        op.meta = structs.RowMeta(*(x.data_ptr() for x in arrays))
        kind = structs.CACHE_FORMATS[shape.format]
        op.cache = structs.CachePages(
            self.table.data_ptr(), self.table.stride(0), 0, kind, shape.page
        )
        op.q, op.q_stride = self.q.data_ptr(), self.q.stride(0)
        op.out, op.out_stride = self.out.data_ptr(), self.out.stride(0)
        op.scale = dim**-0.5
        op.num_heads, op.num_kv_heads, op.head_dim = shape.heads, kv, dim
        self.program = (ctypes.c_void_p * 1)(ctypes.addressof(op))

    def native(self, threads: int) -> None:
        address = ctypes.addressof(self.program)
        library().run(address, 1, self.batch * self.rows, self.batch, 0, threads)

    def sdpa(self) -> Callable[[], Tensor]:
        """The same sizes, in one contiguous cache."""
        shape = self.shape
        kv, dim, group = shape.kv_heads, shape.dim, shape.heads // shape.kv_heads

        def draw(*size: int) -> Tensor:
            return torch.randn(*size).to(shape.dtype)

        k, v = (draw(self.batch, kv, self.context, dim) for _ in range(2))
        if self.rows == 1:
            q = draw(self.batch, kv, group, dim)
            return lambda: F.scaled_dot_product_attention(q, k, v)
        q = draw(self.batch, shape.heads, self.rows, dim)
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @property
    def cache_bytes(self) -> int:
        shape = self.shape
        return 2 * self.batch * self.context * shape.kv_heads * shape.vector_bytes

    @property
    def flop(self) -> float:
        """Multiplications and additions of the visible half, both products."""
        pairs = self.rows * (2 * self.context - self.rows + 1) / 2
        return 4.0 * self.batch * self.shape.heads * self.shape.dim * pairs


def seconds(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    repeats = {}
    for name, call in contestants.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(0.02 / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def line(label: str, work: float, unit: str, times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    rates = [work / x / 1e9 for x in (high, middle, low)]
    return (
        f"{label:34} {middle * 1e6:10.1f} us  {rates[1]:8.1f} {unit} "
        f"[{rates[0]:.1f}, {rates[2]:.1f}]"
    )


def compare_formats(shape: Shape, threads: int, rounds: int) -> None:
    """One token of all layers of a model: as many as do not fit any processor's cache."""
    for batch, context in ((1, 1024), (1, 8192), (1, 65536), (16, 4096)):
        layers = max(1, FORMATS_BYTES // Case(shape, batch, context, 1).cache_bytes)
        calls, sizes = {}, {}
        for format in (None, "int8", "fp8", "int4"):
            cases = [Case(replace(shape, format=format), batch, context, 1) for _ in range(layers)]
            name = format or str(shape.dtype).removeprefix("torch.")
            sizes[name] = sum(case.cache_bytes for case in cases)
            calls[name] = lambda cases=cases: [case.native(threads) for case in cases]
        times = seconds(calls, rounds)
        dense = statistics.median(next(iter(times.values())))
        for name, found in times.items():
            gain = dense / statistics.median(found)
            label = f"{name:9} {batch:3} x {context:5}, {layers:3} layers"
            print(f"{line(label, sizes[name], 'GB/s', found)}  x{gain:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["generation", "prefill", "formats"])
    args = parser.parse_args()
    shape = Shape(args.heads, args.kv_heads, args.dim, args.page, getattr(torch, args.dtype))
    threads = library().get_threads()
    torch.set_num_threads(threads)
    print(f"{shape}; native: {describe()}; PyTorch {torch.__version__}, {threads} threads")
    if args.only == "formats":
        compare_formats(shape, threads, args.rounds)
    if args.only in (None, "generation"):
        block = torch.ones(64 << 20, dtype=torch.int64)
        times = seconds({"read": lambda: block.sum()}, args.rounds)["read"]
        print(line("reading 512 MiB", 8.0 * block.numel(), "GB/s", times))
        for batch in (1, 8, 32):
            for context in (128, 1024, 8192):
                case = Case(shape, batch, context, 1)
                contestants: dict[str, Callable[[], object]] = {
                    "native": lambda case=case: case.native(threads),
                    "sdpa": case.sdpa(),
                }
                for name, times in seconds(contestants, args.rounds).items():
                    label = f"{name:6} generation {batch:3} x {context}"
                    print(line(label, case.cache_bytes, "GB/s", times))
    if args.only in (None, "prefill"):
        for context, rows in ((128, 128), (512, 512), (2048, 2048), (2048, 512)):
            case = Case(shape, 1, context, rows)
            contestants = {"native": lambda case=case: case.native(threads)}
            if rows == context:
                contestants["sdpa"] = case.sdpa()
            for name, times in seconds(contestants, args.rounds).items():
                label = f"{name:6} prefill {rows} of {context}"
                print(line(label, case.flop, "GFLOP/s", times))


if __name__ == "__main__":
    main()
