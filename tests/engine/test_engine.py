"""Requests from admission to the end: refusals, aborts, priorities, log-probabilities, async."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, random_requests, tiny_decoder, tiny_spec

from skimp.cost import memory_plan
from skimp.decoding.params import SamplingParams
from skimp.engine import AsyncEngine, Engine, EngineOptions
from skimp.engine.options import Backend, OptionError
from skimp.errors import RequestError, SkimpError
from skimp.kernels import native
from skimp.kernels.ops import StepInputs
from skimp.kernels.plain import PlainOps

OPTIONS = EngineOptions(max_batch=8, token_budget=64, threads=1)


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny_decoder(), None, OPTIONS)


def reference_logprobs(token_ids: list[int]) -> np.ndarray:
    """Log-softmax of one forward over the whole text, without any cache."""
    decoder = tiny_decoder()
    ops = PlainOps()
    count = len(token_ids)
    positions = torch.arange(count, dtype=torch.int32)
    step = StepInputs(
        token_ids=torch.tensor(token_ids, dtype=torch.int32),
        positions=positions,
        row_seq=torch.zeros(count, dtype=torch.int32),
        kv_end=positions + 1,
        seq_starts=torch.tensor([0, count]),
        logit_rows=positions,
    )
    with torch.no_grad():
        logits = decoder.bind(ops)(step, ops)
    scores = torch.log_softmax(logits.double(), -1)[:-1]
    return scores.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize(
    ("prompt", "params", "named"),
    [
        ([], SamplingParams(max_tokens=1), "prompt"),
        ([VOCAB], SamplingParams(max_tokens=1), r"prompt\[0\]"),
        ([1, -1], SamplingParams(max_tokens=1), r"prompt\[1\]"),
        ([1, True], SamplingParams(max_tokens=1), r"prompt\[1\]"),
        ([1, "a"], SamplingParams(max_tokens=1), r"prompt\[1\]"),
        ([1.5], SamplingParams(max_tokens=1), r"prompt\[0\]"),
        ("text", SamplingParams(max_tokens=1), "tokenizer"),
        ([1] * 1024, SamplingParams(max_tokens=1), "prompt: 1024"),
        ([1] * 1000, SamplingParams(max_tokens=25), "max_tokens: 25"),
        ([1], SamplingParams(max_tokens=1, n=9), "n: 9"),
        ([1], SamplingParams(max_tokens=1, stop=["x"]), "stop"),
        ([1], SamplingParams(max_tokens=1, bad_words=["x"]), "bad_words"),
        ([1], SamplingParams(max_tokens=1, logit_bias={VOCAB: 1.0}), "logit_bias"),
        ([1], SamplingParams(max_tokens=1, stop_token_ids=[VOCAB]), "stop_token_ids"),
    ],
)
def test_bad_requests_are_refused_at_once(
    engine: Engine, prompt: object, params: SamplingParams, named: str
) -> None:
    with pytest.raises(SkimpError, match=named) as caught:
        engine.add_request(prompt, params)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not engine.has_unfinished()
    assert engine.cache.stats().sequences == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "float16"),
        ("device", "tpu"),
        ("threads", 0),
        ("cache_bytes", -5),
        ("max_batch", 0),
        ("max_batch", True),
        ("token_budget", 1.5),
        ("max_context", 0),
        ("page_tokens", "16"),
        ("prefix_cache", 1),
        ("backend", "fast"),
        ("deterministic", "yes"),
    ],
)
def test_bad_options_are_named(field: str, value: object) -> None:
    with pytest.raises(OptionError, match=field):
        EngineOptions(**{field: value})  # type: ignore[arg-type]


def test_options_at_odds_with_the_model() -> None:
    with pytest.raises(OptionError, match="max_context: 4096"):
        Engine(tiny_decoder(), None, dataclasses.replace(OPTIONS, max_context=4096))
    with pytest.raises(OptionError, match="cache_bytes"):
        Engine(tiny_decoder(), None, dataclasses.replace(OPTIONS, cache_bytes=1000))


@pytest.mark.skipif(not native.available(), reason="native kernels are not built")
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_native_pages_are_whole_blocks(backend: Backend) -> None:
    options = dataclasses.replace(OPTIONS, page_tokens=24, backend=backend)
    with pytest.raises(
        OptionError, match="page_tokens: the native backend needs a multiple of 16, got 24"
    ):
        Engine(tiny_decoder(), None, options)


def test_never_fits_is_refused_and_the_rest_served() -> None:
    small = Engine(tiny_decoder(), None, dataclasses.replace(OPTIONS, cache_bytes=200_000))
    with pytest.raises(RequestError, match="cache"):
        small.add_request([1] * 900, SamplingParams(max_tokens=100))
    out = small.generate([[1, 2, 3]], SamplingParams(max_tokens=3))[0]
    assert len(out.outputs[0].token_ids) in (1, 2, 3)


def test_the_default_arena_is_what_the_cost_model_plans() -> None:
    engine = Engine(tiny_decoder(), None, OPTIONS)
    plan = memory_plan(engine.work, batch=8, context=1024, step_tokens=64)
    # Rounded up to whole chunks, so that all sequences fit.
    assert plan.cache_bytes <= engine.cache.arena.budget_bytes <= 1.02 * plan.cache_bytes
    whole = engine.cache.layout.bytes_needed(1024, 64, 8)
    assert abs(plan.cache_bytes / whole - 1) < 0.1  # the arena's own rounding into chunks
    alone = Engine(tiny_decoder(), None, dataclasses.replace(OPTIONS, max_batch=1))
    assert alone.cache.fits(1024, 64)


def test_arena_stays_within_its_budget() -> None:
    options = dataclasses.replace(OPTIONS, cache_bytes=300_000)
    engine = Engine(tiny_decoder(), None, options)
    for prompt, params in random_requests(30, seed=9, max_prompt=120):
        engine.add_request(prompt, params)
    while engine.has_unfinished():
        engine.step()
        stats = engine.cache.stats()
        assert sum(group.bytes_used for group in stats.groups) <= 300_000
    assert engine.cache.arena.data.numel() <= 300_000


def test_abort_returns_every_page(engine: Engine) -> None:
    plain = dataclasses.replace(OPTIONS, prefix_cache=False)
    engine = Engine(tiny_decoder(), None, plain)
    ids = [
        engine.add_request([1] * 90, SamplingParams(max_tokens=50, n=2, ignore_eos=True))
        for _ in range(6)
    ]
    for _ in range(4):
        engine.step()
    for request_id in ids[::-1]:
        engine.abort(request_id)
    engine.abort("never heard of")
    reasons = {o.finish_reason for out in engine.step() for o in out.outputs}
    assert reasons == {"abort"}
    assert not engine.has_unfinished()
    engine.cache.audit()
    assert all(group.pages_used == 0 for group in engine.cache.stats().groups)


def test_priority_goes_first() -> None:
    engine = Engine(tiny_decoder(), None, dataclasses.replace(OPTIONS, max_batch=1))
    late = engine.add_request([1, 2], SamplingParams(max_tokens=2, ignore_eos=True), priority=5)
    soon = engine.add_request([1, 2], SamplingParams(max_tokens=2, ignore_eos=True), priority=-1)
    done: list[str] = []
    while engine.has_unfinished():
        done += [out.request_id for out in engine.step() if out.finished]
    assert done == [soon, late]


def test_duplicate_request_id(engine: Engine) -> None:
    engine.add_request([1], SamplingParams(max_tokens=1), request_id="a")
    with pytest.raises(RequestError, match="request_id"):
        engine.add_request([1], SamplingParams(max_tokens=1), request_id="a")


def test_prompt_logprobs_equal_one_plain_forward(engine: Engine) -> None:
    prompt = random_requests(1, seed=12, max_prompt=300)[0][0]
    expected = reference_logprobs(prompt)
    for _ in range(2):  # the second time the prefix is cached, and must still be computed
        out = engine.generate([prompt], SamplingParams(max_tokens=2, prompt_logprobs=3))[0]
        assert out.prompt_logprobs is not None and out.prompt_logprobs[0] is None
        found = [entry.logprob for entry in out.prompt_logprobs[1:] if entry is not None]
        np.testing.assert_allclose(found, expected, atol=2e-4)
        assert all(len(e.top) == 3 for e in out.prompt_logprobs[1:] if e is not None)
    np.testing.assert_allclose(engine.score(prompt), expected, atol=2e-4)


def test_sampled_logprobs_are_the_models(engine: Engine) -> None:
    prompt = [3, 1, 4, 1, 5]
    params = SamplingParams(max_tokens=8, seed=2, logprobs=2, ignore_eos=True)
    out = engine.generate([prompt], params)[0].outputs[0]
    assert out.logprobs is not None
    whole = reference_logprobs(prompt + out.token_ids)[len(prompt) - 1 :]
    np.testing.assert_allclose([e.logprob for e in out.logprobs], whole, atol=2e-4)


def test_eos_and_stop_tokens_end_a_sequence(engine: Engine) -> None:
    free = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)
    tokens = engine.generate([[7, 8]], free)[0].outputs[0].token_ids
    stop = next(t for t in tokens[3:] if t not in tokens[:3])
    params = dataclasses.replace(free, stop_token_ids=(stop,))
    cut = engine.generate([[7, 8]], params)[0].outputs[0]
    assert cut.token_ids == tokens[: tokens.index(stop) + 1]
    assert cut.finish_reason == "stop"


def test_nan_logits_end_that_request_alone() -> None:
    spec = dataclasses.replace(tiny_spec(), tie_embeddings=False)
    decoder = tiny_decoder(spec)
    assert decoder.embed_tokens.weight is not None
    decoder.embed_tokens.weight.data[5] = float("nan")
    engine = Engine(decoder, None, OPTIONS)
    params = SamplingParams(max_tokens=5, seed=1, ignore_eos=True, logit_bias={5: -100.0})
    scored = dataclasses.replace(params, prompt_logprobs=0)
    prompts = [[1, 5], [1, 5, 2], [1, 2, 3]]
    sick, scored_sick, well = engine.generate(prompts, [params, scored, params])
    for out in (sick, scored_sick):
        assert out.error is not None and out.outputs[0].finish_reason == "error"
    assert well.error is None and len(well.outputs[0].token_ids) == 5
    engine.cache.audit()


def test_stream_abandoned_midway_frees_its_request(engine: Engine) -> None:
    stream = engine.stream([1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    assert not engine.has_unfinished()


def test_generate_keeps_other_requests_outputs(engine: Engine) -> None:
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    aborted = engine.add_request([4], params)
    engine.abort(aborted)
    other = engine.add_request([5], params)
    assert len(engine.generate([[1], [2]], params)) == 2
    seen = {}
    while engine.has_unfinished():
        seen |= {out.request_id: out for out in engine.step()}
    assert set(seen) == {aborted, other}
    assert len(seen[other].outputs[0].token_ids) == 2


def test_two_threads_and_one_agree() -> None:
    requests = random_requests(6, seed=21, max_prompt=120)
    texts = []
    for threads in (1, 2):
        engine = Engine(tiny_decoder(), None, dataclasses.replace(OPTIONS, threads=threads))
        outs = engine.generate([p for p, _ in requests], [s for _, s in requests])
        texts.append([out.outputs[0].token_ids for out in outs])
    assert texts[0] == texts[1]


def test_async_engine_serves_many_and_aborts() -> None:
    requests = random_requests(12, seed=31, max_prompt=60)
    sync = Engine(tiny_decoder(), None, OPTIONS)
    expected = [sync.generate([p], s)[0].outputs[0].token_ids for p, s in requests]

    async def serve() -> None:
        inner = Engine(tiny_decoder(), None, OPTIONS)
        engine = AsyncEngine(inner)

        async def one(prompt: list[int], params: SamplingParams) -> list[int]:
            tokens: list[int] = []
            async for out in engine.generate(prompt, params):
                tokens += out.new_token_ids
            return tokens

        async def leave_early() -> None:
            async for _ in engine.generate([1, 2], SamplingParams(max_tokens=500)):
                break

        found = await asyncio.gather(*(one(p, s) for p, s in requests), leave_early())
        assert found[:-1] == expected
        with pytest.raises(RequestError, match="prompt"):
            await one([], SamplingParams())
        await engine.close()
        assert not inner.has_unfinished()

    asyncio.run(asyncio.wait_for(serve(), 120))
    assert not [t for t in threading.enumerate() if t.name == "skimp-engine"]
