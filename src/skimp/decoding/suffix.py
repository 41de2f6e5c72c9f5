"""Guesses from suffixes: what followed most often where the text read the same the longest.

As suffix decoding (Oliaro et al. 2024) has it, in the request itself and in what was answered to
earlier requests of the same salt, so that no tenant sees another's text, not even by how fast it
comes. In place of a tree there are the tokens in one list and the places of every pair of them:
the places of the last pair are followed backwards, and those that agree the longest vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Final

from skimp.decoding.proposal import EMPTY, Ask, Draft

PLACES: Final = 32  # the newest that are looked at
DEPTH: Final = 32  # tokens that are compared backwards
FLOOR: Final = 0.15  # a guess goes on while its chance, by the votes, is above
PER_MATCHED: Final = 2  # guesses for each token that agrees
KEPT: Final = 1 << 17  # tokens of past answers a salt, of which the older half is let go
KEPT_OF_ALL: Final = 1 << 19  # of all salts: those not answered for the longest are let go
GAP: Final = -1  # between two answers


class SuffixIndex:
    """Tokens, and where each pair of them ends. Grows at its end only."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        own, places = self.tokens, self._places
        for token in tokens:
            if own and GAP not in (own[-1], token):
                places.setdefault((own[-1], token), []).append(len(own) + 1)
            own.append(token)

    def guess(self, text: Sequence[int], most: int) -> tuple[tuple[int, ...], float]:
        """A continuation of ``text`` of at most ``most`` tokens, and how many of them the votes
        expect to be right."""
        if len(text) < 2:
            return (), 0.0
        places = self._places.get((text[-2], text[-1]), ())[-PLACES:]
        lengths = {place: self._agreement(text, place) for place in places if self._goes_on(place)}
        if not lengths:
            return (), 0.0
        best = max(lengths.values())
        alive = [place for place in lengths if lengths[place] == best]
        guessed: list[int] = []
        chance, expected = 1.0, 0.0
        for step in range(min(most, PER_MATCHED * best)):
            votes = Counter(
                self.tokens[place + step]
                for place in reversed(alive)
                if self._goes_on(place + step)
            )
            votes.pop(GAP, None)
            if not votes:
                break
            token, count = votes.most_common(1)[0]  # of equals the newest
            chance *= count / len(alive)
            if chance < FLOOR:
                break
            guessed.append(token)
            expected += chance
            alive = [p for p in alive if self._goes_on(p + step) and self.tokens[p + step] == token]
        return tuple(guessed), expected

    def _goes_on(self, place: int) -> bool:
        return place < len(self.tokens) and self.tokens[place] != GAP

    def _agreement(self, text: Sequence[int], place: int) -> int:
        """How many tokens before ``place`` are those at the end of ``text``."""
        tokens, size = self.tokens, len(text)
        longest = min(DEPTH, place, size)
        length = 2
        while length < longest and tokens[place - length - 1] == text[size - length - 1]:
            length += 1
        return length


class _Own:
    """What is remembered of a sequence."""

    __slots__ = ("index", "num_prompt", "salt", "tokens")

    def __init__(self, ask: Ask) -> None:
        self.index = SuffixIndex()
        self.tokens, self.num_prompt, self.salt = ask.tokens, ask.num_prompt, ask.salt


class _Past:
    """Past answers of a salt in two generations, so that letting go of the older costs nothing."""

    __slots__ = ("newer", "older")

    def __init__(self) -> None:
        self.older, self.newer = SuffixIndex(), SuffixIndex()

    @property
    def size(self) -> int:
        return len(self.older.tokens) + len(self.newer.tokens)

    def learn(self, answer: Sequence[int]) -> None:
        if self.newer.tokens and len(self.newer.tokens) + len(answer) > KEPT // 2:
            self.older, self.newer = self.newer, SuffixIndex()
        self.newer.extend([*answer[-KEPT // 2 :], GAP])

    def guess(self, text: Sequence[int], most: int) -> tuple[tuple[int, ...], float]:
        found = [index.guess(text, most) for index in (self.newer, self.older)]
        return max(found, key=lambda one: one[1])


class Suffix:
    """A :class:`~skimp.decoding.proposal.Proposer` without a model."""

    def __init__(self) -> None:
        self._own: dict[Hashable, _Own] = {}
        self._past: dict[str | None, _Past] = {}  # the salt that was answered last is the last
        self._size = 0  # tokens of all salts

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        return [self._one(ask) for ask in asks]

    def end(self, key: Hashable) -> None:
        """The answer is now one of its salt's past answers."""
        own = self._own.pop(key, None)
        if own is None:
            return
        past = self._past.pop(own.salt) if own.salt in self._past else _Past()
        self._past[own.salt] = past
        before = past.size
        past.learn(own.tokens[own.num_prompt :])
        self._size += past.size - before
        while self._size > KEPT_OF_ALL and len(self._past) > 1:
            self._size -= self._past.pop(next(iter(self._past))).size

    def _one(self, ask: Ask) -> Draft:
        own = self._own.get(ask.key)
        if own is None:
            own = self._own[ask.key] = _Own(ask)
        own.tokens = ask.tokens
        own.index.extend(ask.tokens[len(own.index.tokens) :])
        found, expected = own.index.guess(ask.tokens, ask.most)
        past = self._past.get(ask.salt)
        if past is not None:
            others, more = past.guess(ask.tokens, ask.most)
            if more > expected:
                found = others
        return Draft(found) if found else EMPTY
