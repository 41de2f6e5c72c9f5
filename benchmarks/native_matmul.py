"""Speed of the native matrix products beside torch's prepacked oneDNN linear.

Weights are read from memory, not from cache: each product of a round uses another copy, and all
copies together are larger than ``--mib``. Rounds are interleaved; figures are medians, with the
spread of the middle half. Rows of 8 and fewer are limited by reading weights (GB/s), more rows by
arithmetic (GFLOP/s). oneDNN writes the weights' dtype, the native product float32.

On a machine shared with others use ``--cpu-time``: one thread, and the processor time it took.
For scale, the best rate at which torch sums one large buffer is printed first.

    python benchmarks/native_matmul.py [--isa avx512bf16] [--threads 2] [--cpu-time]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from skimp.kernels import native
from skimp.kernels.native import NativeOps
from skimp.model.layers import Linear, RMSNorm

SHAPES = [(576, 1536), (896, 4864), (4864, 896), (288, 768), (576, 49152)]  # inputs, outputs
FEW, MANY = [1, 2, 4, 8], [8, 16, 32, 128, 512]


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


def build(
    k: int, n: int, rows: int, dtype: torch.dtype, copies: int, onednn: bool, normed: bool
) -> dict[str, Callable[[], None]]:
    linear = Linear(k, n)
    weight = torch.randn(n, k, dtype=torch.float32).to(dtype) / k**0.5
    linear.weight = torch.nn.Parameter(weight.clone())
    x = torch.randn(rows, k)
    norm = RMSNorm(k, eps=1e-6)
    norm.weight = torch.nn.Parameter(torch.ones(k))
    ops = NativeOps()
    packed = ops.pack([linear])
    with ops.capture(rows, 1, 1) as program:
        inputs = x if normed else x.to(dtype)
        for copy in range(copies):
            panels = packed.panels if copy == 0 else packed.panels.clone()
            matrix = dataclasses.replace(packed, panels=panels)
            ops.matmul(inputs, matrix, norm=norm if normed else None)
    calls: dict[str, Callable[[], None]] = {"native": lambda: program.run(rows)}
    if onednn:
        cast = x.to(dtype)
        linear_op = torch.ops.mkldnn._linear_pointwise
        prepacked = [
            torch.ops.mkldnn._reorder_linear_weight(weight.clone(), rows) for _ in range(copies)
        ]

        def run_onednn() -> None:
            for matrix in prepacked:
                linear_op(cast, matrix, None, "none", [], "")

        calls["oneDNN"] = run_onednn
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=["scalar", "avx2", "avx512", "avx512bf16", "amx"])
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--mib", type=int, default=768, help="working set of few-row products")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="*", help="only these numbers of rows")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("K", "N"))
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
            nbytes = k * n * dtype.itemsize
            plan = [(r, True) for r in FEW] + [(r, False) for r in MANY]
            for rows, few in plan:
                if args.rows and rows not in args.rows:
                    continue
                budget = args.mib << 20 if few else max(64 << 20, (args.mib << 20) * 4 // rows)
                copies = max(1, -(-budget // nbytes))
                calls = build(k, n, rows, dtype, copies, not args.no_onednn, args.norm)
                parts = []
                for name, (low, mid, high) in measure(calls, args.rounds, clock).items():
                    work = nbytes if few else 2.0 * k * n * rows
                    rate, spread = work * copies / mid / 1e9, (high - low) / mid
                    unit = "GB/s" if few else "GFLOP/s"
                    parts.append(f"{name} {rate:7.1f} {unit} ±{spread / 2:4.0%}")
                print(f"{k:5} x {n:5}  {rows:3} rows  " + "   ".join(parts), flush=True)


if __name__ == "__main__":
    main()
