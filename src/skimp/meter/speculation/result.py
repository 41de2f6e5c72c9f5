"""The record of one engine that guesses, on one category of prompts at one temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skimp.meter.speculation.predict import Check, slope


@dataclass(frozen=True, kw_only=True)
class SpeculationResult:
    """Times are ratios to a step of the same engine without guesses, named ``plain``, in the same
    rounds. ``gain`` is the median over rounds of tokens a second over plain ones, ``gains`` are
    all of them."""

    name: str
    plain: str
    speculate: str
    draft_model: str | None
    draft_rule: str | None  # by which guesses that a model drew stand
    longest_draft: int
    controlled: bool  # how many are guessed follows from what it has been worth
    draft_bytes: int  # weights and cache that the draft model adds
    category: str
    temperature: float
    batch: int
    prompts: int
    prompt_tokens: float  # mean
    new_tokens: int
    rounds: int
    device: str
    dtype: str
    backend: str
    threads: int
    hardware: str
    templated: bool
    tokens_per_step: float  # of a sequence: E, the accepted length and one
    drafted_per_step: float  # of a sequence
    drafted: tuple[int, ...]  # at each place, over all rounds
    accepted: tuple[int, ...]
    filled: float  # sequences of a step over the batch: some end before the others
    same_answers: float  # share of answers that are plain generation's, token by token
    guess: float | None  # c; None where nothing was guessed
    expected_guess: float | None  # by the cost model; None where it has no idea
    checks: tuple[Check, ...]  # v(k)
    tokens_per_s: float
    plain_tokens_per_s: float
    predicted: float  # E / (c k + v(k))
    expected: float | None  # the same with the cost model's c and v
    gains: tuple[float, ...]
    gain: float

    @property
    def by_position(self) -> tuple[float, ...]:
        """The share of guesses at each place that stood."""
        return tuple(a / d for a, d in zip(self.accepted, self.drafted))

    @property
    def row_cost(self) -> float:
        """v's slope: what one more row a sequence adds to a step."""
        return slope([(check.guesses, check.ratio) for check in self.checks])

    @property
    def expected_row_cost(self) -> float:
        return slope([(check.guesses, check.expected) for check in self.checks])

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "name": self.name,
            "lossless_to": self.plain,
            "speculate": self.speculate,
            "draft_model": self.draft_model,
            "draft_rule": self.draft_rule,
            "longest_draft": self.longest_draft,
            "draft_control": self.controlled,
            "draft_bytes": self.draft_bytes,
            "category": self.category,
            "temperature": self.temperature,
            "batch": self.batch,
            "tokens_per_step": self.tokens_per_step,
            "drafted_per_step": self.drafted_per_step,
            "acceptance_by_position": list(self.by_position),
            "drafted_by_position": list(self.drafted),
            "cost_ratio": self.guess,
            "predicted_cost_ratio": self.expected_guess,
            "verification": [
                {"guesses": c.guesses, "ratio": c.ratio, "predicted_ratio": c.expected}
                for c in self.checks
            ],
            "verification_slope": self.row_cost,
            "predicted_verification_slope": self.expected_row_cost,
            "tokens_per_s": self.tokens_per_s,
            "plain_tokens_per_s": self.plain_tokens_per_s,
            "gain": self.gain,
            "gain_by_round": list(self.gains),
            "predicted_gain": self.predicted,
            "cost_model_gain": self.expected,
            "batch_filled": self.filled,
            "same_answers": self.same_answers,
            "prompts": self.prompts,
            "mean_prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "chat_template": self.templated,
            "rounds": self.rounds,
            "device": self.device,
            "dtype": self.dtype,
            "backend": self.backend,
            "threads": self.threads,
            "hardware": self.hardware,
        }
