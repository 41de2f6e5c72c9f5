"""A draft model's guesses: the law stays, and where guesses are compared every token does."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from joint_laws import Floats, Law, Prefix, chi_square, plain_law
from test_equivalence import BASE, Requests, quarter_cache, serve
from test_speculation import check_greedy
from tiny_models import mixed_spec, random_requests, tiny_decoder, tiny_spec

from skimp.decoding.accept import RULES, RatioTest, RuleName
from skimp.decoding.params import SamplingParams
from skimp.decoding.process import process
from skimp.decoding.proposal import Ask
from skimp.decoding.rows import RowState
from skimp.decoding.sampler import Sampler
from skimp.engine import Engine, EngineOptions
from skimp.engine.draft_model import DraftModel, require_same_tokens
from skimp.errors import OptionError, SkimpError
from skimp.model.spec import ModelSpec
from skimp.text import Tokenizer


def drafting(
    options: EngineOptions,
    spec: ModelSpec | None = None,
    *,
    draft: ModelSpec | None = None,
    seed: int = 1,
    coupled: bool = True,
) -> tuple[Engine, DraftModel]:
    proposer = DraftModel(tiny_decoder(draft or spec, seed=seed), options, coupled=coupled)
    return Engine(tiny_decoder(spec), None, options, proposer=proposer), proposer


def requests_of(backend: str) -> Requests:
    if backend == "plain":
        return random_requests(6, seed=21, max_prompt=40, max_output=20)
    return random_requests(16, seed=21, max_prompt=90, max_output=30)


@pytest.mark.parametrize("mixed", [False, True], ids=["heads", "mixed"])
def test_compared_guesses_change_nothing(mixed: bool, backend: str) -> None:
    spec = mixed_spec() if mixed else None
    requests = requests_of(backend)
    base = dataclasses.replace(BASE, backend=backend, draft_tokens=None)  # type: ignore[arg-type]
    expected = serve(Engine(tiny_decoder(spec), None, base), requests, together=False)
    tight = dataclasses.replace(base, cache_bytes=quarter_cache(requests, base, spec))
    ways = {
        "batched": base,
        "small steps": dataclasses.replace(base, token_budget=33),
        "a quarter of the cache": tight,
        "reuse": dataclasses.replace(base, prefix_cache=True),
    }
    for name, options in ways.items():
        engine, proposer = drafting(options, spec)
        assert serve(engine, requests) == expected, name
        if name == "reuse":
            assert serve(engine, requests) == expected, "warm"
        assert sum(engine.speculation.drafted) > 50, name
        proposer.served.cache.audit()
        assert proposer.served.cache.stats().sequences == 0, name


@pytest.mark.parametrize("ahead", [False, True], ids=["round by round", "ahead"])
@pytest.mark.parametrize("coupled", [True, False], ids=["match", "block"])
@pytest.mark.parametrize("mixed", [False, True], ids=["heads", "mixed"])
def test_a_model_that_guesses_for_itself_is_always_right(
    coupled: bool, mixed: bool, ahead: bool
) -> None:
    """Its rows must then stand at the right places of its cache, whatever was refused before."""
    spec = mixed_spec() if mixed else None
    rule = dataclasses.replace(BASE, deterministic=False)
    engine, proposer = drafting(rule, spec, seed=0, coupled=coupled)
    proposer.runs_ahead = ahead
    if not coupled:
        use_rule(engine, "block")
    serve(engine, requests_of("native"))
    assert sum(engine.speculation.drafted) > 100
    assert engine.speculation.accepted == engine.speculation.drafted


def use_rule(engine: Engine, name: RuleName) -> None:
    engine._acceptor = RatioTest(Sampler(), RULES[name])


ASKED = {"temperature": 0.8, "top_p": 0.97, "frequency_penalty": 0.5}


def law_after(engine: Engine, prompt: list[int]) -> Law:
    """A model's own law of the next token, from its logits."""
    row = RowState(
        SamplingParams(ignore_eos=True, **ASKED),  # type: ignore[arg-type]
        vocab_size=engine.spec.vocab_size,
    )

    def law(prefix: Prefix) -> Floats:
        logits = list(engine.logits([*prompt, *prefix, 0]))[-1][-1:]
        return process(logits, [row.drafted(prefix)]).probabilities()[0].numpy()

    return law


def check_law(rule: RuleName, samples: int) -> None:
    small = dataclasses.replace(tiny_spec((None, 4)), vocab_size=6)
    options = EngineOptions(
        max_batch=64, cache_bytes=32 << 20, prefix_cache=False, threads=1, draft_control=False
    )
    prompt = [1, 2, 3]
    law = plain_law(law_after(Engine(tiny_decoder(small), None, options), prompt), 3)
    engine, _ = drafting(options, small, coupled=False)
    use_rule(engine, rule)
    counts = np.zeros(law.shape)
    for first in range(0, samples, 64):
        params = [
            SamplingParams(max_tokens=5, ignore_eos=True, seed=seed, **ASKED)
            for seed in range(first, first + 64)
        ]
        for out in engine.generate([prompt] * 64, params):
            counts[tuple(out.outputs[0].token_ids[:3])] += 1
    assert chi_square(counts, law) > 1e-5
    assert 0.1 < sum(engine.speculation.accepted) / sum(engine.speculation.drafted) < 0.9


@pytest.mark.parametrize("rule", ["block", "chain"])
def test_the_whole_engine_keeps_the_law(rule: RuleName) -> None:
    check_law(rule, 3200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rule", ["block", "chain"])
def test_the_whole_engine_keeps_the_law_over_many_samples(rule: RuleName) -> None:
    check_law(rule, 100_000)


def test_equal_seeds_alone_and_in_a_batch_in_deterministic_mode() -> None:
    options = EngineOptions(
        deterministic=True,
        speculate="draft",
        draft_model="tales-draft",
        draft_control=False,
        cache_bytes=64 << 20,
    )
    engine = Engine.load("tales", options)
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.encode("Once upon a time")
    asked = SamplingParams(max_tokens=24, seed=5, ignore_eos=True)
    alone = engine.generate([prompt], asked)[0].outputs[0].token_ids
    others = [dataclasses.replace(asked, seed=seed, max_tokens=9 + seed) for seed in range(31)]
    together = engine.generate([prompt] * 32, [*others, asked])
    assert together[-1].outputs[0].token_ids == alone
    assert sum(engine.speculation.accepted) > 0


def test_greedy_stories_with_a_draft() -> None:
    check_greedy(12, 48, "draft", draft_model="tales-draft")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_500_greedy_stories_with_a_draft() -> None:
    print(check_greedy(500, 128, "draft", draft_model="tales-draft"))


def test_no_guess_beyond_the_drafts_own_context() -> None:
    short = dataclasses.replace(tiny_spec(), max_positions=40)
    engine, proposer = drafting(BASE, draft=short)
    requests = [([3, 4, 5] * 8, SamplingParams(max_tokens=60, temperature=0.0))]
    expected = serve(Engine(tiny_decoder(), None, BASE), requests)
    assert serve(engine, requests) == expected
    assert proposer.served.max_context == 40
    assert 0 < engine.speculation.drafted[0] <= 16


def test_sequences_that_end_or_are_aborted_leave_nothing() -> None:
    engine, proposer = drafting(BASE)
    ids = [
        engine.add_request([5 + i, 6, 7] * 9, SamplingParams(max_tokens=30, ignore_eos=True))
        for i in range(4)
    ]
    for _ in range(4):
        engine.step()
    assert proposer.served.cache.stats().sequences == 4
    for request_id in ids:
        engine.abort(request_id)
    assert proposer.served.cache.stats().sequences == 0
    proposer.served.cache.audit()


def test_rows_that_are_no_numbers_end_a_draft() -> None:
    decoder = tiny_decoder(seed=1)
    with torch.no_grad():
        next(decoder.parameters()).fill_(float("nan"))
    requests = random_requests(3, seed=2, max_prompt=20)
    broken = DraftModel(decoder, BASE, coupled=True)
    expected = serve(Engine(tiny_decoder(), None, BASE), requests)
    engine = Engine(tiny_decoder(), None, BASE, proposer=broken)
    assert serve(engine, requests) == expected
    assert sum(engine.speculation.drafted) == 0


def test_options_are_refused() -> None:
    with pytest.raises(OptionError, match="draft_model"):
        EngineOptions(speculate="draft")
    with pytest.raises(OptionError, match="draft_model"):
        EngineOptions(speculate="lookup", draft_model="tales-draft")
    with pytest.raises(OptionError, match="draft_rule"):
        EngineOptions(speculate="suffix", draft_rule="chain")
    fields = {"speculate": "draft", "draft_model": "tales-draft"}
    with pytest.raises(OptionError, match="draft_rule"):
        EngineOptions(**fields, draft_rule="lossy")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"draft_rule.*deterministic"):
        EngineOptions(**fields, draft_rule="block", deterministic=True)  # type: ignore[arg-type]
    assert EngineOptions(**fields).accepts_by == "block"  # type: ignore[arg-type]
    assert EngineOptions(**fields, deterministic=True).accepts_by == "match"  # type: ignore[arg-type]
    with pytest.raises(SkimpError, match="nowhere"):
        Engine.load("tales", EngineOptions(speculate="draft", draft_model="./nowhere"))


def test_models_of_other_tokens_are_refused() -> None:
    small, large = tiny_spec(), dataclasses.replace(tiny_spec(), vocab_size=400)
    with pytest.raises(OptionError, match=r"draft_model.*320.*400"):
        require_same_tokens("it", small, None, large, None)
    require_same_tokens("it", small, None, small, None)

    class Renamed:
        def __init__(self, other: Tokenizer) -> None:
            self._other = other

        def token(self, token_id: int) -> str | None:
            return "?" if token_id == 7 else self._other.token(token_id)

    engine = Engine.load("tales", EngineOptions(cache_bytes=8 << 20))
    own = engine.tokenizer
    assert own is not None
    require_same_tokens("it", engine.spec, own, engine.spec, own)
    with pytest.raises(OptionError, match="token 7 "):
        require_same_tokens("it", engine.spec, Renamed(own), engine.spec, own)  # type: ignore[arg-type]


def test_laws_of_a_draft_are_those_it_was_drawn_from() -> None:
    """Each law sums to 1 and gives the drafted token a chance."""
    proposer = DraftModel(tiny_decoder(seed=1), BASE, coupled=False)
    size = tiny_spec().vocab_size
    rows = [RowState(SamplingParams(seed=i, top_k=5 + i), vocab_size=size) for i in range(5)]
    asks = [
        Ask(key=i, tokens=[3, 4, 5 + i], num_prompt=3, most=1 + i, row=row)
        for i, row in enumerate(rows)
    ]
    for ask, draft in zip(asks, proposer.propose(asks)):
        assert len(draft.tokens) == ask.most and draft.laws is not None
        assert torch.allclose(draft.laws.sum(-1), torch.ones(ask.most, dtype=torch.float64))
        for law, token in itertools.zip_longest(draft.laws, draft.tokens):
            assert law[token] > 0 and int((law > 0).sum()) == ask.row.params.top_k
