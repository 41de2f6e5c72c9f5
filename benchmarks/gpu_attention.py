"""Paged attention on a GPU: each case against the plain backend, and its time.

    python benchmarks/gpu_attention.py [--sweep] [--only generate] --out RESULT.md

Times are medians over CUDA events of one layer's whole attention (norm, rotation, append, softmax),
from CUDA-graph replays that go through several layers, so that what one reads was not just read by
another. "GB/s" counts the keys and values that must be read, "TFLOP/s" the products of visible
pairs. "dense" is torch's own attention on contiguous heads, without append, where it applies.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from skimp.cache.formats import hadamard
from skimp.cache.layout import CacheLayout
from skimp.kernels import cache_rows
from skimp.kernels.ops import AttentionParams, StepInputs
from skimp.kernels.plain import PlainOps, apply_rope, rms_norm
from skimp.kernels.triton.attention import AttentionPlan, Tile, paged_attention, plan_attention
from skimp.model.layers import RMSNorm
from skimp.model.mixers.attention import cache_spec
from skimp.model.rope import rope_tables
from skimp.model.spec import AttentionSpec, RopeSpec

DEVICE = torch.device("cuda", 0)
CYCLE_BYTES = 192 << 20  # of one round's keys and values, if that many layers are allowed
MOST_LAYERS = 28
REFERENCE_PAIRS = 1 << 31  # heads x rows x keys, above which the reference would not fit
TOLERANCE = {None: 1e-2, "int8": 2e-2, "fp8": 2e-2, "int4": 2e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """``rows`` new tokens of each sequence after ``context - rows`` old ones."""

    heads: tuple[int, int, int]  # query heads, key-value heads, head size
    seqs: int
    rows: int
    context: int
    format: str | None = None
    recent: int = 0
    window: int | None = None
    ahead: bool = False  # rows see all of the step
    deterministic: bool = False
    dtype: torch.dtype = torch.bfloat16
    spread: bool = False  # contexts from 1/16 of ``context`` up to it

    @property
    def name(self) -> str:
        h, g, d = self.heads
        parts = [f"{h}/{g}x{d}", f"{self.seqs} x {self.rows} @ {self.context}"]
        parts += [self.format or str(self.dtype).removeprefix("torch.")]
        parts += [f"recent {self.recent}"] * bool(self.recent)
        parts += [f"window {self.window}"] * bool(self.window)
        parts += ["ahead"] * self.ahead + ["deterministic"] * self.deterministic
        parts += ["spread"] * self.spread
        return ", ".join(parts)

    @property
    def kind(self) -> str:
        return "generate" if self.rows == 1 else "prefill"


SMALL, MIDDLE, TINY, WIDE = (16, 8, 128), (32, 8, 128), (14, 2, 64), (8, 4, 256)
CASES = (
    *(Case(heads=SMALL, seqs=1, rows=1, context=n) for n in (128, 512, 2048, 32768)),
    *(Case(heads=SMALL, seqs=n, rows=1, context=m) for n, m in ((16, 128), (16, 1024), (64, 2048))),
    *(Case(heads=SMALL, seqs=n, rows=1, context=1024) for n in (32, 128)),
    Case(heads=MIDDLE, seqs=1, rows=1, context=128),
    *(Case(heads=MIDDLE, seqs=n, rows=1, context=1024) for n in (8, 16, 32, 64, 128)),
    Case(heads=MIDDLE, seqs=1, rows=1, context=8192),
    *(Case(heads=h, seqs=16, rows=1, context=8192) for h in (SMALL, MIDDLE, TINY, WIDE)),
    Case(heads=SMALL, seqs=16, rows=1, context=16384, spread=True),
    *(Case(heads=TINY, seqs=n, rows=1, context=m) for n, m in ((1, 128), (128, 1024))),
    Case(heads=WIDE, seqs=1, rows=1, context=4096, window=512),
    *(
        Case(heads=SMALL, seqs=n, rows=1, context=m, format=f, recent=64 if f == "int4" else 0)
        for f in ("int8", "fp8", "int4")
        for n, m in ((1, 128), (1, 32768), (16, 8192), (128, 1024))
    ),
    Case(heads=SMALL, seqs=4, rows=1, context=2048, deterministic=True),
    Case(heads=SMALL, seqs=1, rows=5, context=8192),
    Case(heads=SMALL, seqs=8, rows=5, context=2048),
    Case(heads=SMALL, seqs=1, rows=32, context=2048, ahead=True),
    Case(heads=SMALL, seqs=1, rows=512, context=8192),
    *(Case(heads=SMALL, seqs=1, rows=n, context=n) for n in (128, 512, 4096, 16384)),
    Case(heads=SMALL, seqs=8, rows=1024, context=1024),
    Case(heads=MIDDLE, seqs=1, rows=8192, context=8192),
    Case(heads=TINY, seqs=1, rows=4096, context=4096),
    Case(heads=WIDE, seqs=1, rows=4096, context=4096),
    Case(heads=WIDE, seqs=1, rows=4096, context=4096, window=512),
    Case(heads=SMALL, seqs=1, rows=4096, context=4096, format="int8"),
    Case(heads=SMALL, seqs=1, rows=4096, context=4096, format="fp8"),
    Case(heads=SMALL, seqs=1, rows=4096, context=4096, format="int4", recent=64),
    Case(heads=SMALL, seqs=1, rows=4096, context=4096, deterministic=True),
    Case(heads=SMALL, seqs=1, rows=1024, context=1024, dtype=torch.float32),
)
GENERATE_SWEEP = tuple(
    (n, warps, stages, held)
    for n, warps, stages, most in (
        (32, 4, 3, 6),
        (32, 4, 4, 4),
        (64, 4, 3, 3),
        (64, 4, 4, 2),
        (64, 8, 3, 3),
        (128, 4, 2, 3),
        (128, 8, 2, 3),
    )
    for held in (1, 2, 3, 4, 6)
    if held <= most
)
SHARES_SWEEP = ((1, 1), (1, 2), (2, 4), (2, 8), (4, 4), (4, 8))  # least, lone blocks
PREFILL_SWEEP = (
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (128, 64, 8, 5),
    (128, 64, 4, 3),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (128, 32, 8, 3),
    (64, 64, 4, 3),
    (64, 64, 4, 5),
    (64, 128, 4, 3),
)


class Bench:
    """One case's layers, cache and step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        h, g, d = case.heads
        self.spec = AttentionSpec(
            num_heads=h,
            num_kv_heads=g,
            head_dim=d,
            rope=RopeSpec(theta=1e6, rotary_dim=d),
            scale=d**-0.5,
            window=case.window,
            qk_norm=True,
        )
        memory = cache_spec(self.spec, case.dtype)
        if case.format is not None:
            turned = case.format == "int4"
            memory = memory.rounded(case.format, recent=case.recent, hadamard=turned)
        self.memory = memory
        low = case.context // 16 if case.spread else case.context
        step = max(1, (case.context - low) // max(1, case.seqs - 1))
        self.lengths = [low + i * step if case.spread else low for i in range(case.seqs)]
        self.read = sum(memory.bytes_read(n) for n in self.lengths)
        total = memory.bytes_per_token * sum(self.lengths)
        self.layers = max(1, min(MOST_LAYERS, CYCLE_BYTES // total))
        layout = CacheLayout.from_specs([memory] * self.layers, page_tokens=16)
        norms = [RMSNorm(d, eps=1e-6) for _ in range(2)]
        for norm in norms:
            norm.weight = torch.nn.Parameter(torch.rand(d, device=DEVICE) + 0.5)
        cos, sin = rope_tables(RopeSpec(theta=1e6, rotary_dim=d), case.context)
        self.params = [
            AttentionParams(
                spec=self.spec,
                norm_eps=1e-6,
                q_norm=norms[0],
                k_norm=norms[1],
                sinks=None,
                rope=(cos.to(DEVICE), sin.to(DEVICE)),
                cache=layout.layer_cache(i),
            )
            for i in range(self.layers)
        ]
        pages = -(-case.context // 16)
        unit = max(group.page_bytes for group in layout.groups) // 64
        count = len(layout.groups) * case.seqs * pages
        order = torch.randperm(count, device=DEVICE) + 1
        self.tables = tuple((order * unit).int().view(len(layout.groups), case.seqs, pages))
        self.arena = torch.full(((count + 1) * unit * 64,), 0xFF, dtype=torch.uint8, device=DEVICE)
        self.wanted_arena = self.arena if case.format is None else self.arena.clone()
        self.width = self.spec.q_dim + 2 * self.spec.kv_dim
        self.step = self._step([(n - case.rows, case.rows) for n in self.lengths], case.ahead)
        self.qkv = torch.randn(case.seqs * case.rows, self.width, device=DEVICE, dtype=case.dtype)
        self.fill()

    def _step(self, parts: list[tuple[int, int]], ahead: bool = False) -> StepInputs:
        def tensor(values: list[Tensor]) -> Tensor:
            return torch.cat(values).int().to(DEVICE)

        positions = tensor([torch.arange(first, first + n) for first, n in parts])
        seqs = tensor([torch.full((n,), i) for i, (_, n) in enumerate(parts)])
        ends = tensor([torch.full((n,), first + n) for first, n in parts])
        starts = torch.tensor([0, *itertools.accumulate(n for _, n in parts)])
        return StepInputs(
            token_ids=positions,
            positions=positions,
            row_seq=seqs,
            kv_end=ends if ahead else positions + 1,
            seq_starts=starts.int().to(DEVICE),
            logit_rows=positions,
            arena=self.arena,
            block_tables=self.tables,
        )

    def fill(self) -> None:
        """Old tokens into every layer's pages, by the kernel itself; one sequence at a time."""
        case = self.case
        for i, length in enumerate(self.lengths):
            old = length - case.rows
            if old <= 0:
                continue
            step = self._step([(0, old)])
            step.row_seq += i
            step.kv_end.fill_(0)  # append only
            qkv = torch.randn(old, self.width, device=DEVICE, dtype=case.dtype)
            plan = self._plan(1, old, old)
            for params in self.params:
                paged_attention(qkv, params, step, plan=plan)
            if case.format is not None:
                # The reference keeps pages of its own layout.
                self._write(qkv, step)

    def _write(self, qkv: Tensor, step: StepInputs) -> None:
        """As ``PlainOps.attention`` would; attending would need the square of the context."""
        spec, params = self.spec, self.params[0]
        _, k, v = qkv.float().split((spec.q_dim, spec.kv_dim, spec.kv_dim), dim=-1)
        k = k.unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        v = v.unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        assert params.k_norm is not None and params.rope is not None and params.cache is not None
        cos, sin = (table[step.positions.long()] for table in params.rope)
        with torch.no_grad():
            k = apply_rope(rms_norm(k, params.k_norm), cos, sin, interleaved=False)
        if params.cache.spec.hadamard:
            k, v = hadamard(k), hadamard(v)
        cache_rows.write((k, v), params.cache, replace(step, arena=self.wanted_arena))

    def _plan(self, seqs: int, rows: int, most: int, **options: object) -> AttentionPlan:
        return plan_attention(
            self.spec,
            num_seqs=seqs,
            rows=rows,
            most_rows=most,
            context=self.case.context,
            device=DEVICE,
            dtype=self.case.dtype,
            low_bit=self.case.format is not None,
            **options,  # type: ignore[arg-type]
        )

    def plan(self, **options: object) -> AttentionPlan:
        case = self.case
        if case.deterministic:
            options["deterministic"] = True
        return self._plan(case.seqs, case.seqs * case.rows, case.rows, **options)

    def call(self, plan: AttentionPlan) -> Tensor:
        return paged_attention(self.qkv, self.params[0], self.step, plan=plan)

    def error(self, plan: AttentionPlan) -> float | None:
        """Of the first layer, relative; None where the reference would not fit."""
        case = self.case
        if case.heads[0] * case.rows * case.context > REFERENCE_PAIRS:
            return None
        self.call(plan)
        found = self.call(plan).float()  # again: counters must have returned to zero
        if not hasattr(self, "_wanted"):
            step = replace(self.step, arena=self.wanted_arena)
            with torch.no_grad():
                wanted = PlainOps().attention(self.qkv.float(), self.params[0], step)
            self._wanted = wanted
        return float((found - self._wanted).norm() / self._wanted.norm())

    def time(self, plan: AttentionPlan) -> float:
        def one(params: AttentionParams) -> Callable[[], Tensor]:
            return functools.partial(paged_attention, self.qkv, params, self.step, plan=plan)

        return _time([one(params) for params in self.params])

    def pairs(self) -> int:
        """Visible (row, key) pairs of one head."""
        low = 0
        if self.case.window is not None:
            low = (self.step.positions + 1 - self.case.window).clamp(min=0)
        return int((self.step.kv_end - low).sum())

    def dense(self) -> float | None:
        case = self.case
        if case.rows != case.context or case.window or case.dtype != torch.bfloat16:
            return None
        h, g, d = case.heads
        q, k, v = (
            torch.randn(case.seqs, n, case.rows, d, device=DEVICE, dtype=case.dtype)
            for n in (h, g, g)
        )
        call = functools.partial(
            F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True
        )
        return _time([call])


def _time(calls: list[Callable[[], Tensor]]) -> float:
    """Microseconds of a call: the median of rounds, each of which goes through the calls."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    times_each = max(1, 20 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(times_each):
            for call in calls:
                call()
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls) / times_each)
    return statistics.median(times[2:])


def _plans(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, object]]]:
    """What to try of a case, and its name."""
    yield "default", {}
    if not options.sweep:
        return
    case = bench.case
    group = case.heads[0] // case.heads[1]
    if case.kind == "generate" and not case.deterministic:
        m = max(16, triton.next_power_of_2(group))
        for n, warps, stages, held in GENERATE_SWEEP:
            tile = Tile(block_m=m, block_n=n, warps=warps, stages=stages, per_processor=held)
            yield f"{n} keys, {warps} warps, {stages} stages, {held} a processor", {"few": tile}
        if options.tiles:
            return
        for least, lone in SHARES_SWEEP:
            yield f"least {least}, lone {lone}", {"least_blocks": least, "lone_blocks": lone}
        default = bench.plan().splits
        for splits in sorted({1, 2, 4, 8, 16, 32, 64} - {default}):
            yield f"{splits} splits", {"splits": splits}
        yield "append apart", {"fused": False}
    elif case.rows * group > 64:
        for m, n, warps, stages in PREFILL_SWEEP:
            if m * case.heads[2] <= 128 * 256:
                tile = Tile(block_m=m, block_n=n, warps=warps, stages=stages)
                yield f"{m} x {n}, {warps} warps, {stages} stages", {"many": tile}
    else:
        for splits in (1, 4, 8, 16, 32):
            yield f"{splits} splits", {"splits": splits}


def _compile(case: Case, options: argparse.Namespace, part: int, parts: int) -> None:
    """Fill Triton's cache on disk with a part of what a case will try."""
    bench = Bench(case)
    for index, (_, chosen) in enumerate(_plans(bench, options)):
        if index % parts == part:
            with contextlib.suppress(triton.runtime.errors.OutOfResources):
                bench.call(bench.plan(**chosen))


def _line(name: str, what: str, us: float, bench: Bench, error: float | None, dense: str) -> str:
    h, _, d = bench.case.heads
    flops = 4 * d * h * bench.pairs()
    shown = "" if error is None else f"{error:.1e}"
    return (
        f"| {name} | {what} | {us:.1f} | {bench.read / us / 1e3:,.0f} | {flops / us / 1e6:.1f} "
        f"| {dense} | {shown} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="parts of kinds or names of cases, between ;")
    parser.add_argument("--sweep", action="store_true", help="other tiles and splits, too")
    parser.add_argument("--tiles", action="store_true", help="of a sweep only the tiles")
    parser.add_argument("--compile", type=int, default=0, help="processes that compile it first")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = [
        case
        for case in CASES
        if any(part in f"{case.kind} {case.name}" for part in options.only.split(";"))
    ]
    if options.compile:
        parts = 4 if options.sweep else 1
        work = [(case, options, i, parts) for case in cases for i in range(parts)]
        with multiprocessing.get_context("spawn").Pool(options.compile) as pool:
            pool.starmap(_compile, work, chunksize=1)
    lines = [
        "# Paged attention on a GPU",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        f"- GPU: {torch.cuda.get_device_name()}; torch {torch.__version__}, "
        f"triton {triton.__version__}",
        "- command: `python benchmarks/gpu_attention.py`",
        "- heads: query/key-value x size; sequences x new rows @ context; error: relative, against",
        "  the plain backend in float32 on the same stored numbers",
        "",
        "| case | plan | us | GB/s | TFLOP/s | dense us | error |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    failed = False
    for case in cases:
        bench = Bench(case)
        for what, chosen in _plans(bench, options):
            try:
                plan = bench.plan(**chosen)
                error = bench.error(plan)
                took = bench.time(plan)
            except triton.runtime.errors.OutOfResources as problem:
                print(f"| {case.name} | {what} | {problem} | | | | |", flush=True)
                continue
            dense = bench.dense() if what == "default" else None
            shown = "" if dense is None else f"{dense:.1f}"
            lines.append(_line(case.name, what, took, bench, error, shown))
            print(lines[-1], flush=True)
            if error is not None and not error < TOLERANCE[case.format]:
                print(f"WRONG: error {error:.2e}", flush=True)
                failed = True
        del bench
        torch.cuda.empty_cache()
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
