"""Low-bit weights and caches through the engine: the native kernels against PyTorch, and what must
not change a result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import tiny_decoder, tiny_spec

from skimp.decoding.params import SamplingParams
from skimp.engine import Engine, EngineOptions
from skimp.formats import WeightFormat
from skimp.kernels import native
from skimp.kernels.native.library import instruction_set, library
from skimp.model import families
from skimp.model.loading import random_decoder
from skimp.model.spec import ModelSpec

FORMATS = [
    WeightFormat(kind="int", bits=8),
    WeightFormat(kind="int", bits=8, activations="int8"),
    WeightFormat(kind="int", bits=4, group_size=32),
    WeightFormat(kind="int", bits=4, group_size=32, symmetric=False),
    WeightFormat(kind="float", bits=8),
    WeightFormat(kind="float", bits=8, activations="fp8"),
]
IDS = torch.randint(1, 300, (70,), generator=torch.Generator().manual_seed(0)).tolist()


def low_bit_spec(form: WeightFormat, *, table: bool) -> ModelSpec:
    spec = tiny_spec((None, 24))
    names = [n for n in families.tensor_names(spec) if n.startswith("layers.") and "proj" in n]
    formats = {name.removesuffix(".weight"): form for name in names}
    if table:
        formats["embed_tokens"] = form
    return dataclasses.replace(spec, formats=formats)


def engine_of(form: WeightFormat, backend: str, *, table: bool = False, **options) -> Engine:
    decoder = random_decoder(low_bit_spec(form, table=table), seed=2)
    return Engine(decoder, None, EngineOptions(backend=backend, max_context=256, **options))


def logits(engine: Engine) -> torch.Tensor:
    return torch.cat([part.clone() for part in engine.logits(IDS)])


@pytest.mark.parametrize("table", [False, True], ids=["layers", "table too"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "best"])
def test_native_is_plain(form: WeightFormat, isa: str, table: bool) -> None:
    assert native.available(), "the native kernels were not built"
    best = library().best_isa()
    order = ["scalar", "avx2", "avx512"]
    if isa != "best" and best in order and order.index(isa) > order.index(best):
        pytest.skip(f"this CPU has no {isa}")
    plain = logits(engine_of(form, "plain", table=table))
    with instruction_set(best if isa == "best" else isa):
        found = logits(engine_of(form, "native", table=table))
    # Rounded rows may fall to the other side of a tie; elsewhere only sums differ. fp8 weights
    # meet bfloat16 rows where the CPU has such products.
    worst = 2e-2 if form.activations or form.kind == "float" else 2e-3
    assert (found - plain).norm() / plain.norm() < worst


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_neighbours_and_threads_change_nothing(form: WeightFormat) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
    prompts = [IDS[:n] for n in (3, 17, 40, 55, 8, 29)]

    def run(batch: int, threads: int) -> list:
        engine = engine_of(form, "native", max_batch=batch, threads=threads, token_budget=24)
        outs = [out.outputs[0] for out in engine.generate(prompts, params)]
        return [(out.token_ids, out.logprobs) for out in outs]

    assert run(1, 1) == run(6, 2)


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8", "int4"])
def test_low_bit_caches(cache_dtype: str) -> None:
    def engine(**options) -> Engine:
        decoder = tiny_decoder(tiny_spec((None, 24)), seed=1)
        defaults = {"backend": "plain", "max_context": 256}
        return Engine(decoder, None, EngineOptions(**defaults | options))

    full = logits(engine())
    low = logits(engine(cache_dtype=cache_dtype, cache_recent=0))
    distance = (low - full).norm() / full.norm()
    assert 0 < distance < {"int8": 0.03, "fp8": 0.1, "int4": 0.4}[cache_dtype]
    kept = logits(engine(cache_dtype=cache_dtype, cache_recent=256))
    assert (kept - full).norm() / full.norm() < 1e-5
    # The same budget holds more tokens, by as much as a token's bytes shrink.
    pages = []
    for options in ({}, {"cache_dtype": cache_dtype, "cache_recent": 0}):
        made = engine(cache_bytes=1 << 20, **options)
        pages.append(sum(made.work.cache_bytes(n) for n in (100,)))
    assert pages[1] < pages[0] / 2
    # Chunks, batches and prefixes read what was stored, so they change nothing.
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    prompts = [IDS[:n] for n in (5, 30, 66)]
    found = [
        [out.outputs[0].token_ids for out in made.generate(prompts, params)]
        for made in (
            engine(cache_dtype=cache_dtype, max_batch=1),
            engine(cache_dtype=cache_dtype, max_batch=3, token_budget=7, prefix_cache=False),
        )
    ]
    assert found[0] == found[1]
