"""Low-bit products on a GPU: each format against its plain reference, and its time beside bfloat16.

    python benchmarks/gpu_lowbit.py --out RESULT.md

Times are medians over CUDA events, the weights cycled through copies that together exceed the
second-level cache, so that every product reads its weights from memory. "GB/s" counts weights and
scales only.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from skimp.formats import QuantizedWeight, WeightFormat, quantize
from skimp.kernels.triton.lowbit import lowbit_matmul

FORMATS = (
    WeightFormat(kind="int", bits=8),
    WeightFormat(kind="int", bits=8, activations="int8"),
    WeightFormat(kind="int", bits=4, group_size=128),
    WeightFormat(kind="int", bits=4, group_size=128, symmetric=False),
    WeightFormat(kind="int", bits=4, group_size=32),
    WeightFormat(kind="float", bits=8),
)
SHAPES = ((6144, 4096), (28672, 4096), (4096, 14336), (3072, 1024))  # outputs, inputs
ROWS = (1, 8, 32, 512)
CYCLE_BYTES = 256 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    lines = [
        "# Low-bit products on a GPU",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        f"- GPU: {torch.cuda.get_device_name()}; torch {torch.__version__}, "
        f"triton {triton.__version__}",
        "- command: `python benchmarks/gpu_lowbit.py`",
        "- rows in bfloat16 (rounded to int8 first for a8), results in float32; error: against the",
        "  float64 product with the dequantized matrix, relative",
        "",
        "| outputs x inputs | rows | format | us | GB/s | of bf16's time | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for n, k in SHAPES:
        dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        packed = {f.name: quantize(dense, f) for f in FORMATS}
        for m in ROWS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            copies = [dense.clone() for _ in range(_copies(dense.nbytes))]
            base = _time([functools.partial(torch.matmul, x, w.T) for w in copies])
            lines.append(_line(n, k, m, "bfloat16", base, dense.nbytes, base, None))
            del copies
            for form in FORMATS:
                weight = packed[form.name]
                rows, row_scale = _rows(x, form)
                found = lowbit_matmul(rows, weight, row_scale).double()
                exact = rows.double() if row_scale is None else rows * row_scale[:, None].double()
                wanted = exact @ weight.dequantize().double().T
                error = float((found - wanted).norm() / wanted.norm())
                many = [_copy(weight) for _ in range(_copies(weight.nbytes))]
                took = _time([functools.partial(lowbit_matmul, rows, w, row_scale) for w in many])
                lines.append(_line(n, k, m, form.name, took, weight.nbytes, base, error))
                if not error < 1e-5:
                    raise SystemExit(f"{form.name} at {m} rows of {n} x {k}: error {error:.2e}")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0


def _rows(x: Tensor, form: WeightFormat) -> tuple[Tensor, Tensor | None]:
    if form.activations is None:
        return x, None
    scale = x.float().abs().amax(1) / 127
    return (x.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def _copies(nbytes: int) -> int:
    return max(2, -(-CYCLE_BYTES // nbytes))


def _copy(weight: QuantizedWeight) -> QuantizedWeight:
    zero = None if weight.zero is None else weight.zero.clone()
    return replace(weight, values=weight.values.clone(), scale=weight.scale.clone(), zero=zero)


def _time(calls: list) -> float:
    """Microseconds of a call: the median of rounds, each of which goes once through the calls."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()  # or Python's launches would be timed
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def _line(
    n: int, k: int, m: int, name: str, us: float, nbytes: int, base: float, error: float | None
) -> str:
    shown = "" if error is None else f"{error:.1e}"
    return (
        f"| {n} x {k} | {m} | {name} | {us:.1f} | {nbytes / us / 1e3:,.0f} | {us / base:.2f} "
        f"| {shown} |"
    )


if __name__ == "__main__":
    sys.exit(main())
