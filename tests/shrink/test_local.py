"""Windows where they should be, in a class that says so, on the layers that can bear them."""

from __future__ import annotations

import json
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

from skimp.errors import ShrinkError
from skimp.model import families
from skimp.model.loading import load_decoder, random_decoder
from skimp.model.saving import save_checkpoint
from skimp.model.spec import ModelSpec
from skimp.shrink.local import GLOBAL, STATE, Local, combined

BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
IDS = [(7 * i * i + 3) % 320 for i in range(48)]
GENERATOR = torch.Generator().manual_seed(1)
TOKENS = torch.randint(320, (6, 64), generator=GENERATOR)
WINDOW = 12


def spec_of(family: str, **fields: Any) -> ModelSpec:
    return families.to_spec(BASE | {"model_type": family} | fields)


def windows(spec: ModelSpec) -> list[int | None]:
    return [layer.mixer.window for layer in spec.layers]


def written(spec: ModelSpec, folder: Path) -> Path:
    decoder = varied(random_decoder(spec, seed=3))
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    return save_checkpoint(folder / "in", spec, decoder)


@pytest.mark.parametrize(
    ("given", "stay"),
    [("every:2", [0, 2, 4]), ([1, 4], [1, 4]), ("every:9", [0]), ([], [])],
)
def test_transformers_agrees_beyond_the_window(given: Any, stay: list[int], tmp_path: Path) -> None:
    """The first ``window`` positions are those of the model that went in, the next one is not, and
    all are those of the stock class."""
    transformers = pytest.importorskip("transformers")
    spec = spec_of("llama")
    source = written(spec, tmp_path)
    recipe = f"- local: {{window: {WINDOW}, global_layers: {json.dumps(given)}}}"
    done = run_recipe(source, recipe, tmp_path / "out")
    config = json.loads((done.output / "config.json").read_text())
    kinds = ["full_attention" if i in stay else "sliding_attention" for i in range(5)]
    assert config["model_type"] == ("cwm" if stay else "mistral")
    assert config["sliding_window"] == WINDOW
    assert not stay or config["layer_types"] == kinds
    assert any("cwm" in note for note in done.notes) == bool(stay)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        done.output, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == ("CwmForCausalLM" if stay else "MistralForCausalLM")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    mine, before = logits(load_decoder(done.output), IDS), logits(load_decoder(source), IDS)
    assert apart(expected, mine) < 1e-4
    assert greedy_agrees(model, done.output, IDS)
    assert apart(before[:WINDOW], mine[:WINDOW]) < 1e-4
    assert apart(before[WINDOW], mine[WINDOW]) > 1e-2


def test_windows_that_change_nothing(tmp_path: Path) -> None:
    spec = spec_of("llama")
    for step in (
        Local(window=128, global_layers=2),
        Local(window=5000, global_layers=0),
        Local(window=8, global_layers=5),
        Local(window=8, global_layers="every:1"),
    ):
        assert step.need(spec).passes == 1
        before = named(tiny_decoder(spec))
        out_spec, out, run = run_step(step, spec, before)
        assert out_spec == spec and all(out[n] is t for n, t in before.items())
        assert any("changes nothing" in note for note in run.notes)


def test_the_layer_that_looks_back_is_found() -> None:
    """Only layer 2 attends at all: the others' output matrices are nought."""
    spec = spec_of("llama")
    tensors = named(varied(tiny_decoder(spec)))
    for name, tensor in tensors.items():
        if "o_proj" in name and "layers.2." not in name:
            tensor.zero_()
        if "layers.2." in name and ("q_proj" in name or "k_proj" in name):
            tensor.mul_(0.1)  # attends to everything
    step = Local(window=WINDOW, global_layers=1)
    assert step.need(spec).passes == 2 and step.need(spec).calibration
    out_spec, out, run = run_step(step, spec, tensors, TOKENS)
    assert run.state[GLOBAL] == [2] and windows(out_spec) == [12, 12, None, 12, 12]
    assert all(out[n] is t for n, t in tensors.items())
    kl = run.state[STATE]["kl"]
    assert kl[2] > 0.001 and max(abs(kl[i]) for i in (0, 1, 3, 4)) < 1e-9
    assert out_spec.family == "cwm" and any("layers 2 stay global" in n for n in run.notes)


def test_what_is_measured_is_the_models_own_divergence() -> None:
    """Against whole forwards of the model with one layer local."""
    spec = spec_of("llama")
    tensors = named(varied(tiny_decoder(spec)))
    step = Local(window=WINDOW, global_layers=2)
    _, _, run = run_step(step, spec, tensors, TOKENS)
    for layer in range(5):
        others = [i for i in range(5) if i != layer]
        local = Local(window=WINDOW, global_layers=tuple(others)).planned_spec(spec)
        total = 0.0
        for row in TOKENS[:4].tolist():
            own, theirs = (
                logits(decoder_of(s, tensors), row).double().log_softmax(-1)[WINDOW:]
                for s in (spec, local)
            )
            total += float((own.exp() * (own - theirs)).sum(-1).mean()) / 4
        assert run.state[STATE]["kl"][layer] == pytest.approx(total, rel=1e-3, abs=1e-7)
    shares = combined(run.state[STATE]["kl"], run.state[STATE]["lost"])
    assert run.state[GLOBAL] == sorted(sorted(range(5), key=lambda i: -shares[i])[:2])


def test_combined() -> None:
    assert combined([1.0, 3.0], [-2.0, 0.5]) == [0.25, 1.75]
    assert combined([0.0, 0.0], [-1.0, -1.0]) == [0.0, 0.0]


def test_patterns() -> None:
    spec = spec_of("llama", num_hidden_layers=8)

    def stay(**fields: Any) -> list[int]:
        planned = Local(window=9, **fields).planned_spec(spec)
        return [i for i, window in enumerate(windows(planned)) if window is None]

    assert stay(global_layers=2, choose="every") == [0, 4]
    assert stay(global_layers=3, choose="every") == [0, 2, 5]
    assert stay(global_layers="every:4") == [0, 4]
    assert stay(global_layers=(7, 3)) == [3, 7]
    assert stay(global_layers=0) == []


@pytest.mark.parametrize(
    ("family", "fields", "target"),
    [
        ("mistral", {"sliding_window": None}, "cwm"),
        ("cwm", {"layer_types": ["full_attention"] * 5}, "cwm"),
        ("gemma2", {"head_dim": 16, "sliding_window": 9}, "gemma2"),
    ],
)
def test_other_families(family: str, fields: Any, target: str) -> None:
    spec = spec_of(family, **fields)
    step = Local(
        window=9,
        insist=family == "gemma2",
        global_layers=[i for i, w in enumerate(windows(spec)) if w is None][:1],
    )
    step.need(spec)
    planned = step.planned_spec(spec)
    assert planned.family == target and windows(planned).count(9) == 4
    assert families.to_spec(families.to_config(planned)) == planned


def test_engines_that_ignore_windows() -> None:
    for family in ("qwen2", "qwen3"):
        spec = spec_of(family, head_dim=16)
        with pytest.raises(ShrinkError, match=r"^target: .*vLLM.*SGLang"):
            Local(window=8, global_layers="every:2").need(spec)
        step = Local(window=8, global_layers="every:2", insist=True)
        out_spec, _, run = run_step(step, spec, named(tiny_decoder(spec)))
        assert out_spec.family == family
        assert any("transformers and skimp serve it" in note for note in run.notes)


def test_refusals() -> None:
    llama = spec_of("llama")
    with pytest.raises(ShrinkError, match=r"^target: .*qkv_bias"):
        Local(window=8, global_layers=(0,)).need(spec_of("llama", attention_bias=True))
    with pytest.raises(ShrinkError, match=r"^target: .*qkv_bias"):
        Local(window=8, global_layers=(0,), target="cwm").need(spec_of("qwen2"))
    with pytest.raises(ShrinkError, match=r"^target: .*window"):
        Local(window=8, global_layers=(0,), target="mistral").need(llama)
    with pytest.raises(ShrinkError, match=r"^global_layers: 6 is more than the 5"):
        Local(window=8, global_layers=6).need(llama)
    with pytest.raises(ShrinkError, match=r"^global_layers: 5 is none of the 5"):
        Local(window=8, global_layers=(5,)).need(llama)
    gemma = spec_of("gemma3_text", head_dim=16, sliding_window=9, sliding_window_pattern=2)
    with pytest.raises(ShrinkError, match=r"^global_layers: .*RoPE"):
        Local(window=9, global_layers=1, choose="every").need(gemma)
    with pytest.raises(ShrinkError, match=r"^window: .*9 already"):
        Local(window=10, global_layers=2).need(gemma)
    with pytest.raises(ShrinkError, match=r"^global_layers: layer 0 has a window"):
        Local(window=9, global_layers=(0,)).need(gemma)
    narrower = Local(window=4, global_layers=2)
    narrower.need(gemma)
    assert windows(narrower.planned_spec(gemma)) == [4, None, 4, None, 4]
    tensors = named(tiny_decoder(llama))
    with pytest.raises(ShrinkError, match=r"^calibration: "):
        run_step(Local(window=8, global_layers=2), llama, tensors)
    with pytest.raises(ShrinkError, match=r"^calibration\.tokens: 64"):
        run_step(Local(window=40, global_layers=2), llama, tensors, TOKENS)
    for bad in (
        {"window": 0},
        {"global_layers": "every:0"},
        {"global_layers": -1},
        {"target": "llama"},
        {"choose": "best"},
        {"layers": 3},
    ):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            Local.model_validate({"window": 8, "global_layers": 2} | bad)
    with pytest.raises(ValidationError, match="choose: global_layers says which"):
        Local(window=8, global_layers=(1,), choose="every")
    with pytest.raises(ValidationError, match="global_layers: 1 is named twice"):
        Local(window=8, global_layers=(1, 1))


def test_a_spec_with_windows_keeps_them() -> None:
    spec = spec_like(tiny_spec((None, 24, None, 24)), tied=True)
    out = Local(window=24, global_layers=(2,), insist=True).planned_spec(spec)
    assert windows(out) == [24, 24, None, 24]
