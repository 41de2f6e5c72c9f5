"""Latent attention (MLA) on a CPU: the native backend beside the plain one, in interleaved rounds.

    python benchmarks/cpu_latent.py benchmarks/shapes/mla-0.3b.json [--dtype float32] [--rounds 3]

Both engines have the same random weights. Times are medians of rounds; "times" is the median of
the rounds' ratios plain / native, with the smallest and the largest of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from skimp.cli.models import config_spec
from skimp.engine import Engine, EngineOptions
from skimp.kernels import native
from skimp.meter.speed import random_prompt, time_generation, time_prefill
from skimp.model.loading import random_decoder

GENERATION = ((1, 128), (1, 1024), (8, 128), (8, 1024))  # batch, context
PREFILL = (512, 2048)


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
    shown = " | ".join(f"{1e3 * value:.1f}" for value in medians)
    spread = f"{min(ratios):.1f}–{max(ratios):.1f}"
    return f"| {label} | {shown} | {statistics.median(ratios):.1f} ({spread}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="the later half is timed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=["generation", "prefill"])
    args = parser.parse_args()
    both = engines(args.shape, args.dtype, args.threads)
    print(
        f"{args.shape.stem}, {args.dtype}; native: {native.describe()}; torch {torch.__version__}"
    )
    print("\n| case | native, ms | plain, ms | times |\n|---|---|---|---|")
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
