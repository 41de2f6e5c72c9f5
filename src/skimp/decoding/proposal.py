"""Who guesses tokens before the model is asked.

A step is propose → forward → accept k → commit k. Plain generation proposes nothing, so one row of
logits comes back and one token is drawn: the same path with an empty guess. ``accept`` says how
many guesses stand.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from skimp.decoding.rows import RowState
from skimp.decoding.sampler import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens, and the laws that they were drawn from: float64 [k, V], each summing to 1 and
    given the tokens before it. None: they were not drawn but follow from what was there before."""

    tokens: tuple[int, ...] = ()
    laws: Tensor | None = None

    def cut(self, length: int) -> Draft:
        """Its beginning. How long that is must not depend on the tokens (the law would change)."""
        if length >= len(self.tokens):
            return self
        laws = None if self.laws is None or not length else self.laws[:length]
        return Draft(self.tokens[:length], laws)


EMPTY: Final = Draft()


@dataclass(frozen=True, slots=True)
class Ask:
    """What a proposer may know of a sequence: a key for what it remembers of it, its tokens (prompt
    and output so far), how many of them are prompt, the most that may be guessed, whose past
    outputs may be looked into (``salt``), and what the model's last step left of the rows before
    the last token (``features`` float32 [n, D]), if it was of this sequence."""

    key: Hashable
    tokens: Sequence[int]
    num_prompt: int
    most: int
    row: RowState
    salt: str | None = None
    features: Tensor | None = None


class Proposer(Protocol):
    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """A draft, which may be empty, for each sequence."""
        ...

    def end(self, key: Hashable) -> None:
        """Forget a sequence, which need not be known: it has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Accepted:
    """What one sequence gains: the accepted part of its draft and one token after it. With an
    ``error`` that token is missing, and the error says why."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    error: str | None = None


class Acceptor(Protocol):
    def accept(
        self, logits: Tensor, rows: Sequence[RowState], drafts: Sequence[Draft]
    ) -> list[Accepted]:
        """For each row its new tokens; ``logits`` [L, V] hold 1 + len(draft) lines a row."""
        ...
