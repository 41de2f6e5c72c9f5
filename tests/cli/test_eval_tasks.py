"""``skimp eval --task``: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": [
        {"sentence_good": f"it is {i}", "sentence_bad": f"it {i} is", "UID": "u", "field": "f"}
        for i in range(6)
    ],
    "choice": [{"context": "we say", "options": ["a", "bc"], "label": i % 2} for i in range(6)],
    "words": [{"context": "we say", "target": "ab"} for _ in range(6)],
    "sums": [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)],
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for name, rows in ROWS.items():
        found[name] = tmp_path / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    found["text"] = tmp_path / "text.txt"
    found["text"].write_text("A long tale. " * 20)
    return found


def test_tasks_as_json(skimp, model_dir: Path, files: dict[str, Path]) -> None:
    tasks = [part for name in ROWS for part in ("--task", files[name])]
    result = skimp("eval", model_dir, *tasks, "--max-tokens", 4, "--shots", 1, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {"tasks"}
    kinds = {task["task"]: task["kind"] for task in found["tasks"]}
    assert kinds == {
        "pairs": "minimal-pair",
        "choice": "choice",
        "words": "last-word",
        "sums": "generate",
    }
    for task in found["tasks"]:
        assert task["n"] == (5 if task["task"] == "sums" else 6)
        for score in task["scores"].values():
            low, high = score["ci95"]
            assert low <= score["value"] <= high
            assert score["n"] == task["n"]
    assert set(found["tasks"][1]["scores"]) == {"accuracy", "accuracy_per_byte"}
    assert found["tasks"][0]["groups"]["UID"]["u"]["n"] == 6


def test_a_text_and_a_task(skimp, model_dir: Path, files: dict[str, Path]) -> None:
    args = ("eval", model_dir, "--text", files["text"], "--task", files["pairs"])
    found = json.loads(skimp(*args, "--max-items", 3, "--json").stdout)
    assert found["tasks"][0]["n"] == 3
    assert found["perplexity"] == pytest.approx(2 ** found["bits_per_token"])
    shown = skimp(*args).stdout
    for expected in ("bits per byte", "perplexity", "pairs: accuracy", "0.500", "field f"):
        assert expected in shown


def test_the_packaged_text_is_not_scored_beside_a_task(skimp, model_dir, files) -> None:
    assert "bits per byte" not in skimp("eval", model_dir, "--task", files["pairs"]).stdout


@pytest.mark.parametrize(
    ("args", "field"),
    [
        (["--task", "/no/such.jsonl"], "/no/such.jsonl"),
        (["--task", "{text}"], "text.txt"),
        (["--task", "{pairs}", "--kind", "quiz"], "kind"),
        (["--task", "{pairs}", "--kind", "choice"], "context"),
        (["--task", "{pairs}", "--max-items", "0"], "max_items"),
        (["--task", "{pairs}", "--context", "64"], "context"),
        (["--task", "{pairs}", "--max-bytes", "64"], "max_bytes"),
        (["--task", "{pairs}", "--shots", "2"], "shots"),
        (["--task", "{pairs}", "--max-tokens", "2"], "max_tokens"),
        (["--task", "{pairs}", "--template", "{{question}}"], "template"),
        (["--task", "{pairs}", "--stop", "x"], "stop"),
        (["--task", "{pairs}", "--chat"], "chat"),
        (["--text", "{text}", "--kind", "choice"], "kind"),
        (["--text", "{text}", "--max-items", "3"], "max_items"),
        (["--task", "{sums}", "--shots", "6"], "shots"),
        (["--task", "{sums}", "--shots", "-1"], "shots"),
        (["--task", "{sums}", "--template", "none"], "template"),
        (["--task", "{sums}", "--max-tokens", "9999"], "max_tokens"),
    ],
)
def test_refusals(skimp, model_dir, files, args: list[str], field: str) -> None:
    names = {name: str(path) for name, path in files.items()}
    result = skimp("eval", model_dir, *(arg.format(**names) for arg in args))
    assert result.exit_code == 2, result.output
    message = result.stderr.strip()
    assert field in message
    assert len(message.splitlines()) == 1
