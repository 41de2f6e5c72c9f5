"""The price's two tables, losses and speeds, as rows of text."""

from __future__ import annotations

import io
from dataclasses import dataclass

from skimp.meter.price import Price, Row


@dataclass(frozen=True, kw_only=True)
class Table:
    """A heading, columns (the first is text, the others are figures), and what holds for all."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def tables(price: Price) -> tuple[Table, Table]:
    """Loss and bytes; speed."""
    rows = (price.base, *price.rows)
    quality, first = price.base.quality, price.base.speed[0].result
    loss = Table(
        title="What it costs",
        columns=(
            "model",
            "verdict",
            "disk",
            "weights resident",
            "weights read/token",
            "cache/token",
            "bits/byte (95 %)",
            "loss (95 %)",
            "KL, nats/token (95 %)",
        ),
        rows=tuple(_loss(row) for row in rows),
        note=(
            f"{quality.tokens:,} tokens in {quality.documents:,} documents ({quality.bytes:,} "
            f"bytes), windows of {quality.context}; intervals from a bootstrap over "
            f"{quality.blocks} passages, losses and KL paired with the base; "
            f"{first.device}, {_each(rows, 'dtype')}"
        ),
    )
    speed = Table(
        title="What it gains",
        columns=(
            "model",
            "batch x context",
            "tokens/s",
            "spread",
            "gain",
            "gain spread",
            "predicted gain",
            "first token",
        ),
        rows=tuple(line for row in rows for line in _speed(row)),
        note=(
            f"{first.device}, {_each(rows, 'dtype')}, {_each(rows, 'backend')} kernels, "
            f"{first.threads} threads; medians of {first.rounds} rounds of {first.case.new_tokens} "
            "steps, all models loaded and taking turns; spread is (slowest - fastest) / median; "
            f"{first.hardware}"
        ),
    )
    return loss, speed


def as_text(price: Price) -> str:
    """Both tables for a terminal, as wide as they need."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    stream = io.StringIO()
    console = Console(file=stream, width=400, highlight=False, markup=False)
    for table in tables(price):
        grid = Grid(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, expand=False)
        for index, column in enumerate(table.columns):
            grid.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
        console.print(table.note + "\n")
    return "\n".join(line.rstrip() for line in stream.getvalue().strip().splitlines())


def as_markdown(price: Price) -> str:
    """Both tables as Markdown."""
    parts = []
    for table in tables(price):
        rule = ["---", *["---:"] * (len(table.columns) - 1)]
        lines = [table.columns, rule, *table.rows]
        body = "\n".join("| " + " | ".join(_escaped(c) for c in line) + " |" for line in lines)
        parts.append(f"## {table.title}\n\n{body}\n\n{table.note}\n")
    return "\n".join(parts)


def _loss(row: Row) -> tuple[str, ...]:
    low, high = row.quality.ci95
    own = f"{row.quality.bits_per_byte:.4f} ({low:.4f} to {high:.4f})"
    lost = kl = ""
    verdict = "base"
    if (found := row.comparison) is not None:
        (low, high), worse = found.paired.ci95, found.paired.bits_per_byte
        lost = f"{worse:+.4f} ({low:+.4f} to {high:+.4f})"
        low, high = found.divergence.ci95
        kl = f"{found.divergence.kl:.3g} ({low:.3g} to {high:.3g})"
        verdict = "worse" if worse > 0 else "better"
        verdict = "inside the noise" if found.paired.inside_noise else verdict
    sizes = (
        row.disk_bytes,
        row.resident_weight_bytes,
        row.weight_bytes_per_token,
        row.cache_bytes_per_token,
    )
    return (row.name, verdict, *map(_bytes, sizes), own, lost, kl)


def _speed(row: Row) -> list[tuple[str, ...]]:
    return [
        (
            row.name,
            f"{g.result.case.batch} x {g.result.case.context}",
            f"{g.result.tokens_per_s:,.1f}",
            f"{g.result.spread:.0%}",
            f"{g.gain:.2f}x",
            f"{g.spread:.0%}",
            f"{g.predicted:.2f}x",
            f"{g.result.first_token_ms:,.1f} ms",
        )
        for g in row.speed
    ]


def _each(rows: tuple[Row, ...], field: str) -> str:
    values = dict.fromkeys(str(getattr(row.speed[0].result, field)) for row in rows)
    return " / ".join(values)


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
