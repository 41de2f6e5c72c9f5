"""Rotation changes nothing in float32, spreads outliers, and says where it cannot be done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from shrink.drive import apart, decoder_of, logits, named, run_step, spec_like, varied
from tiny_models import tiny_decoder, tiny_spec

import skimp
from skimp.errors import ShrinkError
from skimp.formats.weight import WeightFormat, quantize
from skimp.model.loading import load_decoder
from skimp.shrink.hadamard import hadamard, rotation
from skimp.shrink.rotate import Rotate

TOKENS = [(7 * i * i + 3) % 320 for i in range(40)]
SPECS = {
    "qwen3-tied": spec_like(tiny_spec(), tied=True),
    "qwen3-untied": spec_like(tiny_spec(), tied=False),
    "qwen2-bias": spec_like(tiny_spec(), tied=True, qk_norm=False, qkv_bias=True, out_bias=True),
    "llama-sinks": spec_like(tiny_spec(), tied=False, qk_norm=False, sinks=True),
    "scaled-plus-one": dataclasses.replace(
        spec_like(tiny_spec(), tied=True), norm_plus_one=True, embed_scale=8.0
    ),
    "width-48": dataclasses.replace(spec_like(tiny_spec(), tied=True), hidden_size=48),
    "width-70": dataclasses.replace(spec_like(tiny_spec(), tied=False), hidden_size=70),
}


def ffn_bias(spec: Any) -> Any:
    layers = (
        dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, bias=True))
        for layer in spec.layers
    )
    return dataclasses.replace(spec, layers=tuple(layers))


@pytest.mark.parametrize("matrix", ["hadamard", "random_hadamard", "orthogonal"])
@pytest.mark.parametrize("name", SPECS)
def test_identity(name: str, matrix: Any) -> None:
    spec = ffn_bias(SPECS[name])
    decoder = varied(tiny_decoder(spec))
    base = logits(decoder, TOKENS)
    before = named(decoder)
    for residual, values in ((True, True), (True, False), (False, True)):
        step = Rotate(residual=residual, values=values, matrix=matrix, seed=3)
        out_spec, out, _ = run_step(step, spec, before)
        assert out_spec == step.planned_spec(spec)
        assert out_spec.tie_embeddings == (spec.tie_embeddings and not residual)
        assert not torch.equal(
            out["layers.1.mixer.o_proj.weight"], before["layers.1.mixer.o_proj.weight"]
        )
        assert apart(base, logits(decoder_of(out_spec, out), TOKENS)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tales", "tales-draft"])
def test_identity_of_embedded_models(name: str) -> None:
    path = Path(skimp.__file__).parent / "assets" / "models" / name
    decoder = load_decoder(path, dtype="float32")
    spec, before = decoder.spec, named(decoder)
    tokens = [(31 * i * i + 5) % spec.vocab_size for i in range(64)]
    base = logits(decoder, tokens)
    out_spec, out, _ = run_step(Rotate(dtype="float32"), spec, before)
    assert out_spec.dtype == "float32"
    assert apart(base, logits(decoder_of(out_spec, out), tokens)) < 1e-4


def test_units_alone_give_the_whole_models_rotation() -> None:
    """The same change written for the whole model at once, with the matrices spelled out."""
    spec = spec_like(tiny_spec(), tied=False)
    before = {n: t.double() for n, t in named(varied(tiny_decoder(spec))).items()}
    r = rotation(spec.hidden_size, "random_hadamard", 5)[0].matrix()
    want = dict(before)
    for i in range(spec.num_layers):
        for norm, names in (
            ("mixer_norm", "mixer.q mixer.k mixer.v"),
            ("ffn_norm", "ffn.gate ffn.up"),
        ):
            for short in names.split():
                key = f"layers.{i}.{short}_proj.weight"
                want[key] = before[key] @ torch.diag(before[f"layers.{i}.{norm}.weight"]) @ r
            want[f"layers.{i}.{norm}.weight"] = torch.ones(spec.hidden_size)
        for short in ("mixer.o", "ffn.down"):
            key = f"layers.{i}.{short}_proj.weight"
            want[key] = r.T @ before[key]
    want["embed_tokens.weight"] = before["embed_tokens.weight"] @ r
    want["lm_head.weight"] = before["lm_head.weight"] * before["norm.weight"] @ r
    want["norm.weight"] = torch.ones(spec.hidden_size)
    tensors = {n: t.float() for n, t in before.items()}
    _, out, _ = run_step(Rotate(values=False, seed=5), spec, tensors)
    assert set(out) == set(want)
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, want[name].float(), rtol=1e-5, atol=1e-6)


def test_the_checkpoints_dtype_stays() -> None:
    spec = dataclasses.replace(spec_like(tiny_spec(), tied=True), dtype="bfloat16")
    tensors = named(tiny_decoder(spec, dtype="bfloat16"))
    for dtype, want in (("checkpoint", torch.bfloat16), ("float32", torch.float32)):
        out_spec, out, run = run_step(Rotate.model_validate({"dtype": dtype}), spec, tensors)
        assert {t.dtype for t in out.values()} == {want}
        assert out_spec.dtype == str(want).removeprefix("torch.")
        extra = spec.vocab_size * spec.hidden_size * want.itemsize
        assert any(f"{extra:,} bytes more" in note for note in run.notes)


def test_two_runs_are_bit_identical() -> None:
    spec = spec_like(tiny_spec(), tied=True)
    tensors = named(varied(tiny_decoder(spec)))
    first, second = (run_step(Rotate(matrix="orthogonal"), spec, tensors)[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = run_step(Rotate(matrix="orthogonal", seed=1), spec, tensors)[1]
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def test_planted_outliers_are_spread() -> None:
    """A few loud residual dimensions: rotation lowers peak over rms, and int4's error with it."""
    spec = spec_like(tiny_spec(), tied=False)
    decoder = tiny_decoder(spec)
    tensors = named(decoder)
    loud = [3, 41]
    tensors["embed_tokens.weight"][:, loud] *= 40
    for name, tensor in tensors.items():
        if name.endswith(
            (
                "q_proj.weight",
                "k_proj.weight",
                "v_proj.weight",
                "gate_proj.weight",
                "up_proj.weight",
            )
        ):
            tensor[:, loud] *= 8
    _, out, _ = run_step(Rotate(), spec, tensors)

    def crest(x: torch.Tensor) -> float:
        return float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())

    def error(weights: dict[str, torch.Tensor]) -> float:
        format = WeightFormat(kind="int", bits=4, group_size=32)
        lost = 0.0
        for name in (n for n in weights if n.endswith("gate_proj.weight")):
            w = weights[name]
            lost += float((quantize(w, format).dequantize() - w).square().sum() / w.square().sum())
        return lost

    before, after = (crest(t["embed_tokens.weight"]) for t in (tensors, out))
    assert after < 0.7 * before
    assert error(out) < 0.7 * error(tensors)


@pytest.mark.parametrize(
    "size", [1, 2, 4, 12, 16, 20, 24, 28, 36, 44, 48, 64, 128, 384, 576, 896, 1536]
)
def test_hadamard(size: int) -> None:
    matrix = hadamard(size)
    assert matrix is not None
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=matrix.dtype))


@pytest.mark.parametrize("size", [3, 6, 10, 70, 100])
def test_sizes_without_a_hadamard(size: int) -> None:
    turn, exact = rotation(size, "hadamard", 0)
    assert exact == (hadamard(size) is not None)
    torch.testing.assert_close(
        turn.matrix() @ turn.matrix().T, torch.eye(size, dtype=torch.float64)
    )


def test_a_stand_in_for_a_hadamard_is_noted() -> None:
    spec = SPECS["width-70"]
    _, _, run = run_step(Rotate(), spec, named(tiny_decoder(spec)))
    assert any("size 70" in note for note in run.notes)


def test_refusals() -> None:
    spec = tiny_spec()
    gemma = dataclasses.replace(
        spec, layers=tuple(dataclasses.replace(layer, post_norms=True) for layer in spec.layers)
    )
    with pytest.raises(ShrinkError, match=r"^residual: "):
        Rotate().need(gemma)
    assert Rotate(residual=False).need(gemma).passes == 1
    decoder = varied(tiny_decoder(gemma))
    out_spec, out, _ = run_step(Rotate(residual=False), gemma, named(decoder))
    assert apart(logits(decoder, TOKENS), logits(decoder_of(out_spec, out), TOKENS)) < 1e-4
    with pytest.raises(ShrinkError, match="residual"):
        Rotate(residual=False, values=False).need(spec)
    low = {"layers.0.ffn.up_proj": WeightFormat(kind="int", bits=8)}
    with pytest.raises(ShrinkError, match=r"layers\.0\.ffn\.up_proj"):
        Rotate().need(dataclasses.replace(spec, formats=low))
    for bad in ({"sede": 1}, {"matrix": "givens"}, {"seed": -1}, {"dtype": "int8"}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            Rotate.model_validate(bad)
