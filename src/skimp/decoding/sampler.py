"""Drawing tokens from processed logits, with their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skimp.decoding.process import Processed, process
from skimp.decoding.rng import Purpose, uniforms
from skimp.decoding.rows import RowState
from skimp.kernels.draws import rows_of

LogprobsMode = Literal["raw", "processed"]
_BLOCK = 1 << 18  # logits turned into float64 at a time, to stay within a cache


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural log-probability of one token and of the most likely ones.

    ``rank`` is 1 for the most likely token; ``top`` holds (id, log-probability) in descending
    order, equal ones by id, and does not repeat the token unless it is among the most likely.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """One token a row, in the order of the rows.

    ``token_ids[i]`` is -1 and ``errors[i]`` says why when the row had no valid law; the other rows
    are as if it had not been there. ``logprobs[i]`` is None unless the row asked for it.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: tuple[str | None, ...]


class Sampler:
    """Stateless but for its mode; rows carry everything that changes.

    ``logprobs_mode``: ``raw`` reports the model's own log-softmax, before any processing, as the
    OpenAI API and vLLM do by default; ``processed`` reports the law the token was drawn from.
    """

    def __init__(self, *, logprobs_mode: LogprobsMode = "raw") -> None:
        if logprobs_mode not in ("raw", "processed"):
            raise ValueError(f"logprobs_mode must be 'raw' or 'processed', got {logprobs_mode!r}")
        self.logprobs_mode: LogprobsMode = logprobs_mode

    def sample(self, logits: Tensor, rows: Sequence[RowState]) -> SampledBatch:
        """One token for each row of ``logits`` [L, V]; commits nothing.

        Greedy rows take the argmax (lowest id of equals), the others an inverse-CDF draw with the
        uniform of (row key, row position), so a token depends on its own row alone.
        """
        processed = process(logits, rows)
        tokens = list(processed.best)
        if processed.weights is not None:
            keys = [rows[i].key for i in processed.sampled]
            positions = [rows[i].position for i in processed.sampled]
            numbers = uniforms(keys, positions, Purpose.SAMPLE)
            drawn = rows_of((processed.weights,)).draw(numbers)
            for i, token in zip(processed.sampled, drawn):
                tokens[i] = token
        for i, error in enumerate(processed.errors):
            if error is not None:
                tokens[i] = -1
        return SampledBatch(
            token_ids=tokens,
            logprobs=self.logprobs(logits, processed, rows, tokens),
            errors=processed.errors,
        )

    def logprobs(
        self,
        logits: Tensor,
        processed: Processed,
        rows: Sequence[RowState],
        token_ids: Sequence[int],
    ) -> list[TokenLogprobs | None]:
        """Log-probabilities of ``token_ids`` for the rows that want them, by the mode."""
        found: list[TokenLogprobs | None] = [None] * len(rows)
        wanted = [
            i for i, row in enumerate(rows) if row.params.logprobs is not None and token_ids[i] >= 0
        ]
        if not wanted:
            return found
        if self.logprobs_mode == "raw":
            scores = torch.log_softmax(logits[wanted].double(), dim=-1)
        else:
            scores = processed.probabilities()[wanted].log()
        for score, i in zip(scores, wanted):
            count = rows[i].params.logprobs
            assert count is not None
            found[i] = describe(score, token_ids[i], count)
        return found


def describe(scores: Tensor, token_id: int, top: int) -> TokenLogprobs:
    """One token and the ``top`` most likely from a row of log-probabilities [V]."""
    chosen = scores[token_id]
    best: tuple[tuple[int, float], ...] = ()
    if top:
        limit = scores.topk(min(top, len(scores))).values[-1]
        # topk picks any of equal values: take all of them and keep the lowest ids
        ids = (scores >= limit).nonzero().view(-1)
        values, order = scores[ids].sort(descending=True, stable=True)
        best = tuple(zip(ids[order[:top]].tolist(), values[:top].tolist()))
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(chosen),
        rank=int((scores > chosen).sum()) + 1,
        top=best,
    )


def prompt_logprobs(logits: Tensor, targets: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Model log-probabilities of prompt tokens.

    ``logits`` [T, V] are the rows *before* each target: row t predicts ``targets[t]``. Prompts are
    not sampled, so this is the raw log-softmax (float64) in either mode. Raises ValueError on a
    row with NaN or +inf, or a length mismatch.
    """
    if logits.shape[0] != len(targets):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(targets)} prompt tokens")
    found: list[TokenLogprobs] = []
    rows = max(1, _BLOCK // max(1, logits.shape[1]))
    for start in range(0, len(targets), rows):
        scores = torch.log_softmax(logits[start : start + rows].double(), dim=-1)
        ids = torch.tensor(targets[start : start + rows], device=logits.device)
        chosen = scores.gather(-1, ids[:, None])
        finite = torch.isfinite(scores.amax(dim=-1))
        if not bool(finite.all()):
            position = start + int(finite.logical_not().nonzero()[0])
            raise ValueError(f"non-finite logits at prompt position {position}")
        if top:
            found += [describe(row, int(token), top) for row, token in zip(scores, ids)]
            continue
        ranks = (scores > chosen).sum(dim=-1) + 1
        found += [
            TokenLogprobs(token_id=token, logprob=logprob, rank=rank, top=())
            for token, logprob, rank in zip(ids.tolist(), chosen[:, 0].tolist(), ranks.tolist())
        ]
    return found
