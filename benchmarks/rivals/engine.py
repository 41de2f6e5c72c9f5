"""What an engine must offer to be measured, and the measuring itself.

A new engine or weight format is one class with `load` and `generate` plus one line in
`rivals.registry`.
"""

from __future__ import annotations

import random
import statistics
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

START_PROMPT_TOKENS = 128
WARM_UP_CONTEXT = 64
WARM_UP_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure.

    Attributes:
        kind: ``generate`` (decode steps), ``prefill`` (one prompt) or ``start`` (process start to
            first token).
        batch: sequences decoded together.
        context: prompt tokens of each sequence.
    """

    kind: str
    batch: int
    context: int

    @property
    def key(self) -> str:
        """Short stable name, used in result files."""
        if self.kind == "generate":
            return f"generate b{self.batch} c{self.context}"
        return f"{self.kind} {self.context}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the driver asks of one worker process.

    Attributes:
        engine: name in the registry.
        config: path of the shape's JSON file.
        files: model file or folder in the engine's format.
        threads: threads the engine may use.
        cases: measured in order, all of one kind.
        new_tokens: decode steps timed in one repeat.
        min_seconds: repeat a case until this much time is measured ...
        max_repeats: ... or this many repeats are done.
        seed: of the random prompt ids; differs between rounds.
        spawned_at: ``time.monotonic()`` of the driver just before it started the process.
        options: engine options, such as ``flash_attention`` or ``command``.
        probe: report versions and instruction sets instead of timing.
    """

    engine: str
    config: str
    files: str
    threads: int
    cases: list[Case]
    new_tokens: int
    min_seconds: float
    max_repeats: int
    seed: int
    spawned_at: float
    options: dict[str, Any] = field(default_factory=dict)
    probe: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Request:
        """The inverse of `to_json`."""
        return cls(**{**data, "cases": [Case(**case) for case in data["cases"]]})


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Times of one batch.

    Attributes:
        first_s: seconds from submission until every sequence has its first new token.
        steps_s: seconds of each following step (one new token for every sequence).
        first_tokens: the first new token of each sequence.
    """

    first_s: float
    steps_s: list[float]
    first_tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest case a process will be asked for: sequences, tokens of one, tokens of all."""

    sequences: int
    tokens_each: int
    tokens_total: int


class Engine(ABC):
    """One engine with one model; lives in a process of its own.

    Args:
        files: the model in the engine's format.
        config: the Hugging Face config.
        threads: threads to use.
        options: engine options from the registry and the command line.
    """

    def __init__(
        self, files: Path, config: dict[str, Any], threads: int, options: dict[str, Any]
    ) -> None:
        self.files, self.config, self.threads, self.options = files, config, threads, options

    @abstractmethod
    def load(self, limits: Limits) -> None:
        """Load the model, ready for anything within ``limits``."""

    def prepare(self, case: Case, tokens: int) -> None:  # noqa: B027 (optional, not abstract)
        """Untimed set-up for one case, whose sequences reach ``tokens`` tokens each (optional)."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], steps: int) -> Generation:
        """Greedily make 1 + ``steps`` tokens for each prompt, ignoring end-of-text tokens."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Package name to version."""

    def isa(self) -> dict[str, Any]:
        """What is known of the instruction sets and kernels in use, after `load`."""
        return {}


def limits_of(cases: list[Case], new_tokens: int) -> Limits:
    """The smallest limits that hold every case, with room for the new tokens."""
    room = new_tokens + 1
    return Limits(
        sequences=max(case.batch for case in cases),
        tokens_each=max(max(case.context, WARM_UP_CONTEXT) + room for case in cases),
        tokens_total=max(
            case.batch * (max(case.context, WARM_UP_CONTEXT) + room) for case in cases
        ),
    )


def random_prompts(
    generator: random.Random, vocabulary: int, batch: int, tokens: int
) -> list[list[int]]:
    """Prompts of uniformly random ids, the lowest hundred (special tokens) left out."""
    return [[generator.randrange(100, vocabulary) for _ in range(tokens)] for _ in range(batch)]


def measure_start(engine: Engine, request: Request) -> dict[str, Any]:
    """Seconds from process start to the first token of a prompt; loads the engine."""
    (case,) = request.cases
    prompts = random_prompts(
        random.Random(request.seed), engine.config["vocab_size"], 1, case.context
    )
    engine.load(limits_of(request.cases, 0))
    engine.prepare(case, case.context + 1)
    done = engine.generate(prompts, 0)
    seconds = time.monotonic() - request.spawned_at
    return {"case": case.key, "seconds": seconds, "first_token": done.first_tokens[0]}


def measure_generate(engine: Engine, request: Request, case: Case) -> dict[str, Any]:
    """Decode speed of one case, from the median step, which is also what `skimp bench` tells."""
    generator = random.Random(f"{request.seed} {case.key}")
    vocabulary, steps = engine.config["vocab_size"], request.new_tokens
    engine.prepare(case, max(case.context, WARM_UP_CONTEXT) + steps + 1)
    warm = random_prompts(generator, vocabulary, case.batch, WARM_UP_CONTEXT)
    engine.generate(warm, min(WARM_UP_STEPS, steps))
    repeats: list[list[float]] = []
    while True:
        prompts = random_prompts(generator, vocabulary, case.batch, case.context)
        repeats.append(engine.generate(prompts, steps).steps_s)
        timed = sum(sum(times) for times in repeats)
        if timed >= request.min_seconds or len(repeats) >= request.max_repeats:
            break
    per_step = statistics.median(statistics.median(times) for times in repeats)
    return {
        "case": case.key,
        "ms_per_step": per_step * 1e3,
        "ms_per_step_mean": timed / len(repeats) / steps * 1e3,
        "ms_per_step_min": min(min(times) for times in repeats) * 1e3,
        "tokens_per_s": case.batch / per_step,
        "repeats": len(repeats),
        "steps": steps,
    }


def measure_prefill(engine: Engine, request: Request, case: Case) -> dict[str, Any]:
    """Prompt tokens per second: prompt length / median time to the first new token."""
    generator = random.Random(f"{request.seed} {case.key}")
    engine.prepare(case, case.context + 1)
    times: list[float] = []
    warmed = False
    while True:
        prompts = random_prompts(generator, engine.config["vocab_size"], 1, case.context)
        done = engine.generate(prompts, 0)
        if warmed:
            times.append(done.first_s)
        warmed = True
        if times and (sum(times) >= request.min_seconds or len(times) >= request.max_repeats):
            break
    seconds = statistics.median(times)
    return {
        "case": case.key,
        "seconds": seconds,
        "seconds_min": min(times),
        "tokens_per_s": case.context / seconds,
        "repeats": len(times),
    }


def measure(engine: Engine, request: Request) -> list[dict[str, Any]]:
    """Measure every case of the request, loading the engine first.

    Raises:
        ValueError: the cases are not all of one known kind.
    """
    kinds = {case.kind for case in request.cases}
    if kinds == {"start"}:
        return [measure_start(engine, request)]
    engine.load(limits_of(request.cases, request.new_tokens))
    if kinds == {"generate"}:
        return [measure_generate(engine, request, case) for case in request.cases]
    if kinds == {"prefill"}:
        return [measure_prefill(engine, request, case) for case in request.cases]
    raise ValueError(f"one process measures cases of one kind, not {sorted(kinds)}")
