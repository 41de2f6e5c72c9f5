"""A figure with how sure it is: the mean over items with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from skimp.meter.quality import Block, bootstrap

_Z = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Score:
    """``chance`` is what a model that guesses would reach, where that is known."""

    value: float
    ci95: tuple[float, float]
    n: int
    chance: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "ci95": list(self.ci95),
            "n": self.n,
            "chance": self.chance,
        }


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): holds for few items and near 0 and 1."""
    share, square = right / n, _Z * _Z / n
    centre = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / n + square / (4 * n))
    # Rounding must not put the share itself outside.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def share(outcomes: Sequence[bool], chance: float | None = None) -> Score:
    """The share of items that came out right. At least one item."""
    right, n = sum(outcomes), len(outcomes)
    return Score(value=right / n, ci95=wilson(right, n), n=n, chance=chance)


def mean(values: Sequence[float], *, seed: int = 0) -> Score:
    """A mean over items, with a bootstrap over them."""
    blocks = [Block(amount=float(value), size=1) for value in values]
    total = math.fsum(block.amount for block in blocks)
    return Score(value=total / len(blocks), ci95=bootstrap(blocks, seed=seed), n=len(blocks))
