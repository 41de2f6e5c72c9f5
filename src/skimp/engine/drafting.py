"""What models that guess have in common: a cache of their own, rounds of one token, draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skimp.cache import CacheSequence
from skimp.decoding.deferred import DeviceDraws, deferrable, draw_on_device, draw_tables
from skimp.decoding.process import inverse_temperature, judge, process, tempered_only
from skimp.decoding.proposal import EMPTY, Ask, Draft
from skimp.decoding.rng import Purpose, uniforms
from skimp.engine.request import Flying
from skimp.engine.served import ServedModel
from skimp.kernels.draws import guess_tokens, is_native, rows_of


class DraftedSequence:
    """What the guessing model knows of a sequence, in the form that a runner reads: ``tokens`` from
    the sequence's ``base``-th on, of which the cache holds the first, and of the open append the
    ``written`` ones."""

    __slots__ = ("base", "cache", "flying", "tokens", "written")

    def __init__(self, cache: CacheSequence, base: int = 0) -> None:
        self.cache, self.base = cache, base
        self.tokens: list[int] = []
        self.written = 0
        self.flying: Flying | None = None  # its last guess, in rounds that run ahead


@dataclass
class Guess:
    """A draft in the making. ``features``: what rows of tokens that stand are computed from, the
    first of them at cache position ``start``; ``last_row``: of its rows, in the last round."""

    ask: Ask
    seq: DraftedSequence
    start: int = 0
    last_row: int = -1
    tokens: list[int] = field(default_factory=list)
    laws: Tensor | None = None  # float64 [most, V], as far as there are tokens
    done: bool = False

    def room_for_laws(self, vocab_size: int, device: torch.device | None = None) -> Tensor:
        """``laws``, which is made if need be."""
        if self.laws is None:
            self.laws = torch.empty(self.ask.most, vocab_size, dtype=torch.float64, device=device)
        return self.laws

    def draft(self) -> Draft:
        count = len(self.tokens)
        if not count:
            return EMPTY
        return Draft(tuple(self.tokens), None if self.laws is None else self.laws[:count])


@dataclass(frozen=True)
class GuessRows:
    """A part of a round, as a runner reads it."""

    guess: Guess
    start: int
    num_tokens: int
    num_logits: int

    @property
    def seq(self) -> DraftedSequence:
        return self.guess.seq

    @property
    def token_ids(self) -> list[int]:
        return self.seq.tokens[self.start : self.start + self.num_tokens]


class ModelProposer(ABC):
    """A :class:`~skimp.decoding.proposal.Proposer` that draws from a model's own law.

    What it draws with is what the request asks of the target, so laws are alike. ``coupled`` draws
    with the target's own random numbers and records no law: the target then draws for itself, and
    where both laws are alike both draw the same. ``runs_ahead``: where it can the host waits once
    for all rounds, as a GPU wants it.
    """

    needs_features = False  # a sequence without them is not asked for

    def __init__(
        self,
        served: ServedModel,
        *,
        coupled: bool,
        vocab_size: int,
        words: Tensor | None = None,
    ) -> None:
        """``vocab_size``: V of the target; ``words``: the tokens that the model has, int64 [W],
        None: all."""
        self.served = served
        self._coupled = coupled
        self._vocab_size, self._words = vocab_size, words
        if words is not None:
            assert int(words.min()) >= 0 and int(words.max()) < vocab_size
            # Logits of a round; what the model has no word for stays as it is.
            self._whole = torch.full(
                (served.runner.buffers.max_logits, vocab_size), -torch.inf, device=words.device
            )
        self.runs_ahead = served.runner.buffers.arena.is_cuda
        self._known: dict[Hashable, DraftedSequence] = {}

    @property
    def captures(self) -> int:
        """Rounds so far that took long for the sake of others: see ``Backend``."""
        return self.served.runner.backend.captures

    @abstractmethod
    def _begin(self, ask: Ask) -> Guess | None:
        """Bring a sequence up to date and reserve room; None where there is none."""

    @abstractmethod
    def _logits(self, work: Sequence[GuessRows]) -> Tensor:
        """Run a round: float32 [L, W], of the model's own words."""

    def _spread(self, logits: Tensor) -> Tensor:
        """Over the target's vocabulary, float32 [L, V]; valid until the next round."""
        if self._words is None:
            return logits
        return self._whole[: len(logits)].index_copy_(1, self._words, logits)

    def _highest(self) -> tuple[Tensor, Tensor] | None:
        """Of a round's logits [L, V] the maxima and where they are, if a backend has found them."""
        return None if self._words is not None else self.served.runner.backend.highest()

    @abstractmethod
    def _end_of(self, guess: Guess) -> None:
        """A draft is made: keep what will not change."""

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        guesses = [self._begin(ask) for ask in asks]
        active = [guess for guess in guesses if guess is not None]
        if active and self._may_run_ahead(active):
            self._run_ahead(active)
            active = []
        with self.served.runner.sampling_threads():
            while active:
                work = self._next_rows(active)
                self._draw(work, self._logits(work))
                active = [guess for guess in active if not guess.done]
        for guess in guesses:
            if guess is not None:
                self._end_of(guess)
                guess.laws = None if self._coupled else guess.laws
        return [EMPTY if guess is None else guess.draft() for guess in guesses]

    def end(self, key: Hashable) -> None:
        seq = self._known.pop(key, None)
        if seq is not None:
            self.served.cache.close(seq.cache)

    def _next_rows(self, active: Sequence[Guess]) -> list[GuessRows]:
        """As many of the tokens that wait as a step takes, the first sequences first."""
        work, budget = [], self.served.runner.buffers.max_rows
        for guess in active:
            seq = guess.seq
            start = seq.cache.length + seq.written
            count = min(len(seq.tokens) - start, budget)
            if count:
                whole = start + count == len(seq.tokens)
                work.append(GuessRows(guess, start, count, int(whole)))
                budget -= count
        return work

    def _draw(self, work: Sequence[GuessRows], logits: Tensor) -> None:
        """A token more for each sequence whose last token was computed."""
        for rows in work:
            rows.seq.written += rows.num_tokens
        drawing = [rows.guess for rows in work if rows.num_logits]
        if not drawing:
            return
        leads = [len(guess.tokens) for guess in drawing]
        if is_native(logits) and all(map(tempered_only, (g.ask.row for g in drawing), leads)):
            tokens, errors = self._draw_tempered(drawing, leads, logits)
        else:
            tokens, errors = self._draw_processed(drawing, self._spread(logits))
        for guess, token, error in zip(drawing, tokens, errors):
            if error is not None:
                guess.done = True
                continue
            guess.tokens.append(token)
            guess.seq.tokens.append(token)
            guess.done = len(guess.tokens) == guess.ask.most

    def _draw_tempered(
        self, drawing: Sequence[Guess], leads: Sequence[int], logits: Tensor
    ) -> tuple[list[int], Sequence[str | None]]:
        """As :meth:`_draw_processed`, of logits [L, W] in one call."""
        scales = [inverse_temperature(guess.ask.row.params) for guess in drawing]
        laws = [
            guess.room_for_laws(self._vocab_size) if scale else None
            for guess, scale in zip(drawing, scales)
        ]
        numbers = self._numbers(drawing, leads) if any(scales) else scales
        tops, tokens = guess_tokens(logits, self._words, scales, numbers, laws, leads)
        return tokens, [judge(top, top) for top in tops]

    def _draw_processed(
        self, drawing: Sequence[Guess], logits: Tensor
    ) -> tuple[list[int], Sequence[str | None]]:
        """A token for each, of logits [L, V], and why it has none."""
        processed = process(logits, [guess.ask.row.drafted(guess.tokens) for guess in drawing])
        tokens = list(processed.best)
        weights, sampled = processed.weights, processed.sampled
        if weights is not None:
            some = [drawing[i] for i in sampled]
            found = rows_of((weights,))
            numbers = self._numbers(some, [len(guess.tokens) for guess in some])
            for i, token in zip(sampled, found.draw(numbers)):
                tokens[i] = token
            laws = [guess.room_for_laws(self._vocab_size, weights.device) for guess in some]
            places = [len(guess.tokens) for guess in some]
            found.normalise([law[i : i + 1] for law, i in zip(laws, places)])
        return tokens, processed.errors

    def _may_run_ahead(self, guesses: Sequence[Guess]) -> bool:
        """When all begin with the first round and none needs the host to draw."""
        if not self.runs_ahead:
            return False
        buffers = self.served.runner.buffers
        waiting = sum(len(guess.seq.tokens) - guess.seq.cache.length for guess in guesses)
        return waiting <= buffers.max_rows and all(
            deferrable(guess.ask.row, 0) for guess in guesses
        )

    def _run_ahead(self, guesses: Sequence[Guess]) -> None:
        """All rounds, each reading on the device what the one before drew there; the host waits
        once, for all tokens."""
        drawn = self.served.runner.buffers.drawn
        rounds: list[tuple[list[Guess], DeviceDraws]] = []
        found: list[Tensor] = []
        work = self._next_rows(guesses)
        by_lead = [
            [guess for guess in guesses if guess.ask.most > lead]
            for lead in range(max(guess.ask.most for guess in guesses))
        ]
        tables = draw_tables(
            [
                ([g.ask.row for g in drawing], self._numbers(drawing, [lead] * len(drawing)))
                for lead, drawing in enumerate(by_lead)
            ],
            drawn.device,
        )
        for lead, (drawing, table) in enumerate(zip(by_lead, tables)):
            if lead:
                work = [GuessRows(g, g.seq.cache.length + g.seq.written, 1, 1) for g in drawing]
            logits = self._spread(self._logits(work))
            draws = draw_on_device(logits, table, self._highest())
            drawn[: len(drawing)] = draws.tokens
            # A copy: the next replay of a graph finds its maxima at the same place.
            found.append(torch.stack((draws.tokens.float(), draws.top), 1))
            rounds.append((drawing, draws))
            for part in work:
                part.seq.written += part.num_tokens
            for place, guess in enumerate(drawing):
                guess.seq.flying = Flying(lead, place)
        values, place = torch.cat(found).tolist(), 0
        laws: dict[int, list[Tensor]] = {}
        for drawing, draws in rounds:
            if draws.weights is not None and not self._coupled:
                normal = draws.weights * draws.weights.sum(dim=-1, keepdim=True).reciprocal_()
                for i, law in zip(draws.sampled, normal):
                    laws.setdefault(id(drawing[i]), []).append(law)
            for i, guess in enumerate(drawing):
                token, top = values[place + i]
                guess.done = guess.done or judge(top, top) is not None
                if guess.done:
                    continue
                guess.tokens.append(int(token))
                guess.seq.tokens.append(int(token))
            place += len(drawing)
        for guess in guesses:
            seq = guess.seq
            if id(guess) in laws:
                guess.laws = torch.stack(laws[id(guess)])
            seq.flying = None
            seq.written = min(seq.written, len(seq.tokens) - seq.cache.length)

    def _numbers(self, guesses: Sequence[Guess], leads: Sequence[int]) -> list[float]:
        keys = [guess.ask.row.key for guess in guesses]
        positions = [guess.ask.row.position + lead for guess, lead in zip(guesses, leads)]
        if self._coupled:
            return uniforms(keys, positions, Purpose.SAMPLE)
        return uniforms(keys, positions, Purpose.DRAFT, leads)
