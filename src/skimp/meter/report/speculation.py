"""What guesses gain, as a table: for ``skimp bench`` alone, and below the price of models."""

from __future__ import annotations

from collections.abc import Sequence

from skimp.meter.report.grid import Table, bytes_text
from skimp.meter.speculation import SpeculationResult


def speculation_table(results: Sequence[SpeculationResult]) -> Table:
    """A row for each model that guesses, category of prompts, batch and temperature."""
    first = results[0]
    plain = " and ".join(dict.fromkeys(found.plain for found in results))
    lengths = [found.prompt_tokens for found in results]
    extra = {found.name: found.draft_bytes for found in results if found.draft_bytes}
    dtypes = " / ".join(dict.fromkeys(found.dtype for found in results))
    return Table(
        title="What guesses gain",
        columns=(
            "model",
            "prompts (batch, temperature)",
            "tokens/step (right, by place)",
            "c (cost model)",
            "v(k) (k)",
            "row (cost model)",
            "predicted (cost model)",
            "achieved (least to most)",
            "tokens/s (plain)",
        ),
        rows=tuple(_row(found) for found in results),
        note=(
            f"real prompts of {min(lengths):,.0f} to {max(lengths):,.0f} tokens on average"
            f"{', in the chat template' if first.templated else ''}, {first.new_tokens} new tokens "
            f"each, {_range([found.prompts for found in results])} prompts a category; gains are "
            f"tokens/s over {plain} without guesses, medians of {first.rounds} rounds in turn; "
            "right: of the guesses at each place of a draft, in percent; c: time of a guess over "
            "that of a plain step; v(k): time of a step with k more rows a sequence over that of a "
            "plain step; row: its slope; "
            "predicted: measured tokens/step, c and rows in E / (c k + v(k)), and in brackets "
            "with the cost model's c and rows; guesses leave the law as it is; "
            + "".join(f"{name}: {bytes_text(size)} more; " for name, size in extra.items())
            + f"{first.device}, {dtypes}, {first.backend} kernels, {first.threads} threads; "
            f"{first.hardware}"
        ),
    )


def _row(found: SpeculationResult) -> tuple[str, ...]:
    shares = " ".join(f"{100 * share:.0f}" for share in found.by_position)
    return (
        found.name,
        f"{found.category} ({found.batch}, {found.temperature:g})",
        f"{found.tokens_per_step:.2f} ({shares or 'no guess'})",
        _beside(found.guess, found.expected_guess, ".3f"),
        f"{' '.join(f'{check.ratio:.2f}' for check in found.checks)} "
        f"({' '.join(str(check.guesses) for check in found.checks)})",
        _beside(found.row_cost, found.expected_row_cost, ".3f"),
        f"{_beside(found.predicted, found.expected, '.2f', 'x')}",
        f"{found.gain:.2f}x ({min(found.gains):.2f} to {max(found.gains):.2f})",
        f"{found.tokens_per_s:,.1f} ({found.plain_tokens_per_s:,.1f})",
    )


def _beside(value: float | None, expected: float | None, form: str, unit: str = "") -> str:
    """A figure, and the cost model's in brackets."""
    shown, other = ("-" if v is None else f"{v:{form}}" for v in (value, expected))
    return f"{shown}{unit if value is not None else ''} ({other})"


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"
