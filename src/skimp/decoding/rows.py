"""What the sampler knows of one request: parameters, random key, and the tokens seen so far.

A :class:`RowState` lives from admission to the end of one sample. The engine commits tokens to it;
nothing else changes it. A row of a speculative step is ``row.drafted([x1, ..., xi])``: the same
request as it would be if the drafted tokens had been committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from skimp.decoding.params import BadWord, ParamsError, SamplingParams
from skimp.decoding.rng import make_key


class PenaltyState:
    """Distinct tokens of prompt and output, with output counts; O(1) a token.

    ``ids`` [S] and ``counts`` [S] stay small arrays (S distinct tokens, not V), so a step touches
    only the logits it changes. A prompt token that is not in the output has count 0.
    """

    def __init__(self, prompt_ids: Sequence[int] = ()) -> None:
        unique = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._size = len(unique)
        self._ids = unique
        self._counts = np.zeros(len(unique), dtype=np.int64)
        self._slots = {int(token): i for i, token in enumerate(unique)}

    def extend(self, tokens: Iterable[int]) -> None:
        """Count tokens as output."""
        for token in tokens:
            slot = self._slots.get(token)
            if slot is None:
                slot = self._slots[token] = self._size
                if slot == len(self._ids):
                    room = max(64, slot)
                    self._ids = np.concatenate([self._ids, np.zeros(room, dtype=np.int64)])
                    self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.int64)])
                self._ids[slot] = token
                self._size += 1
            self._counts[slot] += 1

    def seen(self, drafted: Sequence[int] = ()) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(ids [S], output counts [S]) as if ``drafted`` were output too; do not write to them."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        if not drafted:
            return ids, counts
        counts = counts.copy()
        fresh: dict[int, int] = {}
        for token in drafted:
            slot = self._slots.get(token)
            if slot is None:
                fresh[token] = fresh.get(token, 0) + 1
            else:
                counts[slot] += 1
        if fresh:
            ids = np.concatenate([ids, np.fromiter(fresh.keys(), dtype=np.int64)])
            counts = np.concatenate([counts, np.fromiter(fresh.values(), dtype=np.int64)])
        return ids, counts


class RowState:
    """One sample of one request, as the sampler sees it.

    Args:
        params: checked parameters.
        vocab_size: columns of the logits; every id in ``params`` must be below it.
        prompt_ids: the prompt, for the repetition penalty.
        eos_ids: the model's end tokens, masked while ``min_tokens`` is not reached.
        bad_words: the token sequences of ``params.bad_words`` (see :func:`resolve_bad_words`);
            may be left out when none of them is a string.
        sample_index: which of the ``n`` samples this is.

    Attributes:
        key: the 64-bit key of this sample's random stream.
        outputs: committed output tokens; append only through :meth:`commit`.
        allowed: bool [V] or None, set before each step by whoever constrains the output (a
            grammar); tokens where it is False are masked.

    Raises :class:`ParamsError` when an id is outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        prompt_ids: Sequence[int] = (),
        eos_ids: Iterable[int] = (),
        bad_words: Sequence[Sequence[int]] | None = None,
        sample_index: int = 0,
    ) -> None:
        if not 0 <= sample_index < params.n:
            raise ParamsError("n", f"is {params.n}, so there is no sample {sample_index}")
        if bad_words is None:
            bad_words = resolve_bad_words(params.bad_words, None)
        _check_ids("prompt_ids", prompt_ids, vocab_size)
        _check_ids("logit_bias", params.logit_bias, vocab_size)
        _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
        for i, word in enumerate(bad_words):
            _check_ids(f"bad_words[{i}]", word, vocab_size)
        self.params = params
        self.vocab_size = vocab_size
        self.key = make_key(params.seed, sample_index)
        self.outputs: list[int] = []
        self.allowed: Tensor | None = None
        self.penalties = PenaltyState(prompt_ids) if params.has_penalties else None
        self.bad_words = tuple(tuple(word) for word in bad_words)
        ends = () if params.ignore_eos else tuple(eos_ids)
        self.end_ids = tuple(
            dict.fromkeys(token for token in (*ends, *params.stop_token_ids) if token < vocab_size)
        )
        self._always_touched = bool(params.has_penalties or params.logit_bias or self.bad_words)
        self._draft: tuple[int, ...] = ()
        self._bad_reach = max((len(word) - 1 for word in self.bad_words), default=0)

    @property
    def position(self) -> int:
        """Index of the next output token; with ``key`` and a purpose it fixes the draw."""
        return len(self.outputs) + len(self._draft)

    @property
    def draft(self) -> tuple[int, ...]:
        """Tokens assumed but not committed."""
        return self._draft

    def touched(self, ahead: int = 0) -> bool:
        """Whether penalties, a bias or masks may change the logits, ``ahead`` tokens on."""
        if self._always_touched or self.allowed is not None:
            return True
        return bool(self.end_ids) and self.position + ahead < self.params.min_tokens

    def commit(self, tokens: Iterable[int]) -> None:
        """Append output tokens. Not on a drafted view: those are thrown away."""
        assert not self._draft, "commit to the row itself, not to a drafted view"
        tokens = list(tokens)
        self.outputs.extend(tokens)
        if self.penalties is not None:
            self.penalties.extend(tokens)

    def drafted(self, tokens: Sequence[int]) -> RowState:
        """This row as if ``tokens`` had been committed; shares everything, costs O(1)."""
        view = object.__new__(RowState)  # copy() takes several times as long
        view.__dict__.update(self.__dict__)
        view._draft = (*self._draft, *tokens)
        return view

    def masked_ids(self) -> list[int]:
        """Tokens forbidden at this position: ends before ``min_tokens``, last of a bad word."""
        ids = list(self.end_ids) if self.position < self.params.min_tokens else []
        if self.bad_words:
            tail = self._tail(self._bad_reach)
            for word in self.bad_words:
                start = len(word) - 1
                if start == 0 or tail[-start:] == word[:-1]:
                    ids.append(word[-1])
        return ids

    def _tail(self, count: int) -> tuple[int, ...]:
        if count <= len(self._draft):
            return self._draft[len(self._draft) - count :]
        first = max(0, len(self.outputs) - (count - len(self._draft)))
        return (*self.outputs[first:], *self._draft)


def resolve_bad_words(
    words: Sequence[BadWord | Sequence[int]], encode: Callable[[str], Sequence[int]] | None
) -> tuple[tuple[int, ...], ...]:
    """Token sequences of bad words; a string gives its tokens with and without a space before it.

    The ban is on tokens, as in vLLM and transformers: the same text reached through another
    segmentation is not caught. ``encode`` must add no special tokens. Raises
    :class:`ParamsError` for a string when there is no ``encode``, or when it has no tokens.
    """
    found: dict[tuple[int, ...], None] = {}
    for i, word in enumerate(words):
        if not isinstance(word, str):
            found[tuple(word)] = None
            continue
        if encode is None:
            raise ParamsError(f"bad_words[{i}]", "is a string, which needs a tokenizer")
        bare = word.lstrip()
        for text in (word, bare, " " + bare):
            ids = tuple(encode(text))
            if not ids:
                raise ParamsError(f"bad_words[{i}]", "has no tokens in this vocabulary")
            found[ids] = None
    return tuple(found)


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    array = np.asarray(list(ids))
    if array.size == 0:
        return
    if array.dtype.kind not in "iu":
        raise ParamsError(name, "must hold integer token ids")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ParamsError(name, f"has token id {wrong}, outside the vocabulary 0..{vocab_size - 1}")
