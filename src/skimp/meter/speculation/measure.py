"""Rounds that go through plain generation and every engine that guesses, in turn.

In each round an engine first answers every group of prompts for a few steps with scripted guesses
of every length, which gives v(k), and then all groups with its own, as many as it chooses,
which gives c, what came true, and the achieved gain. What past answers left is dropped before
either. A round's figures are ratios to the plain steps of that round, so that a slow minute of the
machine cancels.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from skimp.meter.cases import Case, check_fit
from skimp.meter.speculation.predict import (
    Check,
    expected_guess,
    expected_ratio,
    lengths_timed,
    predicted_gain,
)
from skimp.meter.speculation.prompts import Chosen
from skimp.meter.speculation.result import SpeculationResult
from skimp.meter.speculation.runs import (
    Run,
    Script,
    TimedStep,
    Watch,
    answer,
    forget,
    guessing_by,
    longest_always,
)
from skimp.meter.work import engine_threads

if TYPE_CHECKING:
    from skimp.cost import Hardware
    from skimp.decoding.params import SamplingParams
    from skimp.engine import Engine, EngineOptions

BLOCK = 6  # scripted steps of one length in a row, of which the later half is timed
MOST_BLOCKS, GROUPS = 2, 4  # of each length in a group; with so many groups one is enough
Group = Sequence[tuple[int, ...]]


def tokens_needed(options: EngineOptions, new_tokens: int) -> int:
    """Tokens that a sequence may have beyond its prompt: its answer's, or a script's. ValueError if
    an answer may end before anything of it is timed."""
    if options.speculate == "none":
        return new_tokens
    if new_tokens <= options.longest_draft + 1:
        raise ValueError(
            f"new_tokens: more than {options.longest_draft + 1}, as a step of {options.speculate} "
            f"may give that many, not {new_tokens}"
        )
    return max(new_tokens, _script_steps(options, MOST_BLOCKS) + options.longest_draft + 1)


def measure_speculation(
    plain: Engine,
    engines: Mapping[str, Engine],
    chosen: Chosen,
    hardware: Hardware,
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    batch: int = 1,
    new_tokens: int = 64,
    rounds: int = 5,
    seed: int = 0,
    name: str = "plain",
    progress: Callable[[str], None] | None = None,
) -> list[SpeculationResult]:
    """A record for each category, temperature and engine, in this order.

    ``plain`` is the same model with the same options, but without guesses, called ``name``. Every
    answer has ``new_tokens`` tokens, whatever ends it; prompts are answered ``batch`` at a time,
    and those that fill no group are left out. A round before the others does not count. Raises
    ValueError for what does not fit, before anything is timed.
    """
    from skimp.decoding.params import SamplingParams

    if rounds < 1:
        raise ValueError(f"rounds: at least 1, not {rounds}")
    for one, engine in {name: plain, **engines}.items():
        _require_fit(engine, chosen, batch, new_tokens, one)
    found = []
    for category, prompts in chosen.prompts.items():
        groups = [prompts[i : i + batch] for i in range(0, len(prompts) - batch + 1, batch)]
        for temperature in temperatures:
            params = SamplingParams(
                max_tokens=new_tokens, temperature=temperature, ignore_eos=True, seed=seed
            )
            asked = _Asked(category=category, groups=groups, params=params, chosen=chosen)
            tallies = {one: _Tally() for one in engines}
            order: list[str | None] = [None, *engines]
            for index in range(rounds + 1):
                if progress is not None:
                    what = "warm-up" if index == 0 else f"round {index} of {rounds}"
                    progress(f"{category}, batch {batch}, temperature {temperature:g}: {what}")
                runs: list[Run] = []
                measured: dict[str, _Round] = {}
                for which in order[::-1] if index % 2 else order:
                    if which is None:
                        forget(plain)
                        runs = [answer(plain, group, params) for group in groups]
                    else:
                        measured[which] = _round(engines[which], asked)
                if index:
                    for one, tally in tallies.items():
                        tally.add(runs, measured[one], batch)
            for one, engine in engines.items():
                found.append(_result((one, engine), (name, plain), asked, tallies[one], hardware))
    return found


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Groups of prompts, each answered at once."""

    category: str
    groups: Sequence[Group]
    params: SamplingParams
    chosen: Chosen

    @property
    def batch(self) -> int:
        return len(self.groups[0])


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What one engine did in a round."""

    scripted: tuple[TimedStep, ...]
    runs: tuple[Run, ...]
    drafted: tuple[int, ...]  # at each place
    accepted: tuple[int, ...]

    @property
    def steps(self) -> list[TimedStep]:
        """Of its own guesses, those that drew tokens."""
        return [step for run in self.runs for step in run.steps if step.tokens]


@dataclass
class _Tally:
    """What is kept of the rounds."""

    rounds: list[_Round] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    rates: list[tuple[float, float]] = field(default_factory=list)  # tokens/s: own and plain
    guesses: list[float] = field(default_factory=list)
    ratios: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    same: list[bool] = field(default_factory=list)

    def add(self, plain: Sequence[Run], own: _Round, batch: int) -> None:
        rate, plain_rate = _tokens_per_s(own.runs), _tokens_per_s(plain)
        self.rounds.append(own)
        self.rates.append((rate, plain_rate))
        self.gains.append(rate / plain_rate)
        steps = own.steps
        if lengths := sum(step.length for step in steps):
            spent = sum(step.propose_s for step in steps)
            self.guesses.append(spent / lengths / (batch / plain_rate))
        same = (a == b for x, y in zip(plain, own.runs) for a, b in zip(x.answers, y.answers))
        self.same += same
        beside = [step.seconds for run in plain for step in run.steps if step.tokens]
        checks: dict[int, list[float]] = defaultdict(list)
        for step in own.scripted:
            if step.length == round(step.length):
                checks[round(step.length)].append(step.seconds - step.propose_s)
        for length, seconds in checks.items():
            self.ratios[length].append(statistics.median(seconds) / statistics.median(beside))


def _require_fit(engine: Engine, chosen: Chosen, batch: int, new_tokens: int, name: str) -> None:
    options = engine.options
    more = tokens_needed(options, new_tokens)
    if chosen.longest + more > engine.max_context:
        raise ValueError(
            f"prompts: {chosen.longest} tokens and {more} new ones do not fit the "
            f"{engine.max_context} positions of {name}"
        )
    case = Case(batch=batch, context=chosen.longest, new_tokens=more)
    check_fit(engine.cache.arena, options, case, name)


def _script_steps(options: EngineOptions, blocks: int) -> int:
    return blocks * BLOCK * len(lengths_timed(options.longest_draft))


def _settled(steps: Sequence[TimedStep]) -> Iterator[TimedStep]:
    """The later half of each row of steps of one length: what other work pushed out of the
    processor's caches comes back only within several steps."""
    for _, row in itertools.groupby(steps, key=lambda step: step.length):
        own = list(row)
        yield from own[len(own) // 2 :]


def _tokens_per_s(runs: Sequence[Run]) -> float:
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def _round(engine: Engine, asked: _Asked) -> _Round:
    options = engine.options
    lengths = lengths_timed(options.longest_draft)
    blocks = 1 if len(asked.groups) >= GROUPS else MOST_BLOCKS
    steps = _script_steps(options, blocks)
    long_enough = replace(asked.params, max_tokens=steps + options.longest_draft + 1)
    script = partial(
        Script,
        lengths=[length for length in lengths for _ in range(BLOCK)],
        vocab_size=engine.spec.vocab_size,
    )
    scripted: list[TimedStep] = []
    forget(engine)
    with longest_always(engine), guessing_by(engine, script):
        for group in asked.groups:
            scripted += _settled(answer(engine, group, long_enough, most_steps=steps).steps)
    forget(engine)
    runs = []
    drafted: list[int] = []
    accepted: list[int] = []
    with guessing_by(engine, Watch):
        for group in asked.groups:
            runs.append(answer(engine, group, asked.params))
            drafted = _added(drafted, engine.speculation.drafted)
            accepted = _added(accepted, engine.speculation.accepted)
    return _Round(
        scripted=tuple(scripted),
        runs=tuple(runs),
        drafted=tuple(drafted),
        accepted=tuple(accepted),
    )


def _added(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The sum by place of counts that may be of different lengths."""
    size = max(len(one), len(other))
    return [sum(counts[i] for counts in (one, other) if i < len(counts)) for i in range(size)]


def _result(
    own: tuple[str, Engine],
    base: tuple[str, Engine],
    asked: _Asked,
    tally: _Tally,
    hardware: Hardware,
) -> SpeculationResult:
    from skimp.engine.options import BY_MODEL

    (name, engine), (plain_name, plain) = own, base
    options, batch, params = engine.options, asked.batch, asked.params
    assert params.max_tokens is not None
    prompt_tokens = statistics.fmean(len(prompt) for group in asked.groups for prompt in group)
    context = round(prompt_tokens + params.max_tokens / 2)
    steps = [step for one in tally.rounds for step in one.steps]
    sequences = sum(step.sequences for step in steps)
    drafted: list[int] = []
    accepted: list[int] = []
    for one in tally.rounds:
        drafted, accepted = _added(drafted, one.drafted), _added(accepted, one.accepted)
    checks = tuple(
        Check(
            guesses=length,
            ratio=statistics.median(ratios),
            expected=expected_ratio(plain.work, hardware, batch, context, length),
        )
        for length, ratios in sorted(tally.ratios.items())
    )
    guess = statistics.median(tally.guesses) if tally.guesses else None
    served = getattr(engine.scheduler.proposer, "served", None)
    before: float | None = None
    if served is not None:
        before = expected_guess(served.work, plain.work, hardware, batch, context)
    elif options.speculate not in BY_MODEL:
        before = 0.0  # a few dictionary entries, which the cost model does not know
    expected = None
    if before is not None:
        points = [(check.guesses, check.expected) for check in checks]
        expected = predicted_gain(steps, batch, before, points)
    draft_bytes = 0
    if served is not None:
        draft_bytes = round(served.work.resident_weight_bytes) + served.cache.arena.budget_bytes
    return SpeculationResult(
        name=name,
        plain=plain_name,
        speculate=options.speculate,
        draft_model=options.draft_model,
        draft_rule=options.accepts_by if options.speculate in BY_MODEL else None,
        longest_draft=options.longest_draft,
        controlled=options.controls,
        draft_bytes=draft_bytes,
        category=asked.category,
        temperature=params.temperature,
        batch=batch,
        prompts=batch * len(asked.groups),
        prompt_tokens=prompt_tokens,
        new_tokens=params.max_tokens,
        rounds=len(tally.rounds),
        device=options.device,
        dtype=plain.work.compute_dtype,
        backend=engine.backend_name,
        threads=engine_threads(engine),
        hardware=hardware.note,
        templated=asked.chosen.templated,
        tokens_per_step=sum(step.tokens for step in steps) / sequences,
        drafted_per_step=sum(step.drafted for step in steps) / sequences,
        drafted=tuple(drafted),
        accepted=tuple(accepted),
        filled=sequences / batch / len(steps),
        same_answers=statistics.fmean(tally.same),
        guess=guess,
        expected_guess=before,
        checks=checks,
        tokens_per_s=statistics.median(rate for rate, _ in tally.rates),
        plain_tokens_per_s=statistics.median(rate for _, rate in tally.rates),
        predicted=predicted_gain(steps, batch, guess, [(c.guesses, c.ratio) for c in checks]),
        expected=expected,
        gains=tuple(tally.gains),
        gain=statistics.median(tally.gains),
    )
