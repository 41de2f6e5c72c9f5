"""What guesses should gain: E / (c k + v(k)), over the steps as they were.

``c`` is the time of a guess and ``v(k)`` that of a step with k more rows a sequence, both over a
plain step's. Lengths may differ from step to step and sequences may end one after the other, so
the sum goes over steps: each has its own k, and its own rows. Where every step has k guesses and
all sequences take part the formula is the one above.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from skimp.cost import Hardware, ModelWork, predict, step_cost, uniform

LEAST_RATIO = 0.05  # of a step, however few rows are left of its batch


@dataclass(frozen=True, kw_only=True)
class Check:
    """A step with ``guesses`` more rows a sequence, over a plain one: ``ratio`` as measured and
    ``expected`` by the cost model."""

    guesses: int
    ratio: float
    expected: float


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """A step of ``sequences`` that drew ``tokens``, ``drafted`` guesses among its rows."""

    sequences: int
    drafted: int
    tokens: int

    @property
    def length(self) -> float:
        """Guesses a sequence."""
        return self.drafted / self.sequences if self.sequences else 0.0


Points = Sequence[tuple[float, float]]


def slope(points: Points) -> float:
    """Of the straight line nearest to (k, v(k)); 0 of a single point."""
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points)).slope


def ratio_at(points: Points, rows: float) -> float:
    """v at ``rows`` more rows a sequence: between the points on straight lines, and outside of
    them along the slope. Less than 0 rows is a batch of which some have ended."""
    ordered = sorted(points)
    (first, low), (last, high) = ordered[0], ordered[-1]
    if rows <= first:
        return max(LEAST_RATIO, low + slope(ordered) * (rows - first))
    if rows >= last:
        return high + slope(ordered) * (rows - last)
    for (x, y), (more, higher) in itertools.pairwise(ordered):
        if rows <= more:
            return y + (higher - y) * (rows - x) / (more - x)
    raise AssertionError("unreachable")


def predicted_gain(
    steps: Sequence[StepShape], batch: int, guess: float | None, points: Points
) -> float:
    """Tokens of ``steps`` over the time they should take, against plain steps of ``batch`` tokens.

    ``guess`` is c (None: nothing was guessed), ``points`` are (k, v(k)).
    """
    time = sum(
        (guess or 0.0) * step.length
        + ratio_at(points, (step.sequences + step.drafted) / batch - 1.0)
        for step in steps
    )
    return sum(step.tokens for step in steps) / batch / time


def expected_ratio(
    work: ModelWork, hardware: Hardware, batch: int, context: int, guesses: int
) -> float:
    """v(k) by the cost model, before anything was timed."""
    plain = step_cost(work, uniform(batch, context))
    rows = guesses + 1
    longer = step_cost(work, uniform(batch, context + guesses, tokens=rows, logits=rows))
    return predict(longer, hardware).seconds / predict(plain, hardware).seconds


def expected_guess(
    draft: ModelWork, work: ModelWork, hardware: Hardware, batch: int, context: int
) -> float:
    """c of a draft model by the cost model: a step of its own for each guess."""
    own, plain = (predict(step_cost(w, uniform(batch, context)), hardware) for w in (draft, work))
    return own.seconds / plain.seconds


def lengths_timed(longest: int) -> tuple[int, ...]:
    """Numbers of guesses whose steps are timed: none, powers of two, and the longest."""
    powers = [1 << i for i in range(longest.bit_length()) if 1 << i < longest]
    return (0, *powers, longest)
