"""Recipes: what is accepted, and that every mistake is one line that names the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from skimp.errors import ShrinkError
from skimp.shrink.recipe import MAX_BYTES, STEPS, load_recipe, parse_recipe

ROOT = Path(__file__).parents[2]
Q = "- quantize: "

MALFORMED = [
    ("- gqa", "step 1 (gqa): kv_heads: missing"),
    ("- gqa: {kv_heads: '2'}", "step 1 (gqa): kv_heads: Input should be a valid integer"),
    ("- gqa: {kv_heads: 2, method: mean, refit: true}", "step 1 (gqa): refit: method mean"),
    ("- local: {window: 8}", "step 1 (local): global_layers: missing"),
    ("- local: {window: 8, global_layers: every4}", "step 1 (local): global_layers:"),
    ("- local: {window: 8, global_layers: [1, -2]}", "step 1 (local): global_layers"),
    ("- local: {window: 8, global_layers: [1], choose: measured}", "choose: global_layers says"),
    ("", "must be a list of steps"),
    ("[]", "at least one step"),
    ("int8", "must be a list of steps"),
    ("3", "must be a list of steps"),
    ("- 3", "step 1: must be one of quantize"),
    ("- [quantize]", "step 1: must be one of"),
    ("- null", "step 1: must be one of"),
    ("- {}", "step 1: must have one key"),
    ("- quantise: {format: int8}", "step 1: unknown step 'quantise'; known: quantize, smooth"),
    ("- 7: {}", "step 1: unknown step 7"),
    ("- quantize: {format: int8}\n  smooth: {}", "step 1: must have one key"),
    ("- quantize:\n  format: int8", "step 1: must have one key"),
    ("- quantize: int8", "step 1 (quantize): fields must be a mapping"),
    ("- quantize: [int8]", "step 1 (quantize): fields must be a mapping"),
    ("- quantize", "step 1 (quantize): format: missing"),
    (Q + "{}", "step 1 (quantize): format: missing"),
    (Q + "{format: int3}", "step 1 (quantize): format:"),
    (Q + "{format: 4}", "step 1 (quantize): format:"),
    (Q + "{format: null}", "step 1 (quantize): format:"),
    (Q + "{format: int4, group_siz: 64}", "group_siz: unknown field; allowed: format, target_bits"),
    (Q + "{format: int4, group_size: '128'}", "group_size: Input should be a valid integer"),
    (Q + "{format: int4, group_size: 128.5}", "group_size:"),
    (Q + "{format: int4, group_size: 0}", "group_size:"),
    (Q + "{format: int4, group_size: -128}", "group_size:"),
    (Q + "{format: int4, group_size: true}", "group_size:"),
    (Q + "{format: int8, group_size: 128}", "group_size:"),
    (Q + "{format: int4, method: gtpq}", "method:"),
    (Q + "{format: int4, symmetric: yep}", "symmetric:"),
    (Q + "{format: int4, symmetric: 1}", "symmetric:"),
    (Q + "{format: int8, symmetric: false}", "symmetric:"),
    (Q + "{format: int8, activations: fp8}", "activations:"),
    (Q + "{format: int8, activations: int4}", "activations:"),
    (Q + "{format: int4, include: lm_head}", "include:"),
    (Q + "{format: int4, include: [norm]}", "include.0:"),
    (Q + "{format: int4, exclude: [3]}", "exclude.0:"),
    (Q + "{format: int4, exclude: {a: b}}", "exclude:"),
    (Q + "{format: int4, method: gptq, damping: -1}", "damping:"),
    (Q + "{format: int4, method: gptq, damping: .nan}", "damping:"),
    (Q + "{format: int4, method: gptq, damping: .inf}", "damping:"),
    (Q + "{format: int4, method: gptq, block: 1.5}", "block:"),
    (Q + "{format: bf16, method: gptq}", "method:"),
    (Q + "{target_bits: 4.5, format: int4}", "(quantize): format: target_bits is given"),
    (Q + "{target_bits: 4.5, group_size: 64}", "(quantize): group_size:"),
    (Q + "{target_bits: many}", "target_bits:"),
    (Q + "{target_bits: 4.5, candidates: int4}", "candidates:"),
    (Q + "{target_bits: 4.5, candidates: [int8, int5]}", "candidates.1: 'int5' is no format"),
    (Q + "{format: int8, candidates: [int8]}", "(quantize): candidates: they go with target_bits"),
    ("- rotate: {residual: 2}", "step 1 (rotate): residual:"),
    ("- rotate: {seed: 2001-01-01}", "step 1 (rotate): seed:"),
    ("- rotate: {1: true}", "step 1 (rotate): 1:"),
    ("- smooth: {alpha: 2}", "step 1 (smooth): alpha:"),
    ("- smooth: {alpha: half}", "step 1 (smooth): alpha:"),
    ("- rotate: {}\n- cache: {format: int2}", "step 2 (cache): format:"),
    ("- cache: {format: int8, format: fp8}", "line 1: 'format' is there twice"),
    ("- rotate: {}\n  - b", "line 2:"),
    ("- quantize: {format: int8", "line 1:"),
    ("- a: &x {b: c}\n- d: *x", "line 2: aliases are not allowed"),
    ("- rotate: {<<: {residual: true}}", "'<<' is not allowed"),
    ("- !!python/object/apply:os.system ['true']", "line 1: could not determine a constructor"),
    ("- rotate: !foo {}", "line 1: could not determine a constructor"),
    ("- ? {a: b}\n  : c", "line 1: a key must be text"),
    ("--- []\n--- []", "line 2:"),
    ("steps: []", "steps: must hold at least one"),
    ("seed: 1", "steps: missing"),
    ("steps: [rotate]\nsede: 1", "sede: unknown field; allowed: calibration, seed, steps"),
    ("steps: [rotate]\nseed: -1", "seed:"),
    ("steps: [rotate]\nseed: soon", "seed:"),
    ("steps: {rotate: {}}", "steps: must be a list"),
    ("steps: [rotate]\ncalibration: 5", "calibration:"),
    ("steps: [rotate]\ncalibration: {sampels: 5}", "calibration.sampels: unknown field; allowed: "),
    ("steps: [rotate]\ncalibration: {samples: 0}", "calibration.samples:"),
    ("steps: [rotate]\ncalibration: {tokens: many}", "calibration.tokens:"),
    ("steps: [rotate]\ncalibration: {text: nowhere.txt}", "calibration.text:"),
    ("steps: [rotate]\ncalibration: {text: 5}", "calibration.text:"),
    ("steps: [rotate]\ncalibration: {text: a, chat: b}", "calibration: chat:"),
    ("[" * 5000, "nested too deeply"),
    ("- rotate: {seed: " + "9" * 5000 + "}", "not YAML"),
    ("- rotate: {seed: " + "9" * 40 + "}", "seed:"),
    ("- \x01", "not YAML"),
    ("[" + "rotate, " * 100 + "]", "100 steps, more than 64"),
]


@pytest.mark.parametrize(("text", "says"), MALFORMED)
def test_malformed(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(ShrinkError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith("r.yaml: ") and says in message
    assert "\n" not in message and len(message) < 400


def test_enough_malformed_recipes() -> None:
    assert len(MALFORMED) >= 50


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ShrinkError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ShrinkError, match="no such file"):
        load_recipe(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_bytes(b"- rotate\n" + b"#" * MAX_BYTES)
    with pytest.raises(ShrinkError, match="bytes, which no recipe needs"):
        load_recipe(path)
    path.write_bytes(b"- rotate # \xff\n")
    with pytest.raises(ShrinkError, match="UTF-8 at byte 11"):
        load_recipe(path)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes(path: Path) -> None:
    assert load_recipe(path).steps


def test_both_forms(tmp_path: Path) -> None:
    steps = "- rotate\n- quantize: {format: int4, method: gptq, damping: 1e-2, group_size: null}\n"
    plain = parse_recipe(steps, "r", tmp_path)
    assert [s.kind for s in plain.steps] == ["rotate", "quantize"]
    (tmp_path / "c.txt").write_text("text")
    top = "seed: 3\ncalibration: {text: c.txt, samples: 2}\nsteps:\n" + steps
    full = parse_recipe(top, "r", tmp_path)
    assert full.steps == plain.steps and full.seed == 3
    assert full.calibration.text == str(tmp_path / "c.txt") and full.calibration.samples == 2


def test_null_is_not_the_default_in_what_a_run_is(tmp_path: Path) -> None:
    texts = ("- quantize: {format: int4}", "- quantize: {format: int4, group_size: null}")
    a, b = (parse_recipe(text, "r", tmp_path).as_dict() for text in texts)
    assert a != b


def test_registry_names_are_the_steps_own() -> None:
    import importlib

    for kind, place in STEPS.items():
        module, _, name = place.partition(":")
        assert getattr(importlib.import_module(module), name).kind == kind
