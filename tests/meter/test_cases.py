"""How many sequences a cache memory holds, against engines that have to run them."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from skimp.cost import hardware_by_name
from skimp.engine import Engine, EngineOptions
from skimp.engine.options import Backend
from skimp.errors import OptionError
from skimp.kernels import native
from skimp.meter.cases import Case, check_case, plan_cases
from skimp.meter.speed import bench, bench_together, random_prompt, time_generation
from skimp.model.spec import ModelSpec
from tests.tiny_models import mixed_spec, tiny_decoder, tiny_spec

BACKENDS: list[Backend] = ["plain", *(["native"] if native.available() else [])]
FULL = tiny_spec((None, None))
LOCAL = tiny_spec((None, 24, 100, 24))
CONTEXT, NEW = 150, 21


def build(spec: ModelSpec, options: EngineOptions) -> Engine:
    threads = torch.get_num_threads()
    found = Engine(tiny_decoder(spec), None, options)
    torch.set_num_threads(threads)
    return found


def run(engine: Engine, batch: int) -> None:
    rng = random.Random(batch)
    prompts = [random_prompt(rng, engine.spec.vocab_size, CONTEXT) for _ in range(batch)]
    time_generation(engine, prompts, NEW)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (FULL, {}),
        (FULL, {"cache_bytes": 300_000}),  # less than one of the longest context would need
        (FULL, {"cache_dtype": "int8", "page_tokens": 32}),
        (FULL, {"cache_dtype": "int4"}),
        (FULL, {"overlap": True, "backend": "plain"}),
        (LOCAL, {"prefix_cache": False}),
        (mixed_spec(), {"prefix_cache": False, "backend": "plain"}),
    ],
)
def test_the_largest_batch_runs_and_one_more_does_not(
    spec: ModelSpec, options: dict[str, object], backend: Backend
) -> None:
    asked = EngineOptions(
        **{"backend": backend, "cache_bytes": 1_000_000, "token_budget": 64, **options}
    )
    (case,), chosen = plan_cases(spec, asked, [None], [CONTEXT], NEW, name="it")
    assert case.limited_by == "cache_bytes" and case.batch > 2
    assert chosen.max_batch == case.batch and chosen.cache_bytes == asked.cache_bytes
    engine = build(spec, chosen)
    for _ in range(3):  # what earlier rounds left in the cache gives way
        run(engine, case.batch)
        engine.cache.audit()
    assert engine.scheduler.preemptions == 0

    more = case.batch + 1
    engine = build(spec, dataclasses.replace(chosen, max_batch=more))
    try:
        run(engine, more)
    except ValueError as error:
        assert "cache bytes" in str(error)
    else:
        assert engine.scheduler.preemptions > 0


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("options", [{}, {"cache_dtype": "int4", "page_tokens": 32}])
def test_windows_and_reused_prompts_run_too(prefix_cache: bool, options: dict[str, object]) -> None:
    asked = EngineOptions(
        **{"cache_bytes": 1_000_000, "token_budget": 64, "prefix_cache": prefix_cache, **options}
    )
    batches: list[int | None] = [1, None]
    cases, chosen = plan_cases(LOCAL, asked, batches, [40, CONTEXT], NEW, name="it")
    engine = build(LOCAL, chosen)
    results = bench(engine, cases, hardware_by_name("desktop"), rounds=2)
    assert engine.scheduler.preemptions == 0
    assert [r.case.asked_batch for r in results] == ["1", "1", "max", "max"]
    # Nobody runs ahead: all sequences have the same length as they are timed.
    assert all(len(set(r.contexts)) == 1 for r in results)
    assert all(r.cache_bytes_held <= 1_000_000 for r in results)


def test_a_large_batch_makes_the_steps_of_all_cases_longer() -> None:
    """So that while a long prompt is read, windows need more room than with steps as they were."""
    narrow = tiny_spec((None, 24, 24, 24))
    options = EngineOptions(cache_bytes=14_800_000)
    (long,), _ = plan_cases(narrow, options, [None], [900], 8, name="it")
    (short, beside), chosen = plan_cases(narrow, options, [None], [1, 900], 8, name="it")
    assert short.batch == chosen.step_tokens > 512 and beside.batch < long.batch
    engine = build(narrow, chosen)
    bench(engine, [beside], hardware_by_name("desktop"), rounds=1)
    assert engine.scheduler.preemptions == 0
    with pytest.raises(ValueError, match="which hold"):
        more = [beside.batch + 1]
        plan_cases(narrow, dataclasses.replace(chosen, max_batch=64), more, [900], 8, name="it")


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (FULL, {}),
        (FULL, {"cache_dtype": "int8"}),
        (FULL, {"cache_dtype": "int4"}),
        (LOCAL, {}),
        (LOCAL, {"cache_dtype": "int4"}),
        (mixed_spec(), {}),
    ],
)
@pytest.mark.parametrize("length", [20, 77, 160, 333])
def test_bytes_held_are_what_the_arena_gives_a_sequence(
    spec: ModelSpec, options: dict[str, object], length: int
) -> None:
    engine = build(spec, EngineOptions(backend="plain", prefix_cache=False, **options))
    cache, most = engine.cache, 0
    sequence = cache.open([1] * length)
    for token in range(length):
        assert cache.append(sequence, 1)
        most = max(most, sum(group.bytes_used for group in cache.stats().groups))
        cache.commit(sequence, 1, [token])
    assert most == cache.layout.bytes_held(length)


def test_engines_run_one_place_at_batches_of_their_own() -> None:
    engines, cases = [], []
    for spec in (FULL, LOCAL):
        options = EngineOptions(cache_bytes=1_000_000, token_budget=64)
        own, chosen = plan_cases(spec, options, [None], [CONTEXT], 4, name="it")
        engines.append(build(spec, chosen))
        cases.append(own)
    seen: list[str] = []
    desktop = hardware_by_name("desktop")
    found = bench_together(engines, cases, [desktop] * 2, rounds=1, progress=seen.append)
    assert [r.case for (r,) in found] == [c for (c,) in cases]
    assert cases[0][0].batch != cases[1][0].batch
    assert seen[0] == f"batch max, context {CONTEXT}: warm-up"


def test_what_limits_a_largest_batch_is_said() -> None:
    def limit(max_batch: int | None = None, **options: int) -> tuple[int, str | None]:
        asked = EngineOptions(**{"cache_bytes": 4_000_000, **options})
        (case,), chosen = plan_cases(
            FULL, asked, [None], [16], 4, name="it", max_batch=max_batch, least_batch=64
        )
        assert chosen.max_batch == (max_batch or max(64, case.batch))
        assert chosen.step_tokens >= case.batch
        return case.batch, case.limited_by

    held, by = limit()
    assert by == "cache_bytes"
    assert limit(max_batch=3) == (3, "max_batch 3")
    assert limit(max_batch=held) == (held, "cache_bytes")
    assert limit(token_budget=5) == (5, "token_budget 5")
    assert limit(cache_bytes=1 << 30) == (4096, "4096 sequences")


@pytest.mark.parametrize(
    ("batch", "options", "named"),
    [
        (None, {}, "batch: max needs the cache_bytes that it shall fill"),
        (None, {"cache_bytes": 60_000}, "cache_bytes: 60,000 bytes hold no sequence of 150"),
        (None, {"cache_bytes": 100}, "cache_bytes: budget_bytes 100 is too small"),
        (50, {"cache_bytes": 400_000}, "batch: 50 sequences of 150 tokens and 21 new ones do not"),
        (50, {"cache_bytes": 1 << 24, "token_budget": 49}, "batch: 50 .* token_budget 49 of it"),
    ],
)
def test_refusals_name_the_field(batch: int | None, options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan_cases(FULL, EngineOptions(**options), [batch], [CONTEXT], NEW, name="it")


def test_an_engine_that_was_not_made_for_a_case_refuses_it() -> None:
    engine = build(FULL, EngineOptions(cache_bytes=400_000, max_batch=2, max_context=256))
    desktop = hardware_by_name("desktop")
    with pytest.raises(ValueError, match="batch: 3 sequences exceed max_batch 2 of the engine"):
        bench(engine, [Case(batch=3, context=8)], desktop)
    case = Case(batch=2, context=230, new_tokens=200)
    with pytest.raises(ValueError, match="do not fit the 400,000 cache bytes of the engine"):
        check_case(engine.cache.arena, engine.options, case, "the engine")


def test_a_cache_that_no_latent_has_is_refused_before_loading() -> None:
    options = EngineOptions(cache_dtype="int8", cache_bytes=1 << 20)
    with pytest.raises(OptionError, match="latent"):
        plan_cases(mixed_spec(), options, [None], [CONTEXT], NEW, name="it")
