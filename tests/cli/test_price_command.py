"""``skimp price`` on small models of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skimp.cli.price import split_entry
from skimp.engine import Engine
from skimp.kernels import native

ROW = {
    "name", "disk_bytes", "weight_bytes_per_token", "cache_bytes_per_token", "bits_per_byte",
    "ci95", "kl", "kl_ci95", "speed",
}  # fmt: skip
SPEED = {"batch", "context", "tokens_per_s", "gain", "predicted_gain"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("A fox and a hen went for a walk. " * 20)
    return file


def test_json_markdown_and_page(skimp, model_dir: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    markdown, page = tmp_path / "price.md", tmp_path / "price.html"
    done = skimp(
        "price", model_dir, f"{model_dir}@page_tokens=32", "--text", text, "--batch", "1,2",
        "--context", "16", "--new-tokens", 4, "--rounds", 2, "--json", "--markdown", markdown,
        "--html", page,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {"base", "rows", "speculation"} and found["speculation"] == []
    (row,) = found["rows"]
    for each in (found["base"], row):
        assert set(each) >= ROW
        assert [(s["batch"], s["context"]) for s in each["speed"]] == [(1, 16), (2, 16)]
        assert all(
            set(s) >= SPEED | {"device", "dtype", "spread", "samples"} for s in each["speed"]
        )
    assert all(s["gain"] == 1 and s["predicted_gain"] == 1 for s in found["base"]["speed"])
    assert row["name"].endswith("@page_tokens=32")
    assert row["bits_per_byte"] == pytest.approx(found["base"]["bits_per_byte"])
    assert row["inside_noise"]
    for mine, base in zip(row["speed"], found["base"]["speed"]):
        assert mine["gain"] == pytest.approx(mine["tokens_per_s"] / base["tokens_per_s"])
    assert markdown.read_text().count("\n| --- |") == 3
    assert page.read_text().count("<svg") == 3


def test_contexts_and_a_fixed_cache(skimp, model_dir: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    markdown, page = tmp_path / "price.md", tmp_path / "price.html"
    smaller = f"{model_dir}@cache_dtype=int8"
    common = (
        "price", model_dir, smaller, "--text", text, "--context", "16,48", "--new-tokens", 8,
        "--rounds", 1,
    )  # fmt: skip
    done = skimp(
        *common, "--cache-bytes", "128k", "--batch", "1,max", "--json", "--markdown", markdown,
        "--html", page,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    base, row = found["base"], found["rows"][0]
    for each in (base, row):
        assert each["cache_budget_bytes"] == 128 << 10
        assert [(s["asked_batch"], s["context"]) for s in each["speed"]] == [
            ("1", 16), ("1", 48), ("max", 16), ("max", 48),
        ]  # fmt: skip
        assert [s["batch_limited_by"] for s in each["speed"]] == [None] * 2 + ["cache_bytes"] * 2
        assert all(s["cache_bytes_held"] <= each["cache_budget_bytes"] for s in each["speed"])
        # The text is read in windows that the cache holds.
        assert each["window"] == base["window"] <= (128 << 10) // 256
    # Pages of 16 tokens: 256 bytes a token, or 80.
    held = [[use["bytes"] for use in each["cache_bytes_by_context"]] for each in (base, row)]
    assert held == [[16 * 256, 48 * 256], [16 * 80, 48 * 80]]
    for mine, theirs in zip(row["speed"][2:], base["speed"][2:]):
        assert mine["batch"] > 2 * theirs["batch"]
        assert mine["gain"] == pytest.approx(mine["tokens_per_s"] / theirs["tokens_per_s"])
        more = mine["batch"] / theirs["batch"]
        assert mine["predicted_gain"] == pytest.approx(
            more * theirs["predicted_ms"] / mine["predicted_ms"]
        )
    batch = base["speed"][3]["batch"]
    assert f"| max {batch} x 48 |" in markdown.read_text()
    assert "cache at 48" in markdown.read_text() and "131 kB of cache" in markdown.read_text()
    assert "Gain by context, largest batch" in page.read_text()
    for wrong, named in (
        (["--batch", "max"], "batch: max needs the cache_bytes"),
        (["--cache-bytes", "9k"], "cache_bytes: 9,216 bytes hold no sequence of 48"),
        (["--cache-bytes", "big"], "cache_bytes: 'big'"),
        (["--cache-bytes", "900g"], "cache_bytes: 900g exceeds"),
        (["--cache-bytes", "128k", "--batch", "40"], "batch: 40 sequences of 16 tokens"),
        (["--cache-bytes", "32k", "--window", "200"], "window: 200 tokens do not fit the 32,768"),
    ):
        refused = skimp(*common, "--batch", "max", *wrong)
        assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
        assert named in refused.stderr, refused.stderr
    own = skimp("price", model_dir, f"{model_dir}@cache_bytes=9999", "--cache-bytes", "1m")
    assert own.exit_code == 2 and "cache_bytes: is the same for every model" in own.stderr
    few = skimp("price", model_dir, f"{model_dir}@max_batch=2", "--batch", "3", "--context", "16")
    assert few.exit_code == 2 and "batch: 3 sequences exceed max_batch 2" in few.stderr


def test_tasks_are_held_against_the_base(
    skimp, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    pairs, sums = tmp_path / "pairs.jsonl", tmp_path / "sums.jsonl"
    rows = [{"sentence_good": f"it is {i}", "sentence_bad": f"it {i} is"} for i in range(6)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    markdown = tmp_path / "price.md"
    common = (
        "price", model_dir, f"{model_dir}@page_tokens=32", "--text", text, "--context", "16",
        "--new-tokens", 2, "--rounds", 1,
    )  # fmt: skip
    done = skimp(
        *common, "--task", pairs, "--task", sums, "--max-tokens", 4, "--shots", 1, "--json",
        "--markdown", markdown,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    for each in (found["base"], row):
        assert [(t["task"], t["kind"], t["n"]) for t in each["tasks"]] == [
            ("pairs", "minimal-pair", 6),
            ("sums", "generate", 3),
        ]
    own, base = (each["tasks"][0]["scores"]["accuracy"] for each in (row, found["base"]))
    assert own["value"] == base["value"] and own["ci95"] == base["ci95"]
    assert own["difference"] == 0 and own["difference_ci95"] == [0, 0] and own["inside_noise"]
    assert "difference" not in base
    shown = markdown.read_text()
    assert "pairs: accuracy" in shown and "minimal-pair, 6 items" in shown and "1 shots" in shown
    for wrong, named in (
        (["--kind", "choice"], "kind"),
        (["--task", pairs, "--shots", 1], "shots"),
        (["--task", text], "text.txt"),
    ):
        refused = skimp(*common, *wrong)
        assert refused.exit_code == 2 and named in refused.stderr


def test_retrieval_stands_beside_the_tasks(
    skimp, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    markdown = tmp_path / "price.md"
    common = (
        "price", model_dir, f"{model_dir}@page_tokens=32", "--text", text, "--context", "16",
        "--new-tokens", 2, "--rounds", 1,
    )  # fmt: skip
    done = skimp(
        *common, "--retrieval", "200,220", "--retrieval-items", 2, "--json", "--markdown", markdown
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    names = [f"{kind} at {n}" for n in (200, 220) for kind in ("needle", "4 keys")]
    for each in (found["base"], found["rows"][0]):
        assert [t["task"] for t in each["tasks"]] == names
        assert all(t["n"] == 2 and t["kind"] == "retrieval" for t in each["tasks"])
    own, base = (
        each["tasks"][1]["scores"]["accuracy"] for each in (found["rows"][0], found["base"])
    )
    assert own["difference"] == 0 and own["ci95"] == base["ci95"] and base["chance"] == 0.125
    shown = markdown.read_text()
    assert "needle at 200: accuracy" in shown and "chance 0.125" in shown
    for wrong, named in (
        (["--retrieval", "50"], "retrieval: contexts of at least 96"),
        (["--retrieval", "256"], "retrieval: 256 tokens and an answer"),
        (
            ["--retrieval", "200", "--cache-bytes", "20k", "--context", "8", "--new-tokens", "2"],
            "retrieval: 200 tokens and an answer do not fit the",
        ),
        (["--retrieval-items", "5"], "retrieval_items: needs --retrieval"),
    ):
        refused = skimp(*common, *wrong)
        assert refused.exit_code == 2 and named in refused.stderr


@pytest.mark.parametrize("others", [1, 3])
def test_models_that_do_not_fit_together_take_turns_with_the_base(
    skimp, model_dir: Path, text: Path, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skimp.cli import price as command
    from skimp.meter import work

    groups: list[list[str]] = []
    run = command._price
    monkeypatch.setattr(
        command, "_price", lambda g, *rest: groups.append([e.name for e in g]) or run(g, *rest)
    )
    monkeypatch.setattr(work, "engine_bytes", lambda spec, options, free: 10.0)
    entries = [str(model_dir), *(f"{model_dir}@max_batch={4 + i}" for i in range(others))]
    command_line = (
        "price", *entries, "--text", text, "--context", "16", "--new-tokens", 2, "--rounds", 1,
    )  # fmt: skip
    monkeypatch.setattr(work, "free_memory", lambda device: 10 * len(entries))
    assert "all models loaded" in skimp(*command_line).stdout
    assert groups == [entries]
    groups.clear()
    monkeypatch.setattr(work, "free_memory", lambda device: 10 * len(entries) - 1)
    done = skimp(*command_line)
    if others == 1:
        assert done.exit_code == 2 and groups == []
        assert "memory" in done.stderr and "20 B together, and 19 B" in done.stderr
        return
    assert groups == [[entries[0], other] for other in entries[1:]]
    assert "taking turns with the base alone" in done.stdout
    assert all(other in done.stdout for other in entries)


def test_the_memory_that_engines_take_is_counted(model_dir: Path) -> None:
    from skimp.engine import Engine, EngineOptions
    from skimp.meter.work import engine_bytes, free_memory

    options = EngineOptions(max_batch=4, max_context=128)
    engine = Engine.load(model_dir, options)
    counted = engine_bytes(engine.spec, options, free_memory("cpu"))
    held = engine.work.resident_weight_bytes + engine.cache.arena.budget_bytes
    assert held <= counted < 1.5 * held + 8e6


def test_a_text_unlike_the_calibration_is_warned_of(
    skimp, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("A fox and a hen went for a walk. " * 400)
    recipe.write_text(
        f"calibration: {{samples: 4, tokens: 64, text: {calibration}}}\n"
        "steps: [{quantize: {format: int4, method: gptq, group_size: 32}}]"
    )
    made = skimp("shrink", model_dir, recipe, "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    other = tmp_path / "other.txt"
    other.write_text("0123456789 def __init__(self): return {[()]}; " * 40)

    def run(command: str, *args: object) -> str:
        done = skimp(command, *args, "--max-bytes", 2000)
        assert done.exit_code == 0, done.output
        return str(done.stderr)

    fast = ("--context", 16, "--new-tokens", 2, "--rounds", 1)
    assert "unlike" not in run("eval", tmp_path / "out", "--text", text)
    assert "unlike" in run("eval", tmp_path / "out", "--text", other)
    assert "unlike" not in run("price", model_dir, tmp_path / "out", "--text", text, *fast)
    assert "out: it was calibrated on text that is unlike" in run(
        "price", model_dir, tmp_path / "out", "--text", other, *fast
    )
    assert "unlike" not in run("eval", model_dir, "--text", other)


def test_a_checkpoint_that_asks_for_a_low_bit_cache(
    skimp, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    """From the recipe to the table: the engine's ``auto`` follows what the shrunk config says."""
    recipe, out = tmp_path / "cache.yaml", tmp_path / "out"
    recipe.write_text("- cache: {format: int8}\n")
    done = skimp("shrink", model_dir, recipe, "-o", out, "--quiet")
    assert done.exit_code == 0, done.output
    engine = Engine.load(out)
    assert engine.backend_name == ("native" if native.available() else "plain")
    assert engine.cache.layout.groups[0].spec.format == "int8"
    done = skimp(
        "price", model_dir, out, f"{model_dir}@cache_dtype=int8", f"{out}@cache_dtype=float32",
        "--text", text, "--context", "16", "--new-tokens", 4, "--rounds", 1, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    asked, chosen, undone = found["rows"]
    # Two layers of two heads of 8 float32 numbers, twice; or of 8 bytes and a scale of two.
    assert found["base"]["cache_bytes_per_token"] == undone["cache_bytes_per_token"] == 256
    assert asked["cache_bytes_per_token"] == chosen["cache_bytes_per_token"] == 80
    assert asked["kl"] == pytest.approx(chosen["kl"], rel=1e-6)
    assert 0 < asked["kl"] < 0.01 and undone["kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("entry", "named"),
    [("m@colour=red", "colour"), ("m@threads=", "threads"), ("m@threads=2,page=3", "page")],
)
def test_wrong_options_of_an_entry_are_named(entry: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}:"):
        split_entry(entry)


def test_options_of_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_entry("tales") == ("tales", {})
    assert split_entry("a@b/c@threads=2,prefix_cache=false,dtype=float32") == (
        "a@b/c",
        {"threads": 2, "prefix_cache": False, "dtype": "float32"},
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m@threads=2").mkdir()
    assert split_entry("m@threads=2") == ("m@threads=2", {})


def test_wrong_values_end_in_one_line(skimp, model_dir: Path, text: Path) -> None:
    for arguments, named in (
        (["--rounds", 0], "rounds"),
        (["--context", "4000"], "context"),
        (["--text", text.parent / "none.txt"], "none.txt"),
    ):
        done = skimp("price", model_dir, model_dir, *arguments)
        assert done.exit_code == 2
        assert named in done.stderr and done.stderr.count("\n") == 1
    done = skimp("price", model_dir, f"{model_dir}@backend=fast", "--text", text)
    assert done.exit_code == 2 and "backend" in done.stderr
