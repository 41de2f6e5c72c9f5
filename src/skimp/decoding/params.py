"""What a request may ask of the sampler, checked in one place.

Every field is honoured or refused by :class:`ParamsError`, which names the field and its range.
Limits that depend on the vocabulary are checked when the row is made (``RowState``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from skimp.errors import SkimpError

MAX_N = 128
MAX_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_TOKEN_ID = 2**31 - 1
MAX_BIAS_ENTRIES = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 64
MAX_BAD_WORD_CHARS = 256
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 256

BadWord = str | tuple[int, ...]


class ParamsError(SkimpError):
    """A sampling parameter is refused. ``field`` is its name, with an index where it has one."""

    def __init__(self, field_name: str, problem: str) -> None:
        super().__init__(f"{field_name} {problem}")
        self.field = field_name


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's decoding parameters; immutable, so it can be shared between ``n`` samples.

    ==================  ==================  ====================================================
    field               range               meaning
    ==================  ==================  ====================================================
    max_tokens          None or 1..2^31-1   output tokens; None: as many as the context holds
    min_tokens          0..max_tokens       before that many, no end token and no stop string
    temperature         0..100              0 is greedy (top_k, top_p and min_p then do nothing)
    top_k               -1, 0 or 1..2^31-1  keep the k largest (all ties of the k-th); 0, -1: off
    top_p               (0, 1]              smallest set of mass >= top_p; 1: off
    min_p               [0, 1]              keep p >= min_p * max p; 0: off
    presence_penalty    -2..2               subtracted once from every token already in the output
    frequency_penalty   -2..2               subtracted as often as the token is in the output
    repetition_penalty  0.01..100           divides positive, multiplies negative logits of every
                                            token in prompt or output; 1: off
    logit_bias          {id: -100..100}     added to logits, at most 1024 ids
    bad_words           <= 256              strings (<= 256 characters) or token lists (<= 64)
                                            never to be completed in the output
    stop                <= 64 strings       output ends before the first of them (<= 1024 chars)
    stop_token_ids      <= 256 ids          output ends at one of them
    ignore_eos          bool                the model's own end tokens do not stop
    include_stop        bool                keep the stop string or stop token in the text
    seed                None or int64       None: drawn from the system, never repeated
    n                   1..128              independent samples
    logprobs            None or 0..20       log-probability of each token and that many alternatives
    prompt_logprobs     None or 0..20       the same for prompt tokens
    ==================  ==================  ====================================================

    Sequences may be given as lists; they are stored as tuples. Raises :class:`ParamsError`.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[BadWord | Sequence[int]] = ()
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check_int("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParamsError(
                "min_tokens",
                f"must be at most max_tokens = {self.max_tokens}, got {self.min_tokens}",
            )
        self._set_number("temperature", 0.0, 100.0)
        _check_int("top_k", self.top_k, -1, MAX_TOKEN_ID)
        self._set_number("top_p", 0.0, 1.0, open_low=True)
        self._set_number("min_p", 0.0, 1.0)
        self._set_number("presence_penalty", -2.0, 2.0)
        self._set_number("frequency_penalty", -2.0, 2.0)
        self._set_number("repetition_penalty", 0.01, 100.0)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "bad_words", _bad_words(self.bad_words))
        object.__setattr__(self, "stop", _stop(self.stop))
        ids = _sequence("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS)
        for i, token in enumerate(ids):
            _check_int(f"stop_token_ids[{i}]", token, 0, MAX_TOKEN_ID)
        object.__setattr__(self, "stop_token_ids", ids)
        for name in ("ignore_eos", "include_stop"):
            if not isinstance(getattr(self, name), bool):
                raise ParamsError(name, f"must be true or false, got {_show(getattr(self, name))}")
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_int("n", self.n, 1, MAX_N)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """From a plain mapping; a name that is no field is refused, not ignored."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ParamsError(str(name)[:64], "is not a sampling parameter")
        return cls(**values)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def has_filters(self) -> bool:
        """Whether a sampled row needs top-k or top-p (min-p is a plain comparison)."""
        return self.top_k > 0 or self.top_p < 1.0

    def __hash__(self) -> int:
        rest = tuple(getattr(self, f.name) for f in fields(self) if f.name != "logit_bias")
        return hash((rest, tuple(sorted(self.logit_bias.items()))))

    def _set_number(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = _number(name, getattr(self, name), low, high, open_low=open_low)
        object.__setattr__(self, name, value)


def _show(value: object) -> str:
    """A short form for messages: a hostile value must not fill the log."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "of more than 30 digits"  # repr itself refuses ints of thousands of digits
    if isinstance(value, str):
        value = value[:64]
    text = repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__
    return text if len(text) <= 64 else text[:61] + "..."


def _check_int(name: str, value: object, low: int, high: int) -> None:
    # bool is an int to Python; True as max_tokens is a client's mistake, not a 1
    if isinstance(value, bool) or not isinstance(value, int):
        raise ParamsError(name, f"must be an integer in {low}..{high}, got {_show_type(value)}")
    if not low <= value <= high:
        shown = str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
        raise ParamsError(name, f"must be in {low}..{high}, got {shown}")


def _show_type(value: object) -> str:
    return f"{type(value).__name__} {_show(value)}"


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    span = f"{'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ParamsError(name, f"must be a number in {span}, got {_show_type(value)}")
    if isinstance(value, int) and abs(value) > 10**30:
        raise ParamsError(name, f"must be in {span}, got a number of more than 30 digits")
    number = float(value)
    if math.isnan(number) or not low <= number <= high or (open_low and number == low):
        raise ParamsError(name, f"must be in {span}, got {number}")
    return number


def _sequence(name: str, value: object, limit: int) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ParamsError(name, f"must be a list, got {_show_type(value)}")
    if len(value) > limit:
        raise ParamsError(name, f"must have at most {limit} entries, got {len(value)}")
    return tuple(value)


def _text(name: str, value: str, limit: int) -> None:
    if not 1 <= len(value) <= limit:
        raise ParamsError(name, f"must have 1..{limit} characters, got {len(value)}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ParamsError(name, "must be valid Unicode, got a lone surrogate")


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ParamsError("logit_bias", f"must map token ids to numbers, got {_show_type(value)}")
    if len(value) > MAX_BIAS_ENTRIES:
        raise ParamsError(
            "logit_bias", f"must have at most {MAX_BIAS_ENTRIES} entries, got {len(value)}"
        )
    bias = {}
    for token, number in value.items():
        name = f"logit_bias[{_show(token)}]"
        _check_int(f"{name} (its token id)", token, 0, MAX_TOKEN_ID)
        bias[token] = _number(name, number, -100.0, 100.0)
    return bias


def _bad_words(value: object) -> tuple[BadWord, ...]:
    words: list[BadWord] = []
    for i, word in enumerate(_sequence("bad_words", value, MAX_BAD_WORDS)):
        name = f"bad_words[{i}]"
        if isinstance(word, str):
            _text(name, word, MAX_BAD_WORD_CHARS)
            if not word.strip():
                raise ParamsError(name, "must not be only white space")
            words.append(word)
            continue
        ids = _sequence(name, word, MAX_BAD_WORD_TOKENS)
        if not ids:
            raise ParamsError(name, f"must have 1..{MAX_BAD_WORD_TOKENS} token ids, got 0")
        for j, token in enumerate(ids):
            _check_int(f"{name}[{j}]", token, 0, MAX_TOKEN_ID)
        words.append(ids)
    return tuple(words)


def _stop(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)  # the OpenAI schema allows one bare string
    stops = _sequence("stop", value, MAX_STOP_STRINGS)
    for i, text in enumerate(stops):
        if not isinstance(text, str):
            raise ParamsError(f"stop[{i}]", f"must be a string, got {_show_type(text)}")
        _text(f"stop[{i}]", text, MAX_STOP_CHARS)
    return stops
