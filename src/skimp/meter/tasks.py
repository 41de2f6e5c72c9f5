"""Tasks: what a model gets right, with a 95 % interval and, where it is known, the level of chance.

============  ======================================================================================
kind          scores
============  ======================================================================================
minimal-pair  accuracy: the good sentence is the more probable (BLiMP: Warstadt et al. 2020)
choice        accuracy: the right option has the greatest log-probability after the context;
              accuracy_per_byte: the same of log-probability per UTF-8 byte of the option
last-word     accuracy: every token of the word is the likeliest, so greedy decoding writes it;
              logprob: mean natural log-probability of the word
generate      accuracy: the number of a greedily generated answer equals the file's
============  ======================================================================================

A tie is a miss. Shares have Wilson intervals, means a bootstrap over items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from skimp.meter.continuations import encode_continuation, score_continuations
from skimp.meter.quality import Block, bootstrap
from skimp.meter.score import Score, mean, share
from skimp.meter.taskfiles import (
    GROUPS,
    Choice,
    LastWord,
    MinimalPair,
    Problem,
    Task,
    TaskFileError,
    last_number,
)

if TYPE_CHECKING:
    from skimp.engine import Engine

Progress = Callable[[int, int], None] | None
TEMPLATE = "Question: {question}\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How answers are generated. ``template`` holds ``{question}``; ``shots`` solved examples come
    before each question. ``stop`` None: where the template's next question would begin. ``chat``:
    through the model's chat template, the examples being earlier turns."""

    template: str = TEMPLATE
    shots: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if self.template.count("{question}") != 1:
            raise ValueError("template: must hold {question} once")
        if self.shots < 0:
            raise ValueError(f"shots: at least 0, not {self.shots}")

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is not None:
            return self.stop
        opening = self.template.partition("{question}")[0].strip()
        return (opening,) if opening and not self.chat else ()

    def prompt(self, problem: Problem, examples: Sequence[Problem]) -> str:
        parts = [f"{self.ask(e)} {e.worked}" for e in examples]
        return "\n\n".join([*parts, self.ask(problem)])

    def messages(self, problem: Problem, examples: Sequence[Problem]) -> list[dict[str, str]]:
        found = []
        for example in examples:
            found.append({"role": "user", "content": self.ask(example)})
            found.append({"role": "assistant", "content": example.worked})
        return [*found, {"role": "user", "content": self.ask(problem)}]

    def ask(self, problem: Problem) -> str:
        return self.template.replace("{question}", problem.question)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """``outcomes``: for each score, every item's part in it, in the file's order. ``groups``: the
    accuracy of parts of the items, by what parts them. ``cut``: items whose context lost its
    beginning."""

    name: str
    kind: str
    n: int
    scores: dict[str, Score]
    outcomes: dict[str, tuple[float, ...]]
    groups: dict[str, dict[str, Score]] = field(default_factory=dict)
    cut: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "kind": self.kind,
            "n": self.n,
            "scores": {name: score.as_dict() for name, score in self.scores.items()},
            "groups": {
                by: {name: score.as_dict() for name, score in parts.items()}
                for by, parts in self.groups.items()
            },
            "cut": self.cut,
            **self.notes,
        }


def paired_score(base: TaskResult, other: TaskResult, name: str, *, seed: int = 0) -> Score:
    """Other less base of one score over the same items, with the paired bootstrap's interval."""
    if (base.name, base.n) != (other.name, other.n):
        raise ValueError(f"task: {base.name} and {other.name} are not over the same items")
    gaps = [b - a for a, b in zip(base.outcomes[name], other.outcomes[name], strict=True)]
    blocks = [Block(amount=gap, size=1) for gap in gaps]
    return Score(value=sum(gaps) / len(gaps), ci95=bootstrap(blocks, seed=seed), n=len(gaps))


def run_task(
    engine: Engine,
    task: Task,
    *,
    generation: Generation | None = None,
    seed: int = 0,
    progress: Progress = None,
) -> TaskResult:
    """Score a task. ``generation`` is for tasks that generate. Raises ValueError or ``SkimpError``
    naming what does not fit the engine."""
    if task.kind == "minimal-pair":
        return _pairs(engine, task, progress)
    if task.kind == "choice":
        return _choices(engine, task, progress)
    if task.kind == "last-word":
        return _last_words(engine, task, seed, progress)
    return _problems(engine, task, generation or Generation(), progress)


def _pairs(engine: Engine, task: Task, progress: Progress) -> TaskResult:
    items: tuple[MinimalPair, ...] = task.items
    texts = [text for item in items for text in (item.good, item.bad)]
    encoded = [encode_continuation(engine, "", text) for text in texts]
    sums = [float(s.logprobs.sum()) for s in score_continuations(engine, encoded, progress)]
    right = [good > bad for good, bad in zip(sums[::2], sums[1::2])]
    groups = {}
    for by in GROUPS:
        parts: dict[str, list[bool]] = {}
        for item, outcome in zip(items, right):
            if by in item.groups:
                parts.setdefault(item.groups[by], []).append(outcome)
        if parts:
            groups[by] = {name: share(found, 0.5) for name, found in sorted(parts.items())}
    return TaskResult(
        name=task.name,
        kind=task.kind,
        n=len(items),
        scores={"accuracy": share(right, 0.5)},
        outcomes={"accuracy": tuple(map(float, right))},
        groups=groups,
    )


def _choices(engine: Engine, task: Task, progress: Progress) -> TaskResult:
    items: tuple[Choice, ...] = task.items
    encoded = [
        [encode_continuation(engine, item.context, _joined(item.context, o)) for o in item.options]
        for item in items
    ]
    flat = [one for options in encoded for one in options]
    found = iter(score_continuations(engine, flat, progress))
    raw: list[bool] = []
    per_byte: list[bool] = []
    for item in items:
        sums = [float(next(found).logprobs.sum()) for _ in item.options]
        raw.append(_best(sums) == item.label)
        sizes = [len(option.encode()) for option in item.options]
        per_byte.append(_best([s / n for s, n in zip(sums, sizes)]) == item.label)
    chance = sum(1 / len(item.options) for item in items) / len(items)
    outcomes = {"accuracy": raw, "accuracy_per_byte": per_byte}
    return TaskResult(
        name=task.name,
        kind=task.kind,
        n=len(items),
        scores={name: share(right, chance) for name, right in outcomes.items()},
        outcomes={name: tuple(map(float, right)) for name, right in outcomes.items()},
        cut=sum(any(one.cut for one in options) for options in encoded),
    )


def _last_words(engine: Engine, task: Task, seed: int, progress: Progress) -> TaskResult:
    items: tuple[LastWord, ...] = task.items
    encoded = [
        encode_continuation(engine, item.context, _joined(item.context, item.target))
        for item in items
    ]
    found = score_continuations(engine, encoded, progress)
    right = [bool(scores.greedy.all()) for scores in found]
    sums = [float(scores.logprobs.sum()) for scores in found]
    return TaskResult(
        name=task.name,
        kind=task.kind,
        n=len(items),
        scores={"accuracy": share(right), "logprob": mean(sums, seed=seed)},
        outcomes={"accuracy": tuple(map(float, right)), "logprob": tuple(sums)},
        cut=sum(item.cut for item in encoded),
    )


def _problems(engine: Engine, task: Task, how: Generation, progress: Progress) -> TaskResult:
    from skimp.decoding.params import SamplingParams

    problems, examples = _examples(task, how.shots)
    prompts = [_prompt(engine, how, problem, examples) for problem in problems]
    params = SamplingParams(max_tokens=how.max_tokens, temperature=0.0, stop=how.stops)
    for problem, prompt in zip(problems, prompts):
        if len(prompt) + how.max_tokens > engine.max_context:
            raise TaskFileError(
                f"{task.name} line {problem.line}: a prompt of {len(prompt)} tokens and "
                f"max_tokens {how.max_tokens} exceed the context of {engine.max_context}"
            )
    right: list[bool] = []
    unfinished = 0
    # The first alone: what the prompts share is then computed once.
    edges = [0, *range(1, len(prompts), 4 * engine.options.max_batch), len(prompts)]
    for a, b in pairwise(edges):
        if progress is not None:
            progress(a, len(prompts))
        for problem, out in zip(problems[a:b], engine.generate(prompts[a:b], params)):
            if out.error is not None:
                raise ValueError(f"{task.name} line {problem.line}: {out.error}")
            answer = out.outputs[0]
            unfinished += answer.finish_reason == "length"
            right.append(last_number(answer.text) == problem.number)
    if progress is not None:
        progress(len(prompts), len(prompts))
    return TaskResult(
        name=task.name,
        kind=task.kind,
        n=len(right),
        scores={"accuracy": share(right)},
        outcomes={"accuracy": tuple(map(float, right))},
        notes={
            "shots": how.shots,
            "chat": how.chat,
            "max_tokens": how.max_tokens,
            "unfinished": unfinished,
        },
    )


def _examples(task: Task, shots: int) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Problems to solve and those to show: of what was left out, or else from the beginning."""
    if shots <= len(task.spare):
        return task.items, task.spare[:shots]
    if task.spare or shots >= len(task.items):
        raise TaskFileError(
            f"shots: {shots} examples, but {task.name} has only "
            f"{len(task.spare) or len(task.items)} items to take them from"
        )
    return task.items[shots:], task.items[:shots]


def _prompt(
    engine: Engine, how: Generation, problem: Problem, examples: Sequence[Problem]
) -> list[int]:
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("model: it has no tokenizer, so it cannot be asked anything")
    if not how.chat:
        return tokenizer.encode(how.prompt(problem, examples))
    from skimp.text.chat import encode_chat, template_for

    return encode_chat(tokenizer, template_for(tokenizer), how.messages(problem, examples))


def _joined(context: str, continuation: str) -> str:
    """The continuation with a blank before it, unless there is one or nothing to part it from."""
    if not context or context[-1].isspace() or continuation[0].isspace():
        return continuation
    return " " + continuation


def _best(values: Sequence[float]) -> int | None:
    """Where the greatest value is, or None if it is there twice."""
    most = max(values)
    return values.index(most) if values.count(most) == 1 else None
