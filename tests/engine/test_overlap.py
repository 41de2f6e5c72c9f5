"""Faults while steps overlap: nothing is lost, and no token comes out otherwise."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_decoder

from skimp.decoding.deferred import DeferredDraws
from skimp.decoding.params import SamplingParams
from skimp.engine import Engine, EngineOptions
from skimp.engine import engine as engine_module

SAMPLED = SamplingParams(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9], [100, 3, 4, 5]]


class Fault(Exception):
    pass


def build(**fields: Any) -> Engine:
    options = {"overlap": True, "threads": 1, "max_batch": 8, "deterministic": True} | fields
    return Engine(tiny_decoder(), None, EngineOptions(**options))


def failing(call: Callable[..., Any], on: int, *, after: bool = False) -> Callable[..., Any]:
    """``call``, but its ``on``-th time raises, before or after it has done its work."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == on and not after:
            raise Fault
        result = call(*args, **kwargs)
        if count == on:
            raise Fault
        return result

    return wrapped


def serve(engine: Engine, prompts: list[list[int]] = PROMPTS) -> tuple[dict[str, list[int]], int]:
    """Tokens by request, stepping on after every fault, and how many there were."""
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, SAMPLED, request_id=str(index))
    found: dict[str, list[int]] = {}
    faults = 0
    for _ in range(400):
        if not engine.has_unfinished():
            break
        try:
            outputs = engine.step()
        except Fault:
            faults += 1
            continue
        found |= {o.request_id: o.outputs[0].token_ids for o in outputs if o.finished}
    engine.cache.audit()
    assert engine.cache.stats().sequences == 0 and not engine.has_unfinished()
    return found, faults


@pytest.mark.parametrize("on", [1, 2, 5])
@pytest.mark.parametrize("where", ["forward", "forward, done", "draw", "draw, done", "landing"])
def test_a_fault_changes_no_token(where: str, on: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = serve(build())
    engine = build()
    after = where.endswith("done")
    if where.startswith("forward"):
        backend = engine.runner.backend
        monkeypatch.setattr(backend, "forward", failing(backend.forward, on, after=after))
    elif where.startswith("draw"):
        draw = failing(engine_module.draw_deferred, on, after=after)
        monkeypatch.setattr(engine_module, "draw_deferred", draw)
    else:
        monkeypatch.setattr(DeferredDraws, "wait", failing(DeferredDraws.wait, on))
    assert serve(engine) == (wanted, 1)


@pytest.mark.parametrize(("first", "second"), [(47, 21), (60, 21), (30, 15), (31, 16)])
def test_a_fault_while_a_preempted_token_flies(first: int, second: int) -> None:
    rng = random.Random(first)
    prompts = [[rng.randrange(1, VOCAB) for _ in range(n)] for n in (first, second)]
    wanted = build(overlap=False).generate([prompts[1]], SAMPLED)[0].outputs[0].token_ids
    least = build().cache.layout.bytes_needed(first + SAMPLED.max_tokens, 512)
    engine = build(cache_bytes=int(least * 1.15))
    forward, failed = engine.runner.backend.forward, []

    def once(*args: int, **kwargs: bool) -> torch.Tensor:
        if engine.scheduler.preemptions == 1 and not failed:
            failed.append(True)
            raise Fault
        return forward(*args, **kwargs)

    engine.runner.backend.forward = once  # type: ignore[method-assign]
    found, _ = serve(engine, prompts)
    assert failed and found["1"] == wanted


def test_one_request_s_text_breaks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = serve(build())
    engine = build()
    add = engine._sequence

    def with_fault(request: Any, index: int) -> Any:
        seq = add(request, index)
        if request.request_id == "1":
            monkeypatch.setattr(seq.output, "push", failing(seq.output.push, 4))
        return seq

    monkeypatch.setattr(engine, "_sequence", with_fault)
    found, faults = serve(engine)
    assert faults == 1 and found["0"] == wanted["0"] and found["2"] == wanted["2"]


def test_nothing_is_left_after_a_stop() -> None:
    engine = build()
    params = SamplingParams(max_tokens=30, temperature=1.0, stop_token_ids=tuple(range(1, 200)))
    engine.generate([[1, 2, 3]], params)
    assert not engine.has_unfinished()


def test_a_table_row_is_sent_although_a_step_failed_before() -> None:
    engine = build()
    backend = engine.runner.backend
    forward = backend.forward
    backend.forward = failing(forward, 1)  # type: ignore[method-assign]
    engine.add_request([1, 2, 3], SAMPLED)
    with pytest.raises(Fault):
        engine.step()
    engine.step()
    assert 0 in engine.runner.buffers.changed_tables
