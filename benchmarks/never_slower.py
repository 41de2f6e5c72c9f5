"""Generation that guesses as it pays, beside generation that never does and that always does, while
the load rises from one sequence to many and falls again; and on text where guesses never come true.

    python benchmarks/never_slower.py [--speculate draft] [--draft-model tales-draft] [--most 64]

Each level keeps so many requests running. The three engines take turns within a level, a slice of
steps each; what counts is tokens a second.
"""

from __future__ import annotations

import argparse
import datetime
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parent))

from skimp.cli.evaluate import read_text
from skimp.cost.machine import cpu_model
from skimp.decoding.params import SamplingParams
from skimp.decoding.proposal import Ask, Draft
from skimp.engine import Engine, EngineOptions
from skimp.model.loading import load_decoder
from skimp.model.locate import locate_model
from skimp.text.tokenizer import Tokenizer

NEW_TOKENS = 96
PROMPT = 60


class Wrong:
    """Guesses that hardly ever come true."""

    def __init__(self) -> None:
        self.draw = random.Random(5)

    def propose(self, asks: list[Ask]) -> list[Draft]:
        return [Draft(tuple(self.draw.randrange(100, 8000) for _ in range(a.most))) for a in asks]

    def end(self, key: object) -> None:
        pass


@dataclass
class Side:
    """An engine that is kept busy, and what it has done at this level, slice by slice."""

    engine: Engine
    prompts: list[list[int]]
    params: dict[str, Any]
    running: set[str] = field(default_factory=set)
    rates: list[float] = field(default_factory=list)
    asked: int = 0

    def fill(self, level: int) -> None:
        while len(self.running) < level:
            prompt = self.prompts[self.asked % len(self.prompts)]
            params = SamplingParams(
                max_tokens=NEW_TOKENS, ignore_eos=True, seed=self.asked, **self.params
            )
            self.running.add(self.engine.add_request(prompt, params))
            self.asked += 1

    def slice(self, level: int, seconds: float) -> None:
        tokens, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            if len(self.running) < level:
                self.fill(level)
            for output in self.engine.step():
                tokens += len(output.new_token_ids)
                if output.finished:
                    self.running.discard(output.request_id)
        self.rates.append(tokens / (time.perf_counter() - start))

    def shrink(self, level: int) -> None:
        """Down to so many: the others are aborted."""
        for name in sorted(self.running)[level:]:
            self.engine.abort(name)
            self.running.discard(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tales")
    parser.add_argument("--speculate", default="draft", help="lookup, suffix, draft, head or wrong")
    parser.add_argument("--draft-model", default="tales-draft")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--most", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wide", action="store_true", help="the model in Llama-3.1-8B's shape")
    parser.add_argument("--slice", type=float, default=0.5, help="seconds")
    parser.add_argument("--slices", type=int, default=7)
    parser.add_argument("--levels", help="going up, e.g. 1,16; all powers of two by default")
    parser.add_argument("--warm", type=int, default=1, help="slices at each level before")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    path = locate_model(given.model)
    tokenizer = Tokenizer.load(path)
    by_model = given.speculate in ("draft", "head")

    def build(**fields: Any) -> Engine:
        decoder = load_decoder(path)
        if given.wide:
            from widened import Shape, Widener

            decoder = Widener(decoder.spec, Shape(), given.device, torch.bfloat16).decoder(decoder)
        options = EngineOptions(
            device=given.device,
            max_batch=given.most,
            cache_bytes=2 << 30,
            prefix_cache=False,
            **fields,
        )
        wrong = given.speculate == "wrong" and fields
        return Engine(decoder, tokenizer, options, proposer=Wrong() if wrong else None)  # type: ignore[arg-type]

    guessing: dict[str, Any] = {"draft_tokens": given.draft_tokens}
    if given.speculate != "wrong":
        guessing["speculate"] = given.speculate
    if by_model:
        guessing["draft_model"] = given.draft_model
    ids = tokenizer.encode(read_text(None))
    starts = random.Random(2).sample(range(len(ids) - PROMPT), 200)
    prompts = [ids[s : s + PROMPT] for s in starts]
    sides = {
        name: Side(engine, prompts, {"temperature": given.temperature})
        for name, engine in {
            "never": build(),
            "never, again": build(),
            "always": build(**guessing, draft_control=False),
            "as it pays": build(**guessing),
        }.items()
    }
    up = [1 << i for i in range(given.most.bit_length())]
    if given.levels:
        up = [int(level) for level in given.levels.split(",")]
    machine = torch.cuda.get_device_name() if given.device == "cuda" else cpu_model()
    lines = [
        "# Guesses as they pay, while the load rises and falls",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}; torch {torch.__version__}",
        f"- machine: {machine}",
        f"- command: `python benchmarks/never_slower.py {' '.join(sys.argv[1:])}`",
        "",
        "| sequences | never, tokens/s | never, again (noise) | always | as it pays "
        "| over the better (least to most) |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for level in up:  # what is prepared once for each size is
        for side in sides.values():
            side.fill(level)
            for _ in range(given.warm):
                side.slice(level, given.slice)
    for level in [*up, *up[-2::-1]]:
        for side in sides.values():
            side.shrink(level)
            side.fill(level)
            side.rates = []
        for index in range(given.slices + 1):
            for name in list(sides)[:: -1 if index % 2 else 1]:
                sides[name].slice(level, given.slice)
        never, again, always, paid = (side.rates[1:] for side in sides.values())
        better = never if statistics.median(never) >= statistics.median(always) else always
        ratios = [a / b for a, b in zip(paid, better)]
        noise = [x / y for x, y in zip(again, never)]
        a, b, c = (statistics.median(one) for one in (never, always, paid))
        lines.append(
            f"| {level} | {a:,.0f} | {statistics.median(noise):.2f} ({min(noise):.2f} to "
            f"{max(noise):.2f}) | {b / a:.2f}x | {c / a:.2f}x | "
            f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
        print(lines[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
