"""Conversions of the embedded model that remember less: each as converted, and healed.

    python benchmarks/remember_less.py --text FILE --work DIR [--device cuda] [--jobs N]

runs ``skimp shrink`` on two recipes for each conversion below: alone, and with a heal step behind
it. FILE is any text like what the model will read (``self``: what the model itself writes).
Recipes, models, logs and ``seconds.json`` are left in DIR; ``skimp price`` says what the models
cost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BASE = "tales"
CALIBRATION = {"samples": 32, "tokens": 768}
GQA = {"gqa": {"kv_heads": 2}}
LOCAL = {"local": {"window": 256, "global_layers": 2}}
# Layers 5 and 6, which ``choose: measured`` takes, lose least before healing; 5 and 7 do after it.
HEALS_BEST = {"local": {"window": 256, "global_layers": [5, 7]}}


@dataclass(frozen=True)
class Conversion:
    """Steps of the recipe, and fields of its healing that are its own."""

    steps: tuple[dict[str, Any], ...]
    heal: dict[str, Any]


CONVERSIONS = {
    "gqa": Conversion((GQA,), {"lr": 1e-3}),
    "mla": Conversion(({"mla": {"latent": 256, "rope": 64}},), {"lr": 1e-3}),
    # Small damage: it is soon less than what large steps shake, so they must end in tiny ones.
    "local": Conversion((HEALS_BEST,), {"lr": 6e-4, "final": 0.02, "betas": [0.9, 0.99]}),
    "gqa-local": Conversion((GQA, LOCAL), {"lr": 1e-3}),
}


def recipes(name: str, heal: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By the name of what comes out, the steps of a conversion without and with healing."""
    own = CONVERSIONS[name]
    return {name: [*own.steps], f"{name}-healed": [*own.steps, {"heal": heal | own.heal}]}


def shrink(name: str, steps: list[dict[str, Any]], work: Path) -> float:
    """Seconds that ``skimp shrink`` took."""
    recipe = work / f"{name}.yaml"
    content = {"calibration": CALIBRATION, "steps": steps}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "skimp", "shrink", BASE, str(recipe), "-o", str(work / name)]
    begin = time.perf_counter()
    with (work / f"{name}.log").open("wb") as log:
        code = subprocess.run([*command, "--restart"], stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"{name}: see {work / name}.log")
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", default="self", help="a file, or self")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--length", type=int, default=2047)
    parser.add_argument("--only", nargs="+", default=list(CONVERSIONS), choices=CONVERSIONS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    heal = {
        "text": given.text if given.text == "self" else str(Path(given.text).resolve()),
        "tokens": given.tokens,
        "batch": given.batch,
        "micro_batch": given.batch,
        "length": min(given.length, given.batch),
        "device": given.device,
    }
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in given.only:
        runs |= recipes(name, heal)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // given.jobs))
    with ThreadPoolExecutor(given.jobs) as pool:
        took = pool.map(lambda name: shrink(name, runs[name], given.work), runs)
        seconds = {name: round(one, 1) for name, one in zip(runs, took)}
    (given.work / "seconds.json").write_text(json.dumps(seconds, indent=1), encoding="utf-8")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
