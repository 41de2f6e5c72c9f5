"""Guesses for a large target on a GPU: `tales` widened to Llama-3.1-8B's shape (widened.py). Those
who guess know what it will say: `tales-draft`, `tales` itself in four bits, and a draft head that
was trained for `tales`, widened too.

    python benchmarks/speculate_gpu.py [--head DIR] [--int4 DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parent))

from widened import Shape, Widener

from skimp.cli.evaluate import read_text
from skimp.draft import read_head
from skimp.engine import Engine, EngineOptions
from skimp.meter.calibrate import engine_hardware
from skimp.meter.speculation.measure import measure_speculation
from skimp.meter.speculation.prompts import choose_prompts, packaged_prompts
from skimp.model.loading import load_decoder
from skimp.model.locate import locate_model
from skimp.text.tokenizer import Tokenizer

HEAD_INNER = 14336


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", type=Path)
    parser.add_argument("--int4", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", type=int, nargs=4, default=(4096, 32, 32, 14336))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    path = locate_model("tales")
    tokenizer = Tokenizer.load(path)
    small = load_decoder(path)
    shape = Shape(*given.shape)
    dtype = torch.bfloat16
    base = {"device": given.device, "max_batch": 8, "cache_bytes": 1 << 30, "prefix_cache": False}
    wanted: dict[str, dict[str, object]] = {
        "tales-draft, 4": {
            "speculate": "draft",
            "draft_model": "tales-draft",
            "draft_tokens": 4,
            "draft_control": False,
        },
        "tales-draft, as it pays": {"speculate": "draft", "draft_model": "tales-draft"},
    }
    if given.int4 is not None:
        wanted["tales in int4, 6"] = {
            "speculate": "draft",
            "draft_model": str(given.int4),
            "draft_tokens": 6,
            "draft_control": False,
        }
        wanted["tales in int4, as it pays"] = {"speculate": "draft", "draft_model": str(given.int4)}
    if given.head is not None:
        wanted["head, 4"] = {
            "speculate": "head",
            "draft_model": str(given.head),
            "draft_tokens": 4,
            "draft_control": False,
        }

    def build(**fields: object) -> Engine:
        widener = Widener(small.spec, shape, given.device, dtype)
        head = None
        if fields.get("speculate") == "head":
            assert given.head is not None
            narrow = read_head(given.head, small.spec)
            head = widener.head(narrow, min(HEAD_INNER, shape.inner))
        options = EngineOptions(**base, **fields)  # type: ignore[arg-type]
        return Engine(widener.decoder(small), tokenizer, options, draft_head=head)

    plain = build()
    engines = {name: build(**fields) for name, fields in wanted.items()}
    gc.collect()
    prompts = [p for p in packaged_prompts(read_text(None)) if p.category == "story"]
    chosen = choose_prompts(prompts, tokenizer, most_tokens=80, each=given.prompts)
    hardware = engine_hardware(plain)
    began = time.monotonic()
    found = measure_speculation(
        plain,
        engines,
        chosen,
        hardware,
        batch=given.batch,
        new_tokens=given.tokens,
        rounds=given.rounds,
        progress=lambda line: print(f"{time.monotonic() - began:.0f} s: {line}", flush=True),
    )
    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    lines = [
        "# Guesses for an 8B-shaped target",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}; torch {torch.__version__}",
        f"- machine: {device}; target: {shape}, vocabulary {small.spec.vocab_size}, bfloat16",
        f"- command: `python benchmarks/speculate_gpu.py {' '.join(sys.argv[1:])}`",
        "",
        "| guesses | T | tokens a step | accepted by place | c | v(k) | ms a plain step "
        "| predicted | achieved (least to most) | achieved / predicted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        places = " ".join(f"{a / d:.2f}" for a, d in zip(one.accepted, one.drafted) if d)
        checks = " ".join(f"{c.guesses}:{c.ratio:.2f}" for c in one.checks)
        guess = "" if one.guess is None else f"{one.guess:.3f}"
        lines.append(
            f"| {one.name} | {one.temperature:g} | {one.tokens_per_step:.2f} | {places} "
            f"| {guess} | {checks} | {given.batch / one.plain_tokens_per_s * 1e3:.2f} "
            f"| {one.predicted:.2f} | "
            f"{one.gain:.2f} ({min(one.gains):.2f} to {max(one.gains):.2f}) | "
            f"{one.gain / one.predicted:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
