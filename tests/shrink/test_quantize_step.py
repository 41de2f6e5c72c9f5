"""The quantize step over tiny models, unit by unit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from shrink.drive import apart, decoder_of, logits, named, run_step, spec_like, varied
from tiny_models import tiny_decoder, tiny_spec, with_latents

from skimp.errors import ShrinkError
from skimp.formats.weight import QuantizedWeight
from skimp.model.decoder import Decoder
from skimp.model.spec import ModelSpec
from skimp.shrink.capture import LayerRunner, embedded
from skimp.shrink.fold import narrow, wide
from skimp.shrink.quantize import Quantize
from skimp.shrink.quantize.calibrated import fold
from skimp.shrink.step import Unit

TOKENS = torch.randint(1, 320, (3, 48), generator=torch.Generator().manual_seed(1))


def model(**mixer: Any) -> tuple[ModelSpec, Decoder]:
    spec = spec_like(tiny_spec(), tied=False, **mixer)
    return spec, varied(tiny_decoder(spec))


GROUPS = model()[0].layers[0].input_groups


def step(**fields: Any) -> Quantize:
    return Quantize.model_validate({"format": "int4", "group_size": 32} | fields)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq"])
@pytest.mark.parametrize("form", ["int4", "int8", "fp8"])
def test_every_method_in_every_format(method: str, form: str) -> None:
    spec, decoder = model()
    quantize = step(method=method) if form == "int4" else Quantize(format=form, method=method)  # type: ignore[arg-type]
    out_spec, out, _ = run_step(quantize, spec, named(decoder), TOKENS)
    low = {n.removesuffix(".weight") for n, t in out.items() if isinstance(t, QuantizedWeight)}
    assert low == set(out_spec.formats) and len(low) == 7 * spec.num_layers
    assert all(out[f"{m}.weight"].format == f for m, f in out_spec.formats.items())
    base = logits(decoder, TOKENS[0].tolist())
    mine = logits(decoder_of(dataclasses.replace(out_spec, formats={}), out), TOKENS[0].tolist())
    assert 0 < apart(base, mine) < (3.0 if form == "int4" else 0.6)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_hidden_states_are_those_of_the_model_that_comes_out(method: str) -> None:
    spec, decoder = model()
    quantize = step(method=method, include=["lm_head", "embed_tokens"])
    _, out, last = run_step(quantize, spec, named(decoder), TOKENS)
    hidden = embedded(spec, out, TOKENS)
    for layer in range(spec.num_layers):
        own = {n: t for n, t in out.items() if n.startswith(f"layers.{layer}.")}
        hidden = LayerRunner(spec, layer, own).forward(hidden)
    assert torch.equal(last.hidden, hidden)
    assert isinstance(out["lm_head.weight"], QuantizedWeight)
    assert isinstance(out["embed_tokens.weight"], QuantizedWeight)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq"])
def test_same_bits_every_time(method: str) -> None:
    spec, decoder = model()
    runs = [run_step(step(method=method), spec, named(decoder), TOKENS)[1] for _ in range(2)]
    for name, tensor in runs[0].items():
        other = runs[1][name]
        if isinstance(tensor, QuantizedWeight):
            assert all(torch.equal(a, b) for a, b in zip(tensor.tensors(), other.tensors()))
        else:
            assert torch.equal(tensor, other)


@pytest.mark.parametrize("group", list(GROUPS))
@pytest.mark.parametrize("plus_one", [False, True])
def test_awq_folding_is_exact(group: str, plus_one: bool) -> None:
    spec, decoder = model(num_kv_heads=4, qkv_bias=True)
    spec = dataclasses.replace(spec, norm_plus_one=plus_one)
    own = {n: t for n, t in named(decoder).items() if n.startswith("layers.0.")}
    unit = Unit(name="layers.0", index=1, spec=spec, tensors=own)
    tensors = wide(unit)
    width = tensors[f"{GROUPS[group][0]}.weight"].shape[1]
    s = torch.rand(width, generator=torch.Generator().manual_seed(0)).double() * 3 + 0.2
    fold(unit, tensors, group, s)
    hidden = torch.randn(2, 20, spec.hidden_size, generator=torch.Generator().manual_seed(2))
    before = LayerRunner(spec, 0, own).forward(hidden)
    after = LayerRunner(spec, 0, narrow(unit, tensors)).forward(hidden)
    assert apart(before, after) < 1e-4


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "mixed"])
@pytest.mark.parametrize("query_latent_dim", [None, 32])
def test_latents(method: str, query_latent_dim: int | None) -> None:
    """All matrices but the one that makes heads of latents, and no great harm."""
    spec = with_latents(spec_like(tiny_spec(), tied=False), query_latent_dim)
    decoder = varied(tiny_decoder(spec))
    if method == "mixed":
        quantize = Quantize(target_bits=6.0, candidates=("int4-g32", "int8"))
    else:
        quantize = step(method=method)
    out_spec, out, _ = run_step(quantize, spec, named(decoder), TOKENS)
    low = {n for n, t in out.items() if isinstance(t, QuantizedWeight)}
    matrices = {n for n in named(decoder) if n.startswith("layers.") and n.endswith("_proj.weight")}
    assert low == {n for n in matrices if "kv_b_proj" not in n}
    assert {f"{n}.weight" for n in out_spec.formats} == low
    ids = TOKENS[0].tolist()
    mine = logits(decoder_of(dataclasses.replace(out_spec, formats={}), out), ids)
    error = float((mine - logits(decoder, ids)).norm() / mine.norm())
    assert 0 < error < 0.5


def test_awq_refuses_latents() -> None:
    spec = with_latents(tiny_spec(), None)
    with pytest.raises(ShrinkError, match="method awq: layer 0 has latent attention"):
        step(method="awq").need(spec)


class Kept:
    def __init__(self, found: dict[str, list[torch.Tensor]]) -> None:
        self.found = found

    def __call__(self, group: str, x: torch.Tensor) -> None:
        self.found.setdefault(group, []).append(x)


def test_watching_sees_what_the_forward_sees() -> None:
    spec, decoder = model()
    own = {n: t for n, t in named(decoder).items() if n.startswith("layers.1.")}
    hidden = torch.randn(2, 20, spec.hidden_size)
    seen: dict[str, list[torch.Tensor]] = {}
    runner = LayerRunner(spec, 1, own)
    runner.forward(hidden, Kept(seen))
    assert list(seen) == list(GROUPS)
    for position, group in enumerate(GROUPS):
        watched: dict[str, list[torch.Tensor]] = {}
        runner.watch(hidden, group, Kept(watched))
        assert list(watched) == list(GROUPS)[: position + 1]
        for name, inputs in watched.items():
            assert all(torch.equal(a, b) for a, b in zip(inputs, seen[name], strict=True))


def test_sixteen_bits_change_nothing() -> None:
    spec, _ = model()
    decoder = varied(tiny_decoder(spec, dtype="bfloat16"))
    out_spec, out, _ = run_step(Quantize(format="bf16"), spec, named(decoder))
    assert all(torch.equal(out[n], t) for n, t in named(decoder).items())
    assert out_spec.formats == {} and out_spec.dtype == "bfloat16"


def test_excluded_matrices_stay() -> None:
    spec, decoder = model()
    quantize = step(exclude=["layers.0.*", "*.down_proj"])
    out_spec, out, _ = run_step(quantize, spec, named(decoder))
    assert len(out_spec.formats) == 6 * (spec.num_layers - 1)
    assert isinstance(out["layers.0.mixer.q_proj.weight"], torch.Tensor)


@pytest.mark.parametrize(
    ("fields", "named_in_error"),
    [
        ({"format": "int3"}, "format"),
        ({"method": "magic"}, "method"),
        ({"bits": 4}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"format": "int8", "group_size": 32}, "group_size"),
        ({"format": "fp8", "symmetric": False, "group_size": None}, "symmetric"),
        ({"activations": "fp8"}, "activations"),
        ({"format": "bf16", "group_size": None, "method": "gptq"}, "format bf16"),
        ({"damping": 0.1}, "damping"),
        ({"method": "gptq", "damping": 0}, "damping"),
        ({"include": ["layers.0"]}, "include"),
    ],
)
def test_malformed_fields_are_refused(fields: dict[str, Any], named_in_error: str) -> None:
    with pytest.raises(ValidationError, match=named_in_error):
        step(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 128}, "group_size: layers.0.mixer.q_proj has 64 inputs"),
        ({"exclude": ["*.k_proj"]}, "k_proj shares its input with"),
        ({"exclude": ["layers.9.*"]}, "exclude: no matrix"),
    ],
)
def test_what_the_model_cannot_take(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ShrinkError, match=message):
        step(**fields).need(model()[0])


def test_tied_head_and_quantized_models_are_refused() -> None:
    with pytest.raises(ShrinkError, match="include"):
        step(include=["lm_head"]).need(tiny_spec())
    spec, _ = model()
    with pytest.raises(ShrinkError, match=r"layers\.0\.mixer\.q_proj is int4-g32 already"):
        step().need(step().planned_spec(spec))


def test_hqq_has_zero_points_unless_told() -> None:
    assert not step(method="hqq").weight_format.symmetric  # type: ignore[union-attr]
    assert step(method="hqq", symmetric=True).weight_format.symmetric  # type: ignore[union-attr]
    assert Quantize(format="int4").weight_format.group_size == 128  # type: ignore[union-attr]
