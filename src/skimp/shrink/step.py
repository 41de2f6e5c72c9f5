"""What a shortcut is to the pipeline: a step that streams a model through memory unit by unit.

A *unit* is as much of a model as is in memory at once: ``embed`` (the table), ``layers.0`` …, and
``head`` (final norm, untied output matrix). The pipeline (``pipeline.py``) shows every unit to a
step, in order, and writes what comes back. It journals each unit and what the step remembers, so
that a killed run goes on behind the last finished unit, and ends bit-identical: a step must depend
on nothing but its arguments (seeded generators, no clock, no thread-dependent sums).

A step may want several passes over the model: all but the last only look (``UnitResult.tensors``
None) and leave what they found in ``Run.state``.

With calibration, the pipeline hands each unit the activations that enter it, made by the units
before it *as already changed by this pass*; the step gives back those that leave it.

A *whole* step (:class:`WholeStep`) has the model at once, and beside it the original, the one the
recipe began with. It works towards its result for long and saves where it stands now and then; a
killed run goes on from the last save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from skimp.formats import QuantizedWeight
    from skimp.model.spec import ModelSpec

Tensors = Mapping[str, "Tensor | QuantizedWeight"]
Axis = Literal["weights", "cache", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """``tensors`` are named as the decoder names its parameters (``layers.3.ffn_norm.weight``);
    a quantized matrix stands under its weight's name. ``table`` is the embedding table, in the head
    of a model whose output matrix it is."""

    name: str
    index: int  # 0 is embed, 1 + i is layer i, the last is head
    spec: ModelSpec  # of the model that enters the step
    tensors: Tensors
    table: Tensor | QuantizedWeight | None = None

    @property
    def layer(self) -> int | None:
        """Which decoder layer this is; None for embed and head."""
        return int(self.name.partition(".")[2]) if self.name.startswith("layers.") else None


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """``tensors`` None: nothing is written (a pass that only looks)."""

    tensors: Tensors | None
    hidden: Tensor | None = None  # activations that leave the unit, as ``Run.hidden`` entered


@dataclass(kw_only=True)
class Run:
    """What a step knows beside the unit. ``state`` is JSON and survives a kill; ``notes`` are
    lines for the user (fallbacks, choices), kept in the journal and the report."""

    pass_index: int
    state: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    tokens: Tensor | None = None  # int64 [samples, T] calibration token ids, or None
    hidden: Tensor | None = None  # float32 [samples, T, D] entering this unit; None before embed
    threads_deterministic: bool = True

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a step will take, before anything is touched. Bytes beyond the unit itself.

    ``open_bits``: of matrices whose format a pass will choose, the bits a weight that they take at
    most on average; ``choices`` says in words what there is to choose from. ``disk_bytes``: of
    files beside the units. ``ticks``: what a whole step counts its progress in; ``work`` says in
    words what it does.
    """

    passes: int = 1
    calibration: bool = False  # wants Run.tokens and Run.hidden
    extra_bytes: int = 0  # at the worst unit, hidden activations not counted
    extra_tokens: int = 0  # whose activations go along with those of the calibration text
    open_bits: Mapping[str, float] = field(default_factory=dict)
    choices: str = ""
    disk_bytes: int = 0
    ticks: int = 0
    work: str = ""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Where a whole step stood: its ``state`` in JSON and its tensors, mapped from a file."""

    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(kw_only=True)
class Whole:
    """What a whole step is handed. ``saved`` is the last save of an earlier run, and ``rows`` all
    that saves have recorded; ``save(state, tensors, rows)`` makes another, and adds its rows."""

    spec: ModelSpec  # of the model that enters the step
    tensors: Tensors
    original: ModelSpec
    original_tensors: Tensors
    directory: Path  # of the original
    seed: int
    saved: Saved | None
    rows: list[dict[str, Any]]
    save: Callable[[Mapping[str, Any], Mapping[str, Tensor], list[dict[str, Any]]], None]
    progress: Callable[[int, str], None]  # ticks done, and how it goes in a few words
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Shortcut(Protocol):
    """One entry of a recipe. Implementations are pydantic models in the module of a shortcut."""

    kind: ClassVar[str]  # the key in a recipe
    axis: ClassVar[Axis]
    lossy: ClassVar[bool]

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        """The spec that comes out, as far as it is known before the run (for ``--dry-run``)."""
        ...

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        """The spec that comes out, once the passes that look have filled ``state``."""
        ...


class Step(Shortcut, Protocol):
    """A step that sees one unit at a time."""

    def need(self, spec: ModelSpec) -> Need:
        """Raises ShrinkError, naming the field, if this model cannot take the step."""
        ...

    def visit(self, unit: Unit, run: Run) -> UnitResult:
        """One unit in one pass; may change ``run.state``."""
        ...


@runtime_checkable
class WholeStep(Shortcut, Protocol):
    """A step that has the whole model, and the original beside it."""

    def need_beside(self, spec: ModelSpec, original: ModelSpec) -> Need:
        """Raises ShrinkError, naming the field, if these models cannot take the step."""
        ...

    def located(self, folder: Path) -> WholeStep:
        """The step with its file names looked up in ``folder``, the recipe's. Raises ValueError,
        naming the field, if a file is not there."""
        ...

    def files(self) -> tuple[Path, ...]:
        """What it reads beside the models."""
        ...

    def check_files(self, spec: ModelSpec, directory: Path) -> None:
        """Raises SkimpError if ``files`` cannot be used with the model in ``directory``, before
        the steps in front of this one have been at work for hours."""
        ...

    def work(self, whole: Whole) -> Tensors:
        """All tensors of the model that comes out. Must depend on nothing but its arguments, and
        return at once if ``whole.saved`` is where it ended."""
        ...


def unit_names(spec: ModelSpec) -> list[str]:
    return ["embed", *(f"layers.{i}" for i in range(spec.num_layers)), "head"]


def calibration_dtype() -> torch.dtype:
    """Of hidden activations between units."""
    import torch

    return torch.float32
