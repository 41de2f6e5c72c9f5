"""The engine on a GPU: graphs, overlap and Triton kernels change no token."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from guessing import guessing
from tiny_models import mixed_spec, random_requests, tiny_decoder, tiny_spec

from skimp.decoding.params import SamplingParams
from skimp.engine import Engine, EngineOptions
from skimp.engine.drafting import ModelProposer
from skimp.model.spec import ExpertsSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytest.importorskip("triton")

GPU = EngineOptions(device="cuda", max_batch=32, prefix_cache=False, token_budget=512)
CPU = EngineOptions(backend="plain", max_batch=32, prefix_cache=False, overlap=False)


def serve(
    options: EngineOptions,
    requests: list[tuple[list[int], SamplingParams]],
    dtype: str = "float32",
    *,
    together: bool = True,
) -> list[list[int]]:
    engine = Engine(tiny_decoder(dtype=dtype), None, options)
    assert options.device == "cpu" or engine.backend_name == "triton"
    if together:
        outs = engine.generate([p for p, _ in requests], [s for _, s in requests])
    else:
        outs = [engine.generate([p], s)[0] for p, s in requests]
    engine.cache.audit()
    return [out.outputs[0].token_ids for out in outs]


def test_float32_tokens_are_the_cpu_s() -> None:
    requests = random_requests(40, seed=1, max_prompt=300)
    wanted = serve(CPU, requests)
    for overlap, budget in ((True, 512), (False, 64)):
        options = dataclasses.replace(GPU, overlap=overlap, token_budget=budget)
        assert serve(options, requests) == wanted, (overlap, budget)


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8", "int4"])
def test_low_bit_caches(cache_dtype: str) -> None:
    requests = random_requests(10, seed=2, max_prompt=200)
    options = dataclasses.replace(GPU, cache_dtype=cache_dtype)  # type: ignore[arg-type]
    wanted = serve(dataclasses.replace(CPU, cache_dtype=cache_dtype), requests)  # type: ignore[arg-type]
    assert serve(options, requests) == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deterministic_tokens_do_not_depend_on_neighbours(dtype: str) -> None:
    requests = random_requests(60, seed=3, max_prompt=300)
    options = dataclasses.replace(GPU, deterministic=True, max_batch=64)
    alone = serve(options, requests, dtype, together=False)
    for budget in (8192, 512, 64):
        batched = dataclasses.replace(options, token_budget=budget, prefix_cache=budget == 64)
        assert serve(batched, requests, dtype) == alone, budget


@pytest.mark.parametrize("fused", [False, True])
def test_experts_of_graphs_follow_the_router(fused: bool) -> None:
    """Generation is replayed from graphs, whatever experts its rows want."""
    requests = random_requests(12, seed=3, max_prompt=60)
    spec, mixture = (
        tiny_spec(),
        ExpertsSpec(
            num_experts=6, experts_per_token=2, intermediate_size=48, bias=fused, fused=fused
        ),
    )
    layers = tuple(dataclasses.replace(layer, ffn=mixture) for layer in spec.layers)
    spec = dataclasses.replace(spec, layers=layers)
    found = []
    for options in (CPU, GPU):
        engine = Engine(tiny_decoder(spec), None, options)
        assert engine.backend_name == ("plain" if options is CPU else "triton")
        outs = engine.generate([p for p, _ in requests], [s for _, s in requests])
        found.append([out.outputs[0].token_ids for out in outs])
    assert found[0] == found[1]


@pytest.mark.parametrize("control", [False, None], ids=["always", "as it pays"])
@pytest.mark.parametrize("mixed", [False, True], ids=["heads", "mixed"])
@pytest.mark.parametrize("speculate", ["lookup", "draft", "head"])
def test_guesses_change_no_token(speculate: str, mixed: bool, control: bool | None) -> None:
    """Steps with guesses are replayed too, and lie between steps that overlap."""
    requests = random_requests(24, seed=4, max_prompt=100, max_output=60)
    requests += [
        ([3 + i, 4, 5, 6] * 4, SamplingParams(max_tokens=60, temperature=0.0)) for i in range(12)
    ]
    spec = mixed_spec() if mixed else None
    engine = Engine(tiny_decoder(spec), None, CPU)
    prompts, params = [p for p, _ in requests], [s for _, s in requests]
    wanted = [out.outputs[0].token_ids for out in engine.generate(prompts, params)]
    options = dataclasses.replace(GPU, draft_control=control, max_batch=8)
    engine = guessing(speculate, options, spec)
    for _ in range(2):
        found = [out.outputs[0].token_ids for out in engine.generate(prompts, params)]
        assert found == wanted
    engine.cache.audit()
    assert engine.cache.stats().sequences == 0
    if control is False:
        assert sum(engine.speculation.drafted) > 100
        assert engine.speculation.steps > 0
        proposer = engine.scheduler.proposer
        if isinstance(proposer, ModelProposer):
            assert proposer.runs_ahead
            proposer.served.cache.audit()
            assert proposer.served.cache.stats().sequences == 0


def test_a_model_that_guesses_for_itself_is_always_right() -> None:
    """Greedy in float32: rows of a replayed step stand where single rows would."""
    options = dataclasses.replace(GPU, draft_control=False, draft_tokens=5)
    engine = guessing("draft", options, seed=0)
    prompts = [[5, 6, 7], [9] * 20, [1, 2], [4]]
    engine.generate(prompts, SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
    assert sum(engine.speculation.drafted) > 100
    assert engine.speculation.accepted == engine.speculation.drafted
