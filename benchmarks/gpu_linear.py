"""Linear layers on a GPU: every kernel against float64, and its time beside cuBLAS and a copy.

    python benchmarks/gpu_linear.py --out RESULT.md
    python benchmarks/gpu_linear.py --sweep --save src/skimp/kernels/triton/tuned.json

Each product is the whole of what a decoder layer asks of it: qkv with the norm before it, o and
down with the residual after them, gate and up with norm and activation, the output matrix with
norm and float32 logits. cuBLAS gets its rows normed and does the bare product. Times are medians
over replays of a CUDA graph that goes through copies of the matrix, together larger than the
second-level cache, so that weights come from memory. GB/s counts the stored matrix only.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from skimp.cost.gpu import copy_rate
from skimp.formats import WeightFormat, quantize
from skimp.kernels.lowbit import round_rows
from skimp.kernels.triton import tuning
from skimp.kernels.triton.linear import Matrix, linear, pack_matrix
from skimp.kernels.triton.tuning import Config, bucket, measure

MODELS = {
    "llama-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (14336, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    },
    "qwen-0.6b": {
        "qkv": (4096, 1024),
        "o": (1024, 2048),
        "gate_up": (3072, 1024),
        "down": (1024, 3072),
        "head": (151936, 1024),
    },
}
NORMED = ("qkv", "gate_up", "head")
EPS = 1e-6
CYCLE_BYTES = 320 << 20
BOUND = 8e-3  # of bfloat16 rows


@dataclass
class Case:
    matrix: Matrix
    exact: list[Tensor]  # float32, the matrices it stands for
    copies: list[Matrix]
    name: str

    def calls(self, x: Tensor, pdl: bool, matrices: list[Matrix]) -> list[Callable[[], Tensor]]:
        normed = self.name in NORMED
        factor = torch.ones(x.shape[1], device="cuda") if normed else None
        rows = x if normed else x.bfloat16()
        residual = None
        if self.name in ("o", "down"):
            residual = torch.zeros(x.shape[0], self.matrix.outputs, device="cuda")
        return [
            functools.partial(
                linear,
                rows,
                matrix,
                norm_factor=factor,
                eps=EPS,
                activation="silu" if self.name == "gate_up" else None,
                residual=residual,
                out_dtype=torch.float32 if self.name == "head" else torch.bfloat16,
                pdl=pdl,
            )
            for matrix in matrices
        ]

    def wanted(self, x: Tensor) -> Tensor:
        x = x.double()
        if self.name in NORMED:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        else:
            x = x.bfloat16().double()
        form = self.matrix.segments[0].format
        if form is not None and form.activations is not None:
            x = round_rows(x.bfloat16(), form.activations).double()
        parts = []
        for part in self.exact:  # in pieces, for float64 copies of output matrices are large
            parts.append(torch.cat([x @ piece.double().T for piece in part.split(16384)], dim=1))
        return F.silu(parts[0]) * parts[1] if len(parts) == 2 else parts[0]

    def force(self, config: Config, rows: int) -> None:
        for matrix in self.copies:
            matrix.segments[0].configs[bucket(rows)] = config


def build(name: str, shape: tuple[int, int], form: str, copies: int | None = None) -> Case:
    dense = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
        for _ in range(2 if name == "gate_up" else 1)
    ]
    if form == "bf16":
        parts, exact = dense, dense
    else:
        parts = [quantize(part, WeightFormat.named(form)) for part in dense]
        exact = [] if copies else [part.dequantize() for part in parts]
    matrix = pack_matrix(parts, None, gated=name == "gate_up", dtype=torch.bfloat16)
    every = [matrix]
    for _ in range(max(1, copies or -(-CYCLE_BYTES // matrix.nbytes)) - 1):
        (segment,) = matrix.segments
        scale, less = (None if t is None else t.clone() for t in (segment.scale, segment.less))
        twin = replace(segment, weight=segment.weight.clone(), scale=scale, less=less, configs={})
        every.append(replace(matrix, segments=[twin]))
    return Case(matrix=matrix, exact=exact, copies=every, name=name)


def library_time(case: Case, x: Tensor) -> float:
    """cuBLAS with the bfloat16 matrix of the same shape."""
    n, k = case.matrix.segments[0].outputs, case.matrix.inputs
    count = max(1, -(-CYCLE_BYTES // (2 * n * k)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    rows = x.bfloat16()
    return measure([functools.partial(F.linear, rows, weight) for weight in weights])


def check(case: Case, x: Tensor, pdl: bool) -> float:
    """The relative error; twice, for what a call might leave behind."""
    wanted = case.wanted(x)
    worst = 0.0
    for _ in range(2):
        (call,) = case.calls(x, pdl, [case.matrix])
        worst = max(worst, float((call().double() - wanted).norm() / wanted.norm()))
    if not worst < BOUND:
        raise SystemExit(f"{case.name} at {x.shape[0]} rows: error {worst:.1e}")
    return worst


def shown(config: Config) -> str:
    if config.kind == "library":
        return "cuBLAS"
    text = f"{config.kind} n{config.block_n} k{config.block_k} w{config.warps} s{config.stages}"
    return text if config.kind == "gemv" else f"{text} m{config.block_m} split {config.split}"


def compile_first(options: argparse.Namespace) -> None:
    """Fill Triton's cache on disk with what a sweep may try, for compiling takes it longest."""
    cases = list(
        itertools.product(
            options.models.split(","),
            options.matrices.split(","),
            options.formats.split(","),
            options.rows,
        )
    )
    with multiprocessing.get_context("spawn").Pool(options.compile) as pool:
        work = [(case, options.pdl) for case in sorted(cases, key=lambda case: -case[3])]
        pool.map(compile_case, work, chunksize=1)


def compile_case(work: tuple[tuple[str, str, str, int], bool]) -> None:
    (model, name, form, rows), pdl = work
    n, k = MODELS[model][name]
    case = build(name, (n, k), form, copies=1)
    problem = case.matrix.segments[0].problem
    x = torch.randn(rows, k, device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for seed in tuning.seeds(problem, rows, processors):
        for config in (seed, *tuning.neighbours(problem, rows, seed)):
            case.force(config, rows)
            with contextlib.suppress(RuntimeError, triton.errors.TritonError):
                case.calls(x, pdl, [case.matrix])[0]()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--matrices", default="qkv,o,gate_up,down,head")
    parser.add_argument("--formats", default="bf16,int8,fp8,int4-g128")
    parser.add_argument("--rows", type=numbers, default=numbers("1,2,4,8,16,32,64,128"))
    parser.add_argument("--pdl", action="store_true", help="programmatic dependent launch")
    parser.add_argument("--sweep", action="store_true", help="look for better configurations")
    parser.add_argument("--save", type=Path, help="add what the sweep finds to this table")
    parser.add_argument("--depth", type=int, default=1, help="steps downhill of a sweep")
    parser.add_argument("--compile", type=int, default=0, help="processes that compile it first")
    parser.add_argument("--compile-only", action="store_true", help="and time nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.compile:
        compile_first(options)
    if options.compile_only:
        return 0
    copy = copy_rate()
    gpu = torch.cuda.get_device_name()
    lines = [
        "# Linear layers on a GPU",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        f"- GPU: {gpu}; torch {torch.__version__}, triton {triton.__version__}",
        f"- command: `python benchmarks/gpu_linear.py {' '.join(sys.argv[1:])}`",
        f"- a device copy moves {copy:,.0f} GB/s",
        "",
        "| model | matrix | format | rows | us | GB/s | of a copy | cuBLAS bf16, us | error | by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    library: dict[tuple[str, str, int], float] = {}
    device = torch.device("cuda", torch.cuda.current_device())
    for model in options.models.split(","):
        for name in options.matrices.split(","):
            for form in options.formats.split(","):
                case = build(name, MODELS[model][name], form)
                (segment,) = case.matrix.segments
                for rows in options.rows:
                    x = torch.randn(rows, case.matrix.inputs, device="cuda")
                    if (model, name, rows) not in library:
                        library[model, name, rows] = library_time(case, x)
                    if options.sweep:

                        def make(config: Config, case=case, rows=rows, x=x) -> list:
                            case.force(config, rows)
                            return case.calls(x, options.pdl, case.copies)

                        best, _ = tuning.tune(
                            segment.problem, rows, make, device, depth=options.depth
                        )
                        case.force(best, rows)
                        if options.save:
                            key = segment.problem.key(tuning.device_family(gpu), rows)
                            tuning.save({key: best}, options.save)
                    error = check(case, x, options.pdl)
                    us = measure(case.calls(x, options.pdl, case.copies))
                    speed = case.matrix.nbytes / us / 1e3
                    line = (
                        f"| {model} | {name} | {form} | {rows} | {us:.2f} | {speed:,.0f} "
                        f"| {speed / copy:.2f} | {library[model, name, rows]:.2f} | {error:.1e} "
                        f"| {shown(segment.config(rows))} |"
                    )
                    lines.append(line)
                    print(line, flush=True)
                del case, segment
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
