"""The price of shortcuts: what each changed model loses against its base, and what it gains.

Quality is read over one text, all models in one pass; tasks are asked of each; speed is measured in
rounds that go through all models in turn. The predicted gain comes from the same cost model for
all of them, and stands beside the measured one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skimp.cost import Hardware, step_cost, uniform
from skimp.meter.cases import Case, check_case
from skimp.meter.divergence import Comparison, ReadingOptions, compare_all
from skimp.meter.quality import QualityResult, evaluate
from skimp.meter.retrieval import Retrieval, run_retrieval
from skimp.meter.score import Score
from skimp.meter.speculation import SpeculationResult
from skimp.meter.speed import SpeedResult, bench_together
from skimp.meter.taskfiles import Task
from skimp.meter.tasks import Generation, TaskResult, paired_score, run_task

if TYPE_CHECKING:
    from skimp.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A loaded model, by the name its row shall have, what makes its figures doubtful, and how it
    was healed: for each time (tokens, held-out KL to the original in nats a token)."""

    name: str
    directory: Path
    engine: Engine
    warnings: tuple[str, ...] = ()
    healing: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A case's speed beside the base's: tokens a second, as a ratio. ``spread`` is that of the
    ratio over the rounds, (largest - smallest) / median."""

    result: SpeedResult
    gain: float
    predicted: float
    spread: float

    def as_dict(self) -> dict[str, Any]:
        found = self.result.as_dict()
        first = {
            "batch": found.pop("batch"),
            "context": found.pop("context"),
            "asked_batch": found.pop("asked_batch"),
            "batch_limited_by": found.pop("batch_limited_by"),
            "tokens_per_s": found.pop("tokens_per_s"),
            "gain": self.gain,
            "predicted_gain": self.predicted,
            "gain_spread": self.spread,
        }
        return first | found


@dataclass(frozen=True, kw_only=True)
class TaskPrice:
    """A task's scores; ``differences`` to the base's over the same items, none for the base."""

    result: TaskResult
    differences: Mapping[str, Score]

    def as_dict(self) -> dict[str, Any]:
        found = self.result.as_dict()
        for name, difference in self.differences.items():
            found["scores"][name] |= {
                "difference": difference.value,
                "difference_ci95": list(difference.ci95),
                "inside_noise": inside_noise(difference),
            }
        return found


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """Cache of one sequence of ``context`` tokens: the bytes of the pages that the engine holds for
    it, and those that a step reads of them."""

    context: int
    bytes: int
    bytes_read: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model's line of the table; the base has no ``comparison``. ``cache`` has an entry a
    context, ``cache_budget`` is the bytes that the engine has for all sequences. ``warnings``: what
    makes its figures doubtful."""

    name: str
    disk_bytes: int
    resident_weight_bytes: float
    weight_bytes_per_token: float
    cache_bytes_per_token: int
    cache: tuple[CacheUse, ...]
    cache_budget: int
    quality: QualityResult
    comparison: Comparison | None
    speed: tuple[Gain, ...]
    tasks: tuple[TaskPrice, ...] = ()
    warnings: tuple[str, ...] = ()
    healing: tuple[tuple[tuple[int, float], ...], ...] = ()  # as the candidate's

    def as_dict(self) -> dict[str, Any]:
        """The base's loss and divergence are 0 of themselves: it was not read twice."""
        quality, found = self.quality, self.comparison
        none = [0.0, 0.0]
        first = self.speed[0].result
        return {
            "name": self.name,
            "disk_bytes": self.disk_bytes,
            "resident_weight_bytes": round(self.resident_weight_bytes),
            "weight_bytes_per_token": round(self.weight_bytes_per_token),
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "cache_bytes_by_context": [
                {"context": use.context, "bytes": use.bytes, "bytes_read": use.bytes_read}
                for use in self.cache
            ],
            "cache_budget_bytes": self.cache_budget,
            "bits_per_byte": quality.bits_per_byte,
            "ci95": list(quality.ci95),
            "loss": 0.0 if found is None else found.paired.bits_per_byte,
            "loss_ci95": none if found is None else list(found.paired.ci95),
            "inside_noise": found is None or found.paired.inside_noise,
            "kl": 0.0 if found is None else found.divergence.kl,
            "kl_ci95": none if found is None else list(found.divergence.ci95),
            "top1": 1.0 if found is None else found.divergence.top1,
            "tokens": quality.tokens,
            "text_bytes": quality.bytes,
            "window": quality.context,
            "device": first.device,
            "dtype": first.dtype,
            "speed": [gain.as_dict() for gain in self.speed],
            "tasks": [task.as_dict() for task in self.tasks],
            "warnings": list(self.warnings),
            "healing": [
                [{"tokens": tokens, "held_out_kl": kl} for tokens, kl in curve]
                for curve in self.healing
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Price:
    """The table: the base, and a row for each changed model. ``together``: all models were in
    memory at once and took turns; else each took turns with the base alone. ``speculation``:
    models of the table with guesses, which keep its law and are timed on real prompts."""

    base: Row
    rows: tuple[Row, ...]
    together: bool = True
    speculation: tuple[SpeculationResult, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "base": self.base.as_dict(),
            "rows": [row.as_dict() for row in self.rows],
            "speculation": [found.as_dict() for found in self.speculation],
        }

    @classmethod
    def joined(cls, prices: Sequence[Price]) -> Price:
        """One table of several, whose bases are the same model."""
        rows = tuple(row for price in prices for row in price.rows)
        return cls(base=prices[0].base, rows=rows, together=len(prices) == 1)


def price(
    candidates: Sequence[Candidate],
    text: str,
    cases: Sequence[Sequence[Case]],
    hardware: Sequence[Hardware],
    *,
    rounds: int = 5,
    context: int | None = None,
    max_bytes: int | None = None,
    tasks: Sequence[Task] = (),
    generation: Generation | None = None,
    retrieval: Retrieval | None = None,
    alone: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Price:
    """Measure ``candidates``, the base first, each on the machine as its engine uses it, and at
    cases of its own, which may differ from the base's in their batch. ``retrieval`` is asked
    behind the tasks. ``alone``: a base without others will do.

    Raises ValueError if models cannot be compared or a case does not fit.
    """
    base, *others = (candidate.engine for candidate in candidates)
    if not others and not alone:
        raise ValueError("OUT: name at least one model to hold against the base")
    for candidate, own in zip(candidates, cases):
        engine = candidate.engine
        for case in own:
            check_case(engine.cache.arena, engine.options, case, candidate.name)
    if context is None:
        context = min(candidate.engine.max_context for candidate in candidates) - 1

    tell = progress or (lambda line: None)
    reading: ReadingOptions = {
        "context": context,
        "max_bytes": max_bytes,
        "seed": seed,
        "progress": lambda done, total: tell(f"scoring: document {done} of {total}"),
    }
    compared = compare_all(base, others, text, **reading)
    quality = compared[0].base if compared else evaluate(base, text, **reading)
    asked = []
    for candidate in candidates:
        results = []
        for task in tasks:
            tell(f"{candidate.name}: {task.name}")
            results.append(run_task(candidate.engine, task, generation=generation, seed=seed))
        if retrieval is not None:

            def ask(line: str, name: str = candidate.name) -> None:
                tell(f"{name}: {line}")

            results += run_retrieval(candidate.engine, retrieval, seed=seed, progress=ask)
        asked.append(results)
    speed = bench_together(
        [base, *others], cases, hardware, rounds=rounds, seed=seed, progress=progress
    )
    qualities = [quality, *(found.other for found in compared)]
    rows = [
        _row(candidate, quality, comparison, gains(speed[0], results), answers)
        for candidate, quality, comparison, results, answers in zip(
            candidates, qualities, [None, *compared], speed, _task_prices(asked, seed)
        )
    ]
    return Price(base=rows[0], rows=tuple(rows[1:]))


def _task_prices(asked: Sequence[Sequence[TaskResult]], seed: int) -> list[tuple[TaskPrice, ...]]:
    base = asked[0]
    found = [tuple(TaskPrice(result=result, differences={}) for result in base)]
    for results in asked[1:]:
        found.append(
            tuple(
                TaskPrice(
                    result=new,
                    differences={
                        name: paired_score(old, new, name, seed=seed) for name in new.scores
                    },
                )
                for old, new in zip(base, results)
            )
        )
    return found


def inside_noise(difference: Score) -> bool:
    """Whether the interval of a paired difference holds zero."""
    return difference.ci95[0] <= 0.0 <= difference.ci95[1]


def gains(base: Sequence[SpeedResult], results: Sequence[SpeedResult]) -> tuple[Gain, ...]:
    """Each case's gain over the base in tokens a second: a step of a larger batch has more of them.
    Rounds are paired: both ran within one round."""
    found = []
    for old, new in zip(base, results):
        more = new.case.batch / old.case.batch
        ratios = [a / b for a, b in zip(old.round_ms, new.round_ms)]
        found.append(
            Gain(
                result=new,
                gain=new.tokens_per_s / old.tokens_per_s,
                predicted=more * old.predicted_ms / new.predicted_ms,
                spread=(max(ratios) - min(ratios)) / statistics.median(ratios),
            )
        )
    return tuple(found)


def graph_warning(engine: Engine, cases: Sequence[Case]) -> str | None:
    """A line for batches that a GPU's CUDA graphs do not reach."""
    if engine.backend_name != "triton":
        return None
    from skimp.engine.graphs import MOST_GRAPHED

    batch = max(case.batch for case in cases)
    if batch <= MOST_GRAPHED:
        return None
    return (
        f"a batch of {batch} is launched kernel by kernel: CUDA graphs end at {MOST_GRAPHED} "
        "sequences"
    )


def disk_bytes(directory: Path) -> int:
    """Bytes of the files of a model's directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _row(
    candidate: Candidate,
    quality: QualityResult,
    comparison: Comparison | None,
    speed: tuple[Gain, ...],
    tasks: tuple[TaskPrice, ...],
) -> Row:
    work, arena = candidate.engine.work, candidate.engine.cache.arena
    return Row(
        name=candidate.name,
        disk_bytes=disk_bytes(candidate.directory),
        resident_weight_bytes=work.resident_weight_bytes,
        weight_bytes_per_token=step_cost(work, uniform(1, 1)).weight_bytes,
        cache_bytes_per_token=work.cache_bytes_per_token,
        cache=tuple(
            CacheUse(
                context=context,
                bytes=arena.layout.bytes_held(context),
                bytes_read=round(step_cost(work, uniform(1, context)).cache_read_bytes),
            )
            for context in dict.fromkeys(gain.result.case.context for gain in speed)
        ),
        cache_budget=arena.budget_bytes,
        quality=quality,
        comparison=comparison,
        speed=speed,
        tasks=tasks,
        warnings=candidate.warnings,
        healing=candidate.healing,
    )
