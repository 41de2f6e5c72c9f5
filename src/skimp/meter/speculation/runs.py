"""One group of prompts answered and timed: generation alone, guesses and checks apart."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skimp.decoding.proposal import EMPTY, Ask, Draft, Proposer
from skimp.meter.speculation.predict import StepShape
from skimp.meter.speed import requests

if TYPE_CHECKING:
    from torch import Tensor

    from skimp.decoding.params import SamplingParams
    from skimp.engine import Engine


@dataclass(frozen=True, kw_only=True)
class TimedStep(StepShape):
    """``propose_s`` of the step's ``seconds`` went into guesses."""

    seconds: float
    propose_s: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """The steps after all prompts were read, and all tokens of each answer."""

    steps: tuple[TimedStep, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)


class Watch:
    """A proposer, and the seconds it has ``spent``."""

    def __init__(self, inner: Proposer) -> None:
        self.inner = inner
        self.spent = 0.0

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        start = time.perf_counter()
        try:
            return self._propose(asks)
        finally:
            self.spent += time.perf_counter() - start

    def _propose(self, asks: Sequence[Ask]) -> list[Draft]:
        return self.inner.propose(asks)

    def end(self, key: Hashable) -> None:
        self.inner.end(key)

    def __getattr__(self, name: str) -> Any:
        """Whatever else an engine may want of its proposer."""
        return getattr(self.inner, name)


class Script(Watch):
    """Guesses as many tokens as it is told, a different number every step, hardly ever right.

    Before a step with guesses the proposer itself guesses too, in vain: what it leaves in the
    processor's caches is part of what the step costs, and where its guesses have laws the scripted
    ones have some as well, whose checking costs more.
    """

    def __init__(self, inner: Proposer, lengths: Sequence[int], vocab_size: int) -> None:
        super().__init__(inner)
        self._lengths = itertools.cycle(lengths)
        self._vocab_size = vocab_size

    def _propose(self, asks: Sequence[Ask]) -> list[Draft]:
        length = next(self._lengths)
        found = self.inner.propose(asks) if length else []
        laws = next((draft.laws for draft in found if draft.laws is not None), None)
        return [self._draft(ask, min(length, ask.most), laws) for ask in asks]

    def _draft(self, ask: Ask, length: int, like: Tensor | None) -> Draft:
        if not length:
            return EMPTY
        tokens = tuple((ask.tokens[-1] + 1 + i) % self._vocab_size for i in range(length))
        if like is None:
            return Draft(tokens)
        laws = like.new_zeros(length, self._vocab_size)
        laws[range(length), tokens] = 1.0
        return Draft(tokens, laws)


def answer(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    most_steps: int | None = None,
) -> Run:
    """Answer all prompts at once, in at most ``most_steps`` steps after all have been read.

    ``engine.speculation`` then holds what became of the guesses in those steps. Raises ValueError
    if the engine does not hold all sequences at once or one fails.
    """
    from skimp.engine.speculation import SpeculationStats

    steps: list[TimedStep] = []
    answers: dict[str, tuple[int, ...]] = {}
    with requests(engine, prompts, params) as ids:
        unread = set(ids)
        while unread:
            for output in engine.step():
                unread.discard(output.request_id)
                answers[output.request_id] = tuple(output.outputs[0].token_ids)
                if output.finished:
                    raise ValueError(
                        f"batch: {len(prompts)} sequences are not answered at once: one ended "
                        f"before the others began ({output.error or 'the cache is too small'})"
                    )
        engine.speculation = SpeculationStats()
        while engine.has_unfinished() and (most_steps is None or len(steps) < most_steps):
            drafted, spent = sum(engine.speculation.drafted), _spent(engine)
            start = time.perf_counter()
            outputs = engine.step()
            took = time.perf_counter() - start
            for output in outputs:
                if output.error is not None:
                    raise ValueError(f"prompt: {output.error}")
                answers[output.request_id] = tuple(output.outputs[0].token_ids)
            steps.append(
                TimedStep(
                    sequences=sum(bool(output.new_token_ids) for output in outputs),
                    drafted=sum(engine.speculation.drafted) - drafted,
                    tokens=sum(len(output.new_token_ids) for output in outputs),
                    seconds=took,
                    propose_s=_spent(engine) - spent,
                )
            )
        return Run(steps=tuple(steps), answers=tuple(answers[name] for name in ids))


def forget(engine: Engine) -> None:
    """Drop what past requests left: their prefixes, and the answers that a proposer remembers."""
    from skimp.decoding.suffix import Suffix

    proposer = engine.scheduler.proposer
    if isinstance(proposer, Suffix):
        engine.scheduler.proposer = Suffix()
    if (served := getattr(proposer, "served", None)) is not None:
        served.cache.clear_prefix()
    engine.cache.clear_prefix()


@contextmanager
def guessing_by(engine: Engine, wrapped: Callable[[Proposer], Watch]) -> Iterator[None]:
    """The engine's proposer inside another."""
    own = engine.scheduler.proposer
    assert own is not None, "this engine does not guess"
    engine.scheduler.proposer = wrapped(own)
    try:
        yield
    finally:
        engine.scheduler.proposer = own


@contextmanager
def longest_always(engine: Engine) -> Iterator[None]:
    """As many guesses as may be, and nothing learned of them by what controls their number."""
    from skimp.engine.speculation import Lengths

    own = engine.lengths
    engine.lengths = Lengths(engine.options.longest_draft, None)
    try:
        yield
    finally:
        engine.lengths = own


def _spent(engine: Engine) -> float:
    proposer = engine.scheduler.proposer
    return proposer.spent if isinstance(proposer, Watch) else 0.0
