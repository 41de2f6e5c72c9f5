"""``skimp bench --speculate`` and ``skimp price`` with models that guess, on small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SPECULATION = {
    "name", "lossless_to", "category", "temperature", "batch", "tokens_per_step",
    "drafted_per_step", "acceptance_by_position", "cost_ratio", "predicted_cost_ratio",
    "verification", "verification_slope", "predicted_verification_slope", "gain", "gain_by_round",
    "predicted_gain", "cost_model_gain", "tokens_per_s", "plain_tokens_per_s", "batch_filled",
    "same_answers", "device", "dtype", "backend", "threads", "rounds", "prompts", "new_tokens",
}  # fmt: skip


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [
        *({"category": "qa", "turns": [f"Who is number {i}?", "Why?"]} for i in range(3)),
        *({"category": "sums", "question": f"{i} and {i} and {i} and"} for i in range(3)),
        {"category": "long", "prompt": "a word and " * 40},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def checked(found: dict) -> dict:
    assert set(found) >= SPECULATION
    assert found["gain"] > 0 and found["predicted_gain"] > 0 and found["cost_model_gain"] > 0
    assert len(found["gain_by_round"]) == found["rounds"]
    assert all(set(v) == {"guesses", "ratio", "predicted_ratio"} for v in found["verification"])
    return found


def test_bench_of_guesses(skimp, model_dir: Path, prompts: Path) -> None:
    common = (
        "bench", model_dir, "--prompts", prompts, "--category", "qa,sums", "--rounds", 1,
        "--max-prompts", 2, "--new-tokens", 16, "--dtype", "float32", "--draft-tokens", 2,
    )  # fmt: skip
    done = skimp(
        *common, "--speculate", "draft,lookup", "--draft-model", model_dir, "--batch", "1,2",
        "--temperature", "0,0.5", "--json", "--no-draft-control",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = [checked(one) for one in json.loads(done.stdout)["speculation"]]
    assert [(f["batch"], f["category"], f["temperature"], f["speculate"]) for f in found] == [
        (batch, category, temperature, method)
        for batch in (1, 2)
        for category in ("qa", "sums")
        for temperature in (0.0, 0.5)
        for method in ("draft", "lookup")
    ]
    for one in found:
        assert one["lossless_to"] == str(model_dir) and one["longest_draft"] == 2
        assert one["prompts"] == 2 and one["new_tokens"] == 16
        if one["speculate"] == "draft" and one["temperature"] == 0:
            assert one["acceptance_by_position"] == [1.0, 1.0] and one["same_answers"] == 1.0
            assert one["predicted_cost_ratio"] == 1.0
    done = skimp(*common, "--speculate", "suffix", "--temperature", 1)
    assert done.exit_code == 0, done.output
    assert "What guesses gain" in done.stdout and "What guesses cost" in done.stdout
    assert "2 a category, 16 new tokens each" in done.stdout
    # Without a choice of categories one that does not fit is left out, and that is said.
    assert "note: left out: long has 0 prompts of at most" in skimp(
        "bench", model_dir, "--speculate", "lookup", "--prompts", prompts, "--rounds", 1,
        "--max-prompts", 1, "--new-tokens", 10, "--temperature", 0,
    ).stderr  # fmt: skip


def test_bench_guesses_on_the_packaged_text_by_default(skimp, model_dir: Path) -> None:
    done = skimp(
        "bench", model_dir, "--speculate", "lookup", "--rounds", 1, "--max-prompts", 1,
        "--new-tokens", 12, "--temperature", 0, "--json", "--category", "story",
        "--draft-tokens", 2,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["speculation"]
    assert checked(found)["category"] == "story" and found["mean_prompt_tokens"] == 60


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--draft-tokens", 3], "draft_tokens: needs --speculate"),
        (["--draft-control"], "draft_control: needs --speculate"),
        (["--temperature", 0], "temperature: needs --speculate"),
        (["--speculate", "none"], "speculate: none"),
        (["--speculate", "guess"], "speculate: expected one of"),
        (["--speculate", "draft"], "draft_model: "),
        (["--speculate", "lookup", "--draft-model", "m"], "draft_model: only with speculate draft"),
        (["--speculate", "lookup", "--context", 8], "context: real prompts have"),
        (["--speculate", "lookup", "--batch", "1,max"], "batch: max"),
        (["--speculate", "lookup", "--batch", 8, "--max-prompts", 4], "max_prompts: 4"),
        (["--speculate", "lookup", "--category", "poems"], "category: 'poems' is none of"),
        (["--speculate", "lookup", "--temperature", "hot"], "temperature: 'hot'"),
        (["--speculate", "lookup", "--temperature", "-1"], "temperature: from 0"),
        (["--speculate", "lookup", "--new-tokens", 9], "new_tokens: more than 9"),
        (["--speculate", "lookup", "--new-tokens", 250], "new_tokens: 250"),
        (["--speculate", "lookup", "--prompts", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_wrong_options_are_named(
    skimp, model_dir: Path, arguments: list[object], named: str
) -> None:
    done = skimp("bench", model_dir, *arguments)
    assert done.exit_code == 2 and named in done.stderr and done.stderr.count("\n") == 1


def test_random_weights_have_no_text_to_guess(skimp, config_file: Path) -> None:
    done = skimp("bench", "--random-weights", config_file, "--speculate", "lookup")
    assert done.exit_code == 2 and "random_weights: guesses are measured on text" in done.stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("A fox and a hen went for a walk. " * 20)
    return file


def test_price_of_models_that_guess(
    skimp, model_dir: Path, prompts: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    markdown, page = tmp_path / "price.md", tmp_path / "price.html"
    lookup = f"{model_dir}@speculate=lookup,draft_tokens=2"
    itself = (
        f"{model_dir}@speculate=draft,draft_model={model_dir},draft_tokens=2,draft_control=false"
    )
    paged = f"{model_dir}@page_tokens=32"
    other = f"{model_dir}@speculate=lookup,draft_tokens=2,page_tokens=32"
    common = (
        "price", model_dir, "--text", text, "--context", 8, "--new-tokens", 12, "--rounds", 1,
        "--prompts", prompts, "--category", "qa", "--temperature", 0, "--max-prompts", 1,
    )  # fmt: skip
    done = skimp(
        *common, lookup, paged, itself, other, "--json", "--markdown", markdown, "--html", page
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["name"] for row in found["rows"]] == [paged]
    results = [checked(one) for one in found["speculation"]]
    assert [(one["name"], one["lossless_to"]) for one in results] == [
        (lookup, str(model_dir)),
        (itself, str(model_dir)),
        (other, paged),
    ]
    assert results[1]["acceptance_by_position"] == [1.0, 1.0]
    shown = markdown.read_text()
    assert f"| {lookup} | lossless |" in shown and f"| {other} | as {paged} |" in shown
    assert "## What guesses gain" in shown and "## What guesses cost" in shown
    assert "measured on real prompts, below" in shown
    assert "Gain by guesses" in page.read_text() and page.read_text().count("<svg") == 4
    alone = skimp(*common, lookup, "--html", page)
    assert alone.exit_code == 0, alone.output
    assert "lossless" in alone.stdout and page.read_text().count("<svg") == 1


def test_guesses_need_a_plain_twin_and_real_prompts(skimp, model_dir: Path, text: Path) -> None:
    lookup = f"{model_dir}@speculate=lookup"
    for arguments, named in (
        ([lookup, model_dir], "speculate: BASE is without guesses"),
        (
            [model_dir, f"{model_dir}@speculate=lookup,page_tokens=32"],
            f"is held against {model_dir}@page_tokens=32, which is to be named too",
        ),
        ([model_dir, model_dir, "--temperature", 0], "temperature: needs a model with speculate"),
        ([model_dir, lookup, "--batch", "max", "--cache-bytes", "128k"], "name a number too"),
        ([model_dir, f"{model_dir}@speculate=draft"], "draft_model: "),
        ([model_dir, lookup, "--category", "poems"], "category: 'poems'"),
    ):
        done = skimp("price", *arguments, "--context", 16, "--new-tokens", 10, "--text", text)
        assert done.exit_code == 2 and named in done.stderr, (arguments, done.stderr)
