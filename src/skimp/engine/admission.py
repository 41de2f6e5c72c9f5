"""What is checked of a request before it is queued: what can never be served is refused at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skimp.cache import CacheManager
from skimp.decoding.params import SamplingParams
from skimp.engine.options import EngineOptions
from skimp.errors import RequestError
from skimp.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


def encode(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """The prompt's token ids. Raises ``RequestError`` naming what is wrong with it."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("prompt: text needs a tokenizer, and this engine has none")
        ids = tokenizer.encode(prompt)
    else:
        try:
            ids = list(prompt)
        except TypeError:
            raise RequestError(
                f"prompt: expected text or token ids, got {type(prompt).__name__}"
            ) from None
        for index, token in enumerate(ids):
            if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
                raise RequestError(f"prompt[{index}]: expected a token id, got {token!r}")
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"prompt[{index}]: token id {token} is outside the vocabulary of {vocab_size}"
                )
    if not ids:
        raise RequestError("prompt: is empty, and this model has no token to begin with")
    return ids


def most_tokens(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    max_context: int,
    options: EngineOptions,
    cache: CacheManager,
) -> int:
    """The most tokens this request may generate, or ``RequestError`` when it can never fit."""
    room = max_context - len(prompt_ids)
    if room < 1:
        raise RequestError(
            f"prompt: {len(prompt_ids)} tokens leave no room to generate in a context of "
            f"{max_context}"
        )
    max_tokens = room if params.max_tokens is None else params.max_tokens
    if max_tokens > room:
        raise RequestError(
            f"max_tokens: {max_tokens} after a prompt of {len(prompt_ids)} tokens exceeds the "
            f"context of {max_context}"
        )
    if params.n > options.max_batch:
        raise RequestError(f"n: {params.n} samples exceed max_batch {options.max_batch}")
    if not cache.fits(len(prompt_ids) + max_tokens, options.step_tokens):
        raise RequestError(
            f"prompt: {len(prompt_ids)} tokens and {max_tokens} generated ones need more cache "
            f"than the whole budget of {cache.arena.budget_bytes} bytes"
        )
    return max_tokens
