"""Low-bit matrix products with many rows: panels multiplied as they are, against panels widened to
bfloat16 first, both relative to the dense bfloat16 product.

The first is what the deterministic mode always does; the default widens from some number of rows
on, which differs by CPU and format. Rounds are interleaved; figures are medians of seven.

    python benchmarks/native_widening.py [--isa amx avx512bf16] [--rows 32 128 512] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from skimp.formats.weight import WeightFormat, quantize
from skimp.kernels import native
from skimp.kernels.native import NativeOps
from skimp.kernels.native.library import library
from skimp.kernels.native.program import Program
from skimp.model.layers import Linear

SHAPES = [(576, 1536), (896, 4864), (4864, 896)]  # inputs, outputs
FORMATS = [
    None,
    WeightFormat(kind="int", bits=8),
    WeightFormat(kind="int", bits=4, group_size=32),
    WeightFormat(kind="int", bits=4, group_size=128),
    WeightFormat(kind="int", bits=4, group_size=32, symmetric=False),
    WeightFormat(kind="float", bits=8),
]
ROUNDS = 7


def product(k: int, n: int, form: WeightFormat | None, most_rows: int) -> Program:
    linear = Linear(k, n, bias=False)
    linear.weight = torch.nn.Parameter((torch.randn(n, k) / k**0.5).bfloat16())
    if form is not None:
        linear.quantized, linear.weight = quantize(linear.weight.detach(), form), None
    ops = NativeOps()
    matrix = ops.pack([linear])
    with ops.capture(max_rows=most_rows, max_seqs=1, max_logits=1) as program:
        ops.matmul(torch.randn(most_rows, k).bfloat16(), matrix)
    return program


def seconds(program: Program, rows: int, threads: int, deterministic: bool) -> float:
    repeats = max(1, 1024 // rows)
    program.run(rows, threads=threads, deterministic=deterministic)
    start = time.perf_counter()
    for _ in range(repeats):
        program.run(rows, threads=threads, deterministic=deterministic)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--isa", nargs="+", default=[library().best_isa()])
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 32, 128, 256, 512])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    names = [form.name for form in FORMATS if form is not None]
    print(f"| ISA | inputs x outputs | rows | bf16 GFLOP/s | {' | '.join(names)} |")
    print("|---" * (4 + len(names)) + "|")
    for isa in options.isa:
        with native.instruction_set(isa), torch.inference_mode():
            for k, n in SHAPES:
                programs = [product(k, n, form, max(options.rows)) for form in FORMATS]
                for rows in options.rows:
                    measure(isa, (k, n), rows, options.threads, programs)


def measure(
    isa: str, shape: tuple[int, int], rows: int, threads: int, programs: list[Program]
) -> None:
    """One row of the table: as they are / by default, of bfloat16's speed."""
    took: dict[tuple[int, bool], list[float]] = {}
    for _ in range(ROUNDS):
        for index, program in enumerate(programs):
            for as_they_are in (False, True) if index else (False,):
                took.setdefault((index, as_they_are), []).append(
                    seconds(program, rows, threads, as_they_are)
                )
    middle = {key: statistics.median(values) for key, values in took.items()}
    dense = middle[0, False]
    cells = [
        f"{dense / middle[i, True]:.2f} / {dense / middle[i, False]:.2f}"
        for i in range(1, len(programs))
    ]
    rate = 2 * shape[0] * shape[1] * rows / dense / 1e9
    print(f"| {isa} | {shape[0]} x {shape[1]} | {rows} | {rate:.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
