"""``skimp draft train`` as a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 40
QUICK = ["--tokens", 512, "--length", 32, "--batch", 256, "--layers", "0,1", "--held-out", 64]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_train(skimp: Callable[..., Any], model_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    done = skimp("draft", "train", model_dir, "-o", out, "--text", text, *QUICK, "--unroll", 3)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{out}: ") and "260 of 260 words" in done.stdout
    assert "Chains of 3: " in done.stdout and "accepted" in done.stderr
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    again = skimp("draft", "train", model_dir, "-o", out, "--text", text, *QUICK)
    assert again.exit_code == 2 and "exists already" in again.stderr
    more = ["--overwrite", "--vocabulary", 30, "--loss", "mix", "--json", "--quiet"]
    done = skimp("draft", "train", model_dir, "-o", out, "--text", text, *QUICK, *more)
    assert done.exit_code == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    assert found["words"] == 30 and found["vocabulary"] == 260 and found["tokens"] == 512
    assert len(found["accepted"]) == len(found["agreed"]) == 5
    assert found["curve"][-1]["tokens"] == 512 and found["layers"] == [0, 1]
    config = json.loads((out / "config.json").read_text())
    assert config["skimp"]["loss"] == "mix"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--tokens", "many"], "tokens"),
        (["--loss", "hinge"], "loss"),
        (["--layers", "a,b"], "layers"),
        (["--layers", "0,9"], "layers"),
        (["--batch", "8"], "batch"),
        (["--vocabulary", "1k"], "vocabulary"),
        (["--device", "tpu"], "device"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--threads", "0"], "threads"),
        (["--self-tokens", "1k"], "self_tokens"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_refused(
    skimp: Callable[..., Any],
    model_dir: Path,
    text: Path,
    tmp_path: Path,
    options: list[str],
    field: str,
) -> None:
    out = tmp_path / "head"
    done = skimp("draft", "train", model_dir, "-o", out, "--text", text, *QUICK, *options)
    assert done.exit_code == 2 and not out.exists(), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("skimp: error: ") and field in line


def test_what_was_trained_guesses(
    skimp: Callable[..., Any], model_dir: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "head"
    done = skimp("draft", "train", model_dir, "-o", out, "--text", text, *QUICK, "--vocabulary", 90)
    assert done.exit_code == 0, done.output
    asked = ["generate", model_dir, "It was", "--max-tokens", 12, "--temperature", 0, "--json"]
    plain = json.loads(skimp(*asked).stdout)
    done = skimp(*asked, "--speculate", "head", "--draft-model", out)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["token_ids"] == plain["token_ids"]
