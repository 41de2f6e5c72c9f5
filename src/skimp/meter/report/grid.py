"""Tables of text, and how a terminal and Markdown show them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """A heading, columns (the first is text, the others are figures), and what holds for all."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def parted(cell: str) -> tuple[str, str]:
    """A figure, and what stands in brackets after it: its interval, or nothing."""
    found = re.fullmatch(r"(.+?) (\([^()]*\))", cell)
    return (cell, "") if found is None else (found[1], found[2])


def text_of(tables: Sequence[Table]) -> str:
    """Tables for a terminal, as wide as they need; intervals stand below their figures."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    stream = io.StringIO()
    console = Console(file=stream, width=400, highlight=False, markup=False)
    for table in tables:
        grid = Grid(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(table.columns):
            heading = "\n".join(filter(None, parted(column)))
            grid.add_column(heading, justify="right" if index else "left", no_wrap=True)
        for row in table.rows:
            grid.add_row(*("\n".join(filter(None, parted(cell))) for cell in row))
        console.print(grid)
        console.print(table.note + "\n")
    return "\n".join(line.rstrip() for line in stream.getvalue().strip().splitlines())


def markdown_of(tables: Sequence[Table]) -> str:
    """Tables as Markdown."""
    parts = []
    for table in tables:
        rule = ["---", *["---:"] * (len(table.columns) - 1)]
        lines = [table.columns, rule, *table.rows]
        body = "\n".join("| " + " | ".join(_escaped(c) for c in line) + " |" for line in lines)
        parts.append(f"## {table.title}\n\n{body}\n\n{table.note}\n")
    return "\n".join(parts)


def bytes_text(value: float) -> str:
    """``1.5 GB``: decimal units, three figures."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
