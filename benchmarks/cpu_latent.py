"""Latent attention (MLA) on a CPU: the native backend beside the plain one, in interleaved rounds.

    python benchmarks/cpu_latent.py benchmarks/shapes/mla-0.3b.json [--dtype float32] [--rounds 3]
    python benchmarks/cpu_latent.py benchmarks/shapes/mla-0.3b.json --only layer

Of whole models with the same random weights, times are wall-clock; of one layer's latent attention
they are seconds of one thread's processor time, which other processes hardly disturb. Figures are
medians of rounds; "times" is the median of the rounds' ratios plain / native, with the smallest
and the largest of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from skimp.cli.models import config_spec
from skimp.engine import Engine, EngineOptions
from skimp.kernels import native
from skimp.kernels.ops import LatentParams, LayerCache, StepInputs
from skimp.kernels.plain import PlainOps
from skimp.meter.speed import random_prompt, time_generation, time_prefill
from skimp.model.layers import Linear, RMSNorm
from skimp.model.loading import random_decoder
from skimp.model.mixers.latent import cache_spec
from skimp.model.rope import rope_tables
from skimp.model.spec import LatentAttentionSpec

GENERATION = ((1, 128), (1, 1024), (8, 128), (8, 1024))  # batch, context
PREFILL = (512, 2048)
# Sequences, rows of each, context.
LAYER = ((1, 1, 128), (1, 1, 1024), (8, 1, 1024), (1, 8, 1024), (1, 512, 512), (1, 512, 2048))
PAGE = 16


class Layer:
    """One layer's latent attention over sequences whose latents are cached: random numbers."""

    def __init__(
        self, spec: LatentAttentionSpec, dtype: torch.dtype, seqs: int, rows: int, end: int
    ):
        self.rows, self.seqs = seqs * rows, seqs
        cached = cache_spec(spec, dtype)
        cache = LayerCache(spec=cached, group=0, offset=0, page_tokens=PAGE)
        pages, lines = -(-end // PAGE), cached.bytes_per_token * PAGE // 64
        memory = torch.randn(seqs * pages * lines * 64 // dtype.itemsize + 64).to(dtype)
        skip = -memory.data_ptr() % 64 // dtype.itemsize
        at = torch.arange(end - rows, end, dtype=torch.int32).repeat(seqs)
        self.step = StepInputs(
            token_ids=at,
            positions=at,
            row_seq=torch.arange(seqs, dtype=torch.int32).repeat_interleave(rows),
            kv_end=at + 1,
            seq_starts=torch.arange(0, self.rows + 1, rows, dtype=torch.int32),
            logit_rows=at,
            arena=memory[skip:].view(torch.uint8),
            block_tables=((torch.arange(seqs * pages).int() * lines).view(seqs, pages),),
        )
        rope = None if spec.rope is None else rope_tables(spec.rope, end)
        norm = RMSNorm(spec.latent_dim, eps=spec.latent_eps)
        torch.nn.init.ones_(norm.weight)
        params = LatentParams(spec=spec, latent_norm=norm, rope=rope, cache=cache)
        inputs, outputs = spec.matrices(1)["kv_b_proj"]
        weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)
        queries, latents = (
            torch.randn(self.rows, spec.query_dim),
            torch.randn(self.rows, spec.cached_dim),
        )
        self.plain, ops = PlainOps(serving=True), native.NativeOps()
        heads = self.plain.pack_latent(_linear(weight), spec)
        self.arguments = queries.to(dtype), latents.to(dtype), heads, params, self.step
        packed = ops.pack_latent(_linear(weight), spec)
        with ops.capture(self.rows, seqs, 1) as self.program:
            self.out = ops.latent_attention(queries, latents, packed, params, self.step)

    def run(self, name: str) -> None:
        if name == "native":
            self.program.run(self.rows, self.seqs, 0, 1)
        else:
            self.plain.latent_attention(*self.arguments)


def _linear(weight: Tensor) -> Linear:
    linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def processor_seconds(layer: Layer, name: str) -> float:
    """Of one run, when as many have been timed as take a tenth of a second."""
    layer.run(name)
    runs, start = 0, time.process_time()
    while time.process_time() - start < 0.1:
        layer.run(name)
        runs += 1
    return (time.process_time() - start) / runs


def engines(shape: Path, dtype: str, threads: int | None) -> dict[str, Engine]:
    spec = config_spec(shape)
    options = EngineOptions(dtype=dtype, threads=threads, max_batch=8)  # type: ignore[arg-type]
    return {
        name: Engine(
            random_decoder(spec, seed=0, dtype=dtype),
            tokenizer=None,
            options=dataclasses.replace(options, backend=name),  # type: ignore[arg-type]
        )
        for name in ("native", "plain")
    }


def line(label: str, rounds: list[dict[str, float]]) -> str:
    ratios = [times["plain"] / times["native"] for times in rounds]
    medians = [statistics.median(times[name] for times in rounds) for name in ("native", "plain")]
    shown = " | ".join(f"{1e3 * value:.3g}" for value in medians)
    spread = f"{min(ratios):.1f}–{max(ratios):.1f}"
    return f"| {label} | {shown} | {statistics.median(ratios):.1f} ({spread}) |"


@torch.inference_mode()
def time_layers(spec: LatentAttentionSpec, dtype: torch.dtype, rounds: int) -> None:
    torch.set_num_threads(1)
    for seqs, rows, end in LAYER:
        layer = Layer(spec, dtype, seqs, rows, end)
        found = [
            {name: processor_seconds(layer, name) for name in ("native", "plain")}
            for _ in range(rounds)
        ]
        print(line(f"layer: {seqs} x {rows} rows @ {end}", found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="the later half is timed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=["generation", "prefill", "layer"])
    args = parser.parse_args()
    kernels = f"native: {native.describe()}; torch {torch.__version__}"
    print(f"{args.shape.stem}, {args.dtype}; {kernels}")
    print("\n| case | native, ms | plain, ms | times |\n|---|---|---|---|")
    if args.only == "layer":
        mixer = config_spec(args.shape).layers[0].mixer
        assert isinstance(mixer, LatentAttentionSpec), "a shape with latent attention"
        time_layers(mixer, getattr(torch, args.dtype), args.rounds)
    else:
        time_models(args)


def time_models(args: argparse.Namespace) -> None:
    both = engines(args.shape, args.dtype, args.threads)
    rng = random.Random(0)

    def prompts(batch: int, context: int) -> list[list[int]]:
        vocab = both["native"].spec.vocab_size
        return [random_prompt(rng, vocab, context) for _ in range(batch)]

    for tokens in PREFILL if args.only != "generation" else ():
        rounds = []
        for _ in range(args.rounds):
            fresh = prompts(1, tokens)
            rounds.append({name: time_prefill(engine, fresh) for name, engine in both.items()})
        print(line(f"prefill of {tokens}", rounds), flush=True)
    for batch, context in GENERATION if args.only != "prefill" else ():
        same = prompts(batch, context)  # in later rounds the prefix cache has them
        rounds = []
        for _ in range(args.rounds):
            steps = {name: time_generation(e, same, args.steps)[0] for name, e in both.items()}
            rounds.append({name: statistics.median(times) for name, times in steps.items()})
        print(line(f"a step of {batch} x {context}", rounds), flush=True)


if __name__ == "__main__":
    main()
