"""Joint laws of tokens drawn one by one, and whether counts of draws follow them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Prefix = tuple[int, ...]
Law = Callable[[Prefix], Floats]


def plain_law(law: Law, length: int, prefix: Prefix = ()) -> Floats:
    """Joint law [V] * length of the tokens after ``prefix``, drawn one by one."""
    if length == 0:
        return np.ones(())
    p = law(prefix)
    shape = (len(p),) * (length - 1)
    rows = [
        p[x] * plain_law(law, length - 1, (*prefix, x)) if p[x] > 0 else np.zeros(shape)
        for x in range(len(p))
    ]
    return np.stack(rows)


def chi_square(found: Floats, law: Floats) -> float:
    """The chance of a deviation as large; cells of less than 5 expected draws are one."""
    expected = law.ravel() * found.sum()
    assert found.ravel()[expected == 0].sum() == 0, "drawn what cannot be"
    small = expected < 5
    seen = np.append(found.ravel()[~small], found.ravel()[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    keep = wanted > 0
    statistic = ((seen[keep] - wanted[keep]) ** 2 / wanted[keep]).sum()
    return float(stats.chi2.sf(statistic, keep.sum() - 1))
