"""Guessing changes no token (float32), whatever else is on."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from importlib import resources

import pytest
from test_equivalence import BASE, Oracle, build, quarter_cache, serve
from tiny_models import mixed_spec, random_requests

from skimp.cache.layout import ALIGN
from skimp.decoding.params import SamplingParams
from skimp.decoding.proposal import Ask, Draft
from skimp.engine import Engine, EngineOptions
from skimp.errors import OptionError
from skimp.meter.cases import Case, check_case

PROPOSERS = ["lookup", "suffix"]


@pytest.mark.parametrize("speculate", PROPOSERS)
@pytest.mark.parametrize("mixed", [False, True], ids=["heads", "mixed"])
def test_all_ways(speculate: str, mixed: bool, backend: str) -> None:
    """Requests with every kind of parameter; tiny models repeat themselves, so guesses stand."""
    spec = mixed_spec() if mixed else None
    count, longest = (5, 40) if backend == "plain" else (16, 90)
    requests = random_requests(count, seed=11, max_prompt=longest, max_output=40)
    requests += [
        ([3 + i, 4, 5, 6] * 4, SamplingParams(max_tokens=60, temperature=0.0))
        for i in range(count // 2)
    ]
    base = dataclasses.replace(BASE, backend=backend)  # type: ignore[arg-type]
    expected = serve(build(base, spec), requests, together=False)
    on = dataclasses.replace(base, speculate=speculate)  # type: ignore[arg-type]
    tight = dataclasses.replace(on, cache_bytes=quarter_cache(requests, base, spec))
    ways = {
        "batched": on,
        "3 guesses": dataclasses.replace(on, draft_tokens=3),
        "small steps": dataclasses.replace(on, token_budget=33),
        "a quarter of the cache": tight,
        "reuse": dataclasses.replace(on, prefix_cache=True),
    }
    for name, options in ways.items():
        engine = build(options, spec)
        assert serve(engine, requests) == expected, name
        assert sum(engine.speculation.accepted) > 10 * count // 2, name
        if name == "reuse":
            assert serve(engine, requests) == expected, "warm"
            assert engine.cache.stats().prefix.tokens_reused > 0


def texts() -> str:
    return resources.files("skimp").joinpath("assets/text/evaluation.txt").read_text("utf-8")


def story_prompts(engine: Engine, count: int) -> list[list[int]]:
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(texts())
    draw = random.Random(0)
    starts = [draw.randrange(len(ids) - 100) for _ in range(count)]
    return [ids[start : start + draw.randrange(8, 100)] for start in starts]


def check_greedy(count: int, tokens: int, speculate: str, **fields: object) -> float:
    """Tokens a step, when all are those of plain generation."""
    options = EngineOptions(
        dtype="float32", max_batch=32, cache_bytes=40 << 20, draft_control=False
    )
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    plain = Engine.load("tales", options)
    prompts = story_prompts(plain, count)
    expected = [out.outputs[0].token_ids for out in plain.generate(prompts, params)]
    on = dataclasses.replace(options, speculate=speculate, **fields)  # type: ignore[arg-type]
    engine = Engine.load("tales", on)
    found = [out.outputs[0].token_ids for out in engine.generate(prompts, params)]
    assert found == expected
    assert sum(engine.speculation.accepted) > count * tokens / 20
    if count > 100:
        assert engine.scheduler.preemptions > 0
    return engine.speculation.tokens_per_step


@pytest.mark.parametrize("speculate", PROPOSERS)
def test_greedy_stories(speculate: str) -> None:
    check_greedy(12, 48, speculate)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("speculate", PROPOSERS)
def test_500_greedy_stories(speculate: str) -> None:
    print(speculate, check_greedy(500, 128, speculate))


class Always:
    """Guesses the same tokens, and notes what it was asked."""

    def __init__(self, draft: Sequence[int]) -> None:
        self.draft, self.asks, self.ended = list(draft), 0, 0
        self.most: list[int] = []
        self.outputs: list[int] = []  # that there were when it was asked

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        self.asks += len(asks)
        self.most += [ask.most for ask in asks]
        self.outputs += [len(ask.tokens) - ask.num_prompt for ask in asks]
        return [Draft(tuple(self.draft[: ask.most])) for ask in asks]

    def end(self, key: object) -> None:
        self.ended += 1


def test_wrong_guesses_are_rolled_back() -> None:
    requests = random_requests(12, seed=5, max_prompt=50)
    expected = serve(build(BASE), requests)
    wrong = Always([7, 8, 9, 10])
    engine = build(BASE, proposer=wrong)
    assert serve(engine, requests) == expected
    assert wrong.asks > 50 and wrong.ended >= len(requests)
    assert sum(engine.speculation.drafted) > 10 * sum(engine.speculation.accepted)
    assert engine.cache.stats().sequences == 0


Page = tuple[str, int, int]  # request, group of layers, number


def step_pages(engine: Engine) -> dict[Page, bytes]:
    """After a step, the bytes of every page that committed tokens fill."""
    arena, found = engine.cache.arena, {}
    for seq in engine.scheduler.running:
        assert seq.cache is not None and not seq.cache.pending
        for group, pages in zip(engine.cache.layout.groups, seq.cache.pages):
            full = seq.cache.length // group.page_tokens
            for number, page in enumerate(pages[:full]):
                if page:
                    begin = page * ALIGN
                    cells = arena.data[begin : begin + group.page_bytes]
                    key = seq.request.request_id, group.index, number
                    found[key] = cells.numpy().tobytes()
    return found


@pytest.mark.parametrize(
    ("mixed", "cache_dtype"),
    [(False, "auto"), (False, "int8"), (True, "auto")],
    ids=["heads", "int8", "mixed"],
)
def test_the_cache_is_that_of_plain_generation(mixed: bool, cache_dtype: str) -> None:
    """Step by step, with guesses of which some stand, bit for bit."""
    spec = mixed_spec() if mixed else None
    options = dataclasses.replace(BASE, cache_dtype=cache_dtype)  # type: ignore[arg-type]
    requests = [
        (prompt, dataclasses.replace(params, max_tokens=60, ignore_eos=True))
        for prompt, params in random_requests(6, seed=31, max_prompt=70)
    ]
    plain: dict[Page, bytes] = {}

    def add_all(engine: Engine) -> None:
        for index, (prompt, params) in enumerate(requests):
            engine.add_request(prompt, params, request_id=f"{index}")

    engine = build(options, spec)
    add_all(engine)
    while engine.has_unfinished():
        engine.step()
        plain |= step_pages(engine)
    texts = [p + s[0] for (p, _), s in zip(requests, serve(build(options, spec), requests))]
    engine = build(options, spec, proposer=Oracle(texts))
    add_all(engine)
    compared = 0
    while engine.has_unfinished():
        engine.step()
        for key, cells in step_pages(engine).items():
            assert plain[key] == cells, key
            compared += 1
    stats = engine.speculation
    assert compared > 300 and 0 < sum(stats.accepted) < sum(stats.drafted)


class Failing(Always):
    """Raises at every third call of either kind."""

    calls = 0

    def _maybe(self) -> None:
        self.calls += 1
        if self.calls % 3 == 0:
            raise RuntimeError("no guess today")

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        self._maybe()
        return super().propose(asks)

    def end(self, key: object) -> None:
        self._maybe()


def test_a_proposer_that_raises_loses_nothing() -> None:
    requests = random_requests(10, seed=6, max_prompt=50)
    expected = serve(build(BASE), requests)
    engine = build(BASE, proposer=Failing([7, 8]))
    ids = [engine.add_request(prompt, params) for prompt, params in requests]
    done = {}
    while engine.has_unfinished():
        try:
            done |= {out.request_id: out for out in engine.step() if out.finished}
        except RuntimeError:
            engine.cache.audit()
    assert [[o.token_ids for o in done[i].outputs] for i in ids] == expected
    assert engine.cache.stats().sequences == 0


def test_guesses_evict_no_prefix() -> None:
    """A prefix that plain generation keeps is kept with guesses, too."""
    pages = dataclasses.replace(BASE, prefix_cache=True)
    first, second = list(range(3, 100)), list(range(200, 226))
    asked = [(first, 4), (second, 4), (first, 2)]

    def reused(proposer: Always | None) -> list[int]:
        size = build(pages).cache.layout.bytes_needed(8 * 16, 512)
        engine = build(dataclasses.replace(pages, cache_bytes=size), proposer=proposer)
        params = [SamplingParams(max_tokens=n, temperature=0.0) for _, n in asked]
        outs = [engine.generate([p], s)[0] for (p, _), s in zip(asked, params)]
        return [out.metrics.reused_prompt_tokens for out in outs]

    assert reused(None)[2] > 0
    assert reused(Always([1] * 8)) == reused(None)


def test_the_last_token_of_a_context_is_drawn_plainly() -> None:
    prompt = [3, 4, 5, 6] * 4
    options = dataclasses.replace(BASE, max_context=32)
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    proposer = Always([9] * 8)
    engine = build(options, proposer=proposer)
    assert serve(engine, [(prompt, params)]) == serve(build(options), [(prompt, params)])
    assert max(m + o for m, o in zip(proposer.most, proposer.outputs)) == 15


def test_drafts_take_nobodys_place() -> None:
    """With a budget of one token a sequence there is no room for guesses, and all still move."""
    requests = [([5 + i, 6, 7], SamplingParams(max_tokens=20, temperature=0.0)) for i in range(16)]
    options = dataclasses.replace(BASE, token_budget=16, max_batch=16)
    proposer = Always([1, 2, 3])
    engine = build(options, proposer=proposer)
    for prompt, params in requests:
        engine.add_request(prompt, params)
    running = engine.scheduler.running
    while len(running) < 16 or any(seq.num_tokens == seq.num_prompt for seq in running):
        engine.step()
    before = [len(seq.tokens) for seq in engine.scheduler.running]
    engine.step()
    assert [len(seq.tokens) - b for seq, b in zip(engine.scheduler.running, before)] == [1] * 16


def test_statistics_by_position() -> None:
    engine = build(dataclasses.replace(BASE, speculate="lookup", draft_tokens=4))
    serve(engine, [([3, 4, 5, 6] * 4, SamplingParams(max_tokens=80, temperature=0.0))])
    found = engine.speculation
    assert len(found.drafted) == len(found.accepted) == 4
    assert found.drafted == sorted(found.drafted, reverse=True)
    assert found.accepted == sorted(found.accepted, reverse=True)
    assert found.tokens_per_step == 1 + sum(found.accepted) / found.steps
    assert found.by_position[0] == found.accepted[0] / found.drafted[0]


def test_options_are_refused() -> None:
    with pytest.raises(OptionError, match="speculate"):
        EngineOptions(speculate="medusa")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="draft_tokens"):
        EngineOptions(speculate="lookup", draft_tokens=33)
    with pytest.raises(OptionError, match="overlap"):
        EngineOptions(speculate="lookup", overlap=True, draft_control=False)
    with pytest.raises(OptionError, match="draft_tokens"):
        build(EngineOptions(draft_tokens=3))
    engine = build(dataclasses.replace(BASE, speculate="lookup"))
    with pytest.raises(ValueError, match="speculate"):
        check_case(engine.cache.arena, engine.options, Case(batch=1, context=8, new_tokens=4), "m")
