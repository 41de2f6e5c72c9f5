"""Conversions of the embedded model that remember less: each as converted, and healed.

    python benchmarks/remember_less.py --device cuda --work DIR [--jobs N]

runs ``skimp shrink`` on a recipe for each model named below, twice: the conversion alone, and with
a heal step behind it, on text that the original writes itself. Recipes, models and ``times.json``
(seconds a run) are left in DIR; ``skimp price`` says what they cost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

BASE = "tales"
GQA = {"gqa": {"kv_heads": 2}}
LOCAL = {"local": {"window": 256, "global_layers": 2}}
CONVERSIONS: dict[str, list[dict[str, Any]]] = {
    "gqa": [GQA],
    "mla": [{"mla": {"latent": 256, "rope": 64}}],
    "local": [LOCAL],
    "gqa-local": [GQA, LOCAL],
}
CALIBRATION = {"samples": 32, "tokens": 768}


def heal_step(device: str, tokens: int, self_tokens: int, batch: int, lr: float) -> dict[str, Any]:
    return {
        "heal": {
            "text": "self",
            "self_tokens": self_tokens,
            "tokens": tokens,
            "batch": batch,
            "micro_batch": min(batch, 32768),
            "length": min(batch, 2047),
            "lr": lr,
            "device": device,
        }
    }


def shrink(name: str, steps: list[dict[str, Any]], work: Path) -> float:
    """Seconds."""
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--self-tokens", type=int, default=4_000_000)
    parser.add_argument("--batch", type=int, default=32768)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--only", nargs="+", default=list(CONVERSIONS), choices=CONVERSIONS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    heal = heal_step(given.device, given.tokens, given.self_tokens, given.batch, given.lr)
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in given.only:
        runs |= {name: CONVERSIONS[name], f"{name}-healed": [*CONVERSIONS[name], heal]}
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // given.jobs))
    with ThreadPoolExecutor(given.jobs) as pool:
        took = pool.map(lambda name: shrink(name, runs[name], given.work), runs)
        times = {name: round(seconds, 1) for name, seconds in zip(runs, took)}
    (given.work / "times.json").write_text(json.dumps(times, indent=1), encoding="utf-8")
    print(json.dumps(times))


if __name__ == "__main__":
    main()
