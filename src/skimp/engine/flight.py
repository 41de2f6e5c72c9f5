"""A step between its launch and its landing."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from skimp.decoding.deferred import DeferredDraws
from skimp.engine.request import Sequence
from skimp.engine.scheduler import Work


@dataclass
class Draw:
    """A part of the work that reaches its sequence's end, the samples that draw from its logits,
    where these begin, and the part's first row."""

    item: Work
    samples: list[Sequence]
    line: int
    row: int


@dataclass
class Flight:
    """A step that was launched, and what is to be made of it when it lands; ``deferred`` is None
    when the host draws."""

    number: int
    work: list[Work]
    logits: Tensor
    draws: list[Draw] = field(default_factory=list)
    deferred: DeferredDraws | None = None
    committed: bool = False
