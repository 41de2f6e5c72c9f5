"""Heads are reordered, turned and merged exactly where that can be, as well as can be beyond."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from shrink.drive import (
    apart,
    decoder_of,
    greedy_agrees,
    logits,
    named,
    run_step,
    spec_like,
    varied,
)
from shrink.runs import run as run_recipe
from tiny_models import tiny_decoder, tiny_spec
from torch import Tensor

from skimp.errors import ShrinkError
from skimp.formats.weight import WeightFormat
from skimp.model import families
from skimp.model.loading import load_decoder, random_decoder
from skimp.model.saving import save_checkpoint
from skimp.model.spec import ModelSpec
from skimp.shrink.gqa import Gqa
from skimp.shrink.heads import Heads, Pairs, balanced_groups, mean_heads

TOKENS = torch.randint(320, (4, 48), generator=torch.Generator().manual_seed(1))
TEXT = TOKENS[0].tolist()


def llama(**mixer: Any) -> ModelSpec:
    mixer = {"num_heads": 8, "num_kv_heads": 4, "qk_norm": False} | mixer
    return spec_like(tiny_spec((None, 24)), tied=False, **mixer)


def rope(**fields: Any) -> Any:
    return dataclasses.replace(tiny_spec().layers[0].mixer.rope, **fields)


SPECS = {
    "plain": llama(),
    "biases": llama(qkv_bias=True, out_bias=True),
    "interleaved": llama(rope=rope(interleaved=True)),
    "partial": llama(rope=rope(rotary_dim=8)),
    "partial-biases": llama(rope=rope(rotary_dim=8, interleaved=True), qkv_bias=True),
    "no-rope": llama(rope=None),
    "sinks": llama(sinks=True),
}


def copies(spec: ModelSpec, seed: int = 0, norms: bool = False) -> dict[str, Tensor]:
    """A model whose key-value heads 0 and 3, and 1 and 2, are one another in other bases: keys
    under RoPE turned and scaled pair by pair, values and the rest of keys by any matrix."""
    tensors = {n: t.double() for n, t in named(varied(tiny_decoder(spec))).items()}
    generator = torch.Generator().manual_seed(seed)

    def matrix(size: int) -> Tensor:
        random = torch.randn(size, size, generator=generator, dtype=torch.float64)
        if norms:
            return torch.linalg.qr(random)[0]
        return torch.eye(size, dtype=torch.float64) + 0.4 * random / size**0.5

    for i, layer in enumerate(spec.layers):
        mixer, prefix = layer.mixer, f"layers.{i}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        heads, pairs = Heads.of(own, mixer), Pairs(mixer)
        for one, two in ((0, 3), (1, 2)):
            turn = matrix(mixer.head_dim)
            heads.v_GKD[two] = turn @ heads.v_GKD[one]
            angles = torch.rand(len(pairs.first), generator=generator, dtype=torch.float64) * 6.28
            factor = torch.polar(torch.ones_like(angles) if norms else 0.5 + angles / 4, angles)
            if norms:  # unequal gains let only half turns through
                factor = factor.real.sign().to(torch.complex128)
            z = pairs.complex(heads.k_GKD[one], 0) * factor[:, None]
            pairs.put(heads.k_GKD[two], z, 0)
            if len(pairs.rest):
                mixed = matrix(len(pairs.rest))
                heads.k_GKD[two, pairs.rest] = mixed @ heads.k_GKD[one, pairs.rest]
        tensors |= {prefix + name: t for name, t in heads.tensors().items()}
    return {n: t.float().contiguous() for n, t in tensors.items()}


@pytest.mark.parametrize("method", ["joint", "aligned", "mean"])
@pytest.mark.parametrize("name", SPECS)
def test_the_present_number_is_the_identity(name: str, method: Any) -> None:
    spec = SPECS[name]
    before = named(varied(tiny_decoder(spec)))
    step = Gqa(kv_heads=4, method=method)
    assert step.need(spec).passes == 1 and not step.need(spec).calibration
    out_spec, out, _ = run_step(step, spec, before, TOKENS)
    assert out_spec == spec
    assert all(out[n] is t for n, t in before.items())


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_heads_that_are_copies_in_other_bases_merge_without_loss(name: str, refit: bool) -> None:
    """The groups have to be found, the bases, RoPE's layout, biases and sinks be right."""
    spec = SPECS[name]
    tensors = copies(spec)
    base = logits(decoder_of(spec, tensors), TEXT)
    out_spec, out, _ = run_step(Gqa(kv_heads=2, refit=refit), spec, tensors, TOKENS)
    assert {layer.mixer.num_kv_heads for layer in out_spec.layers} == {2}
    assert out["layers.0.mixer.k_proj.weight"].shape == (32, 64)
    assert apart(base, logits(decoder_of(out_spec, out), TEXT)) < 1e-4
    _, bad, _ = run_step(Gqa(kv_heads=2, group="adjacent"), spec, tensors, TOKENS)
    assert apart(base, logits(decoder_of(out_spec, bad), TEXT)) > 0.1
    _, pooled, _ = run_step(Gqa(kv_heads=2, method="mean"), spec, tensors, TOKENS)
    assert apart(base, logits(decoder_of(out_spec, pooled), TEXT)) > 0.3


def test_aligned_finds_rotations() -> None:
    """What it may do: orthogonal matrices and phases."""
    spec = llama(qkv_bias=True)
    tensors = copies(spec, norms=True)
    base = logits(decoder_of(spec, tensors), TEXT)
    for weights in ("energy", "equal"):
        step = Gqa(kv_heads=2, method="aligned", refit=False, weights=weights)
        out_spec, out, _ = run_step(step, spec, tensors, TOKENS)
        assert apart(base, logits(decoder_of(out_spec, out), TEXT)) < 1e-4


def test_norms_of_keys() -> None:
    """Gains of each dimension: half turns and any values merge without loss, and a note says so;
    gains that a pair shares let phases through."""
    spec = llama(qk_norm=True)
    tensors = copies(spec, norms=True)
    base = logits(decoder_of(spec, tensors), TEXT)
    out_spec, out, run = run_step(Gqa(kv_heads=2), spec, tensors, TOKENS)
    assert any("half turns" in note for note in run.notes)
    assert apart(base, logits(decoder_of(out_spec, out), TEXT)) < 1e-4
    for i in range(spec.num_layers):
        for norm in ("q_norm", "k_norm"):
            gain = tensors[f"layers.{i}.mixer.{norm}.weight"]
            gain[8:] = gain[:8]
    turn = torch.polar(torch.ones(8), torch.linspace(0.3, 3.0, 8)).to(torch.complex128)
    for i, layer in enumerate(spec.layers):
        name, pairs = f"layers.{i}.mixer.k_proj.weight", Pairs(layer.mixer)
        k = tensors[name].double().view(4, 16, -1)
        pairs.put(k[3], pairs.complex(k[0], 0) * turn[:, None], 0)
        tensors[name] = k.float().view_as(tensors[name])
    base = logits(decoder_of(spec, tensors), TEXT)
    out_spec, out, run = run_step(Gqa(kv_heads=2), spec, tensors, TOKENS)
    assert not run.notes
    assert apart(base, logits(decoder_of(out_spec, out), TEXT)) < 1e-4


def test_one_head_for_all() -> None:
    spec = llama()
    tensors = named(varied(tiny_decoder(spec)))
    out_spec, out, _ = run_step(Gqa(kv_heads=1), spec, tensors, TOKENS)
    assert logits(decoder_of(out_spec, out), TEXT).isfinite().all()


def test_a_random_model_loses_less_the_more_is_done() -> None:
    """Heads that have nothing in common: best of all are joint heads, refitted."""
    spec = llama(num_kv_heads=8)
    tensors = named(varied(tiny_decoder(spec)))
    base = logits(decoder_of(spec, tensors), TEXT)

    def lost(**fields: Any) -> float:
        out_spec, out, _ = run_step(Gqa(kv_heads=4, **fields), spec, tensors, TOKENS)
        return float((logits(decoder_of(out_spec, out), TEXT) - base).square().mean())

    joint, aligned = lost(refit=False), lost(method="aligned", refit=False)
    assert lost() < joint < aligned < lost(method="mean")


def test_grouping() -> None:
    """Against all ways to part eight heads in pairs and in fours."""
    points = torch.randn(8, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    distances = torch.cdist(points, points)

    def inside(groups: Any) -> float:
        return sum(float(distances[a, b]) for g in groups for a, b in itertools.combinations(g, 2))

    for count in (4, 2):
        size = 8 // count
        ways = [
            [order[i : i + size] for i in range(0, 8, size)]
            for order in itertools.permutations(range(8))
            if all(
                list(order[i : i + size]) == sorted(order[i : i + size]) for i in range(0, 8, size)
            )
        ]
        found = balanced_groups(distances, count)
        assert sorted(x for group in found for x in group) == list(range(8))
        assert inside(found) <= min(map(inside, ways)) * 1.05
    assert balanced_groups(distances, 8) == [[i] for i in range(8)]
    assert balanced_groups(distances, 1) == [list(range(8))]


def test_mean_is_the_mean_of_neighbours() -> None:
    spec = llama()
    before = named(varied(tiny_decoder(spec)))
    _, out, _ = run_step(Gqa(kv_heads=2, method="mean"), spec, before)
    k = before["layers.1.mixer.k_proj.weight"].view(4, 16, -1)
    want = torch.stack(((k[0] + k[1]) / 2, (k[2] + k[3]) / 2)).flatten(0, 1)
    torch.testing.assert_close(out["layers.1.mixer.k_proj.weight"], want)
    for name in ("q_proj", "o_proj"):
        key = f"layers.1.mixer.{name}.weight"
        assert torch.equal(out[key], before[key])
    heads = Heads.of(
        {n.removeprefix("layers.1."): t for n, t in before.items() if n.startswith("layers.1.")},
        spec.layers[1].mixer,
    )
    assert all(torch.equal(t, before[f"layers.1.{n}"]) for n, t in heads.tensors().items())
    assert mean_heads(heads, 2).k_GKD.shape == (2, 16, 64)


BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
FAMILIES = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "gemma3_text": {"head_dim": 16, "sliding_window": 9, "sliding_window_pattern": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_agrees(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = families.to_spec(BASE | {"model_type": family} | FAMILIES[family])
    decoder = varied(random_decoder(spec, seed=3))
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(5)
    directory = save_checkpoint(tmp_path / "in", spec, decoder)
    out = run_recipe(directory, "- gqa: {kv_heads: 2}", tmp_path / "out", tokens=TOKENS).output
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_key_value_heads == 2 and model.config.model_type == family
    with torch.no_grad():
        expected = model(TOKENS[:1]).logits[0]
    assert apart(expected, logits(load_decoder(out), TEXT)) < 1e-4
    assert greedy_agrees(model, out, TEXT)


def test_refusals() -> None:
    spec = llama(num_kv_heads=4)
    for count, words in ((8, "more than the 4"), (3, "equal size")):
        with pytest.raises(ShrinkError, match=rf"^kv_heads: .*{words}"):
            Gqa(kv_heads=count).need(spec)
    uneven = dataclasses.replace(spec, layers=(spec.layers[0], *llama(num_kv_heads=2).layers[1:]))
    with pytest.raises(ShrinkError, match=r"^kv_heads: layers"):
        Gqa(kv_heads=2).need(uneven)
    low = {"layers.1.mixer.v_proj": WeightFormat(kind="int", bits=8)}
    with pytest.raises(ShrinkError, match=r"layers\.1\.mixer\.v_proj"):
        Gqa(kv_heads=2).need(dataclasses.replace(spec, formats=low))
    with pytest.raises(ShrinkError, match=r"^calibration: "):
        run_step(Gqa(kv_heads=2), spec, named(tiny_decoder(spec)))
    for bad in ({"kv_heads": 0}, {"method": "best"}, {"heads": 2}, {"refit": "maybe"}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            Gqa.model_validate({"kv_heads": 2} | bad)
    for name, value in (("group", "adjacent"), ("weights", "equal"), ("refit", True)):
        with pytest.raises(ValidationError, match=name):
            Gqa.model_validate({"kv_heads": 2, "method": "mean", name: value})
