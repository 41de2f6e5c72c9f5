"""Batching, chunking, preemption, prefix reuse and drafts change no token (float32)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from tiny_models import mixed_spec, random_requests, tiny_decoder, tiny_spec

from skimp.decoding.params import SamplingParams
from skimp.decoding.proposal import Ask, Draft
from skimp.engine import Engine, EngineOptions
from skimp.model.spec import ModelSpec

BASE = EngineOptions(
    deterministic=True,
    max_batch=32,
    prefix_cache=False,
    token_budget=512,
    threads=1,
    draft_control=False,
)

Requests = list[tuple[list[int], SamplingParams]]


def serve(engine: Engine, requests: Requests, *, together: bool = True) -> list[list[list[int]]]:
    """Token ids by request and sample."""
    if together:
        outs = engine.generate([p for p, _ in requests], [s for _, s in requests])
    else:
        outs = [engine.generate([p], s)[0] for p, s in requests]
    engine.cache.audit()
    return [[sample.token_ids for sample in out.outputs] for out in outs]


def build(options: EngineOptions, spec: ModelSpec | None = None, **kwargs: object) -> Engine:
    return Engine(tiny_decoder(spec), None, options, **kwargs)  # type: ignore[arg-type]


def quarter_cache(
    requests: Requests, options: EngineOptions = BASE, spec: ModelSpec | None = None
) -> int:
    """A quarter of the bytes that the 32 longest requests need together, and room for one."""
    engine = build(options, spec)
    lengths = sorted((len(p) + (s.max_tokens or 0) for p, s in requests), reverse=True)
    need = sum(engine.cache.layout.bytes_needed(length) for length in lengths[:32])
    return max(need // 4, 2 * engine.cache.layout.bytes_needed(lengths[0]))


def check_all_ways(
    requests: Requests, backend: str, spec: ModelSpec | None = None, **fields: object
) -> None:
    base = dataclasses.replace(BASE, backend=backend, **fields)  # type: ignore[arg-type]
    alone = dataclasses.replace(base, overlap=False)
    expected = serve(build(alone, spec), requests, together=False)
    ways = {
        "batched": base,
        "chunk 7": dataclasses.replace(base, token_budget=7),
        "chunk 64": dataclasses.replace(base, token_budget=64),
        "chunk 256": dataclasses.replace(base, token_budget=256),
    }
    for name, options in ways.items():
        assert serve(build(options, spec), requests) == expected, name
    tight = dataclasses.replace(base, cache_bytes=quarter_cache(requests, base, spec))
    engine = build(tight, spec)
    assert serve(engine, requests) == expected, "a quarter of the cache"
    assert engine.scheduler.preemptions > 0, "the tight cache did not preempt"
    reuse = build(dataclasses.replace(base, prefix_cache=True), spec)
    assert serve(reuse, requests) == expected, "prefix reuse, cold"
    assert serve(reuse, requests) == expected, "prefix reuse, warm"
    assert reuse.cache.stats().prefix.tokens_reused > 0


def test_native_all_ways() -> None:
    check_all_ways(random_requests(60, seed=1), "native")


def test_layers_of_all_kinds_all_ways(backend: str) -> None:
    """The whole past, windows and latents in one model, each with pages of its own kind."""
    longest = 40 if backend == "plain" else 400  # more than one span of latents
    requests = random_requests(32, seed=3, max_prompt=longest, max_output=40)
    check_all_ways(requests, backend, mixed_spec())


@pytest.mark.parametrize("mixed", [False, True])
def test_overlapped_all_ways(mixed: bool) -> None:
    """Tokens that the host learns of a step later are the same; requests whose draws need the
    host come in between, or not at all."""
    requests = random_requests(60, seed=1)
    if not mixed:
        kept = ("temperature", "min_p", "seed", "max_tokens", "ignore_eos", "stop_token_ids")
        requests = [
            (prompt, SamplingParams(**{name: getattr(params, name) for name in kept}))
            for prompt, params in requests
        ]
    check_all_ways(requests, "native", overlap=True)


LOW_BIT_CACHES = [
    {"cache_dtype": "int8"},
    {"cache_dtype": "int8", "cache_recent": 40},
    {"cache_dtype": "fp8"},
    {"cache_dtype": "int4", "cache_recent": 20},
    {"cache_dtype": "int4", "cache_recent": 0, "cache_hadamard": False},
]


@pytest.mark.parametrize("cache", LOW_BIT_CACHES, ids=lambda c: "-".join(map(str, c.values())))
def test_low_bit_caches_all_ways(cache: dict[str, object]) -> None:
    """What is stored is rounded, yet once and for all: whoever reads it finds the same."""
    check_all_ways(random_requests(60, seed=1), "native", **cache)


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8", "int4"])
def test_plain_low_bit_caches_in_chunks(cache_dtype: str) -> None:
    requests = random_requests(6, seed=3, max_prompt=40)
    cache = {"cache_dtype": cache_dtype, "cache_recent": 8}
    base = dataclasses.replace(BASE, backend="plain", **cache)  # type: ignore[arg-type]
    expected = serve(build(base), requests, together=False)
    chunks = dataclasses.replace(base, token_budget=7, prefix_cache=True)
    assert serve(build(chunks), requests) == expected


@pytest.mark.parametrize("cache", LOW_BIT_CACHES, ids=lambda c: "-".join(map(str, c.values())))
def test_low_bit_caches_beside_bfloat16(cache: dict[str, object]) -> None:
    requests = random_requests(12, seed=9, max_prompt=200)

    def served(**fields: object) -> list[list[list[int]]]:
        options = dataclasses.replace(BASE, **cache, **fields)  # type: ignore[arg-type]
        engine = Engine(tiny_decoder(dtype="bfloat16"), None, options)
        return serve(engine, requests, together="token_budget" in fields)

    expected = served()
    for budget in (512, 64, 7):
        found = served(token_budget=budget, prefix_cache=budget == 64, threads=1 + budget % 3)
        assert found == expected, budget


@pytest.mark.parametrize("spec", [tiny_spec(), mixed_spec()], ids=["heads", "mixed"])
@pytest.mark.parametrize("threads", [1, 2])
def test_native_float32_needs_no_deterministic_mode(threads: int, spec: ModelSpec) -> None:
    """On two threads the batches must give what one thread gives alone."""
    requests = random_requests(12, seed=8, max_prompt=300)
    plain = dataclasses.replace(BASE, deterministic=False)
    expected = serve(build(plain, spec), requests, together=False)
    for budget in (512, 64, 7):
        options = dataclasses.replace(plain, threads=threads, token_budget=budget)
        assert serve(build(options, spec), requests) == expected, budget


@pytest.mark.slow
def test_native_all_ways_300() -> None:
    check_all_ways(random_requests(300, seed=2), "native")


def test_plain_all_ways() -> None:
    check_all_ways(random_requests(24, seed=3, max_prompt=40), "plain")


@pytest.mark.parametrize("spec", [tiny_spec(), mixed_spec()], ids=["heads", "mixed"])
def test_bfloat16_in_deterministic_mode(spec: ModelSpec) -> None:
    """Rows of one step and of a hundred take the same kernels, so even bfloat16 agrees."""
    requests = random_requests(12, seed=9, max_prompt=200)

    def bf16(options: EngineOptions) -> Engine:
        return Engine(tiny_decoder(spec, dtype="bfloat16"), None, options)

    expected = serve(bf16(BASE), requests, together=False)
    for budget in (512, 64, 7):
        options = dataclasses.replace(BASE, token_budget=budget, prefix_cache=budget == 64)
        assert serve(bf16(options), requests) == expected, budget


class Oracle:
    """Proposes what plain generation will say, with some tokens spoiled."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.texts = [list(text) for text in texts]
        self.proposed = 0

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        return [self._one(list(ask.tokens), ask.most) for ask in asks]

    def _one(self, tokens: list[int], most: int) -> Draft:
        for text in self.texts:
            if len(text) > len(tokens) and text[: len(tokens)] == tokens:
                draft = text[len(tokens) : len(tokens) + min(most, 4)]
                if len(tokens) % 3 == 0:
                    draft[-1] = (draft[-1] + 1) % 300
                self.proposed += len(draft)
                return Draft(tuple(draft))
        return Draft()

    def end(self, key: object) -> None:
        pass


def test_drafts_change_nothing(backend: str) -> None:
    requests = random_requests(16, seed=4, max_prompt=60)
    base = dataclasses.replace(BASE, backend=backend)  # type: ignore[arg-type]
    expected = serve(build(base), requests)
    texts = [prompt + samples[0] for (prompt, _), samples in zip(requests, expected)]
    oracle = Oracle(texts)
    tight = dataclasses.replace(base, cache_bytes=quarter_cache(requests))
    assert serve(build(tight, proposer=oracle), requests) == expected
    assert oracle.proposed > 50


def test_samples_of_one_prompt(backend: str) -> None:
    """``n`` samples are what ``n`` requests with those keys would give, forks or not."""
    prompt, _ = random_requests(1, seed=5, max_prompt=90)[0]
    params = SamplingParams(max_tokens=12, seed=11, n=5, top_p=0.95)
    options = dataclasses.replace(BASE, backend=backend)  # type: ignore[arg-type]
    alone = serve(build(options), [(prompt, params)])[0]
    assert len({tuple(sample) for sample in alone}) > 1
    crowd = [*random_requests(10, seed=6, max_prompt=90), (prompt, params)]
    tight = dataclasses.replace(options, cache_bytes=quarter_cache(crowd), token_budget=33)
    assert serve(build(tight), crowd)[-1] == alone


def test_drafts_with_several_samples(backend: str) -> None:
    prompt = [5, 6, 7, 8, 9] * 3
    request = [(prompt, SamplingParams(max_tokens=10, seed=3, n=4))]
    options = dataclasses.replace(BASE, backend=backend)  # type: ignore[arg-type]
    expected = serve(build(options), request)
    oracle = Oracle([prompt + sample for sample in expected[0]])
    assert serve(build(options, proposer=oracle), request) == expected
    assert oracle.proposed > 0
