"""A recipe run over a model, unit by unit: resumable, bit-identical however often it is killed.

Work is kept in a hidden directory beside the output: a journal, the units that the last two steps
wrote, the last two saves of a whole step, and the calibration activations that enter the next unit.
The finished checkpoint is written there too and renamed to the output, so that the output is whole
whenever it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from skimp.errors import CheckpointError, ShrinkError, SkimpError
from skimp.model import families
from skimp.model.checkpoint import read_json
from skimp.model.loading import empty_decoder, load_spec, load_stored
from skimp.model.manifest import MANIFEST_FILE, SHRINK_FILE, read_manifest
from skimp.model.saving import SHARD_BYTES, save_checkpoint, sync_directory
from skimp.model.spec import ModelSpec
from skimp.shrink.curve import CURVE
from skimp.shrink.job import (
    Job,
    check_files,
    check_same,
    identity,
    key_of,
    reproducible,
    without_times,
)
from skimp.shrink.journal import JOURNAL, Journal, WorkDirectory
from skimp.shrink.recipe import Recipe
from skimp.shrink.step import (
    Need,
    Run,
    Saved,
    Step,
    Unit,
    Whole,
    WholeStep,
    calibration_dtype,
    unit_names,
)
from skimp.shrink.text import IMPRINT, Imprint
from skimp.shrink.units import (
    CheckpointSource,
    OnDemand,
    Source,
    UnitFiles,
    check_file,
    read_file,
    read_unit,
    unit_of,
    write_file,
)

RECIPE_FILE: Final = "recipe.yaml"
FINISHED: Final = "output"  # in the work directory
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``resumed`` counts units that an earlier run had finished. ``curves``: what whole steps
    recorded, by step."""

    output: Path
    spec: ModelSpec
    notes: tuple[str, ...]
    visits: int
    resumed: int
    curves: tuple[tuple[Mapping[str, Any], ...], ...] = ()


def prepare(directory: Path | str, recipe: Recipe) -> Job:
    """Check a recipe against a model, reading headers alone. Raises SkimpError."""
    directory = Path(directory)
    spec = load_spec(directory)
    stored = load_stored(directory, spec, empty_decoder(spec))
    specs, needs = [spec], []
    for number, step in enumerate(recipe.steps, 1):
        try:
            needs.append(_need(step, specs[-1], spec))
            specs.append(step.planned_spec(specs[-1]))
            families.to_config(specs[-1])
        except SkimpError as error:
            raise ShrinkError(f"{recipe.name}: step {number} ({step.kind}): {error}") from error
    return Job(
        directory=directory, recipe=recipe, stored=stored, specs=tuple(specs), needs=tuple(needs)
    )


def _need(step: Step | WholeStep, spec: ModelSpec, original: ModelSpec) -> Need:
    if isinstance(step, WholeStep):
        return step.need_beside(spec, original)
    return step.need(spec)


def shrink(
    job: Job,
    output: Path | str,
    *,
    tokens: Tensor | None = None,
    restart: bool = False,
    progress: Progress = lambda done, total: None,
    tell: Callable[[str], None] = lambda text: None,
    shard_bytes: int = SHARD_BYTES,
) -> Outcome:
    """Run a job, or go on with one that was killed, and return what came out.

    ``tokens`` int64 [samples, T] are needed if the job is calibrated; ``tell`` is told how a whole
    step goes. The same arguments on the
    same kind of machine give the same files, bit for bit, whether or not runs were killed on the
    way. Raises ShrinkError if ``output`` is taken, being written by another process, or half made
    from something else (which ``restart`` throws away).
    """
    assert tokens is not None or not job.calibrated
    output = Path(output).absolute()
    taken = output.is_symlink() or (
        output.exists() and not (output.is_dir() and not any(output.iterdir()))
    )
    work = WorkDirectory(output)
    if taken and not work.path.exists():
        raise ShrinkError(f"{output}: exists already and is not an empty directory")
    run = identity(job, tokens if job.calibrated else None)
    check_files(job)
    with work:
        if taken or (output.exists() and any(output.iterdir())):
            if not _made_by(output, run):
                raise ShrinkError(f"{output}: exists already and is not an empty directory")
            work.remove()  # an earlier run was killed between its last two breaths
            return _finished(job, output)
        if restart:
            work.clear()
        with contextlib.closing(Journal(work.path / JOURNAL)) as journal:
            if journal.run is None:
                for entry in work.path.iterdir():
                    if entry.is_dir():
                        shutil.rmtree(entry)
                journal.start({**run, "threads": torch.get_num_threads()})
            assert journal.run is not None
            check_same(journal.run, run, output)
            with reproducible(journal.run["threads"]):
                result = _Pipeline(job, work.path, journal, tokens, progress, tell).run()
            resumed = result.resumed
            read = Imprint.of(tokens) if tokens is not None and job.calibrated else None
            _write(job, work.path, output, journal, result, key_of(run), read, shard_bytes)
        progress(job.ticks + 1, job.ticks + 1)
        work.remove()
    notes = [note for notes in result.notes for note in notes]
    return Outcome(
        output=output,
        spec=result.spec,
        notes=tuple(dict.fromkeys(notes)),
        visits=job.visits,
        resumed=resumed,
        curves=tuple(tuple(rows) for rows in result.curves if rows),
    )


# ---- the passes -------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Result:
    source: Source
    spec: ModelSpec
    notes: list[list[str]] = field(default_factory=list)  # of each step
    curves: list[list[dict[str, Any]]] = field(default_factory=list)  # likewise
    resumed: int = 0


class _Pipeline:
    def __init__(
        self,
        job: Job,
        work: Path,
        journal: Journal,
        tokens: Tensor | None,
        progress: Progress,
        tell: Callable[[str], None],
    ) -> None:
        self._job, self._work, self._journal = job, work, journal
        self._tokens, self._progress, self._tell = tokens, progress, tell
        self._done = list(journal.entries)  # by earlier runs
        self._read = 0  # of them
        self._ticks = 0

    def run(self) -> _Result:
        original = CheckpointSource(self._job.stored)
        result = _Result(source=original, spec=self._job.specs[0])
        result.resumed = sum("unit" in entry for entry in self._done)
        for number, step in enumerate(self._job.recipe.steps):
            need = _need(step, result.spec, self._job.specs[0])
            files = UnitFiles(self._folder(number))
            files.folder.mkdir(exist_ok=True)
            state: dict[str, Any] = {}
            notes: list[str] = []
            curve: list[dict[str, Any]] = []
            if isinstance(step, WholeStep):
                self._whole(number, step, need, result, original, files, notes, curve)
            else:
                for index in range(need.passes):
                    last = index == need.passes - 1
                    spec, source = result.spec, result.source
                    state = self._pass(
                        number, step, need, index, last, spec, source, files, state, notes
                    )
            result.notes.append(notes)
            result.curves.append(curve)
            result.spec = step.output_spec(result.spec, state)
            result.source = files
            if number > 0:
                shutil.rmtree(self._folder(number - 1), ignore_errors=True)
        return result

    def _tick(self, count: int = 1) -> None:
        self._ticks += count
        self._progress(self._ticks, self._job.ticks + 1)

    def _earlier(self, at: Mapping[str, Any]) -> dict[str, Any] | None:
        """What an earlier run journaled of this place; None from where it was killed."""
        if self._read == len(self._done):
            return None
        entry = self._done[self._read]
        if {key: entry.get(key) for key in at} != at:
            raise ShrinkError(f"{self._journal.path}: units are not in order")
        self._read += 1
        return entry

    def _seed(self, *place: int) -> int:
        text = " ".join(str(part) for part in (self._job.recipe.seed, *place))
        return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)

    def _folder(self, step: int) -> Path:
        return self._work / f"step-{step + 1:02}"

    def _pass(
        self,
        number: int,
        step: Step,
        need: Need,
        index: int,
        last: bool,
        spec: ModelSpec,
        source: Source,
        files: UnitFiles,
        state: dict[str, Any],
        notes: list[str],
    ) -> dict[str, Any]:
        """One pass of a step; the state it ends with."""
        hidden: Tensor | None = None
        for position, name in enumerate(unit_names(spec)):
            at = {"step": number, "pass": index, "unit": position}
            earlier = self._earlier(at)
            if earlier is not None:
                entry = earlier
                state = entry.get("state", state)
                hidden = self._again(entry, files)
            else:
                run = Run(
                    pass_index=index,
                    state=json.loads(json.dumps(state)),
                    tokens=self._tokens if need.calibration else None,
                    hidden=hidden,
                )
                tied = name == "head" and spec.tie_embeddings
                unit = Unit(
                    name=name,
                    index=position,
                    spec=spec,
                    tensors=read_unit(source, name),
                    table=source.read("embed_tokens.weight") if tied else None,
                )
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self._seed(number, index, position))
                    found = step.visit(unit, run)
                assert (found.tensors is not None) == last, f"{step.kind}: pass {index} {name}"
                entry = {**at, "notes": run.notes}
                if found.tensors is not None:
                    entry["sha256"], entry["formats"] = files.write(position, found.tensors)
                hidden = None
                if need.calibration and found.hidden is not None:
                    hidden = found.hidden.to(calibration_dtype()).contiguous()
                    entry["hidden"] = write_file(self._slot(position), {"hidden": hidden})
                if run.state != state:
                    entry["state"] = state = json.loads(json.dumps(run.state))
                self._journal.add(entry)
                del unit, found
            notes += entry["notes"]
            self._tick()
        return state

    def _whole(
        self,
        number: int,
        step: WholeStep,
        need: Need,
        result: _Result,
        original: Source,
        files: UnitFiles,
        notes: list[str],
        curve: list[dict[str, Any]],
    ) -> None:
        """A whole step: its saves, then its units."""
        before = self._ticks
        last: dict[str, Any] | None = None
        while self._read < len(self._done) and "save" in self._done[self._read]:
            last = self._earlier({"step": number, "save": 0 if last is None else last["save"] + 1})
            assert last is not None
            curve += last["rows"]
        names = unit_names(result.spec)
        if len(self._done) - self._read < len(names):  # not all of its units are there
            whole = self._handed(number, step, result, original, files, last, curve, before)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed(number))
                tensors = step.work(whole)
        self._ticks = before
        self._tick(need.ticks)
        for position, name in enumerate(names):
            at = {"step": number, "pass": 0, "unit": position}
            entry = self._earlier(at)
            if entry is not None:
                self._again(entry, files)
            else:
                entry = {**at, "notes": whole.notes if position == 0 else []}
                own = {n: tensors[n] for n in tensors if unit_of(n) == name}
                entry["sha256"], entry["formats"] = files.write(position, own)
                self._journal.add(entry)
            notes += entry["notes"]
            self._tick()

    def _handed(
        self,
        number: int,
        step: WholeStep,
        result: _Result,
        original: Source,
        files: UnitFiles,
        last: Mapping[str, Any] | None,
        curve: list[dict[str, Any]],
        before: int,
    ) -> Whole:
        saved, count = None, 0
        if last is not None:
            count, path = last["save"] + 1, _save_slot(files.folder, last["save"])
            check_file(path, last["sha256"])
            saved = Saved(state=last["state"], tensors=read_file(path))

        def save(
            state: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: list[dict[str, Any]]
        ) -> None:
            nonlocal count
            digest = write_file(_save_slot(files.folder, count), tensors)
            entry = {"step": number, "save": count, "sha256": digest, "state": state, "rows": rows}
            self._journal.add(json.loads(json.dumps(entry)))
            curve.extend(rows)
            count += 1

        def progress(done: int, text: str) -> None:
            self._tell(f"{step.kind}: {text}")
            self._tick(before + done - self._ticks)

        return Whole(
            spec=result.spec,
            tensors=OnDemand(result.source),
            original=self._job.specs[0],
            original_tensors=OnDemand(original),
            directory=self._job.directory,
            seed=self._seed(number),
            saved=saved,
            rows=list(curve),
            save=save,
            progress=progress,
        )

    def _again(self, entry: Mapping[str, Any], files: UnitFiles) -> Tensor | None:
        """Take over a unit of an earlier run; the activations if the next unit needs them."""
        # Steps before the last two are used up and may be gone.
        following = self._done[-1]["step"] + self._step_is_over()
        if "sha256" in entry and entry["step"] >= following - 1:
            files.check(entry["unit"], entry["sha256"])
            files.add(entry["unit"], entry["formats"])
        if "hidden" not in entry or entry is not self._done[-1]:
            return None
        path = self._slot(entry["unit"])
        check_file(path, entry["hidden"])
        return read_file(path)["hidden"].clone()

    def _step_is_over(self) -> bool:
        last = self._done[-1]
        if "save" in last:
            return False
        units = len(unit_names(self._job.specs[0]))
        passes = self._job.needs[last["step"]].passes
        return last["pass"] == passes - 1 and last["unit"] == units - 1

    def _slot(self, unit: int) -> Path:
        """Two slots, so that writing what leaves a unit spares what entered it."""
        return self._work / f"hidden-{unit % 2}.safetensors"


def _save_slot(folder: Path, save: int) -> Path:
    """Two slots, so that writing a save spares the one before."""
    return folder / f"save-{save % 2}.safetensors"


# ---- the output -------------------------------------------------------------------------------


def _write(
    job: Job,
    work: Path,
    output: Path,
    journal: Journal,
    result: _Result,
    key: str,
    read: Imprint | None,
    shard_bytes: int,
) -> None:
    """Write the checkpoint within the work directory, then move it to its place at once."""
    for entry in work.iterdir():
        if entry.name == FINISHED or entry.name.startswith(f".{FINISHED}."):
            shutil.rmtree(entry)
    assert journal.run is not None
    run = {**journal.run, "model": without_times(journal.run["model"])}
    steps = [
        {"step": step.kind, "lossy": step.lossy, "notes": list(dict.fromkeys(notes))}
        for step, notes in zip(job.recipe.steps, result.notes)
    ]
    kept = ("step", "pass", "unit", "sha256", "hidden")
    units = [{k: e[k] for k in kept if k in e} for e in journal.entries if "unit" in e]
    told = [{**s, CURVE: curve} if curve else s for s, curve in zip(steps, result.curves)]
    account = {"run": run, "steps": told, "units": units}
    if read is not None:
        account[IMPRINT] = read.as_dict()
    save_checkpoint(
        work / FINISHED,
        result.spec,
        OnDemand(result.source),
        tokenizer_files_from=job.directory,
        shard_bytes=shard_bytes,
        more_files={
            RECIPE_FILE: job.recipe.text,
            SHRINK_FILE: json.dumps(account, indent=1) + "\n",
        },
        about={"made_by": "skimp shrink", "run": key, **run, "steps": steps},
    )
    try:
        (work / FINISHED).rename(output)
    except OSError as error:
        raise ShrinkError(f"{output}: was taken while it was made: {error.strerror}") from error
    sync_directory(output.parent)


def _made_by(output: Path, run: Mapping[str, Any]) -> bool:
    if not (output / MANIFEST_FILE).exists():
        return False
    try:
        return bool(read_manifest(output)["about"].get("run") == key_of(run))
    except CheckpointError:
        return False


def _finished(job: Job, output: Path) -> Outcome:
    steps = read_json(output / SHRINK_FILE)["steps"]
    notes = [note for step in steps for note in step["notes"]]
    return Outcome(
        output=output,
        spec=load_spec(output),
        notes=tuple(dict.fromkeys(notes)),
        visits=job.visits,
        resumed=job.visits,
        curves=tuple(tuple(step[CURVE]) for step in steps if CURVE in step),
    )
