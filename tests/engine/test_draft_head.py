"""A draft head's guesses: they come of the right features, and change nothing of the law."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from joint_laws import chi_square, plain_law
from test_draft_model import ASKED, law_after, requests_of
from test_equivalence import BASE, quarter_cache, serve
from tiny_models import mixed_spec, tiny_decoder, tiny_head, tiny_spec
from torch import Tensor

from skimp.decoding.accept import RULES, RatioTest
from skimp.decoding.params import SamplingParams
from skimp.decoding.proposal import Ask, Draft
from skimp.decoding.sampler import Sampler
from skimp.engine import Engine, EngineOptions
from skimp.engine.draft_head import HeadProposer
from skimp.kernels.ops import StepInputs
from skimp.kernels.plain import PlainOps
from skimp.model.spec import ModelSpec


def with_head(
    options: EngineOptions, spec: ModelSpec | None = None, *, words: int | None = None
) -> tuple[Engine, HeadProposer]:
    options = dataclasses.replace(options, speculate="head", draft_model="given")
    head = tiny_head(spec, words=words)
    engine = Engine(tiny_decoder(spec), None, options, draft_head=head)
    proposer = engine.scheduler.proposer
    assert isinstance(proposer, HeadProposer)
    return engine, proposer


def whole(tokens: Sequence[int], features: Tensor | None = None) -> StepInputs:
    """One sequence from its beginning, without a cache."""
    rows = len(tokens)
    return StepInputs(
        token_ids=torch.tensor(tokens, dtype=torch.int32),
        positions=torch.arange(rows, dtype=torch.int32),
        row_seq=torch.zeros(rows, dtype=torch.int32),
        kv_end=torch.arange(1, rows + 1, dtype=torch.int32),
        seq_starts=torch.tensor([0, rows], dtype=torch.int32),
        logit_rows=torch.tensor([rows - 1], dtype=torch.int32),
        features=features,
    )


class Reference:
    """Head and target over whole texts, in PyTorch."""

    def __init__(self, spec: ModelSpec | None, words: int | None) -> None:
        self.ops = PlainOps()
        self.target = tiny_decoder(spec)
        self.head = tiny_head(spec, words=words)
        self.target.fusion = self.head.fusion
        self.target.bind(self.ops)
        self.head.attach(self.target.table, self.target.spec.embed_scale)
        self.head.bind(self.ops)

    @torch.no_grad()
    def laws(self, tokens: list[int], guesses: Sequence[int]) -> Tensor:
        """Of each guess, float64 [k, V]."""
        self.target.states(whole(tokens[:-1]), self.ops)
        features = self.target.features
        assert features is not None
        rows, found = tokens[1:], []
        for guess in guesses:
            logits = self.head(whole(rows, features), self.ops)[0].double()
            law = torch.zeros(self.target.spec.vocab_size, dtype=torch.float64)
            law[self.head.token_ids] = logits.softmax(dim=-1)
            found.append(law)
            own = self.head.features
            assert own is not None
            features, rows = torch.cat((features, own[-1:])), [*rows, guess]
        return torch.stack(found)


@pytest.mark.parametrize("ahead", [False, True], ids=["round by round", "ahead"])
@pytest.mark.parametrize("words", [None, 100], ids=["all words", "some words"])
@pytest.mark.parametrize("mixed", [False, True], ids=["heads", "mixed"])
def test_guesses_come_of_the_right_features(
    mixed: bool, words: int | None, ahead: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = mixed_spec() if mixed else None
    options = dataclasses.replace(BASE, backend=backend, deterministic=False)  # type: ignore[arg-type]
    engine, proposer = with_head(options, spec, words=words)
    proposer.runs_ahead = ahead
    reference, seen = Reference(spec, words), 0
    propose = proposer.propose

    def checked(asks: Sequence[Ask]) -> list[Draft]:
        nonlocal seen
        known = [list(ask.tokens) for ask in asks]
        drafts = propose(asks)
        for ask, tokens, draft in zip(asks, known, drafts):
            if ask.features is None:  # of a prompt that is about to be read
                assert len(tokens) == ask.num_prompt
                continue
            assert draft.tokens and draft.laws is not None
            expected = reference.laws(tokens, draft.tokens)
            assert float((draft.laws - expected).abs().max()) < 1e-4
            seen += len(draft.tokens)
        return drafts

    monkeypatch.setattr(proposer, "propose", checked)
    prompts = [[5, 6, 7, 8, 9], [11, 12], [3] * 9]
    engine.generate(prompts, SamplingParams(max_tokens=20, seed=1, ignore_eos=True))
    assert seen > 60
    proposer.served.cache.audit()
    assert proposer.served.cache.stats().sequences == 0


@pytest.mark.parametrize("words", [None, 100], ids=["all words", "some words"])
def test_guesses_in_one_call_are_those_in_steps(
    words: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: tokens, laws, and what becomes of them."""

    def run() -> tuple[list[Draft], list[list[int]]]:
        engine, proposer = with_head(BASE, words=words)
        drafts, propose = [], proposer.propose

        def recorded(asks: Sequence[Ask]) -> list[Draft]:
            drafts.extend(propose(asks))
            return drafts[-len(asks) :]

        proposer.propose = recorded  # type: ignore[method-assign]
        params = [
            SamplingParams(max_tokens=20, seed=i, temperature=t, ignore_eos=True)
            for i, t in enumerate((0.0, 0.7, 1.0))
        ]
        found = engine.generate([[5, 6, 7, 8, 9], [11, 12], [3] * 9], params)
        return drafts, [out.outputs[0].token_ids for out in found]

    drafts, tokens = run()
    monkeypatch.setattr("skimp.engine.drafting.tempered_only", lambda row, ahead: False)
    others, same_tokens = run()
    assert tokens == same_tokens and len(drafts) == len(others) > 20
    for one, other in zip(drafts, others):
        assert one.tokens == other.tokens and (one.laws is None) == (other.laws is None)
        if one.laws is not None and other.laws is not None:
            assert len(one.laws) == len(one.tokens) and torch.equal(one.laws, other.laws)


@pytest.mark.parametrize("words", [None, 100], ids=["all words", "some words"])
def test_compared_guesses_change_nothing(words: int | None, backend: str) -> None:
    """With gaps in what the head has seen: prompts in parts, preemption, prefixes reused."""
    requests = requests_of(backend)
    base = dataclasses.replace(BASE, backend=backend)  # type: ignore[arg-type]
    expected = serve(Engine(tiny_decoder(), None, base), requests, together=False)
    tight = dataclasses.replace(base, cache_bytes=quarter_cache(requests, base, None))
    ways = {
        "batched": base,
        "small steps": dataclasses.replace(base, token_budget=33),
        "a quarter of the cache": tight,
        "reuse": dataclasses.replace(base, prefix_cache=True),
    }
    for name, options in ways.items():
        engine, proposer = with_head(options, words=words)
        assert serve(engine, requests) == expected, name
        if name == "reuse":
            assert serve(engine, requests) == expected, "warm"
        assert sum(engine.speculation.drafted) > 50, name
        proposer.served.cache.audit()
        assert proposer.served.cache.stats().sequences == 0, name


def test_the_whole_engine_keeps_the_law() -> None:
    small = dataclasses.replace(tiny_spec((None, 4)), vocab_size=6)
    options = EngineOptions(
        max_batch=64, cache_bytes=32 << 20, prefix_cache=False, threads=1, draft_control=False
    )
    prompt = [1, 2, 3]
    law = plain_law(law_after(Engine(tiny_decoder(small), None, options), prompt), 3)
    engine, _ = with_head(options, small, words=5)
    engine._acceptor = RatioTest(Sampler(), RULES["block"])
    counts = np.zeros(law.shape)
    for first in range(0, 3200, 64):
        params = [
            SamplingParams(max_tokens=5, ignore_eos=True, seed=seed, **ASKED)  # type: ignore[arg-type]
            for seed in range(first, first + 64)
        ]
        for out in engine.generate([prompt] * 64, params):
            counts[tuple(out.outputs[0].token_ids[:3])] += 1
    assert chi_square(counts, law) > 1e-5
    assert 0.1 < sum(engine.speculation.accepted) / sum(engine.speculation.drafted) < 0.9
