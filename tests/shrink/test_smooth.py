"""SmoothQuant changes nothing before rounding and makes 8-bit activations survive outliers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from shrink.drive import apart, decoder_of, logits, named, run_step, spec_like, varied
from tiny_models import tiny_decoder, tiny_spec

from skimp.errors import ShrinkError
from skimp.formats.weight import WeightFormat
from skimp.shrink.capture import LayerRunner
from skimp.shrink.smooth import Smooth, smoothing, w8a8_error

TOKENS = torch.randint(320, (3, 32), generator=torch.Generator().manual_seed(1))
SPECS = {
    "tied": tiny_spec(),
    "bias": spec_like(tiny_spec(), tied=False, qkv_bias=True, out_bias=True),
    "plus-one": dataclasses.replace(tiny_spec(), norm_plus_one=True),
}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, "auto"])
@pytest.mark.parametrize("name", SPECS)
def test_exact_before_rounding(name: str, alpha: Any) -> None:
    spec = SPECS[name]
    decoder = varied(tiny_decoder(spec))
    before = named(decoder)
    out_spec, out, _ = run_step(Smooth(alpha=alpha, down=True), spec, before, TOKENS)
    assert out_spec == spec and set(out) == set(before)
    for key in ("layers.0.ffn.down_proj.weight", "layers.2.mixer.q_proj.weight"):
        assert not torch.allclose(out[key], before[key], rtol=1e-3)
    text = TOKENS[0].tolist()
    assert apart(logits(decoder, text), logits(decoder_of(spec, out), text)) < 1e-5


def test_the_formula() -> None:
    x_max, weight = (
        torch.tensor([4.0, 9.0, 0.0]),
        torch.tensor([[1.0, -2.0, 5.0], [-16.0, 1.0, 1.0]]),
    )
    s = smoothing(x_max, weight, 0.5)
    torch.testing.assert_close(s, torch.tensor([0.5, (9 / 2) ** 0.5, 1.0]))
    torch.testing.assert_close(x_max[:2] / s[:2], (weight * s).abs().amax(0)[:2])


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_planted_outliers(alpha: Any) -> None:
    """A norm with loud channels: the W8A8 error of what it feeds falls."""
    spec = tiny_spec()
    tensors = named(tiny_decoder(spec))
    for i in range(spec.num_layers):
        for norm in ("mixer_norm", "ffn_norm"):
            tensors[f"layers.{i}.{norm}.weight"][[5, 40]] *= 50
    _, out, _ = run_step(Smooth(alpha=alpha), spec, tensors, TOKENS)
    hidden = torch.nn.functional.embedding(TOKENS, tensors["embed_tokens.weight"])
    errors = []
    for weights in (tensors, out):
        layer = {n: t for n, t in weights.items() if n.startswith("layers.0.")}
        seen: dict[str, list[torch.Tensor]] = {}
        runner = LayerRunner(spec, 0, layer)
        runner.forward(hidden, lambda group, x, into=seen: into.setdefault(group, []).append(x))
        x = torch.cat(seen["ffn.gate_up"])
        w = torch.cat(
            [layer["layers.0.ffn.gate_proj.weight"], layer["layers.0.ffn.up_proj.weight"]]
        )
        errors.append(w8a8_error(x, w, torch.ones(w.shape[1])))
    assert errors[1] < 0.2 * errors[0]


def test_auto_is_no_worse_than_any_fixed_alpha() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator).double()
    x[:, 3] *= 60
    weight = torch.randn(48, 32, generator=generator).double()
    from skimp.shrink.smooth import _Seen

    seen = _Seen(rows=512)
    seen("ffn.down_proj", x.float())
    best = Smooth(alpha="auto")._factors(seen, "ffn.down_proj", [weight])
    got = w8a8_error(x, weight, best)
    for alpha in (0.2, 0.5, 0.8):
        assert got <= w8a8_error(x, weight, smoothing(x.abs().amax(0), weight, alpha)) * 1.001


def test_layer_runner_is_the_decoders_layer() -> None:
    spec = tiny_spec()
    decoder = varied(tiny_decoder(spec))
    tensors = named(decoder)
    hidden = torch.nn.functional.embedding(TOKENS, tensors["embed_tokens.weight"])
    for i in range(spec.num_layers):
        own = {n: t for n, t in tensors.items() if n.startswith(f"layers.{i}.")}
        groups: list[str] = []
        hidden = LayerRunner(spec, i, own).forward(hidden, lambda g, x, to=groups: to.append(g))
        assert groups == ["mixer.qkv", "mixer.o_proj", "ffn.gate_up", "ffn.down_proj"] * 3
    norm = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + spec.norm_eps)
    end = norm * tensors["norm.weight"] @ tensors["embed_tokens.weight"].T
    for sample, row in zip(TOKENS, end):
        assert apart(logits(decoder, sample.tolist()), row) < 1e-5


def test_refusals() -> None:
    spec = tiny_spec()
    assert Smooth().need(spec).calibration
    low = {"layers.1.mixer.v_proj": WeightFormat(kind="int", bits=8)}
    with pytest.raises(ShrinkError, match=r"layers\.1\.mixer\.v_proj"):
        Smooth().need(dataclasses.replace(spec, formats=low))
    with pytest.raises(ShrinkError, match=r"^calibration: "):
        run_step(Smooth(), spec, named(tiny_decoder()))
    for bad in ({"alpha": 1.5}, {"alpha": "best"}, {"beta": 1}, {"down": "maybe"}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            Smooth.model_validate(bad)
