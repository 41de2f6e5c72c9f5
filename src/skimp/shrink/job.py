"""A recipe that fits a model, and what a run of it depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import skimp
from skimp.errors import ShrinkError, SkimpError, shown
from skimp.model.loading import CONFIG_FILE, Stored
from skimp.model.manifest import file_sha256
from skimp.model.spec import ModelSpec
from skimp.shrink.recipe import Recipe
from skimp.shrink.step import Need, WholeStep, unit_names
from skimp.shrink.units import calibration_hash

# What a run depends on, in words for the person whose second run differs from the first.
DEPENDS: Final = {
    "skimp": "skimp version",
    "torch": "torch version",
    "isa": "instruction set",
    "model": "model",
    "recipe": "recipe",
    "calibration": "calibration text",
    "files": "text to heal on",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe that fits a model. ``specs`` has the model's and, after it, what each step is
    planned to make of it."""

    directory: Path
    recipe: Recipe
    stored: Stored
    specs: tuple[ModelSpec, ...]
    needs: tuple[Need, ...]

    @property
    def calibrated(self) -> bool:
        return any(need.calibration for need in self.needs)

    @property
    def visits(self) -> int:
        """Units to be gone through, over all passes."""
        return sum(need.passes for need in self.needs) * len(unit_names(self.specs[0]))

    @property
    def ticks(self) -> int:
        """Of progress: units, and what whole steps count."""
        return self.visits + sum(need.ticks for need in self.needs)


def check_files(job: Job) -> None:
    """What a first step reads it finds fault with itself, at once."""
    for number, step in enumerate(job.recipe.steps[1:], 2):
        if isinstance(step, WholeStep):
            try:
                step.check_files(job.specs[0], job.directory)
            except SkimpError as error:
                where = f"{job.recipe.name}: step {number} ({step.kind})"
                raise ShrinkError(f"{where}: {error}") from error


def identity(job: Job, tokens: Tensor | None) -> dict[str, Any]:
    """Everything the output depends on but the number of threads, which a run keeps."""
    run = {
        "skimp": skimp.__version__,
        "torch": torch.__version__,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "model": _model_identity(job),
        "recipe": job.recipe.as_dict(),
        "calibration": calibration_hash(tokens),
        "files": [
            file_sha256(path)
            for step in job.recipe.steps
            if isinstance(step, WholeStep)
            for path in step.files()
        ],
    }
    return dict(json.loads(json.dumps(run)))


def _model_identity(job: Job) -> dict[str, Any]:
    """Config and headers by hash, data by size and time of change: hashing it would take long."""
    places = [*job.stored.dense.values()]
    places += [place for parts in job.stored.parts.values() for place in parts.values()]
    files = {}
    for path in sorted({place.file for place in places}):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        status = path.stat()
        files[path.name] = {
            "size": status.st_size,
            "header": file_sha256(path, 0, 8 + length),
            "time": status.st_mtime_ns,
        }
    return {"config": file_sha256(job.directory / CONFIG_FILE), "files": files}


def without_times(model: Mapping[str, Any]) -> dict[str, Any]:
    files = {
        name: {key: value for key, value in entry.items() if key != "time"}
        for name, entry in model["files"].items()
    }
    return {"config": model["config"], "files": files}


def key_of(run: Mapping[str, Any]) -> str:
    text = json.dumps({**run, "model": without_times(run["model"])}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], output: Path) -> None:
    for key, words in DEPENDS.items():
        if before.get(key) == now[key]:
            continue
        pair = ""
        if isinstance(now[key], str) and len(now[key]) < 32:
            pair = f" ({shown(before.get(key))}, now {shown(now[key])})"
        raise ShrinkError(
            f"{output}: an unfinished run is there, and its {words} differs{pair}; give the same "
            "again, or begin anew with --restart"
        )


@contextlib.contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Sums split among as many threads as when the run began, by algorithms that repeat."""
    before = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
