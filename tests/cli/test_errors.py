"""Whatever a user gets wrong is answered by one line on stderr and exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

GENERATE = [
    (["--temperature", "-1"], "temperature"),
    (["--temperature", "nan"], "temperature"),
    (["--temperature", "warm"], "--temperature"),
    (["--top-p", "0"], "top_p"),
    (["--top-p", "1.5"], "top_p"),
    (["--top-k", "-5"], "top_k"),
    (["--min-p", "2"], "min_p"),
    (["--max-tokens", "0"], "max_tokens"),
    (["--max-tokens", "99999"], "max_tokens"),
    (["--min-tokens", "9", "--max-tokens", "3"], "min_tokens"),
    (["--presence-penalty", "3"], "presence_penalty"),
    (["--frequency-penalty", "-3"], "frequency_penalty"),
    (["--repetition-penalty", "0"], "repetition_penalty"),
    (["--n", "0"], "n"),
    (["--stop", ""], "stop"),
    (["--stop-token-id", "-1"], "stop_token_ids"),
    (["--logit-bias", "12"], "logit_bias"),
    (["--logit-bias", "a=1"], "logit_bias"),
    (["--logit-bias", "1=1000"], "logit_bias"),
    (["--logit-bias", "5000=1"], "logit_bias"),
    (["--bad-word", ""], "bad_words"),
    (["--logprobs", "2"], "logprobs"),
    (["--logprobs", "999", "--json"], "logprobs"),
    (["--dtype", "float8"], "dtype"),
    (["--device", "tpu"], "device"),
    (["--backend", "fast"], "backend"),
    (["--threads", "0"], "threads"),
    (["--max-context", "0"], "max_context"),
    (["--max-context", "1x"], "max_context"),
    (["--max-context", "1m"], "max_context"),
    (["--seed", "99999999999999999999"], "seed"),
    (["--no-such-option"], "--no-such-option"),
]


def check(result, field: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("skimp: error: ")
    assert field in lines[0]


@pytest.mark.parametrize(("options", "field"), GENERATE, ids=lambda v: " ".join(map(str, v)))
def test_generate_options(skimp, model_dir: Path, options: list[str], field: str) -> None:
    check(skimp("generate", model_dir, "Once", *options), field)


@pytest.mark.parametrize(
    ("prompt", "input", "field"),
    [
        ("x" * 300, None, "prompt"),
        ("-", b"\xff\xfe broken", "PROMPT"),
        ("-", b"y" * 5000, "prompt"),
        ("lone \udc80 surrogate", None, "PROMPT"),
    ],
    ids=["too long", "not UTF-8", "too long from stdin", "surrogate"],
)
def test_prompts(skimp, model_dir: Path, prompt: str, input: bytes | None, field: str) -> None:
    check(skimp("generate", model_dir, prompt, input=input), field)


@pytest.mark.parametrize(
    ("args", "field"),
    [
        (["generate"], "MODEL"),
        (["generate", "tales"], "PROMPT"),
        (["generat", "tales", "x"], "generat"),
        (["generate", "./no/such/model", "x"], "no/such/model"),
        (["chat", "./no/such/model"], "no/such/model"),
        (["eval", "./no/such/model", "--text", "{text}"], "no/such/model"),
        (["eval", "{model}", "--text", "/no/such/file"], "/no/such/file"),
        (["eval", "{model}", "--text", "{model}"], "{model}"),
        (["eval", "{model}", "--text", "{binary}"], "text"),
        (["eval", "{model}", "--text", "{empty}"], "text"),
        (["eval", "{model}", "--text", "{text}", "--context", "9999"], "context"),
        (["eval", "{model}", "--text", "{text}", "--max-bytes", "none"], "max_bytes"),
        (["bench"], "MODEL"),
        (["bench", "{model}", "--random-weights", "{config}"], "MODEL"),
        (["bench", "{model}", "--batch", "0"], "batch"),
        (["bench", "{model}", "--batch", "1,x"], "batch"),
        (["bench", "{model}", "--context", "-3"], "context"),
        (["bench", "{model}", "--context", "4k"], "context"),
        (["bench", "{model}", "--new-tokens", "0"], "new_tokens"),
        (["bench", "{model}", "--rounds", "0"], "rounds"),
        (["bench", "{model}", "--token-budget", "0"], "token_budget"),
        (["bench", "--random-weights", "/no/such.json"], "/no/such.json"),
        (["plan", "/no/such.json"], "/no/such.json"),
        (["plan", "{config}", "--hardware", "abacus"], "hardware"),
        (["plan", "{config}", "--context", "many"], "context"),
        (["plan", "{config}", "--context", "1m"], "context"),
        (["plan", "{config}", "--batch", "0"], "batch"),
        (["plan", "{config}", "--dtype", "int3"], "dtype"),
        (["plan", "{config}", "--acceptance", "2"], "acceptance"),
        (["plan", "{config}", "--kv-heads", "3"], "kv_heads"),
        (["plan", "{config}", "--memory", "-1"], "memory"),
        (["plan", "{config}", "--memory", "nan"], "memory"),
        (["plan", "{config}", "--window", "0"], "window"),
        (["plan", "{config}", "--block", "2"], "block_steps"),
        (["plan", "{text}"], "{text}"),
        (["info", "{bad}"], "model_type"),
        (["info", "{config}", "--dtype", "float8"], "dtype"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_other_commands(
    skimp, model_dir: Path, config_file: Path, tmp_path: Path, args: list[str], field: str
) -> None:
    files = {"model": model_dir, "config": config_file}
    contents = {
        "text": b"A text.",
        "empty": b"",
        "binary": b"\xff\x00",
        "bad": json.dumps({"model_type": "abacus"}).encode(),
    }
    for name, content in contents.items():
        files[name] = tmp_path / f"{name}.{'json' if name == 'bad' else 'txt'}"
        files[name].write_bytes(content)
    result = skimp(*(a.format(**files) for a in args))
    check(result, field.format(**files))


def test_a_damaged_checkpoint_is_named(skimp, tmp_path: Path, model_dir: Path) -> None:
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    check(skimp("generate", tmp_path, "x"), "model.safetensors")


def test_bugs_keep_their_traceback(skimp, model_dir: Path, monkeypatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("skimp.cli.models.load_engine", broken)
    result = skimp("generate", model_dir, "x")
    assert isinstance(result.exception, RuntimeError)


def test_interrupt_is_130(skimp, model_dir: Path, monkeypatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("skimp.cli.models.load_engine", interrupted)
    assert skimp("generate", model_dir, "x").exit_code == 130


@pytest.mark.skipif(sys.platform == "win32", reason="pipes close differently there")
def test_a_reader_that_goes_away_is_no_error(model_dir: Path) -> None:
    import os
    import subprocess

    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "skimp", "info", str(model_dir)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


def test_errors_of_a_real_process(script, model_dir: Path) -> None:
    done = script("generate", model_dir, "x", "--top-p", "7")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("skimp: error: top_p")
    assert done.stderr.count("\n") == 1
