"""Generation with guesses beside plain generation, on real text, in turn. No guess is remembered
from one round to the next.

    python benchmarks/speculate.py [--model tales] [--draft-model tales-draft] [--batch 1,8]

``copy``: prompts of 200 tokens of the evaluation text that then begin again with their first 40;
``story``: 60 tokens of it. All are answered at temperature 0 and at 1.
"""

from __future__ import annotations

import argparse
import datetime
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from skimp.cli.evaluate import read_text
from skimp.cost.machine import cpu_model
from skimp.decoding.params import SamplingParams
from skimp.decoding.suffix import Suffix
from skimp.engine import Engine, EngineOptions
from skimp.engine.draft_model import DraftModel
from skimp.engine.speculation import SpeculationStats

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "lookup": {"speculate": "lookup"},
    "suffix": {"speculate": "suffix"},
    "draft": {"speculate": "draft", "draft_tokens": 2},
}
KINDS = {"copy": (200, 40), "story": (60, 0)}


def prompts(engine: Engine, kind: str, count: int) -> list[list[int]]:
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(read_text(None))
    length, again = KINDS[kind]
    starts = random.Random(1).sample(range(len(ids) - length), count)
    return [ids[s : s + length] + ids[s : s + again] for s in starts]


def forget(engine: Engine) -> None:
    """What past answers left."""
    proposer = engine.scheduler.proposer
    if isinstance(proposer, Suffix):
        engine.scheduler.proposer = Suffix()
    if isinstance(proposer, DraftModel):
        proposer.served.cache.clear_prefix()
    engine.cache.clear_prefix()
    engine.speculation = SpeculationStats()


def generation_s(engine: Engine, asked: list[list[int]], params: SamplingParams) -> float:
    """Seconds from the moment when all prompts are read."""
    engine.scheduler.prompts_first = True
    for prompt in asked:
        engine.add_request(prompt, params)
    while any(seq.num_tokens == seq.num_prompt for seq in engine.scheduler.running) or (
        len(engine.scheduler.running) < len(asked)
    ):
        engine.step()
    start = time.perf_counter()
    while engine.has_unfinished():
        engine.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tales")
    parser.add_argument("--draft-model", default="tales-draft")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    batches = [int(part) for part in given.batch.split(",")]
    engines = {
        name: Engine.load(
            given.model,
            EngineOptions(
                max_batch=max(batches),
                draft_model=given.draft_model if name == "draft" else None,
                **options,
            ),
        )
        for name, options in METHODS.items()
    }
    lines = [
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}; torch {torch.__version__}",
        f"- machine: {cpu_model()}, {torch.get_num_threads()} threads",
        f"- command: `python benchmarks/speculate.py {' '.join(sys.argv[1:])}`",
        "",
        "| prompts | batch | temperature | speculate | speed-up (least to most) | tokens a step | "
        "share that stands, by place |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for kind in KINDS:
        asked = prompts(engines["none"], kind, given.prompts)
        for batch in batches:
            groups = [asked[i : i + batch] for i in range(0, len(asked), batch)]
            for temperature in (0.0, 1.0):
                params = SamplingParams(
                    max_tokens=given.tokens, temperature=temperature, ignore_eos=True, seed=3
                )
                spent: dict[str, list[float]] = {name: [] for name in METHODS}
                for index in range(given.rounds + 1):
                    for name in list(METHODS)[:: -1 if index % 2 else 1]:
                        engine = engines[name]
                        forget(engine)
                        took = sum(generation_s(engine, group, params) for group in groups)
                        if index:  # the first round warms up
                            spent[name].append(took)
                for name in list(METHODS)[1:]:
                    stats = engines[name].speculation
                    gains = [a / b for a, b in zip(spent["none"], spent[name])]
                    shares = " ".join(f"{share:.2f}" for share in stats.by_position)
                    lines.append(
                        f"| {kind} | {batch} | {temperature:g} | {name} | "
                        f"{statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f}) | "
                        f"{stats.tokens_per_step:.2f} | {shares} |"
                    )
                    print(lines[-1], flush=True)
    if given.out:
        text = "# Guessed tokens\n\n" + "\n".join(lines) + "\n"
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
