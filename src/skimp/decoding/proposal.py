"""Who guesses tokens before the model is asked, and who decides how many of them stand.

A step is propose → forward → accept k → commit k. Plain generation proposes nothing, so one row of
logits comes back and one token is drawn: the same path with an empty guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from skimp.decoding.rows import RowState
from skimp.decoding.sampler import Sampler, TokenLogprobs


class Proposer(Protocol):
    def propose(self, tokens: Sequence[int], room: int) -> Sequence[int]:
        """At most ``room`` tokens that may follow ``tokens`` (prompt and output so far)."""
        ...


class NoProposer:
    """Plain generation."""

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[int]:
        return ()


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """What one sequence gains: the accepted part of its draft and one token after it."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    error: str | None = None


class Acceptor(Protocol):
    def accept(
        self, logits: Tensor, rows: Sequence[RowState], drafts: Sequence[Sequence[int]]
    ) -> list[Accepted]:
        """For each row its new tokens; ``logits`` [L, V] hold 1 + len(draft) lines a row."""
        ...


class DrawAndCompare:
    """Draws every position from the model's own law and keeps the draft as far as it agrees.

    For proposals that are not random this is the ratio test of Leviathan et al. (2023) with a
    one-hot draft, so the law is unchanged; and as each position has its own random number, the
    tokens are the very ones that plain generation draws.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def accept(
        self, logits: Tensor, rows: Sequence[RowState], drafts: Sequence[Sequence[int]]
    ) -> list[Accepted]:
        views: list[RowState] = []
        for row, draft in zip(rows, drafts):
            views.append(row)
            views.extend(row.drafted(draft[:i]) for i in range(1, len(draft) + 1))
        batch = self._sampler.sample(logits, views)
        found, line = [], 0
        for draft in drafts:
            kept = 0
            while kept < len(draft) and batch.token_ids[line + kept] == draft[kept]:
                kept += 1
            stop = line + kept + 1
            errors = [error for error in batch.errors[line:stop] if error is not None]
            found.append(
                Accepted(
                    tokens=batch.token_ids[line:stop],
                    logprobs=batch.logprobs[line:stop],
                    error=errors[0] if errors else None,
                )
            )
            line += 1 + len(draft)
        return found
