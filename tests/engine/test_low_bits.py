"""Low-bit weights and caches through the engine: the native kernels against PyTorch, and what must
not change a result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import tiny_decoder, tiny_spec, with_latents

from skimp.decoding.params import SamplingParams
from skimp.engine import Engine, EngineOptions
from skimp.formats import WeightFormat
from skimp.kernels import native
from skimp.kernels.native.library import instruction_set, library
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


def low_bit_spec(form: WeightFormat, *, table: bool, latents: bool = False) -> ModelSpec:
    spec = tiny_spec((None, 24))
    if latents:
        spec = with_latents(spec, query_latent_dim=32)
    formats = {
        f"layers.{index}.{name}": form
        for index, layer in enumerate(spec.layers)
        for group in layer.input_groups.values()
        for name in group
    }
    if table:
        formats["embed_tokens"] = form
    return dataclasses.replace(spec, formats=formats)


def engine_of(
    form: WeightFormat, backend: str, *, table: bool = False, latents: bool = False, **options
) -> Engine:
    decoder = random_decoder(low_bit_spec(form, table=table, latents=latents), seed=2)
    return Engine(decoder, None, EngineOptions(backend=backend, max_context=256, **options))


def level(isa: str) -> str:
    """The instruction set that ``isa``, or "best", stands for on this CPU; skips the test if it has
    none such."""
    best = library().best_isa()
    order = ["scalar", "avx2", "avx512"]
    if isa != "best" and best in order and order.index(isa) > order.index(best):
        pytest.skip(f"this CPU has no {isa}")
    return best if isa == "best" else isa


def logits(engine: Engine) -> torch.Tensor:
    return torch.cat([part.clone() for part in engine.logits(IDS)])


@pytest.mark.parametrize("table", [False, True], ids=["layers", "table too"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "best"])
def test_native_is_plain(form: WeightFormat, isa: str, table: bool) -> None:
    assert native.available(), "the native kernels were not built"
    chosen = level(isa)
    plain = logits(engine_of(form, "plain", table=table))
    with instruction_set(chosen):
        found = logits(engine_of(form, "native", table=table))
    # Rounded rows may fall to the other side of a tie; elsewhere only sums differ. fp8 weights
    # meet bfloat16 rows where the CPU has such products.
    worst = 2e-2 if form.activations or form.kind == "float" else 2e-3
    assert (found - plain).norm() / plain.norm() < worst


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_native_latents_are_plain(form: WeightFormat) -> None:
    plain, found = (logits(engine_of(form, name, latents=True)) for name in ("plain", "native"))
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


def engine_with(backend: str = "native", **options) -> Engine:
    decoder = tiny_decoder(tiny_spec((None, 24)), seed=1)
    return Engine(decoder, None, EngineOptions(backend=backend, max_context=256, **options))


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8", "int4"])
def test_low_bit_caches_lose_little(cache_dtype: str, backend: str) -> None:
    full = logits(engine_with(backend))
    low = logits(engine_with(backend, cache_dtype=cache_dtype, cache_recent=0))
    distance = (low - full).norm() / full.norm()
    assert 0 < distance < {"int8": 0.03, "fp8": 0.1, "int4": 0.4}[cache_dtype]
    kept = logits(engine_with(backend, cache_dtype=cache_dtype, cache_recent=256))
    assert (kept - full).norm() / full.norm() < 1e-5


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "best"])
@pytest.mark.parametrize("turned", [False, True], ids=["as is", "turned"])
@pytest.mark.parametrize("recent", [0, 20])
@pytest.mark.parametrize("cache_dtype", ["int8", "fp8", "int4"])
def test_native_caches_are_plain(cache_dtype: str, recent: int, turned: bool, isa: str) -> None:
    chosen = level(isa)
    options = {"cache_dtype": cache_dtype, "cache_recent": recent, "cache_hadamard": turned}
    plain = logits(engine_with("plain", **options))
    with instruction_set(chosen):
        native_logits = logits(engine_with(**options))
    # A number half way between two codes may fall to either side; fp8's are the farthest apart.
    worst = {"int8": 2e-3, "fp8": 2e-2, "int4": 2e-2}[cache_dtype]
    assert (native_logits - plain).norm() / plain.norm() < worst


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8", "int4"])
def test_a_budget_holds_more_tokens(cache_dtype: str) -> None:
    """By the factor that the cost model predicts, up to pages of whole chunks."""

    def held(**options) -> tuple[float, int]:
        engine = engine_with(cache_bytes=1 << 20, prefix_cache=False, **options)
        seq = engine.cache.open([1] * 100_000)
        while engine.cache.append(seq, 16):
            engine.cache.commit(seq, 16, [1] * 16)
        tokens = seq.length
        engine.cache.close(seq)
        return engine.work.cache_bytes(10_000) / 10_000, tokens

    (full_bytes, full), (low_bytes, low) = held(), held(cache_dtype=cache_dtype, cache_recent=0)
    predicted = full_bytes / low_bytes
    assert predicted > 3
    assert low / full == pytest.approx(predicted, rel=0.05)
