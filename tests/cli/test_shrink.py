"""``skimp shrink`` and ``skimp verify`` as commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    path = tmp_path / "r.yaml"
    path.write_text(
        "calibration: {text: text.txt, samples: 4, tokens: 32}\n"
        "steps:\n- quantize: {format: int4, method: gptq, group_size: 32}\n"
    )
    return path


def test_shrink_then_verify(
    skimp: Callable[..., Any], model_dir: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = skimp("shrink", model_dir, recipe, "-o", out)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{out}: ") and "bits a weight" in done.stdout
    done = skimp("verify", out)
    assert done.exit_code == 0 and "whole" in done.stdout
    shard = out / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    done = skimp("verify", out, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert not found["whole"] and found["damages"][0]["file"] == "model.safetensors"
    assert found["damages"][0]["tensor"]
    done = skimp("verify", out)
    assert done.exit_code == 1 and "DAMAGED" in done.stdout


def test_json(skimp: Callable[..., Any], model_dir: Path, recipe: Path, tmp_path: Path) -> None:
    done = skimp("shrink", model_dir, recipe, "-o", tmp_path / "out", "--json", "--quiet")
    found = json.loads(done.stdout)
    assert found["units"] == 4 and found["units_resumed"] == 0
    assert found["formats"] == {"float32": 1, "int4-g32": 14}


def test_dry_run_touches_nothing(
    skimp: Callable[..., Any], model_dir: Path, recipe: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = skimp("shrink", model_dir, recipe, "-o", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0 and "PREDICTED" in done.stdout and "128 calibration" in done.stdout
    done = skimp("shrink", model_dir, recipe, "--dry-run", "--json")
    found = json.loads(done.stdout)
    assert found["steps"][0]["after"]["formats"]["int4-g32"] == 14
    assert (
        found["memory_bytes"] > 0 and found["disk_bytes"] > 0 and found["calibration_tokens"] == 128
    )
    after = found["steps"][0]["after"]
    assert after["weight_bytes_per_token"] < found["before"]["weight_bytes_per_token"]
    assert sorted(tmp_path.rglob("*")) == before


def test_heal(skimp: Callable[..., Any], model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("- heal: {text: text.txt, tokens: 512, length: 32, batch: 256, held_out: 64}")
    done = skimp("shrink", model_dir, recipe, "--dry-run")
    assert done.exit_code == 0 and "numbers on 512 tokens in 2 steps" in done.stdout
    done = skimp("shrink", model_dir, recipe, "-o", tmp_path / "out", "--json", "--quiet")
    found = json.loads(done.stdout)
    assert [row["tokens"] for row in found["curves"][0]] == [0, 256, 512, 512]
    assert found["notes"] and skimp("verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- quantize: {format: int4, bits: 3}", "r.yaml: step 1 (quantize): bits: unknown field"),
        ("- quantize: {format: int4, group_size: 48}", "step 1 (quantize): group_size: "),
        ("calibration: {tokens: 9000}\nsteps: [smooth]", "calibration: the text has "),
    ],
)
def test_mistakes(
    skimp: Callable[..., Any], model_dir: Path, tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "r.yaml").write_text(text.replace("9000", "900000"))
    done = skimp("shrink", model_dir, tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert done.exit_code == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_usage(skimp: Callable[..., Any], model_dir: Path, recipe: Path, tmp_path: Path) -> None:
    done = skimp("shrink", model_dir, recipe)
    assert done.exit_code == 2 and "OUT: missing" in done.stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("mine")
    done = skimp("shrink", model_dir, recipe, "-o", tmp_path / "out")
    assert done.exit_code == 2 and "exists already" in done.stderr
    assert skimp("verify", tmp_path / "none").exit_code == 2


def test_verify_of_a_foreign_checkpoint(skimp: Callable[..., Any], model_dir: Path) -> None:
    done = skimp("verify", model_dir)
    assert done.exit_code == 0 and "sound in structure" in done.stdout
    assert json.loads(skimp("verify", model_dir, "--json").stdout)["manifest"] is False
