"""Every feature of a request beside every way of guessing: what plain generation gives, or an error
that names both."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from guessing import WAYS, guessing
from test_equivalence import BASE
from test_speculation import story_prompts
from tiny_models import tiny_decoder, tiny_spec

from skimp.decoding.params import SamplingParams
from skimp.decoding.sampler import TokenLogprobs
from skimp.engine import Engine, EngineOptions, RequestOutput

# Of each field of SamplingParams at least one value other than its own default.
FEATURES: dict[str, dict[str, Any]] = {
    "max_tokens": {"max_tokens": 7},
    "min_tokens": {"min_tokens": 20, "stop_token_ids": list(range(0, 300, 2))},
    "temperature": {"temperature": 0.6},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "logit_bias": {"logit_bias": {5: 6.0, 9: -100.0, 7: 4.0}},
    "bad_words": {"bad_words": [[5, 6], [8], [7, 7]], "temperature": 0.0},
    "stop_token_ids": {"stop_token_ids": list(range(0, 320, 9))},
    "ignore_eos": {"ignore_eos": True},
    "include_stop": {"include_stop": True, "stop_token_ids": list(range(0, 320, 9))},
    "seed": {"seed": 12345},
    "n": {"n": 3},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2},
}
PROMPTS = [[5, 6, 7, 8] * 5, [9, 5, 6], [7] * 12, [11, 12, 13, 14, 11, 12, 13, 14, 11]]


def found(engine: Engine, asked: dict[str, Any]) -> list[RequestOutput]:
    params = [SamplingParams(**{"max_tokens": 40, "seed": i, **asked}) for i in range(len(PROMPTS))]
    return engine.generate(PROMPTS, params)


def same(one: TokenLogprobs | None, other: TokenLogprobs | None) -> bool:
    if one is None or other is None:
        return one is other
    near = abs(one.logprob - other.logprob) < 1e-4
    tops = zip(one.top, other.top, strict=True)
    tops_near = all(a == b and abs(x - y) < 1e-4 for (a, x), (b, y) in tops)
    return near and tops_near and (one.token_id, one.rank) == (other.token_id, other.rank)


def test_every_field_is_here() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    tried = {name for asked in FEATURES.values() for name in asked}
    assert fields - tried == {"stop"}  # text, which has a test of its own


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("way", WAYS)
def test_as_in_plain_generation(way: str, feature: str) -> None:
    asked = FEATURES[feature]
    plain = found(Engine(tiny_decoder(), None, BASE), asked)
    engine = guessing(way, BASE)
    guessed = found(engine, asked)
    for one, other in zip(plain, guessed, strict=True):
        assert one.error is None and other.error is None
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason
            assert (a.logprobs is None) == (b.logprobs is None)
            if a.logprobs is not None and b.logprobs is not None:
                assert len(a.logprobs) == len(a.token_ids) == len(b.logprobs)
                assert all(map(same, a.logprobs, b.logprobs))
        ours, theirs = one.prompt_logprobs, other.prompt_logprobs
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert len(ours) == len(theirs) and all(map(same, ours, theirs))
    engine.cache.audit()
    assert engine.cache.stats().sequences == 0


def test_guesses_were_made_beside_every_feature() -> None:
    for feature, asked in FEATURES.items():
        engine = guessing("draft", BASE, seed=0)
        found(engine, asked)
        assert sum(engine.speculation.accepted) > 0, feature


STOPS: list[dict[str, Any]] = [
    {"stop": ["."]},
    {"stop": [" the", "and"], "include_stop": True},
    {"stop": ["e w", " sa"], "min_tokens": 9},
    {"stop": ["not to be found anywhere"]},
]


@pytest.mark.parametrize("asked", STOPS)
@pytest.mark.parametrize("way", ["lookup", "draft"])
def test_stop_strings_cut_within_a_block(way: str, asked: dict[str, Any]) -> None:
    """The model guesses for itself, so blocks run on behind the text's end."""
    options = EngineOptions(
        dtype="float32",
        cache_bytes=40 << 20,
        threads=1,
        deterministic=True,
        draft_control=False,
        prefix_cache=False,
    )
    plain = Engine.load("tales", options)
    on = {"speculate": way} | ({"draft_model": "tales"} if way == "draft" else {})
    engine = Engine.load("tales", dataclasses.replace(options, **on))  # type: ignore[arg-type]
    prompts = story_prompts(plain, 4)
    params = [SamplingParams(max_tokens=30, seed=i, **asked) for i in range(4)]
    for one, other in zip(plain.generate(prompts, params), engine.generate(prompts, params)):
        a, b = one.outputs[0], other.outputs[0]
        assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)
    engine.cache.audit()
    assert engine.cache.stats().sequences == 0
    if way == "draft":
        assert engine.speculation.accepted == engine.speculation.drafted


@pytest.mark.parametrize("rule", ["block", "match"])
def test_2000_copies_without_a_seed_are_independent(rule: str) -> None:
    """As many pairs of equal answers as the law makes: no two copies share their numbers."""
    spec = dataclasses.replace(tiny_spec((None, 8)), vocab_size=8)
    options = EngineOptions(
        max_batch=64,
        cache_bytes=16 << 20,
        threads=1,
        prefix_cache=False,
        draft_control=False,
        speculate="head",
        draft_model="given",
        draft_rule=rule,  # type: ignore[arg-type]
    )
    from tiny_models import tiny_head

    engine = Engine(tiny_decoder(spec), None, options, draft_head=tiny_head(spec))
    asked = SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0)
    outs = engine.generate([[1, 2, 3]] * 2000, asked)
    answers = np.array([out.outputs[0].token_ids for out in outs])
    codes = answers @ (8 ** np.arange(4))
    counts = np.bincount(codes, minlength=8**4)
    law = np.ones(1)
    rows = [[]]
    for _ in range(4):
        chances = []
        for prefix in rows:
            logits = list(engine.logits([1, 2, 3, *prefix, 0]))[-1][-1].double()
            chances.append(logits.softmax(dim=-1).numpy())
        law = (law[:, None] * np.stack(chances)).reshape(-1)
        rows = [[*prefix, token] for prefix in rows for token in range(8)]
    equal = float((law**2).sum())
    pairs = 2000 * 1999 / 2
    seen = float((counts * (counts - 1) / 2).sum())
    # Pairs share copies, which is the larger part of the variance.
    triple = float((law**3).sum())
    variance = pairs * (equal - equal**2) + 2000 * 1999 * 1998 * (triple - equal**2)
    assert abs(seen - pairs * equal) < 5 * variance**0.5
    # Neighbours in the batch, whose steps are computed together, are as unlike as any.
    alike = float((codes[1:] == codes[:-1]).mean())
    assert abs(alike - equal) < 5 * (equal * (1 - equal) / 1000) ** 0.5
    assert sum(engine.speculation.accepted) > 500
