"""Heads turned into latents: exact where nothing is lost, ordered where something is, loadable."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from shrink.drive import apart, decoder_of, greedy_agrees, logits, named, run_step, varied
from tiny_models import VOCAB, tiny_decoder, tiny_spec

from skimp.errors import ShrinkError
from skimp.model import families
from skimp.model.saving import save_checkpoint
from skimp.model.spec import GatedFFNSpec, ModelSpec, RopeSpec
from skimp.shrink.latents import Heads, project, split_keys
from skimp.shrink.mla import Mla

TOKENS = [(7 * i * i + 3) % VOCAB for i in range(40)]
TEXT = torch.randint(1, VOCAB, (6, 32), generator=torch.Generator().manual_seed(1))


def llama(kv_heads: int, **mixer: Any) -> ModelSpec:
    """Four heads of 16 over ``kv_heads``, without what deepseek_v3 has no place for."""
    spec = tiny_spec((None, None))
    fields = {"num_kv_heads": kv_heads, "qk_norm": False} | mixer
    layers = tuple(
        dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **fields))
        for layer in spec.layers
    )
    return dataclasses.replace(spec, family="llama", layers=layers)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
@pytest.mark.parametrize("latent", [16, 40])
def test_full_rank_of_one_key_value_head_is_exact(latent: int, scaling: Any) -> None:
    """All of its key is rotated, and the latent holds its value (and may be wider)."""
    rope = RopeSpec(theta=10_000.0, rotary_dim=16, scaling=scaling)
    spec = llama(1, rope=rope)
    decoder = varied(tiny_decoder(spec))
    base = logits(decoder, TOKENS)
    step = Mla(latent=latent, rope=16)
    made, tensors, _ = run_step(step, spec, named(decoder), TEXT)
    assert made == step.planned_spec(spec) and made.family == "deepseek_v3"
    assert apart(base, logits(decoder_of(made, tensors), TOKENS)) < 1e-4


def test_rotations_commute_with_positions() -> None:
    """Everything rotated, one frequency at a time: products of queries and keys at any distance."""
    torch.manual_seed(0)
    spec = llama(4).layers[0].mixer
    assert not hasattr(spec, "latent_dim")
    half, dim = spec.head_dim // 2, spec.head_dim
    sizes = {"queries": spec.num_heads * dim, "keys": 4 * dim, "values": 4 * dim}
    matrices = {n: torch.randn(rows, 24, dtype=torch.float64) for n, rows in sizes.items()}
    heads = Heads(spec=spec, out=torch.zeros(24, 64), **matrices)
    root = torch.randn(24, 24, dtype=torch.float64)
    split = split_keys(heads, root @ root.T, rotated=dim, fold=1)
    x, y = torch.randn(2, 24, dtype=torch.float64)
    angles = torch.rand(half, dtype=torch.float64) * 6

    def turned(vector: torch.Tensor) -> torch.Tensor:
        a, b = vector.split(half)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin))

    # With the rest turned too, as pairs of the same frequencies, nothing is lost.
    key, rest = split.of_rotated @ y, split.of_rest @ y
    rest_angles = angles.repeat_interleave(len(rest) // dim)
    for head in range(spec.num_heads):
        group = head  # four of each
        query = matrices["queries"].unflatten(0, (4, dim))[head] @ x
        whole = turned(query) @ matrices["keys"].unflatten(0, (4, dim))[group].matmul(y)
        pairs = torch.stack((split.rotated[group] @ query).split(2)).T
        others = torch.stack((split.rest[group] @ query).split(2)).T
        found = 0.0
        for (a, b), turns, against in ((pairs, angles, key), (others, rest_angles, rest)):
            cos, sin = turns.cos(), turns.sin()
            spun = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=1).flatten()
            found += float(spun @ against)
        assert found == pytest.approx(float(whole), abs=1e-9)


def damage(step: Mla, spec: ModelSpec, decoder: Any) -> float:
    base = logits(decoder, TOKENS)
    made, tensors, _ = run_step(step, spec, named(decoder), TEXT)
    found = logits(decoder_of(made, tensors), TOKENS)
    p, q = base.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_wider_latents_lose_less() -> None:
    spec = llama(4)
    decoder = tiny_decoder(spec)
    lost = [damage(Mla(latent=n, rope=16), spec, decoder) for n in (8, 32, 112)]
    assert lost[0] > lost[1] > lost[2]


def test_calibrated_projection_is_the_best_for_what_was_seen() -> None:
    """Of balanced keys and values, no other projection of that rank leaves less."""
    torch.manual_seed(0)
    spec = llama(4).layers[0].mixer
    keys, values = torch.randn(2, 64, 24, dtype=torch.float64)
    heads = Heads(spec=spec, queries=keys, keys=5 * keys, values=values, out=keys.T)
    x = torch.randn(200, 24, dtype=torch.float64) * torch.logspace(0, 1, 24, dtype=torch.float64)
    moments = x.T @ x / len(x)
    split = split_keys(heads, moments, rotated=16, fold=1)
    seen, plain = (
        project(split, heads, moments, latent=10, calibrated=flag) for flag in (True, False)
    )
    balance = float((x @ split.of_rest.T).square().mean(0).sqrt().mean())
    balance /= float((x @ heads.values.T).square().mean(0).sqrt().mean())

    def left(latents: Any) -> float:
        c = x @ latents.down.T
        rest = (x @ split.of_rest.T - c @ latents.rest.T) / balance
        return float(
            rest.square().sum() + (x @ heads.values.T - c @ latents.values.T).square().sum()
        )

    assert left(seen) < left(plain)
    for _ in range(20):
        other = dataclasses.replace(seen, down=seen.down + 0.01 * torch.randn_like(seen.down))
        assert left(other) >= left(seen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_it(tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    spec = dataclasses.replace(llama(2), dtype=dtype)
    decoder = tiny_decoder(spec, dtype=dtype)
    made, tensors, _ = run_step(Mla(latent=24, rope=8), spec, named(decoder), TEXT)
    save_checkpoint(tmp_path / "out", made, tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0]
    wide = {name: t.float() for name, t in tensors.items()}
    assert apart(theirs, logits(decoder_of(made, wide), TOKENS)) < 1e-4
    if dtype == "float32":
        assert greedy_agrees(model, tmp_path / "out", TOKENS)
    # vLLM's class has an output matrix of its own, and so has the file.
    assert not made.tie_embeddings and "lm_head.weight" in tensors
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["first_k_dense_replace"] == 2 and config["rms_norm_eps"] == 1e-6
    assert config["tie_word_embeddings"] is False and config["num_nextn_predict_layers"] == 0
    assert families.to_spec(config) == made


def with_ffn_bias(spec: ModelSpec) -> ModelSpec:
    layers = (
        dataclasses.replace(layer, ffn=GatedFFNSpec(intermediate_size=96, bias=True))
        for layer in spec.layers
    )
    return dataclasses.replace(spec, layers=tuple(layers))


YARN = RopeSpec(theta=1e4, rotary_dim=16, scaling={"rope_type": "yarn", "factor": 2.0})
REFUSED = {
    "window": (llama(2, window=9), {}, "windows"),
    "bias": (llama(2, qkv_bias=True), {}, "biases of queries"),
    "norm": (llama(2, qk_norm=True), {}, "norms of queries and keys"),
    "sinks": (llama(2, sinks=True), {}, "sinks"),
    "ffn": (with_ffn_bias(llama(2)), {}, "biases of the ffn"),
    "yarn": (llama(2, rope=YARN), {}, "yarn"),
    "unrotated": (llama(2, rope=None), {}, "rotated"),
    "rope": (llama(2), {"rope": 12}, "rope: 12"),
    "fold": (llama(2), {"rope": 8, "fold": 1}, "fold: 1"),
    "float16": (dataclasses.replace(llama(2), dtype="float16"), {}, "float16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_cause(name: str) -> None:
    spec, fields, words = REFUSED[name]
    with pytest.raises(ShrinkError, match=words) as caught:
        Mla(**{"latent": 16, "rope": 16, **fields}).need(spec)
    assert "\n" not in str(caught.value)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValidationError):
        Mla(method="magic")  # type: ignore[arg-type]


def test_norm_epsilon_is_said_to_change() -> None:
    spec = dataclasses.replace(llama(1), norm_eps=1e-5)
    decoder = tiny_decoder(spec)
    for keep, words in ((False, "all norms get"), (True, "norms keep")):
        step = Mla(latent=16, rope=16, keep_norm_eps=keep)
        made, tensors, run = run_step(step, spec, named(decoder), TEXT)
        assert made.norm_eps == (1e-5 if keep else 1e-6)
        assert any(words in note for note in run.notes)
        if keep:
            found = logits(decoder_of(made, tensors), TOKENS)
            assert apart(logits(decoder, TOKENS), found) < 1e-4
