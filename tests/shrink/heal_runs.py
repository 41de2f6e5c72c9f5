"""A small model with a tokenizer, a text, and runs of recipes that heal."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from shrink.runs import run
from small_checkpoint import write_model

from skimp.model.loading import load_decoder
from skimp.model.saving import save_checkpoint
from skimp.shrink.pipeline import Outcome

WORDS = [
    "the",
    "old",
    "fox",
    "ran",
    "over",
    "a",
    "hill",
    "and",
    "sat",
    "by",
    "the",
    "cold",
    "river",
    "to",
    "eat",
    "his",
    "bread",
    "in",
    "peace",
]


def write_healable(folder: Path, **changes: Any) -> Path:
    """A model in ``folder``/model whose predictions have some contrast, and ``text.txt`` and
    ``text.jsonl`` beside it, of the same documents."""
    plain = write_model(folder / "plain", **changes)
    decoder = load_decoder(plain)
    for name, parameter in decoder.named_parameters():
        if "embed" in name or "lm_head" in name:
            parameter.data.mul_(8.0)
        elif parameter.dim() == 2:
            parameter.data.mul_(6.0)
    save_checkpoint(folder / "model", decoder.spec, decoder, tokenizer_files_from=plain)
    rng = random.Random(0)
    docs = [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(60)]
    (folder / "text.txt").write_text("".join(f"{doc}\n<|endoftext|>\n" for doc in docs))
    lines = [json.dumps({"text": doc}) + "\n" for doc in docs]
    (folder / "text.jsonl").write_text("".join(lines))
    return folder / "model"


def heal(model: Path, output: Path, fields: str, before: str = "", **kw: Any) -> Outcome:
    """``before`` and then a heal step with ``fields``, on the text beside the model."""
    if "text:" not in fields and "chat:" not in fields:
        fields = f"text: text.txt, {fields}"
    text = "".join(f"{line}\n" for line in (before, f"- heal: {{{fields}}}") if line)
    return run(model, text, output, **kw)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in load_decoder(directory).named_parameters()}
