"""``skimp price`` on small models of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skimp.cli.price import split_entry

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
    assert set(found) == {"base", "rows"}
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
    assert markdown.read_text().count("\n| --- |") == 2
    assert page.read_text().count("<svg") == 3


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
