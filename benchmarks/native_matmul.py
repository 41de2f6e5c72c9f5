"""Speed of the native matrix products: dense, low-bit, and torch's prepacked oneDNN linear.

Weights are read from memory, not from cache: each product of a round uses another copy, and all
copies together are larger than ``--mib``. Rounds are interleaved; figures are medians, with the
spread of the middle half, and for low-bit formats the speed relative to the dense product. Rows
of 8 and fewer are limited by reading weights (GB/s of what the format holds), more rows by
arithmetic (GFLOP/s). oneDNN writes the weights' dtype, the native product float32.

On a machine shared with others use ``--cpu-time``: one thread, and the processor time it took.
For scale, the best rate at which torch sums one large buffer is printed first.

    python benchmarks/native_matmul.py [--isa avx512bf16] [--threads 2] [--cpu-time]
    python benchmarks/native_matmul.py --no-onednn --format int4-g128 int8 int8-a8 fp8
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from skimp.formats.weight import WeightFormat, quantize
from skimp.kernels import native
from skimp.kernels.native import NativeOps, PackedMatrix
from skimp.model.layers import Linear, RMSNorm

SHAPES = [(576, 1536), (896, 4864), (4864, 896), (288, 768), (576, 49152)]  # inputs, outputs
FEW, MANY = [1, 2, 4, 8], [8, 16, 32, 128, 512]
FORMATS = {
    format.name: format
    for format in (
        WeightFormat(kind="int", bits=8),
        WeightFormat(kind="int", bits=8, activations="int8"),
        WeightFormat(kind="int", bits=8, group_size=128),
        WeightFormat(kind="int", bits=4, group_size=32),
        WeightFormat(kind="int", bits=4, group_size=128),
        WeightFormat(kind="int", bits=4, group_size=128, symmetric=False),
        WeightFormat(kind="int", bits=4, group_size=128, activations="int8"),
        WeightFormat(kind="float", bits=8),
        WeightFormat(kind="float", bits=8, activations="fp8"),
    )
}

ISAS = ["scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]
Clock = Callable[[], float]


def sum_rate(mib: int, rounds: int, clock: Clock) -> float:
    """Bytes per second of summing one buffer."""
    buffer = torch.ones(mib << 18, dtype=torch.float32)
    best = 0.0
    for _ in range(rounds):
        start = clock()
        buffer.sum()
        best = max(best, buffer.nbytes / (clock() - start))
    return best


def measure(
    calls: dict[str, Callable[[], None]], rounds: int, clock: Clock
) -> dict[str, tuple[float, float, float]]:
    """Seconds of each call: lower quartile, median, upper quartile."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: tuple(statistics.quantiles(t, n=4)) for name, t in times.items()}  # type: ignore[misc]


@dataclasses.dataclass
class Case:
    """Products of one matrix with some rows, all copies of it in turn."""

    run: Callable[[], None]
    nbytes: int  # of one copy
    copies: int


def native_case(
    weight: torch.Tensor, format: WeightFormat | None, rows: int, budget: int, normed: bool
) -> Case:
    """``weight`` in a format (None: as it is), copied until ``budget`` bytes are reached."""
    n, k = weight.shape
    linear = Linear(k, n)
    linear.weight = torch.nn.Parameter(weight.clone())
    if format is not None:
        linear.quantized, linear.weight = quantize(weight, format), None
    x = torch.randn(rows, k)
    norm = RMSNorm(k, eps=1e-6)
    norm.weight = torch.nn.Parameter(torch.ones(k))
    ops = NativeOps(weight.dtype)
    packed = ops.pack([linear])
    assert isinstance(packed, PackedMatrix)
    copies = max(1, -(-budget // packed.nbytes))
    with ops.capture(rows, 1, 1) as program:
        inputs = x if normed else x.to(weight.dtype)
        for copy in range(copies):
            panels = packed.panels if copy == 0 else packed.panels.clone()
            matrix = dataclasses.replace(packed, panels=panels)
            ops.matmul(inputs, matrix, norm=norm if normed else None)
    return Case(lambda: program.run(rows), packed.nbytes, copies)


def onednn_case(weight: torch.Tensor, rows: int, budget: int) -> Case:
    copies = max(1, -(-budget // weight.nbytes))
    cast = torch.randn(rows, weight.shape[1]).to(weight.dtype)
    linear_op = torch.ops.mkldnn._linear_pointwise
    prepacked = [
        torch.ops.mkldnn._reorder_linear_weight(weight.clone(), rows) for _ in range(copies)
    ]

    def run() -> None:
        for matrix in prepacked:
            linear_op(cast, matrix, None, "none", [], "")

    return Case(run, weight.nbytes, copies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=ISAS)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--mib", type=int, default=768, help="working set of few-row products")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="*", help="only these numbers of rows")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("K", "N"))
    parser.add_argument(
        "--format", nargs="*", default=[], choices=list(FORMATS), help="low-bit formats"
    )
    parser.add_argument("--no-onednn", action="store_true")
    parser.add_argument("--norm", action="store_true", help="float32 inputs through a fused norm")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time")
    args = parser.parse_args()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    args.threads = 1 if args.cpu_time else args.threads
    torch.set_num_threads(args.threads)
    native.set_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    isa = native.instruction_set(args.isa) if args.isa else contextlib.nullcontext()
    with torch.inference_mode(), isa:
        timed = "processor time" if args.cpu_time else "wall time"
        print(f"{native.describe()}; {args.dtype}; torch {torch.__version__}; {timed}")
        rate = sum_rate(args.mib, args.rounds, clock)
        print(f"torch sums a buffer at {rate / 1e9:.1f} GB/s")
        for k, n in args.shape or SHAPES:
            weight = (torch.randn(n, k) / k**0.5).to(dtype)
            plan = [(r, True) for r in FEW] + [(r, False) for r in MANY]
            for rows, few in plan:
                if args.rows and rows not in args.rows:
                    continue
                budget = args.mib << 20 if few else max(64 << 20, (args.mib << 20) * 4 // rows)
                cases = {args.dtype: native_case(weight, None, rows, budget, args.norm)}
                for name in args.format:
                    cases[name] = native_case(weight, FORMATS[name], rows, budget, args.norm)
                if not args.no_onednn:
                    cases["oneDNN"] = onednn_case(weight, rows, budget)
                times = measure({name: c.run for name, c in cases.items()}, args.rounds, clock)
                dense = times[args.dtype][1] / cases[args.dtype].copies
                print(f"{k:5} x {n:5}  {rows:3} rows", flush=True)
                for name, (low, mid, high) in times.items():
                    each = mid / cases[name].copies
                    work = cases[name].nbytes if few else 2.0 * k * n * rows
                    unit = "GB/s" if few else "GFLOP/s"
                    rate, spread = work / each / 1e9, (high - low) / mid / 2
                    print(f"    {name:16} {rate:7.1f} {unit} ±{spread:4.0%}  x {dense / each:5.2f}")


if __name__ == "__main__":
    main()
