"""Fewer heads and local layers on the embedded model: each ingredient helps, measuring helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skimp.engine import Engine, EngineOptions
from skimp.meter.divergence import compare_all
from skimp.meter.retrieval import Retrieval, run_retrieval
from skimp.meter.tasks import paired_score
from skimp.model.locate import locate_model
from skimp.shrink import pipeline
from skimp.shrink.recipe import parse_recipe
from skimp.shrink.text import default_text, load_samples
from skimp.text import Tokenizer

OPTIONS = EngineOptions(dtype="float32", max_batch=8)


def shrunk(folder: Path, name: str, step: str, samples: int, length: int) -> Path:
    model = locate_model("tales")
    text = f"calibration: {{samples: {samples}, tokens: {length}}}\nsteps:\n- {step}\n"
    job = pipeline.prepare(model, parse_recipe(text, "r.yaml", folder))
    tokens = load_samples(job.recipe.calibration, Tokenizer.load(model), 0, 8192)
    for note in pipeline.shrink(job, folder / name, tokens=tokens).notes:
        print(note)
    return folder / name


def divergences(models: dict[str, Path], context: int, max_bytes: int) -> dict[str, Any]:
    text = default_text().with_name("evaluation.txt").read_text()
    base = Engine.load(locate_model("tales"), OPTIONS)
    others = [Engine.load(path, OPTIONS) for path in models.values()]
    found = compare_all(base, others, text, context=context, max_bytes=max_bytes)
    for name, one in zip(models, found):
        low, high = one.divergence.ci95
        print(f"{name}: {one.divergence.kl:.4f} nats a token ({low:.4f} to {high:.4f})")
    return {name: one.divergence for name, one in zip(models, found)}


@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 2])
def test_each_ingredient_of_gqa_helps(heads: int, tmp_path: Path) -> None:
    options = {
        "mean": "method: mean",
        "aligned, adjacent, not refitted": "method: aligned, group: adjacent, refit: false",
        "aligned, not refitted": "method: aligned, refit: false",
        "aligned": "method: aligned",
        "joint, not refitted": "refit: false",
        "joint": "refit: true",
    }
    models = {
        name: shrunk(tmp_path, f"m{i}", f"gqa: {{kv_heads: {heads}, {fields}}}", 32, 256)
        for i, (name, fields) in enumerate(options.items())
    }
    kl = {name: found.kl for name, found in divergences(models, 512, 20_000).items()}
    assert kl["aligned, not refitted"] < 0.5 * kl["mean"]
    assert kl["aligned, not refitted"] < kl["aligned, adjacent, not refitted"]
    assert kl["aligned"] < kl["aligned, not refitted"]
    assert kl["joint"] < kl["joint, not refitted"] < kl["aligned, not refitted"]
    assert kl["joint"] < kl["aligned"]


@pytest.mark.slow
def test_measured_global_layers_keep_more_than_every_other(tmp_path: Path) -> None:
    choices = {"measured": "global_layers: 2", "every": "global_layers: 2, choose: every"}
    models = {
        name: shrunk(tmp_path, name, f"local: {{window: 128, {fields}}}", 12, 768)
        for name, fields in choices.items()
    }
    models["none"] = shrunk(tmp_path, "none", "local: {window: 128, global_layers: 0}", 1, 8)
    kl = divergences(models, 1024, 40_000)
    asked = Retrieval(contexts=(512,), keys=(1,))
    paths = {"base": locate_model("tales"), **models}
    found = {
        name: run_retrieval(Engine.load(path, OPTIONS), asked)[0] for name, path in paths.items()
    }
    for name, result in found.items():
        print(name, result.scores)
    low, _ = found["base"].scores["accuracy"].ci95
    assert low > 0.5  # four times chance
    assert paired_score(found["base"], found["none"], "accuracy").ci95[1] < 0
    for score in ("accuracy", "gain"):
        values = {name: result.scores[score].value for name, result in found.items()}
        assert values["measured"] > values["every"] and values["measured"] > values["none"]
    assert kl["measured"].kl < kl["every"].kl
