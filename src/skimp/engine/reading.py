"""Readers of a prompt: what is made of the logits that predict its tokens.

Row i of a prompt predicts token i + 1. A request may carry one reader; the scheduler then asks for
the logits of its rows from ``start`` on, a few at a time, and the engine hands them over in order,
each row once. Rows before ``start`` may come from the prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from skimp.decoding.sampler import TokenLogprobs, prompt_logprobs


class PromptReader(Protocol):
    """``read`` takes logits [k, V] of the next k rows; the engine writes over them afterwards.

    A ValueError that it raises ends its request alone, with that message.
    """

    start: int

    def read(self, logits: Tensor) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Natural log-probabilities (float64 [k]) of a prompt's last k tokens, each given its past,
    and whether no token was likelier (bool [k])."""

    logprobs: np.ndarray
    greedy: np.ndarray


class DescribeTokens:
    """Log-probability, rank and ``top`` alternatives of every prompt token but the first."""

    start = 0

    def __init__(self, prompt_ids: list[int], top: int) -> None:
        self._prompt, self._top = prompt_ids, top
        self.entries: list[TokenLogprobs | None] = [None]

    def read(self, logits: Tensor) -> None:
        done = len(self.entries)
        targets = self._prompt[done : done + logits.shape[0]]
        self.entries.extend(prompt_logprobs(logits, targets, self._top))


class ScoreTokens:
    """Log-probabilities of the prompt's tokens after position ``start``."""

    def __init__(self, prompt_ids: list[int], start: int) -> None:
        self.start = start
        self._targets = prompt_ids[start + 1 :]
        self._logprobs: list[float] = []
        self._greedy: list[bool] = []

    def read(self, logits: Tensor) -> None:
        done = len(self._logprobs)
        targets = torch.tensor(self._targets[done : done + logits.shape[0]], device=logits.device)
        most = logits.amax(dim=-1, keepdim=True)
        chosen = (logits.gather(-1, targets[:, None]) - most)[:, 0]
        # The sum runs over values below 1: float32 does, at a tenth of the time of float64.
        logprobs = chosen.double() - (logits - most).exp_().sum(dim=-1).double().log()
        if not bool(torch.isfinite(logprobs).all()):
            raise ValueError("non-finite log-probability of a prompt token")
        self._logprobs += logprobs.tolist()
        self._greedy += (chosen == 0).tolist()

    def scores(self) -> Scores:
        return Scores(logprobs=np.array(self._logprobs), greedy=np.array(self._greedy, dtype=bool))


class KeepLogits:
    """Copies of the logits, until somebody takes them."""

    start = 0

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def read(self, logits: Tensor) -> None:
        self._kept.append(logits.clone())

    def take(self) -> list[Tensor]:
        kept, self._kept = self._kept, []
        return kept
