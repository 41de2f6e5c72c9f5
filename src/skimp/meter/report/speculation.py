"""What guesses gain and cost, as tables: for ``skimp bench``, and below the price of models."""

from __future__ import annotations

from collections.abc import Sequence

from skimp.meter.report.grid import Table, bytes_text
from skimp.meter.speculation import SpeculationResult

PROMPTS = "prompts (batch, temperature)"


def speculation_tables(results: Sequence[SpeculationResult]) -> tuple[Table, Table]:
    """What is gained, and of what that is made; a row in each for every model that guesses,
    category of prompts, batch and temperature."""
    first = results[0]
    plain = " and ".join(dict.fromkeys(found.plain for found in results))
    lengths = [found.prompt_tokens for found in results]
    extra = {found.name: found.draft_bytes for found in results if found.draft_bytes}
    dtypes = " / ".join(dict.fromkeys(found.dtype for found in results))
    gain = Table(
        title="What guesses gain",
        columns=(
            "model",
            PROMPTS,
            "tokens/step (guesses)",
            "predicted (cost model)",
            "achieved (least to most)",
            "tokens/s (plain)",
        ),
        rows=tuple(_gain(found) for found in results),
        note=(
            f"tokens/s over {plain} without guesses, whose law is kept: medians of {first.rounds} "
            "rounds, all taking turns; real prompts, on average of "
            f"{_range([round(n) for n in lengths])} tokens"
            f"{', questions in the chat template' if first.templated else ''}, "
            f"{_range([found.prompts for found in results])} a category, {first.new_tokens} new "
            "tokens each; predicted: E / (c k + v(k)) from the tokens a step, c and v as measured, "
            "or with the cost model's c and v; "
            + "".join(f"{name}: {bytes_text(size)} more memory; " for name, size in extra.items())
            + f"{first.device}, {dtypes}, {first.backend} kernels, {first.threads} threads; "
            f"{first.hardware}"
        ),
    )
    cost = Table(
        title="What guesses cost",
        columns=(
            "model",
            PROMPTS,
            "right by place, %",
            "c (cost model)",
            "v(k) (k)",
            "a row (cost model)",
        ),
        rows=tuple(_cost(found) for found in results),
        note=(
            "over a plain step's time: c, a guess; v(k), a step with k more rows a sequence, right "
            "after guessing; a row, the slope of v"
        ),
    )
    return gain, cost


def _gain(found: SpeculationResult) -> tuple[str, ...]:
    return (
        found.name,
        _prompts(found),
        f"{found.tokens_per_step:.2f} ({found.drafted_per_step:.2f})",
        _beside(found.predicted, found.expected, ".2f", "x"),
        f"{found.gain:.2f}x ({min(found.gains):.2f} to {max(found.gains):.2f})",
        f"{found.tokens_per_s:,.1f} ({found.plain_tokens_per_s:,.1f})",
    )


def _cost(found: SpeculationResult) -> tuple[str, ...]:
    ratios = " ".join(f"{check.ratio:.2f}" for check in found.checks)
    return (
        found.name,
        _prompts(found),
        " ".join(f"{100 * share:.0f}" for share in found.by_position) or "no guess",
        _beside(found.guess, found.expected_guess, ".3f"),
        f"{ratios} ({' '.join(str(check.guesses) for check in found.checks)})",
        _beside(found.row_cost, found.expected_row_cost, ".3f"),
    )


def _prompts(found: SpeculationResult) -> str:
    return f"{found.category} ({found.batch}, {found.temperature:g})"


def _beside(value: float | None, expected: float | None, form: str, unit: str = "") -> str:
    """A figure, and the cost model's in brackets."""
    shown, other = ("-" if v is None else f"{v:{form}}{unit}" for v in (value, expected))
    return f"{shown} ({other})"


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"
