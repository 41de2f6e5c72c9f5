"""Latent attention (MLA) on a GPU: each case against the plain backend, and the time of its parts.

    python benchmarks/gpu_latent.py [--sweep] [--page N] [--compile N] --out RESULT.md

Times are medians over CUDA events of one layer, out of CUDA graphs that go through several layers:
all of it (queries to the latent, append, attention, values of heads), and of the attention kernel
alone. "GB/s" counts the latents read, over all of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from gpu_attention import _time as time_calls
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from skimp.cache.layout import CacheLayout
from skimp.kernels.ops import LatentParams, StepInputs
from skimp.kernels.plain import PlainOps
from skimp.kernels.triton.attention import Tile, attend
from skimp.kernels.triton.latent import (
    LatentPlan,
    as_attention,
    latent_attention,
    layer_of,
    plan_latent_attention,
)
from skimp.model.layers import Linear, RMSNorm
from skimp.model.mixers.latent import cache_spec
from skimp.model.rope import rope_tables
from skimp.model.spec import LatentAttentionSpec, RopeSpec

DEVICE = torch.device("cuda", 0)
CYCLE_BYTES = 192 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """``rows`` new tokens of each sequence after ``context - rows`` old ones."""

    heads: int
    seqs: int
    context: int
    rows: int = 1

    @property
    def name(self) -> str:
        return f"{self.heads} heads, {self.seqs} x {self.rows} @ {self.context}"


CASES = (
    *(Case(heads=32, seqs=n, context=m) for n, m in ((1, 128), (32, 1024), (128, 1024))),
    *(Case(heads=32, seqs=n, context=m) for n, m in ((1, 8192), (16, 8192), (1, 65536))),
    Case(heads=128, seqs=1, context=8192),
    Case(heads=128, seqs=16, context=8192),
    Case(heads=32, seqs=8, context=2048, rows=5),
    Case(heads=32, seqs=1, context=8192, rows=512),
)
TILES = ((64, 8, 3, 1), (64, 8, 2, 1), (64, 4, 3, 1), (32, 8, 3, 1), (32, 4, 3, 2))


class Bench:
    def __init__(self, case: Case, page: int) -> None:
        self.case = case
        self.spec = LatentAttentionSpec(
            num_heads=case.heads,
            latent_dim=512,
            rope_dim=64,
            nope_dim=128,
            value_dim=128,
            rope=RopeSpec(theta=5e5, rotary_dim=64, interleaved=True),
            scale=192**-0.5,
        )
        spec = self.spec
        memory = cache_spec(spec, torch.bfloat16)
        self.read = case.seqs * memory.bytes_read(case.context)
        self.layers = max(1, min(28, CYCLE_BYTES // self.read))
        layout = CacheLayout.from_specs([memory] * self.layers, page_tokens=page)
        norm = RMSNorm(spec.latent_dim, eps=1e-6)
        norm.weight = torch.nn.Parameter(torch.rand(spec.latent_dim, device=DEVICE) + 0.5)
        assert spec.rope is not None
        cos, sin = (t.to(DEVICE) for t in rope_tables(spec.rope, case.context))
        self.params = [
            LatentParams(spec=spec, latent_norm=norm, rope=(cos, sin), cache=layout.layer_cache(i))
            for i in range(self.layers)
        ]
        pages = -(-case.context // page)
        unit = layout.groups[0].page_bytes // 64
        order = torch.randperm(case.seqs * pages, device=DEVICE) + 1
        self.table = (order * unit).int().view(case.seqs, pages)
        numbers = (case.seqs * pages + 1) * unit * 32
        self.arena = torch.randn(numbers, device=DEVICE, dtype=torch.bfloat16).view(torch.uint8)
        first = case.context - case.rows
        positions = torch.arange(first, case.context, device=DEVICE).repeat(case.seqs).int()
        starts = torch.arange(case.seqs + 1, device=DEVICE) * case.rows
        self.step = StepInputs(
            token_ids=positions,
            positions=positions,
            row_seq=torch.arange(case.seqs, device=DEVICE).repeat_interleave(case.rows).int(),
            kv_end=positions + 1,
            seq_starts=starts.int(),
            logit_rows=positions,
            arena=self.arena,
            block_tables=(self.table,),
        )
        rows = case.seqs * case.rows
        self.queries = torch.randn(rows, spec.query_dim, device=DEVICE, dtype=torch.bfloat16)
        self.latents = torch.randn(rows, spec.cached_dim, device=DEVICE, dtype=torch.bfloat16)
        shape = spec.matrices(8)["kv_b_proj"]
        weights = torch.randn(shape[1], shape[0], device=DEVICE) * shape[0] ** -0.5
        self.weight = weights.bfloat16()
        # As many matrices of heads as layers: each is read anew in a step.
        heads = self.weight.unflatten(0, (spec.num_heads, -1))
        self.heads = [heads.clone() for _ in range(self.layers)]

    def plan(self, **options: object) -> LatentPlan:
        case = self.case
        return plan_latent_attention(
            self.spec,
            num_seqs=case.seqs,
            rows=case.seqs * case.rows,
            most_rows=case.rows,
            context=case.context,
            device=DEVICE,
            **options,  # type: ignore[arg-type]
        )

    def call(self, plan: LatentPlan, layer: int = 0) -> Tensor:
        return latent_attention(
            self.queries, self.latents, self.heads[layer], self.params[layer], self.step, plan=plan
        )

    def error(self, plan: LatentPlan) -> float | None:
        case = self.case
        if case.seqs * case.rows * case.heads * case.context > 1 << 28:
            return None
        found = self.call(plan).float()
        if not hasattr(self, "_wanted"):
            ops = PlainOps()
            linear = Linear(self.spec.latent_dim, self.weight.shape[0])
            linear.weight = torch.nn.Parameter(self.weight)
            step = replace(self.step, arena=self.arena.clone())
            with torch.no_grad():
                self._wanted = ops.latent_attention(
                    self.queries.float(),
                    self.latents.float(),
                    ops.pack_latent(linear, self.spec),
                    self.params[0],
                    step,
                )
        return float((found - self._wanted).norm() / self._wanted.norm())

    def time(self, plan: LatentPlan) -> tuple[float, float]:
        """Microseconds of a layer, and of the attention kernel in it."""
        layers = range(self.layers)
        whole = time_calls([functools.partial(self.call, plan, i) for i in layers])
        rows, heads = self.case.seqs * self.case.rows, self.case.heads
        q = torch.randn(rows, heads * self.spec.cached_dim, device=DEVICE, dtype=torch.bfloat16)
        mixed = q.new_empty(rows, heads * self.spec.latent_dim)
        alone = time_calls(
            [
                functools.partial(
                    attend,
                    layer_of(p),
                    plan.attention,
                    q,
                    q.stride(0),
                    mixed,
                    self.step,
                    early=False,
                )
                for p in self.params
            ]
        )
        return whole, alone


def _plans(bench: Bench, sweep: bool) -> Iterator[tuple[str, dict[str, object]]]:
    yield "default", {}
    if not sweep:
        return
    group = bench.case.heads // as_attention(bench.spec).num_kv_heads
    m = max(16, triton.next_power_of_2(group))
    if bench.case.rows > 1:
        m = max(m, 64)
    for n, warps, stages, held in TILES:
        tile = Tile(block_m=m, block_n=n, warps=warps, stages=stages, per_processor=held)
        name = f"{m} x {n}, {warps} warps, {stages} stages, {held} a processor"
        yield name, {"few": tile, "many": tile}


def _compile(case: Case, page: int, sweep: bool, part: int, parts: int) -> None:
    """Fill Triton's cache on disk with a part of what a case will try."""
    bench = Bench(case, page)
    for index, (_, chosen) in enumerate(_plans(bench, sweep)):
        if index % parts == part:
            with contextlib.suppress(triton.runtime.errors.OutOfResources):
                bench.call(bench.plan(**chosen))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", action="store_true", help="other tiles, too")
    parser.add_argument("--page", type=int, default=64, help="tokens of a page")
    parser.add_argument("--compile", type=int, default=0, help="processes that compile it first")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.compile:
        parts = 3 if options.sweep else 1
        work = [
            (case, options.page, options.sweep, i, parts) for case in CASES for i in range(parts)
        ]
        with multiprocessing.get_context("spawn").Pool(options.compile) as pool:
            pool.starmap(_compile, work, chunksize=1)
    lines = [
        "# Latent attention on a GPU",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        f"- GPU: {torch.cuda.get_device_name()}; torch {torch.__version__}, "
        f"triton {triton.__version__}",
        f"- command: `python benchmarks/gpu_latent.py`; pages of {options.page} tokens",
        "- latents of 512 + 64 numbers, heads of 128, bfloat16; sequences x new rows @ context;",
        "  error: relative, against the plain backend in float32 on the same stored numbers",
        "",
        "| case | tile | us | attention alone | GB/s | error |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    failed = False
    for case in CASES:
        bench = Bench(case, options.page)
        for what, chosen in _plans(bench, options.sweep):
            try:
                plan = bench.plan(**chosen)
                error = bench.error(plan)
                whole, alone = bench.time(plan)
            except triton.runtime.errors.OutOfResources as problem:
                print(f"| {case.name} | {what} | {problem} | | | |", flush=True)
                continue
            shown = "" if error is None else f"{error:.1e}"
            rate = bench.read / whole / 1e3
            lines.append(
                f"| {case.name} | {what} | {whole:.1f} | {alone:.1f} | {rate:,.0f} | {shown} |"
            )
            print(lines[-1], flush=True)
            failed |= error is not None and not error < 1e-2
        del bench
        torch.cuda.empty_cache()
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
