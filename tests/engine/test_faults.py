"""What goes wrong in one request, one step or one caller must not reach the others."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from tiny_models import tiny_decoder
from torch import Tensor

from skimp.cache import CacheManager
from skimp.decoding.params import SamplingParams
from skimp.engine import AsyncEngine, Engine, EngineOptions
from skimp.errors import OptionError, RequestError
from skimp.meter.work import engine_threads


def make_engine(**options: Any) -> Engine:
    return Engine(tiny_decoder(), options=EngineOptions(backend="plain", **options))


def greedy(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, **more)


def finish(engine: Engine) -> None:
    while engine.has_unfinished():
        engine.step()


def test_places_are_kept_for_samples_that_have_not_parted() -> None:
    engine = make_engine(max_batch=4, token_budget=64)
    engine.add_request(list(range(1, 11)), SamplingParams(n=4, max_tokens=4, ignore_eos=True))
    for first in (20, 30, 40):
        engine.add_request(list(range(first, first + 10)), greedy(4))
    while engine.has_unfinished():
        engine.step()
        assert len(engine.scheduler.running) <= 4


def test_prompt_logprobs_after_preemption_in_the_middle_of_the_prompt() -> None:
    prompts = [[(7 * i + j) % 300 + 1 for j in range(90)] for i in range(4)]
    params = greedy(20, prompt_logprobs=0)
    expected = make_engine().generate(prompts, params)
    most = 0
    for pages in range(8, 40, 2):
        engine = make_engine(token_budget=16, max_context=128, cache_bytes=pages * 8192)
        try:
            outputs = engine.generate(prompts, params)
        except RequestError:
            continue
        most = max(most, engine.scheduler.preemptions)
        for out, right in zip(outputs, expected):
            assert out.prompt_logprobs is not None and right.prompt_logprobs is not None
            got = [entry.logprob for entry in out.prompt_logprobs if entry is not None]
            want = [entry.logprob for entry in right.prompt_logprobs if entry is not None]
            assert got == pytest.approx(want, abs=1e-4)
    assert most > 0


@pytest.mark.parametrize("lengths", [(10, 4), (4, 10)])
def test_streams_side_by_side_both_end(lengths: tuple[int, int]) -> None:
    engine = make_engine()
    streams = [engine.stream([5, 6, 7 + i], greedy(n)) for i, n in enumerate(lengths)]
    gained = [0, 0]
    for _ in range(max(lengths)):
        for index, stream in enumerate(streams):
            gained[index] += len(out.new_token_ids) if (out := next(stream, None)) else 0
    assert tuple(gained) == lengths


def test_leaving_a_stream_loses_no_output_of_others() -> None:
    engine = make_engine()
    stream = engine.stream([5, 6], greedy(9))
    next(stream)
    other = engine.add_request([8, 9], greedy(1))
    next(stream)
    stream.close()
    assert [out.request_id for out in engine.step()] == [other]
    assert not engine.has_unfinished()


def test_refused_generate_leaves_nothing_behind() -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=r"prompt\[0\]"):
        engine.generate([[1, 2], [10**6]], greedy(3))
    assert not engine.has_unfinished()


@pytest.mark.parametrize("wrong", [{"salt": ["x"]}, {"priority": "high"}])
def test_wrong_salt_and_priority_are_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        make_engine().add_request([1, 2], **wrong)


def test_prompt_that_is_no_sequence() -> None:
    with pytest.raises(RequestError, match="prompt"):
        make_engine().add_request(5)  # type: ignore[arg-type]


def test_engine_goes_on_after_a_step_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    expected = engine.generate([[1, 2, 3]], greedy(6))[0].outputs[0].token_ids
    engine.add_request([1, 2, 3], greedy(6))
    engine.step()

    def fail(*_: Any, **__: Any) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(engine.runner.backend, "forward", fail)
        with pytest.raises(MemoryError):
            engine.step()
    cache: CacheManager = engine.cache
    cache.audit()
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert outputs[-1].outputs[0].token_ids == expected


def test_prompt_without_finite_logits_ends_its_own_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()
    forward = engine.runner.backend.forward
    other = engine.add_request([1, 2], greedy(3))
    engine.step()

    def spoil(*sizes: int, **kwargs: bool) -> Tensor:
        logits = forward(*sizes, **kwargs).clone()
        logits[1:] = float("nan")  # all rows but the first request's
        return logits

    bad = engine.add_request([3, 4, 5, 6], greedy(3, prompt_logprobs=1))
    with monkeypatch.context() as broken:
        broken.setattr(engine.runner.backend, "forward", spoil)
        outputs = {out.request_id: out for out in engine.step()}
    assert outputs[bad].error is not None and outputs[bad].finished
    assert outputs[other].error is None
    finish(engine)
    engine.cache.audit()


def test_requests_queued_while_the_engine_closes_end() -> None:
    async def main() -> list[Any]:
        inner = make_engine()
        step = inner.step

        def slow() -> Any:
            time.sleep(0.1)
            return step()

        inner.step = slow  # type: ignore[method-assign]
        engine = AsyncEngine(inner)

        async def run(token: int) -> None:
            async for _ in engine.generate([token], greedy(50)):
                pass

        tasks = [asyncio.create_task(run(1))]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(run(i)) for i in (2, 3)]
        await asyncio.sleep(0)
        await engine.close()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)

    assert [type(result) for result in asyncio.run(main())] == [RuntimeError] * 3


@pytest.mark.parametrize("field", ["max_batch", "token_budget", "threads"])
def test_counts_beyond_reason_are_refused(field: str) -> None:
    with pytest.raises(OptionError, match=field):
        EngineOptions(**{field: 10**12})


def test_threads_that_were_asked_for_are_the_ones_reported() -> None:
    engine = Engine(tiny_decoder(), options=EngineOptions(threads=3))
    assert engine.backend_name == "native" and engine_threads(engine) == 3
