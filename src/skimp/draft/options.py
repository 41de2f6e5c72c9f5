"""What may be said of the training of a draft head, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from skimp.errors import OptionError, shown

Loss = Literal["ce", "tv", "mix", "lk"]
LOSSES: Final[tuple[Loss, ...]] = get_args(Loss)
SELF: Final = "self"  # the text that the target writes
LEAST_ROWS: Final = {"cpu": 2048, "cuda": 32768}  # of a forward, where the batch has as many


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """``tokens`` is the budget, ``batch`` the tokens of an optimiser step, ``length`` the longest
    piece of a document, ``unroll`` how many tokens ahead the head learns to guess; guesses one
    further weigh ``decay`` times as much. ``vocabulary`` is the number of words that the head can
    guess (None: all), ``layers`` those whose input it reads. Shapes that are None follow the
    target's. ``self_tokens``: how much the target writes where the text is its own. ``minutes``:
    training ends by then, as if the tokens had been spent."""

    tokens: int
    minutes: float | None = None
    loss: Loss = "lk"
    unroll: int = 5
    decay: float = 0.8
    vocabulary: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    layers: tuple[int, ...] | None = None
    length: int = 512
    batch: int = 4096
    lr: float = 6e-4
    warmup: float = 0.05
    final: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    held_out: int | None = None
    self_tokens: int | None = None
    measurements: int = 10
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"tokens": 1, "unroll": 1, "length": 3, "batch": 3, "measurements": 1, "seed": 0}
        optional = {"vocabulary": 1, "heads": 1, "kv_heads": 1, "ffn": 1, "held_out": 3}
        for field, low in {**least, **optional, "self_tokens": 64}.items():
            value = getattr(self, field)
            if value is not None and not low <= value < 2**31:
                raise OptionError(f"{field}: at least {low}, not {shown(value)}")
        for field, choices in (
            ("loss", LOSSES),
            ("device", ("cpu", "cuda")),
            ("dtype", ("auto", "float32", "bfloat16")),
        ):
            if getattr(self, field) not in choices:
                given = shown(getattr(self, field))
                raise OptionError(f"{field}: {given} is not one of {', '.join(choices)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError(f"lr: above 0, not {self.lr}")
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise OptionError(f"minutes: above 0, not {self.minutes}")
        if not 0 < self.decay <= 1:
            raise OptionError(f"decay: above 0 and at most 1, not {self.decay}")
        if self.batch < self.length:
            raise OptionError(f"batch: {self.batch} tokens a step hold no piece of {self.length}")
        if self.unroll > self.length - 2:
            raise OptionError(
                f"unroll: {self.unroll} tokens ahead are too many for pieces of {self.length}"
            )
        if self.layers is not None and not self.layers:
            raise OptionError("layers: name at least one")

    @property
    def computes_in(self) -> Literal["float32", "bfloat16"]:
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def rows(self) -> int:
        """Of a forward."""
        return min(self.batch, max(self.length, LEAST_ROWS[self.device]))

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch)
