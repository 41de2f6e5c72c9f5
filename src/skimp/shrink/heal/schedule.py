"""The parts of a healing run and their learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["cosine", "wsd", "constant"]
PartName = Literal["layerwise", "heal", "long"]
DECAY = 0.2  # of the steps, at the end of warm-up, stable, decay


@dataclass(frozen=True, kw_only=True)
class Part:
    """``steps`` optimiser steps on pieces of ``length`` tokens."""

    name: PartName
    steps: int
    length: int
    lr: float

    @property
    def layerwise(self) -> bool:
        """Mixers alone, each to the original's own; else the loss is that of the whole model."""
        return self.name == "layerwise"


def rate(step: int, steps: int, schedule: Schedule, *, warmup: float, final: float) -> float:
    """The factor on the learning rate of step ``step`` of ``steps``, from 0: a linear climb over
    the share ``warmup``, then a cosine down to ``final``; or flat, and at last 1 - sqrt (Hägele et
    al. 2024) down to ``final``; or flat."""
    climb = math.ceil(warmup * steps)
    if step < climb:
        return (step + 1) / climb
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        done = (step - climb + 1) / max(1, steps - climb)
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    begin = max(climb, steps - math.ceil(DECAY * steps))
    done = max(0, step - begin + 1) / max(1, steps - begin)
    return final + (1 - final) * (1 - math.sqrt(done))


def has_settled(losses: Sequence[float], slope: float, window: int) -> bool:
    """Whether the last ``window`` measurements took off less than the share ``slope``."""
    if len(losses) <= window:
        return False
    before, now = losses[-1 - window], losses[-1]
    return before - now < slope * before
