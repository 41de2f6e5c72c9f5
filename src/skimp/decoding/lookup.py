"""Guesses copied from what a sequence has said before: prompt lookup (Saxena 2023).

The last few tokens are looked for further back, the longest stretch first; what followed there is
the draft. It costs a few dictionary entries a token, and pays where answers repeat their prompts:
edits, summaries, code, tables.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from skimp.decoding.proposal import EMPTY, Ask, Draft

LONGEST, SHORTEST = 4, 2  # tokens that must agree


class _Index:
    """Where each short stretch of a sequence last ended, but for the stretch at its very end."""

    __slots__ = ("_ends", "_read")

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._read = 0

    def read(self, tokens: Sequence[int]) -> None:
        ends = self._ends
        for end in range(max(self._read, SHORTEST), len(tokens)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                ends[tuple(tokens[end - size : end])] = end
        self._read = len(tokens)

    def find(self, tokens: Sequence[int]) -> int | None:
        """The place after the last earlier occurrence of the longest end of ``tokens``."""
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            end = self._ends.get(tuple(tokens[len(tokens) - size :]))
            if end is not None:
                return end
        return None


class Lookup:
    """A :class:`~skimp.decoding.proposal.Proposer` without a model."""

    def __init__(self) -> None:
        self._indexes: dict[Hashable, _Index] = {}

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        return [self._one(ask) for ask in asks]

    def end(self, key: Hashable) -> None:
        self._indexes.pop(key, None)

    def _one(self, ask: Ask) -> Draft:
        index = self._indexes.setdefault(ask.key, _Index())
        index.read(ask.tokens)
        begin = index.find(ask.tokens)
        if begin is None:
            return EMPTY
        draft = list(ask.tokens[begin : begin + ask.most])
        period = len(ask.tokens) - begin
        while len(draft) < ask.most:  # the copy reaches its own beginning: it goes round
            draft.append(draft[len(draft) - period])
        return Draft(tuple(draft))
