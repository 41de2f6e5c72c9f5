"""Tiny engines that guess in every way, all guesses being compared with what the target draws."""

from __future__ import annotations

import dataclasses

from tiny_models import tiny_decoder, tiny_head

from skimp.engine import Engine, EngineOptions
from skimp.engine.draft_model import DraftModel
from skimp.model.spec import ModelSpec

WAYS = ("lookup", "suffix", "draft", "head")


def guessing(
    way: str, options: EngineOptions, spec: ModelSpec | None = None, *, seed: int = 1
) -> Engine:
    """``draft`` guesses with another tiny model, which is the target itself where ``seed`` is 0;
    ``head`` with a random head that knows some of the words."""
    target = tiny_decoder(spec)
    if way == "draft":
        draft = DraftModel(tiny_decoder(spec, seed=seed), options, coupled=True)
        return Engine(target, None, options, proposer=draft)
    fields: dict[str, str] = {"speculate": way}
    if way == "head":
        fields |= {"draft_model": "given", "draft_rule": "match"}
    chosen = dataclasses.replace(options, **fields)  # type: ignore[arg-type]
    head = tiny_head(spec, words=200) if way == "head" else None
    return Engine(target, None, chosen, draft_head=head)
