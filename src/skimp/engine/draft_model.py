"""A smaller model that guesses for a larger one: a draft model with a cache of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skimp.cache import CacheSequence
from skimp.decoding.process import draw, process
from skimp.decoding.proposal import EMPTY, Ask, Draft
from skimp.decoding.rng import Purpose, uniforms
from skimp.engine.options import EngineOptions
from skimp.engine.request import Flying
from skimp.engine.served import ServedModel
from skimp.errors import OptionError
from skimp.model.decoder import Decoder
from skimp.model.spec import ModelSpec
from skimp.text.tokenizer import Tokenizer


def require_same_tokens(
    name: str, draft: ModelSpec, own: Tokenizer | None, target: ModelSpec, theirs: Tokenizer | None
) -> None:
    """Raise ``OptionError`` unless a token id means the same to both models."""
    if draft.vocab_size != target.vocab_size:
        raise OptionError(
            f"draft_model: {name} has {draft.vocab_size} tokens, the model {target.vocab_size}"
        )
    if own is None or theirs is None:
        return
    for token_id in range(target.vocab_size):
        if own.token(token_id) != theirs.token(token_id):
            raise OptionError(
                f"draft_model: token {token_id} is {own.token(token_id)!r} to {name} and "
                f"{theirs.token(token_id)!r} to the model"
            )


class _Seq:
    """What the draft model knows of a sequence, in the form that a runner reads: ``tokens``, of
    which the cache holds the first, and of the open append the ``written`` ones."""

    __slots__ = ("cache", "flying", "tokens", "written")

    def __init__(self, cache: CacheSequence) -> None:
        self.cache = cache
        self.tokens: list[int] = []
        self.written = 0
        self.flying: Flying | None = None  # it never is: the host sees every guess


@dataclass
class _Guess:
    """A draft in the making."""

    ask: Ask
    seq: _Seq
    tokens: list[int] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)
    done: bool = False


@dataclass(frozen=True)
class _Rows:
    """A part of a step, as a runner reads it."""

    guess: _Guess
    start: int
    num_tokens: int
    num_logits: int

    @property
    def seq(self) -> _Seq:
        return self.guess.seq

    @property
    def token_ids(self) -> list[int]:
        return self.seq.tokens[self.start : self.start + self.num_tokens]


class DraftModel:
    """A :class:`~skimp.decoding.proposal.Proposer` that draws from a smaller model's own law.

    What it draws with is what the request asks of the target, so laws are alike. ``coupled`` draws
    with the target's own random numbers and records no law: the target then draws for itself, and
    where both laws are alike both draw the same.
    """

    def __init__(self, decoder: Decoder, options: EngineOptions, *, coupled: bool) -> None:
        own = dataclasses.replace(
            options,
            cache_bytes=None,
            max_context=min(decoder.spec.max_positions, options.max_context or 1 << 62),
            speculate="none",
            draft_tokens=None,
            draft_model=None,
            draft_rule=None,
            overlap=False,
        )
        self.served = ServedModel(decoder, own, max_logits=options.max_batch)
        self._coupled = coupled
        self._known: dict[Hashable, _Seq] = {}

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        guesses = [self._begin(ask) for ask in asks]
        active = [guess for guess in guesses if guess is not None]
        while active:
            work = self._next_rows(active)
            logits = self.served.runner.run(work)
            with self.served.runner.sampling_threads():
                self._draw(work, logits)
            active = [guess for guess in active if not guess.done]
        return [EMPTY if guess is None else _draft(guess) for guess in guesses]

    def end(self, key: Hashable) -> None:
        seq = self._known.pop(key, None)
        if seq is not None:
            self.served.cache.close(seq.cache)

    def _begin(self, ask: Ask) -> _Guess | None:
        """Bring a sequence up to date and reserve room; None where there is none."""
        tokens, cache = ask.tokens, self.served.cache
        if len(tokens) + ask.most > self.served.max_context or ask.most < 1:
            return None
        seq = self._known.get(ask.key)
        if seq is None:
            seq = self._known[ask.key] = _Seq(cache.open(list(tokens), salt=ask.salt))
            seq.tokens = list(tokens)
        else:
            base, last = seq.cache.length, len(tokens) - 1
            right = 0
            while right < min(seq.written, last - base) and (
                seq.tokens[base + right] == tokens[base + right]
            ):
                right += 1
            if seq.cache.pending:
                cache.commit(seq.cache, right, tokens[base : base + right])
            seq.tokens[base + right :] = tokens[base + right :]
            seq.written = 0
        missing = len(tokens) - seq.cache.length
        if not cache.append(seq.cache, missing + ask.most - 1):
            return None
        return _Guess(ask, seq)

    def _next_rows(self, active: Sequence[_Guess]) -> list[_Rows]:
        """As many of the tokens that wait as a step takes, the first sequences first."""
        work, budget = [], self.served.runner.buffers.max_rows
        for guess in active:
            seq = guess.seq
            start = seq.cache.length + seq.written
            count = min(len(seq.tokens) - start, budget)
            if count:
                whole = start + count == len(seq.tokens)
                work.append(_Rows(guess, start, count, int(whole)))
                budget -= count
        return work

    def _draw(self, work: Sequence[_Rows], logits: Tensor) -> None:
        """A token more for each sequence whose last token was computed."""
        for rows in work:
            rows.seq.written += rows.num_tokens
        drawing = [rows.guess for rows in work if rows.num_logits]
        if not drawing:
            return
        views = [guess.ask.row.drafted(guess.tokens) for guess in drawing]
        processed = process(logits, views)
        tokens = processed.best.tolist()
        weights, sampled = processed.weights, processed.sampled
        if weights is not None:
            numbers = self._numbers([drawing[i] for i in sampled])
            found = draw(weights, torch.from_numpy(numbers).to(weights.device)).tolist()
            for i, token in zip(sampled, found):
                tokens[i] = token
            if not self._coupled:
                for i, law in zip(sampled, weights / weights.sum(dim=-1, keepdim=True)):
                    drawing[i].laws.append(law)
        for i, guess in enumerate(drawing):
            if processed.errors[i] is not None:
                guess.done = True
                continue
            guess.tokens.append(tokens[i])
            guess.seq.tokens.append(tokens[i])
            guess.done = len(guess.tokens) == guess.ask.most

    def _numbers(self, guesses: Sequence[_Guess]) -> NDArray[np.float64]:
        keys = [guess.ask.row.key for guess in guesses]
        leads = [len(guess.tokens) for guess in guesses]
        positions = [guess.ask.row.position + lead for guess, lead in zip(guesses, leads)]
        if self._coupled:
            return uniforms(keys, positions, Purpose.SAMPLE)
        return uniforms(keys, positions, Purpose.DRAFT, leads)


def _draft(guess: _Guess) -> Draft:
    if not guess.tokens:
        return EMPTY
    return Draft(tuple(guess.tokens), torch.stack(guess.laws) if guess.laws else None)
