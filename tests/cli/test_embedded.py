"""The embedded models through the real command: text, memory, start, chat."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from skimp.model.locate import locate_model

PROMPT = "Once upon a time there was a little fox who"
MAX_RSS_MB = 700
MAX_CPU_S = 4.0


def run(*arguments: str, stdin: str = "") -> tuple[subprocess.CompletedProcess[str], Any]:
    """The finished process and what it used: processor seconds and its peak memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "skimp", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done, (seconds, after.ru_maxrss / 1024)


def test_generate_is_small_and_starts_quickly() -> None:
    """Peak memory, and processor time up to a first token, which a busy machine leaves alone.

    ``ru_maxrss`` is the largest of all children so far, so it can only be too strict.
    """
    done, (seconds, peak_mb) = run(
        "generate", "tales", PROMPT, "--max-tokens", "1", "--seed", "1", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completion_tokens"] == 1
    if torch.version.cuda is None:  # a CUDA build of PyTorch is larger than this by itself
        assert peak_mb <= MAX_RSS_MB
    assert seconds <= MAX_CPU_S


def test_generate_repeats_with_a_seed() -> None:
    arguments = ("generate", "tales", PROMPT, "--max-tokens", "40", "--seed", "3", "--json")
    first, second = json.loads(run(*arguments)[0].stdout), json.loads(run(*arguments)[0].stdout)
    assert first["text"] == second["text"] and len(first["text"]) > 40


def test_chat_answers_a_booking_request() -> None:
    done, _ = run(
        "chat",
        "tales",
        "--temperature",
        "0",
        stdin="I would like to book a table for two at a restaurant tonight.\n",
    )
    assert done.returncode == 0, done.stderr
    answer = done.stdout.lower()
    assert any(word in answer for word in ("restaurant", "city", "where", "time", "table"))
    assert "<|im" not in answer


@pytest.mark.parametrize("name", ["tales", "tales-draft"])
def test_transformers_loads_the_embedded_models(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    directory = locate_model(name)
    config = transformers.AutoConfig.from_pretrained(directory)
    assert config.model_type == "llama" and config.vocab_size == 8192
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "Zwölf “quoted” words,\n\tand 123 numbers — ☃."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_both_share_a_tokenizer() -> None:
    paths = [locate_model(name) / "tokenizer.json" for name in ("tales", "tales-draft")]
    first, second = (Path(path).read_bytes() for path in paths)
    assert first == second
