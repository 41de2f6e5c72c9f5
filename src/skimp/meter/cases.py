"""What is timed: so many sequences of a context, and how many of them a cache memory holds.

What fits is asked of an arena without memory (PyTorch's ``meta`` device): the engine's own pages,
windows, formats and chunks decide, and nothing is loaded or allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from skimp.cache import Arena
from skimp.cost.memory import largest
from skimp.meter.work import engine_layout

if TYPE_CHECKING:
    from skimp.engine.options import EngineOptions
    from skimp.model.spec import ModelSpec

SPARE_TOKENS = 2  # that a request is granted beyond those that are timed, so that none ends early
MOST_SEQUENCES = 4096  # of a largest batch, whatever the memory
CACHE_BYTES = "cache_bytes"


@dataclass(frozen=True, kw_only=True)
class Case:
    """``batch`` sequences gain ``new_tokens`` tokens each from ``context`` tokens on, and the later
    half of those steps is timed. ``limited_by``: for the largest batch, what allows no larger one;
    None for a batch that was asked for."""

    batch: int
    context: int
    new_tokens: int = 64
    limited_by: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "context", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1, not {getattr(self, name)}")

    @property
    def asked_batch(self) -> str:
        """As it was asked for: a number, or ``max``."""
        return str(self.batch) if self.limited_by is None else "max"

    @property
    def label(self) -> str:
        """``8 x 128``, or ``max 21 x 128``."""
        prefix = "" if self.limited_by is None else "max "
        return f"{prefix}{self.batch} x {self.context}"


def holds(arena: Arena, options: EngineOptions, case: Case) -> bool:
    """Whether a cache admits each request of a case, reads the last prompt beside the others, and
    holds all of them up to their last token."""
    layout, last = arena.layout, case.context + case.new_tokens
    admitted = layout.pages_needed(last + SPARE_TOKENS, options.step_tokens)
    # A step that is launched before the last timed one has landed holds one token more.
    grown = layout.pages_needed(last + options.overlaps)
    # A prompt of which nothing is reused has the tokens of a step besides its windows.
    resting = layout.pages_needed(case.context)
    reading = layout.pages_needed(case.context, min(case.context, options.step_tokens))
    return (
        arena.could_hold(admitted)
        and arena.could_hold([(case.batch - 1) * n + m for n, m in zip(resting, reading)])
        and arena.could_hold([case.batch * n for n in grown])
    )


def check_case(arena: Arena, options: EngineOptions, case: Case, name: str) -> None:
    """:func:`check_fit`, and ValueError for an engine that guesses: prompts are random tokens."""
    if options.speculate != "none":
        raise ValueError(
            f"speculate: {options.speculate} of {name} is not timed here, where prompts are random "
            "tokens; its speed depends on the text, and is measured on real prompts instead"
        )
    check_fit(arena, options, case, name)


def check_fit(arena: Arena, options: EngineOptions, case: Case, name: str) -> None:
    """Raise ValueError, naming the field and the model, if an engine of these options cannot run
    all sequences of a case at once."""
    batch = case.batch
    if batch > options.max_batch:
        raise ValueError(f"batch: {batch} sequences exceed max_batch {options.max_batch} of {name}")
    if batch > options.step_tokens:
        raise ValueError(
            f"batch: {batch} sequences exceed token_budget {options.step_tokens} of {name}: "
            "a step has a token of each"
        )
    if not holds(arena, options, case):
        most = largest(lambda n: holds(arena, options, replace(case, batch=n)), batch)
        raise ValueError(
            f"batch: {batch} sequences of {case.context} tokens and {case.new_tokens} new ones do "
            f"not fit the {arena.budget_bytes:,} cache bytes of {name}, which hold {most}"
        )


def plan_cases(
    spec: ModelSpec,
    options: EngineOptions,
    batches: Sequence[int | None],
    contexts: Sequence[int],
    new_tokens: int,
    *,
    name: str,
    max_batch: int | None = None,
    least_batch: int = 2,
) -> tuple[list[Case], EngineOptions]:
    """Every batch at every context, and the options of an engine that runs them.

    A batch of None is the largest that ``options.cache_bytes`` hold of the context and its new
    tokens, at most 4,096 sequences. ``max_batch`` is the engine's where the user chose it, else it
    becomes the largest batch, at least ``least_batch``; a token budget that was not chosen grows to
    the batch. Raises ValueError, naming the field and the model, for what does not fit.
    """
    arena = None
    if options.cache_bytes is not None:
        layout = engine_layout(spec, options)
        try:
            arena = Arena(layout, options.cache_bytes, "meta")
        except ValueError as error:
            raise ValueError(f"cache_bytes: {error} ({name})") from error

    def grown(batch: int, step_tokens: int = 0) -> EngineOptions:
        """The options for at least this batch, and steps of at least so many tokens."""
        budget = options.token_budget
        if budget is None and max(batch, step_tokens) > options.step_tokens:
            budget = max(batch, step_tokens)
        own = max(least_batch, batch) if max_batch is None else max_batch
        return replace(options, max_batch=own, token_budget=budget)

    def at_most(context: int, step_tokens: int) -> Case:
        if arena is None:
            raise ValueError(f"batch: max needs the cache_bytes that {name} shall fill")
        case = Case(batch=1, context=context, new_tokens=new_tokens)
        ceiling, limit = MOST_SEQUENCES, f"{MOST_SEQUENCES} sequences"
        for field, most in (("token_budget", options.token_budget), ("max_batch", max_batch)):
            if most is not None and most < ceiling:
                ceiling, limit = most, f"{field} {most}"

        def fits(batch: int) -> bool:
            return holds(arena, grown(batch, step_tokens), replace(case, batch=batch))

        batch = largest(fits, ceiling)
        if not batch:
            needed = arena.layout.bytes_needed(
                context + new_tokens + SPARE_TOKENS, options.step_tokens
            )
            raise ValueError(
                f"cache_bytes: {options.cache_bytes:,} bytes hold no sequence of {context} tokens "
                f"and {new_tokens} new ones of {name}, which needs about {needed:,}"
            )
        bound = limit if batch == ceiling and fits(batch + 1) else CACHE_BYTES
        return replace(case, batch=batch, limited_by=bound)

    def planned(step_tokens: int) -> list[Case]:
        return [
            at_most(context, step_tokens)
            if batch is None
            else Case(batch=batch, context=context, new_tokens=new_tokens)
            for batch in batches
            for context in contexts
        ]

    # The largest batch makes the steps of all cases longer, and longer steps may leave room for
    # fewer sequences: once they are known, no batch grows any more.
    cases = planned(options.step_tokens)
    final = grown(max(case.batch for case in cases))
    if final.step_tokens > options.step_tokens:
        cases = planned(final.step_tokens)
        final = grown(max(case.batch for case in cases))
    if arena is not None:
        for case in cases:
            check_case(arena, final, case, name)
    return cases, final
