"""What a recipe would do to a model, and what doing it takes, from shapes alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from skimp.cost import model_work, step_cost, uniform
from skimp.cost.work import item_bytes
from skimp.model.caches import cache_specs
from skimp.model.loading import parameter_shapes
from skimp.model.spec import ModelSpec
from skimp.shrink.job import Job
from skimp.shrink.units import unit_of

OPEN: Final = "to be chosen"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a model, in bytes; ``formats`` counts matrices. ``at_most``: formats are still to be
    chosen, within a budget of bits that the figures use up."""

    disk_bytes: int
    weight_bytes_per_token: int  # read by one generated token
    cache_bytes_per_token: int
    bits_per_weight: float  # of all matrices, the table included
    formats: dict[str, int]
    cache_format: str
    at_most: bool = False


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    kind: str
    axis: str
    lossy: bool
    passes: int
    calibration: bool
    after: Size
    choices: str = ""  # what formats there are to choose from once the model is measured
    work: str = ""  # of a step that trains


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``memory_bytes`` is the peak beyond the Python process itself, ``disk_bytes`` what is
    needed at once beside the model: work files and output."""

    before: Size
    steps: tuple[PlannedStep, ...]
    memory_bytes: int
    disk_bytes: int
    calibration_tokens: int

    @property
    def after(self) -> Size:
        return self.steps[-1].after


def plan_job(job: Job, calibration_tokens: int = 0) -> Plan:
    """``calibration_tokens`` over all samples, if the job is calibrated."""
    open_bits: dict[str, float] = {}
    sizes = [size_of(job.specs[0])]
    for need, spec in zip(job.needs, job.specs[1:]):
        open_bits |= need.open_bits
        sizes.append(size_of(spec, open_bits))
    steps = tuple(
        PlannedStep(
            kind=step.kind,
            axis=step.axis,
            lossy=step.lossy,
            passes=need.passes,
            calibration=need.calibration,
            after=size,
            choices=need.choices,
            work=need.work,
        )
        for step, need, size in zip(job.recipe.steps, job.needs, sizes[1:])
    )
    tokens = calibration_tokens if job.calibrated else 0
    memory = kept = 0
    for index, need in enumerate(job.needs):
        units = _largest_unit(job.specs[index]) + _largest_unit(job.specs[index + 1])
        # What enters a unit and what leaves it, in float32.
        rows = tokens + need.extra_tokens if need.calibration else 0
        hidden = 2 * 4 * rows * job.specs[index].hidden_size
        memory, kept = max(memory, units + need.extra_bytes + hidden), max(kept, hidden)
    # While a step runs its input is there too, if a step wrote it; then the output beside it.
    written = [0, *(size.disk_bytes for size in sizes[1:])]
    pairs = [a + b + need.disk_bytes for (a, b), need in zip(pairwise(written), job.needs)]
    last = job.needs[-1].disk_bytes
    disk = max(*pairs, written[-2] + 2 * written[-1] + last) + kept
    return Plan(
        before=sizes[0],
        steps=steps,
        memory_bytes=memory,
        disk_bytes=disk,
        calibration_tokens=tokens,
    )


def _sizes(spec: ModelSpec, open_bits: Mapping[str, float]) -> dict[str, float]:
    """Bytes of each parameter."""
    found: dict[str, float] = {}
    for name, shape in parameter_shapes(spec).items():
        matrix = name.removesuffix(".weight")
        bits = 8.0 * item_bytes(spec.dtype)
        if matrix in open_bits:
            bits = open_bits[matrix]
        elif matrix in spec.formats:
            bits = spec.formats[matrix].bits_per_weight(shape[1])
        found[name] = bits * math.prod(shape) / 8
    return found


def _largest_unit(spec: ModelSpec) -> int:
    units: Counter[str] = Counter()
    for name, size in _sizes(spec, {}).items():
        units[unit_of(name)] += math.ceil(size)
    return max(units.values())


def size_of(spec: ModelSpec, open_bits: Mapping[str, float] | None = None) -> Size:
    """What a model takes, norms and biases in the checkpoint's dtype. ``open_bits``: of matrices
    whose format is not chosen yet, whatever ``spec`` says of them."""
    open_bits = open_bits or {}
    shapes, sizes = parameter_shapes(spec), _sizes(spec, open_bits)
    matrices = [name for name, shape in shapes.items() if len(shape) >= 2]
    weights = sum(math.prod(shapes[name]) for name in matrices)
    names = {matrix: form.name for matrix, form in spec.formats.items()}
    names |= dict.fromkeys(open_bits, OPEN)
    formats = Counter(names.get(name.removesuffix(".weight"), spec.dtype) for name in matrices)
    work = model_work(spec, cache_specs(spec, spec.dtype), bits=open_bits)
    return Size(
        disk_bytes=math.ceil(sum(sizes.values())),
        weight_bytes_per_token=round(step_cost(work, uniform(1, 1)).weight_bytes),
        cache_bytes_per_token=work.cache_bytes_per_token,
        bits_per_weight=8 * sum(sizes[name] for name in matrices) / weights,
        formats=dict(formats),
        cache_format=spec.cache_format or spec.dtype,
        at_most=bool(open_bits),
    )
